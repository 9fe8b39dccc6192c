"""Forty small models in the shapes of those that people train: each method is right on each of them, or says why it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.capture.rules.layers import LinearRule
from gradmaker.capture.rules.normalisations import LayerNormRule
from gradmaker.capture.tape import Tape
from gradmaker.curvature import fisher
from gradmaker.linalg import fused
from gradmaker.loss.terms import CategoricalTerms
from gradmaker.passes import batches
from gradmaker.representations import KronDims
from gradmaker.solvers import RotatedDivision
from tests import oracles
from tests.zoo.measure import (
    EXACT,
    METHODS,
    OF_CURVATURE,
    PRECISIONS,
    cell,
    count,
    differentiable,
    expected,
    make,
    refuses,
    step,
    told,
)
from tests.zoo.oracles import Oracle, couples, kfac_direction
from tests.zoo.registry import ZOO

EXACT_AT_LEAST = {
    **{"shampoo": 40, "soap": 40, "adam": 40},
    **{"ekfac": 35, "kfac": 35, "unit_ng": 39, "full_ng": 39, "hessian_free": 37},
}
ADVICE = ("use ", "give ", "declare", "leave ", "set ", "make ", "run ", "pass ", "methods for any parameter", "choose ")


# ------------------------------------------------------------------ the outcomes
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ZOO)
def test_outcome_is_as_in_the_table(name: str, method: str) -> None:
    """Run python -m tests.zoo.measure, and then docs/make_coverage.py, where this fails after a change that is meant."""
    assert gist(cell(name, method)) == gist(expected()[name][method])


def gist(outcome: str) -> str:
    """Without the digits of an error, and without what torch said on the way."""
    return outcome.split(":")[0] if outcome.startswith("WRONG") else outcome[:60]


def test_no_outcome_is_wrong() -> None:
    wrong = [f"{name}, {method}: {c}" for name, row in expected().items() for method, c in row.items() if c.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("method", EXACT_AT_LEAST)
def test_refusing_is_no_way_out(method: str) -> None:
    assert count(method) >= EXACT_AT_LEAST[method]


def test_refusals_say_what_to_do() -> None:
    said = {c for row in expected().values() for c in row.values() if c.startswith("refused")}
    assert not [c for c in said if not any(word in c.lower() for word in ADVICE)]


def test_the_page_has_the_table() -> None:
    """Run python docs/make_coverage.py where this fails."""
    from tests.docs.test_docs import ROOT, script

    page = script(ROOT / "docs" / "make_coverage.py")
    assert page.PAGE.read_text(encoding="utf-8").endswith(page.zoo())


def test_there_are_forty_of_many_families() -> None:
    assert len(ZOO) == 40 == len(expected())
    assert len({e.family for e in ZOO.values()}) >= 12


# ------------------------------------------------------------------ recording
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", OF_CURVATURE)
@pytest.mark.parametrize("name", ZOO)
def test_recording_changes_no_value(name: str, method: str) -> None:
    plain = ZOO[name].make()
    value = plain.value(plain.output())
    case = ZOO[name].make()
    try:
        recorded = step(case, make(case, ZOO[name], method))
    except (ValueError, RuntimeError) as problem:
        assert refuses(problem), problem
    else:
        assert torch.equal(recorded, value)


# ------------------------------------------------------------------ other precisions
SPOKEN_OF = {
    "two outputs, one made of the other": "called again for one example",  # whose gradients go through each other
    "hypernetwork": "no axis",  # a layer with one constant input
    "GPT-2, head tied by assignment": "no axis",  # positions without an axis of examples
    "T5, relative positions": "no axis",
}
"""Right models of which it is rightly said that a layer is measured one example at a time."""


def quiet() -> list[str]:
    """Models with examples apart and layers that are called."""
    return [e.name for e in ZOO.values() if e.independent and e.seen]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", quiet())
def test_nothing_is_said_of_right_models(name: str, precision: str) -> None:
    if not differentiable(name, precision):
        pytest.skip("torch itself cannot differentiate this loss")
    for method in ("kfac", "unit_ng"):
        if expected()[name][method] == EXACT:
            said = told(name, method, precision)
            assert all(name in SPOKEN_OF and SPOKEN_OF[name] in line for line in said), said


# ------------------------------------------------------------------ the oracles, against those that go example by example
ALONE = [
    *("ConvNeXt block", "DenseNet", "BasicBlock, batch norm in training", "LoRA beside frozen layers", "embedding bag"),
    *("one module under three names", "a weight used beside its module", "x - x.mean(0)", "T5, relative positions", "LSTM"),
]


@pytest.mark.parametrize("name", ALONE)
def test_the_matrix_is_that_of_the_parameter_vector(name: str) -> None:
    case, found = ZOO[name].make(), Oracle(ZOO[name])
    (x,), names = case.inputs, list(found.named)
    expected = oracles.loss_ggn(case.model, x, lambda z: case.value(z), names)
    assert oracles.relative_error(found.matrix, expected) < 1e-12
    if couples(case):
        held = Oracle(ZOO[name], held=True).matrix
        with oracles.frozen_batch_statistics(case.model, x):
            expected = oracles.loss_ggn(case.model, x, lambda z: case.value(z), names)
        assert oracles.relative_error(held, expected) < 1e-12
        assert oracles.relative_error(held, found.matrix) > 0.01


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *(("ConvNeXt block", "1.conv_dw"), ("ConvNeXt block", "1.fc1"), ("DenseNet", "3.conv"), ("squeeze-excite", "expand")),
        *(("LoRA beside frozen layers", "0.lora_A"), ("one module under three names", "steps.0.linear")),
    ],
)
def test_factors_are_those_of_single_examples(name: str, layer: str) -> None:
    case, found = ZOO[name].make(), Oracle(ZOO[name])
    pairs = pairs_of(found, layer)
    columns = oracles.exact_columns("categorical", case.targets[0])
    expected = oracles.kfac_factors(case.model, case.inputs[0], layer, columns, len(case.targets[0]))
    assert len(pairs) == len(expected)
    for (A, B), pair in zip(pairs, expected, strict=True):
        assert oracles.relative_error(A, pair.A) < 1e-12
        assert oracles.relative_error(B, pair.B) < 1e-12


def pairs_of(found: Oracle, layer: str) -> list[tuple[Tensor, Tensor]]:
    """A and B of every group of one layer."""
    pairs = []

    def keep(G: Tensor, A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
        pairs.append((A, B))
        return G

    (watched,) = (w for w in found.layers if w.name == layer)
    assert found.regular(watched)
    found.solve_layer(watched, keep)
    return pairs


@pytest.mark.parametrize("name", ["InfoNCE", "x - x.mean(0)", "message passing, loss a node", "GPT-2, head tied by assignment"])
def test_factors_do_not_depend_on_the_root(name: str) -> None:
    found, other = Oracle(ZOO[name]), Oracle(ZOO[name])
    turn = torch.linalg.qr(torch.randn_like(other.root))[0]
    other.root = other.root @ turn
    one, two = (o.kronecker(kfac_direction(0.05), 0.05) for o in (found, other))
    assert max(oracles.relative_error(two[k], v) for k, v in one.items() if float(v.norm()) > 1e-9) < 1e-9


def test_irregular_layers_are_found() -> None:
    found = {name: [w.name for w in o.layers if not o.regular(w)] for name, o in ((n, Oracle(ZOO[n])) for n in IRREGULAR)}
    assert found == IRREGULAR


IRREGULAR = {
    "a weight used beside its module": ["a", "b"],
    "GPT-2, head tied by assignment": ["wte", "lm_head"],
    "GPT, functional head, N = T": ["wte"],
    "gradient penalty": ["net.0", "net.2"],
    "one module under three names": [],
    "mixture of experts, top 1": ["experts.2"],
    "LoRA beside frozen layers": ["0.base_layer", "2.base_layer", "4"],
}


# ------------------------------------------------------------------ what is planted is found
Change = Callable[[Callable[..., Any]], Callable[..., Any]]


def lengthened(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A step that is a millionth too long."""
    return lambda *args, factor, **options: operator(*args, factor=factor * (1 + 1e-6), **options)


def scaled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A millionth too large."""
    return lambda *args: method(*args) * (1 + 1e-6)


def rolled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of a rule: the rows of another example."""
    return lambda *args: method(*args).roll(1, 1)


def shuffled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of a rule: the output gradients of another example."""
    return lambda *args: method(*args).roll(1, 2)


def dropped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Evidence without the gradients of its last position."""

    def without(*args: Any, **options: Any) -> Any:
        found = method(*args, **options)
        g = found.gradients.clone()
        g[:, :, :, -1] = 0
        return replace(found, gradients=g)

    return without


def first_only(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of a tape: a module's first call."""
    return lambda self, module, *args: None if self.calls[module] else method(self, module, *args)


def without_eps(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, module, call: F.layer_norm(call.input, module.normalized_shape, eps=0.0)


def fewer(method: Callable[..., Any]) -> Callable[..., Any]:
    """The first recorded term alone."""
    return lambda *args: method(*args)[:1]


def broken_order(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: method(*args) + 1e-6


PLANTS: dict[str, tuple[str, str, Any, str, Change]] = {
    "inputs of another example": ("LoRA beside frozen layers", "unit_ng", LinearRule, "inputs", rolled),
    "gradients of another example": ("embedding bag", "unit_ng", LinearRule, "gradients", shuffled),
    "inputs too large": ("adapters and IA3 scales", "kfac", LinearRule, "inputs", scaled),
    "gradients too large": ("LSTM", "full_ng", LinearRule, "gradients", scaled),
    "inputs too large, in a basis": ("dropout in training", "ekfac", LinearRule, "inputs", scaled),
    "a norm without its eps": ("ConvNeXt block", "kfac", LayerNormRule, "normalise", without_eps),
    "a position": ("BasicBlock, batch norm in evaluation", "kfac", fisher, "layer_evidence", dropped),
    "columns too large": ("two heads, two losses", "ekfac", CategoricalTerms, "_columns", scaled),
    "a call": ("one module under three names", "kfac", Tape, "_append", first_only),
    "a term": ("two heads, two losses", "full_ng", batches, "read_terms", fewer),
    "a product": ("Llama, shifted labels", "hessian_free", CategoricalTerms, "_multiply", scaled),
    "Adam's length": ("LSTM", "adam", fused, "adam", lengthened),
    "SOAP's scale": ("DenseNet", "soap", RotatedDivision, "scale", scaled),
    "Shampoo's exponent": ("DenseNet", "shampoo", KronDims, "order", broken_order),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_defects_are_seen(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-checks, which go round most of them."""
    name, method, owner, attribute, change = PLANTS[plant]
    assert cell(name, method) == EXACT
    monkeypatch.setitem(METHODS, method, {**METHODS[method], **({"self_check": "off"} if method in OF_CURVATURE else {})})
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    assert cell(name, method).startswith("WRONG")
