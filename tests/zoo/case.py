"""What one model of the zoo is: how it is made, called and judged, for a maker and for an oracle alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Z = list[Tensor]  # the logits of each loss call, in the graph


@dataclass(frozen=True, eq=False)
class Case:
    """A model with one batch. `loss(output, *targets)` is declared; None where the model returns it as ``output.loss``.

    ``logits`` picks what each loss call takes out of the model's output, and ``terms`` are these calls with all of their
    factors: ``loss == sum_j terms[j](logits[j])``. Only oracles read them.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    logits: Callable[[Any], Z]
    terms: list[Callable[[Tensor], Tensor]]
    loss: Callable[..., Tensor] | None = None
    targets: tuple[Any, ...] = ()
    seed: int = 11  # of the forward pass, where it draws
    autocast: bool = False

    def output(self) -> Any:
        """The model's output, as without any maker."""
        torch.manual_seed(self.seed)
        return self._call(*self.inputs)

    def value(self, output: Any) -> Tensor:
        """The loss of an output."""
        found: Tensor = output.loss if self.loss is None else self.loss(output, *self.targets)
        return found

    def declare(self, maker: Any) -> None:
        """The same two calls, declared to a maker; the next thing to be run is the forward pass."""
        call = self._call if self.autocast else self.model
        y = maker.setup_model_call(call, *self.inputs)
        if self.loss is None:
            maker.setup_loss_repr(y.loss)
        else:
            maker.setup_loss_call(self.loss, y, *self.targets)
        torch.manual_seed(self.seed)

    def _call(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(*inputs)

    def cast(self, dtype: torch.dtype, autocast: bool = False) -> Case:
        """The same case in another precision."""

        def one(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        inputs, targets = tree_map(one, (self.inputs, self.targets))
        return replace(self, model=self.model.to(dtype), inputs=inputs, targets=targets, autocast=autocast)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter, once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    ``independent``: examples do not meet in layers or loss, and every tensor has them first. ``seen``: every use of a layer
    is a call of its module, in the graph of the loss. ``options`` are what a user has to tell the maker of the layout.
    """

    name: str
    family: str
    build: Callable[[], Case]
    independent: bool = True
    seen: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, dtype: torch.dtype = torch.float64, autocast: bool = False) -> Case:
        """A fresh copy, always with the same numbers; they are drawn in float64 whatever the precision."""
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            torch.set_default_dtype(torch.float64)
            try:
                case = self.build()
            finally:
                torch.set_default_dtype(before)
        return case if dtype == torch.float64 and not autocast else case.cast(dtype, autocast)


ENTRIES: list[Entry] = []


def entry(
    name: str, family: str, independent: bool = True, seen: bool = True, **options: Any
) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Adds what a function builds to the zoo."""

    def add(build: Callable[[], Case]) -> Callable[[], Case]:
        ENTRIES.append(Entry(name, family, build, independent, seen, options))
        return build

    return add


def alone(output: Any) -> Z:
    """The output is the logits."""
    return [output]
