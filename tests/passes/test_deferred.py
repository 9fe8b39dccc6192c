"""Deferred values: what is recorded is what would have been computed, once, and Python is told what is not known yet."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gradmaker.passes.deferred import Deferred, depends_on, resolve

X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]], dtype=torch.float64)
ROW = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)


class Pair(NamedTuple):
    first: Any
    second: Any


def produce() -> Any:
    return SimpleNamespace(logits=X, parts=(X, {"a": X + 1}), flag=X > 0, scale=3)


def deferred(function: Callable[..., Any] = produce) -> Deferred:
    return Deferred(function, (), {}, "model()")


RECORDED: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda y: y.logits,
    "item": lambda y: y.parts[0],
    "item of item": lambda y: y.parts[1]["a"],
    "slices": lambda y: y.logits[:, 1:],
    "deferred index": lambda y: y.logits[y.flag],
    "deferred slice": lambda y: y.logits[:, : y.scale - 1],
    "method": lambda y: y.logits.view(3, 2),
    "method with keywords": lambda y: y.logits.sum(dim=-1, keepdim=True),
    "deferred argument": lambda y: y.logits.add(y.parts[0], alpha=y.scale),
    "torch function": lambda y: torch.relu(y.logits),
    "torch function of a list": lambda y: torch.cat([y.logits, X, y.parts[1]["a"]], dim=0),
    "function of functional": lambda y: torch.nn.functional.softmax(y.logits, dim=-1),
    "neg": lambda y: -y.logits,
    "pos": lambda y: +y.logits,
    "abs": lambda y: abs(y.logits),
    "invert": lambda y: ~y.flag,
    "chain": lambda y: (0.5 * (y.logits - ROW) ** 2 / y.scale).mean(),
}
BINARY = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne")
}
BINARY |= {"matmul": lambda a, b: a @ (b.mT if isinstance(b, (Tensor, Deferred)) else b)}
LOGIC = {name: getattr(operator, name) for name in ("and_", "or_", "xor")}


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_what_is_computed(name: str) -> None:
    found = RECORDED[name](deferred())
    assert isinstance(found, Deferred)
    torch.testing.assert_close(resolve(found, {}), RECORDED[name](produce()), rtol=0, atol=0)


@pytest.mark.parametrize("other", [2.0, ROW, X], ids=["number", "row", "tensor"])
@pytest.mark.parametrize("name", [n for n in BINARY if n != "matmul"])
def test_operators_record_on_both_sides(name: str, other: Any) -> None:
    function, y = BINARY[name], deferred().logits
    for found, expected in ((function(y, other), function(X, other)), (function(other, y), function(other, X))):
        assert isinstance(found, Deferred)
        torch.testing.assert_close(resolve(found, {}), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", LOGIC)
def test_logic_records_on_both_sides(name: str) -> None:
    function, other, y = LOGIC[name], X > 1, deferred().flag
    assert torch.equal(resolve(function(y, other), {}), function(X > 0, other))
    assert torch.equal(resolve(function(other, y), {}), function(other, X > 0))


def test_matrix_products_record_on_both_sides() -> None:
    y = deferred().logits
    assert torch.equal(resolve(y @ X.mT, {}), X @ X.mT)
    assert torch.equal(resolve(X @ y.mT, {}), X @ X.mT)
    assert torch.equal(resolve(y @ y.mT, {}), X @ X.mT)


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda y: (y, 1),
    "list": lambda y: [1, [y]],
    "dict": lambda y: {"a": y, "b": (y, 2)},
    "namedtuple": lambda y: Pair(y, Pair(0, y)),
    "ordered": lambda y: OrderedDict(a=y),
    "slice": lambda y: slice(None, y, None),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_trees_are_resolved_in_their_own_types(name: str) -> None:
    tree = CONTAINERS[name](deferred(lambda: 7))
    found = resolve(tree, {})
    assert found == CONTAINERS[name](7) and type(found) is type(tree)
    assert depends_on(tree, next(iter(_deferred(tree)))) and not depends_on(tree, deferred())


def _deferred(tree: Any) -> list[Deferred]:
    if isinstance(tree, Deferred):
        return [tree]
    members = tree.values() if isinstance(tree, dict) else [tree.stop] if isinstance(tree, slice) else tree
    return [d for m in members if isinstance(m, (tuple, list, dict, slice, Deferred)) for d in _deferred(m)]


def test_a_dictionary_with_a_default_keeps_it() -> None:
    tree: Any = defaultdict(list, a=deferred(lambda: 7))
    found = resolve(tree, {})
    assert found["a"] == 7 and found["new"] == [] and isinstance(tree["a"], Deferred)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, Pair(1, 2), torch.Size([2]), X.max(0), {1, 2}, None], ids=str)
def test_what_holds_nothing_deferred_is_passed_on_as_the_very_object(value: Any) -> None:
    assert resolve(value, {}) is value
    assert resolve(Deferred(lambda v: v, (value,), {}, "f"), {}) is value


def test_every_part_is_evaluated_once() -> None:
    calls = []
    y = deferred(lambda: calls.append("model") or produce())
    part = Deferred(lambda v: calls.append("part") or v, (y.logits,), {}, "part")
    known: dict[int, Any] = {}
    total = part + part * part.mean() + y.logits
    first = resolve(total, known)
    assert resolve([total, part, y], known)[0] is first
    assert calls == ["model", "part"]


@pytest.mark.parametrize("path", ["itself", "attribute", "call"])
def test_copies_are_safe(path: str) -> None:
    root = deferred()
    value = {"itself": root, "attribute": root.parts, "call": root.logits.view(-1)}[path]
    assert copy.copy(value) is value  # a twin would be a second call of the model
    for clone in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert isinstance(clone, Deferred) and clone is not value and repr(clone) == repr(value)
        assert str(resolve(clone, {})) == str(resolve(value, {}))


def test_a_deepcopy_is_consistent_in_itself() -> None:
    root = deferred()
    copied_root, copied_part = copy.deepcopy((root, root.logits))
    assert depends_on(copied_part, copied_root) and not depends_on(copied_part, root)


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (bool, "truth value"),
        (lambda y: not y, "truth value"),
        (lambda y: 1 if y > 0 else 2, "truth value"),
        (lambda y: 0 < y < 1, "truth value"),
        (len, "length"),
        (iter, "iteration"),
        (lambda y: [*y], "iteration"),
        (lambda y: (lambda a, b: a)(*y), "iteration"),
    ],
)
def test_python_is_told_what_is_not_known(ask: Callable[[Any], Any], what: str) -> None:
    with pytest.raises(TypeError, match=rf"{what} of <deferred .*is not known before forward_and_backward"):
        ask(deferred().logits)


@pytest.mark.parametrize("ask", [float, int, operator.index, lambda y: y.__setitem__(0, 1)])
def test_conversions_and_assignments_are_refused(ask: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        ask(deferred())


def test_a_deferred_value_is_a_key_by_identity() -> None:
    a, b = deferred(), deferred()
    assert {a: 1, b: 2}[a] == 1 and hash(a) != hash(b)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda y: y, "<deferred model()>"),
        (lambda y: y.logits, "<deferred model().logits>"),
        (lambda y: y["a"][0], "<deferred model()['a'][0]>"),
        (lambda y: y.logits.view(-1, dim=X), "<deferred model().logits.view(-1, dim=tensor(2, 3))>"),
        (lambda y: 2 / -y[0] + 1, "<deferred ((2 / -(model()[0])) + 1)>"),
        (lambda y: torch.relu(y), "<deferred relu(model())>"),
        (lambda y: y("x" * 99), "<deferred model()(<str>)>"),
    ],
)
def test_representations_read_like_the_code(make: Callable[[Any], Any], text: str) -> None:
    assert repr(make(deferred())) == text


def test_dunder_attributes_are_not_recorded() -> None:
    for name in ("__array__", "__length_hint__", "__deepcopy__"):
        assert not hasattr(deferred(), name)
    assert isinstance(deferred().__getattr__("_private"), Deferred)
