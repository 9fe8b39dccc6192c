"""Rows of the comparison: a gradient maker (or none), a torch optimizer, and learning rates."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from gradmaker.compare.errors import InputError
from gradmaker.config import build
from gradmaker.methods import from_config
from gradmaker.options.deprecations import current_name
from gradmaker.options.registry import METHODS

INTERVALS = ("curvature_interval", "preconditioner_interval")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration to train.

    Args:
        maker: the mapping for `from_config`; None trains with the optimizer alone.
        optimizer: name of the class of the optimizer; `options` are its arguments besides the learning rate.
        kind: the class, where it is not one of torch.optim.
        space: what a search of this row varies, in the form of `Tuning.space`, before what the tuning says.
    """

    label: str
    maker: Mapping[str, Any] | None
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...]
    kind: Any = None
    space: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.learning_rates:
            raise InputError(f"{self.label}: learning_rates=(): expected at least one learning rate")
        if bad := [rate for rate in self.learning_rates if not (math.isfinite(rate) and rate > 0)]:
            raise InputError(f"{self.label}: learning_rates={', '.join(map(str, bad))}: expected positive numbers")

    @property
    def method(self) -> str:
        """The name of the maker or, without one, of the optimizer."""
        return self.optimizer if self.maker is None else str(self.maker.get("method", "custom"))

    def check(self) -> None:
        """InputError for options that the method or the optimizer does not have, before any model is made."""
        try:
            if self.maker is not None:
                self._config()
            self.build_optimizer(nn.ParameterList([torch.zeros(1, 1)]), self.learning_rates[0])
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.label}: {error}") from error

    def build_maker(self, model: nn.Module) -> Any:
        """Make the gradient maker on this model; None for a row without one."""
        if self.maker is None:
            return None
        return from_config(model, dict(self.maker))

    def build_optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Make the torch optimizer."""
        made: torch.optim.Optimizer = self.optimizer_class()(model.parameters(), lr=learning_rate, **self.options)
        return made

    def optimizer_class(self) -> Any:
        """The class of the torch optimizer."""
        return self.kind or optimizers()[self.optimizer.lower()]

    def takes(self, name: str) -> bool:
        """Whether the method or the optimizer has an option of this name."""
        return name == "learning_rate" or bool(self._maker_options(name)) or self._optimizer_option(name) is not None

    def with_options(self, given: Mapping[str, Any]) -> "Row":
        """The row with other options, besides the learning rate: those of the method go before those of the optimizer."""
        maker, options = dict(self.maker or {}), dict(self.options)
        for name, value in given.items():
            if own := self._maker_options(name):
                maker.update(dict.fromkeys(own, value))
            elif (option := self._optimizer_option(name)) is not None:
                options[option] = value
        return replace(self, maker=None if self.maker is None else maker, options=options)

    def describe(self) -> dict[str, Any]:
        """The whole configuration as plain values, with the defaults of the method; as given where it cannot be built."""
        name = self.optimizer if self.kind is None else f"{self.kind.__module__}.{self.kind.__qualname__}"
        stated = {"optimizer": {"name": name, **plain(self.options)}}
        if self.maker is None:
            return stated
        try:
            make, config = self._config()
        except (TypeError, ValueError):
            return {"maker": plain(self.maker), **stated}
        resolved = {f.name: getattr(config, f.name) for f in fields(config)} if is_dataclass(config) else {}
        given = {current_name(make.Config, option): value for option, value in self.maker.items()}
        return {"maker": plain({**given, **resolved}), **stated}

    def _config(self) -> tuple[Any, Any]:
        """The maker's class and its config."""
        given = dict(self.maker or {})
        make: Any = METHODS.find("method", given.pop("method", None))
        return make, build(make.Config, given, f"method {self.method!r}")

    def _maker_options(self, name: str) -> tuple[str, ...]:
        """The options of the method that a name means: `interval` means both intervals."""
        if self.maker is None:
            return ()
        make: Any = METHODS.find("method", self.maker.get("method"))
        known = {f.name for f in fields(make.Config)}
        name = current_name(make.Config, name)
        return tuple(option for option in (INTERVALS if name == "interval" else (name,)) if option in known)

    def _optimizer_option(self, name: str) -> str | None:
        """The argument of the optimizer that a name means; `optimizer.eps` means no option of the method."""
        option = name.removeprefix("optimizer.")
        return option if option in inspect.signature(self.optimizer_class()).parameters and option != "lr" else None


def plain(value: Any) -> Any:
    """The value in types of JSON; classes and modules become names."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: {f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    return getattr(value, "__qualname__", None) or str(value)


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """torch.optim classes by lower-case name, without those that need a closure or sparse gradients."""
    kinds = (kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
    return {kind.__name__.lower(): kind for kind in kinds if kind.__name__ not in ("Optimizer", "LBFGS", "SparseAdam")}
