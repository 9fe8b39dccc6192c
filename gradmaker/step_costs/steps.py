"""Kinds of steps of a row: those that neither measure nor refresh, that measure, and that do both."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gradmaker.compare.batches.reading import Call
from gradmaker.compare.batches.trees import moved
from gradmaker.compare.errors import InputError
from gradmaker.compare.rows import Row
from gradmaker.step_costs.subjects import Subject, seeded_model

__all__ = ["INTERVALS", "KINDS", "Made", "clocks_of", "make", "with_intervals"]

NEVER = 10**9
RATE = 1e-4  # learning rate of timed steps, small so that they do not diverge
INTERVALS = ("curvature_interval", "preconditioner_interval")
KINDS = {"plain": (NEVER, NEVER), "measuring": (1, NEVER), "all": (1, 1)}
"""Intervals of measurements and of refreshes, by kind of step."""


@dataclass
class Made:
    """A row on a model: calling it is one step of training."""

    subject: Subject
    batch: Call
    model: nn.Module
    maker: Any
    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if self.maker is None:
            self.subject.loss(self.batch.outputs(self.model), self.batch.targets).backward()
        else:
            outputs = self.maker.setup_model_call(self.model, *self.batch.args, **self.batch.kwargs)
            self.maker.setup_loss_call(self.subject.loss, outputs, self.batch.targets)
            self.maker.forward_and_backward()
        self.optimizer.step()

    def close(self) -> None:
        """Remove the hooks of the maker."""
        if self.maker is not None:
            self.maker.remove()

    def state_bytes(self) -> int:
        """Bytes that maker and optimizer hold from one step to the next, beside weights and gradients."""
        summary = getattr(self.maker, "summary", None)
        own = summary().bytes if summary is not None else _bytes(getattr(self.maker, "state_dict", dict)())
        return int(own) + _bytes(self.optimizer.state_dict()["state"])


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def make(row: Row, subject: Subject, size: int, device: str) -> Made:
    """Build a row on the model of a subject."""
    model = seeded_model(subject, device)
    call = subject.batch(size)
    batch = replace(call, **{name: moved(getattr(call, name), device) for name in ("args", "kwargs", "targets")})
    return Made(subject, batch, model, row.build_maker(model), row.build_optimizer(model, RATE))


def clocks_of(row: Row, subject: Subject, device: str) -> tuple[str, ...]:
    """The options of a row that it takes of: no warm-up, both intervals. InputError where the row is refused without them.

    Methods that measure or refresh at every step refuse intervals, which would have no effect.
    """
    if row.maker is None:
        return ()
    network = seeded_model(subject, device)
    reason = ""
    for names in _choices():
        try:
            with_values(row, dict.fromkeys(names, 10) | ({"warmup_steps": 0} if "warmup_steps" in names else {})).build_maker(
                network
            ).remove()
        except (TypeError, ValueError) as error:
            reason = str(error)
        else:
            return names
    raise InputError(f"{row.label}: {reason}")


def _choices() -> Iterator[tuple[str, ...]]:
    for clocks in (INTERVALS, INTERVALS[:1], INTERVALS[1:], ()):
        yield ("warmup_steps", *clocks)
        yield clocks


def with_values(row: Row, values: Mapping[str, Any]) -> Row:
    """The row with other options of its maker."""
    return replace(row, maker={**(row.maker or {}), **values})


def with_intervals(row: Row, clocks: tuple[str, ...], measure: int, refresh: int) -> Row:
    """The row with intervals, and without a warm-up, as far as it takes them."""
    values = {"warmup_steps": 0, INTERVALS[0]: measure, INTERVALS[1]: refresh}
    return with_values(row, {name: values[name] for name in clocks}) if clocks else row
