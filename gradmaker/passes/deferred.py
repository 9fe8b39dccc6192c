"""Deferred values: what `setup_model_call` returns before the model has run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any, NoReturn

from torch import nn

__all__ = ["Deferred", "arguments", "declared_call", "exchange", "resolve"]

_SLOTS = ("_function", "_args", "_kwargs", "_text")


class Deferred:
    """The result of a call that runs later; operations on it are recorded, and evaluated with it.

    Recorded are items, attributes, calls, arithmetic, comparisons and torch functions: ``y[0]``, ``y.logits``,
    ``y.view(-1, 10)``, ``y / 2``, ``y == t``, ``torch.relu(y)``. ``bool``, ``len`` and iteration need a value: `TypeError`.
    """

    __slots__ = _SLOTS

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
        self._function, self._args, self._kwargs, self._text = function, args, kwargs, text

    def __repr__(self) -> str:
        return f"<deferred {self._text}>"

    def __getattr__(self, name: str) -> Deferred:
        if name in _SLOTS or (name.startswith("__") and name.endswith("__")):  # copy and pickle probe these on bare objects
            raise AttributeError(name)
        return Deferred(getattr, (self, name), {}, f"{self._text}.{name}")

    def __getitem__(self, key: Any) -> Deferred:
        return Deferred(operator.getitem, (self, key), {}, f"{self._text}[{key!r}]")

    def __call__(self, *args: Any, **kwargs: Any) -> Deferred:
        return Deferred(_call, (self, *args), kwargs, f"{self._text}({describe(args, kwargs)})")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Deferred:
        name = getattr(function, "__name__", repr(function))
        return Deferred(function, tuple(args), kwargs or {}, f"{name}({describe(args, kwargs or {})})")

    def _needs_value(self, what: str) -> NoReturn:
        raise TypeError(
            f"{what} of {self!r} is not known before forward_and_backward(); "
            "take its parts by item or attribute (y[0], y.logits), which are recorded"
        )

    def __bool__(self) -> bool:
        self._needs_value("the truth value")

    def __hash__(self) -> int:  # by identity, as tensors: ``==`` is recorded
        return id(self)

    def __copy__(self) -> Deferred:  # a copy would be a second call of the model
        return self

    def __len__(self) -> int:
        self._needs_value("the length")

    def __iter__(self) -> NoReturn:
        self._needs_value("an iteration")


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _binary(symbol: str, function: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    def forward(self: Deferred, other: Any) -> Deferred:
        return Deferred(function, (self, other), {}, f"({self._text} {symbol} {short(other)})")

    def reflected(self: Deferred, other: Any) -> Deferred:
        return Deferred(function, (other, self), {}, f"({short(other)} {symbol} {self._text})")

    return forward, reflected


def _unary(symbol: str, function: Callable[[Any], Any]) -> Any:
    def record(self: Deferred) -> Deferred:
        return Deferred(function, (self,), {}, f"{symbol}({self._text})")

    return record


for _name, _symbol in {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@",
    "and": "&", "or": "|", "xor": "^",
}.items():  # fmt: skip
    _forward, _reflected = _binary(_symbol, getattr(operator, f"__{_name}__"))
    setattr(Deferred, f"__{_name}__", _forward)
    setattr(Deferred, f"__r{_name}__", _reflected)
for _name, _symbol in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    setattr(Deferred, f"__{_name}__", _binary(_symbol, getattr(operator, _name))[0])
for _name, _symbol in {"neg": "-", "pos": "+", "abs": "abs", "invert": "~"}.items():
    setattr(Deferred, f"__{_name}__", _unary(_symbol, getattr(operator, _name)))


def short(value: Any) -> str:
    """A short text for a value, for ``repr``."""
    if isinstance(value, Deferred):
        return value._text
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"tensor{tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 24 else f"<{type(value).__name__}>"


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The argument list of a recorded call, shortened."""
    return ", ".join([short(a) for a in args] + [f"{k}={short(v)}" for k, v in kwargs.items()])


def arguments(value: Deferred) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a deferred call."""
    return value._args, value._kwargs


def resolve(value: Any, known: dict[int, Any]) -> Any:
    """The value of a nested structure that may hold deferred values.

    known: values by ``id`` of the deferred object; filled here, so that each is evaluated once.
    """
    if isinstance(value, Deferred):
        if id(value) not in known:
            args, kwargs = resolve(value._args, known), resolve(value._kwargs, known)
            known[id(value)] = value._function(*args, **kwargs)
        return known[id(value)]
    if not any(isinstance(v, Deferred) for v in _leaves(value)):  # the same object, whatever its type
        return value
    return _rebuilt(value, lambda v: resolve(v, known))


def exchange(value: Any, leaf: Callable[[Any], Any], known: dict[int, Deferred]) -> Any:
    """A nested structure with every leaf mapped by ``leaf``, also in the arguments of deferred calls.

    known: the new deferred objects by ``id`` of the old ones; filled here, so that each is replaced by one object.
    """
    if isinstance(value, Deferred):
        if id(value) not in known:
            args, kwargs = (exchange(part, leaf, known) for part in (value._args, value._kwargs))
            known[id(value)] = Deferred(value._function, args, kwargs, value._text)
        return known[id(value)]
    if isinstance(value, (tuple, list, Mapping, slice)):
        return _rebuilt(value, lambda v: exchange(v, leaf, known))
    return leaf(value)


def _rebuilt(value: Any, member: Callable[[Any], Any]) -> Any:
    """A container of the same type, its members replaced."""
    if isinstance(value, slice):
        return slice(*(member(v) for v in (value.start, value.stop, value.step)))
    if isinstance(value, Mapping):
        rebuilt: Any = copy(value)  # keeps the other attributes of a subclass of dict
        rebuilt.update({k: member(v) for k, v in value.items()})
        return rebuilt
    members = [member(v) for v in value]
    return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)


def depends_on(value: Any, root: Deferred) -> bool:
    """Whether a nested structure holds, at any depth, a value that is computed from ``root``."""
    if isinstance(value, Deferred):
        return value is root or depends_on(value._args, root) or depends_on(value._kwargs, root)
    return any(depends_on(v, root) for v in _leaves(value) if isinstance(v, Deferred))


def _leaves(value: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists, mappings and slices."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, (tuple, list, Mapping)):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(member)
    else:
        yield value


def declared_call(verb: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred:
    """A call that runs later, by a verb of the protocol. TypeError for what is not callable."""
    if not callable(function):
        raise TypeError(f"{verb}: expected a callable first, got {type(function).__name__}")
    name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))
    return Deferred(function, args, kwargs, f"{name}({describe(args, kwargs)})")
