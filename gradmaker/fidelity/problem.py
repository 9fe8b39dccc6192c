"""The model, the loss and the batches on which curvatures are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmaker.capture.borrowing import borrowing
from gradmaker.fidelity.layers import Layers
from gradmaker.maker import GradientMaker

__all__ = ["Batch", "Loss", "Problem", "kept_batches", "read_batches"]

Loss: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Batch:
    """The arguments of the model, and the targets: the arguments of the loss after the model's result."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    targets: tuple[Any, ...]

    @property
    def examples(self) -> int:
        """The first size of the first tensor."""
        tensors = (x for x in (*self.arguments, *self.keywords.values()) if isinstance(x, Tensor))
        return next((len(x) for x in tensors if x.ndim), 0)


def read_batches(batches: Any, most: int | None) -> list[Batch]:
    """Batches from one pair, from a mapping, or from an iterable of these. ValueError for anything else, and for none.

    A pair is (inputs, targets). Inputs are a tensor, a tuple of arguments, or a mapping of keywords; a mapping in place of the
    pair is inputs alone, for a loss of the model's result. most: at most so many are read of an iterable
    """
    if isinstance(batches, Mapping) or _is_pair(batches):
        return [_read(batches)]
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, str)):
        raise ValueError(f"batches: {EXPECTED}; got {type(batches).__name__}")
    found: list[Batch] = []
    for batch in batches:
        if most is not None and len(found) >= most:
            break
        found.append(_read(batch))
    if not found:
        raise ValueError(f"batches: {EXPECTED}; got an empty {type(batches).__name__}")
    return found


def kept_batches(batches: Any, most: int | None) -> list[Any]:
    """The batches themselves, of an iterable that may shuffle or be read once."""
    if isinstance(batches, Mapping) or _is_pair(batches):
        return [batches]
    return list(batches) if most is None else [batch for batch, _ in zip(batches, range(most), strict=False)]


EXPECTED = "expected a pair (inputs, targets), a mapping of the model's keywords, or an iterable of these"


def _is_pair(batch: Any) -> bool:
    """Whether this is one pair and not a sequence of two batches."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    return isinstance(batch[0], (Tensor, Mapping)) or (isinstance(batch[1], Tensor) and isinstance(batch[0], tuple))


def _read(batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        return Batch((), dict(batch), ())
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batches: {EXPECTED}; a batch is a {type(batch).__name__}")
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), (targets,))
    return Batch(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, (targets,))


class Problem:
    """A model and a loss ``loss(result, *targets)``; without a loss, the attribute ``loss`` of the model's result."""

    def __init__(self, model: nn.Module, loss: Loss | None, layers: Layers, seed: int) -> None:
        if loss is not None and not callable(loss):
            raise ValueError(f"loss: expected a function of the model's result and the targets, got {type(loss).__name__}")
        self.model, self.loss, self.layers, self.seed = model, loss, layers, seed

    def loss_of(self, result: Any, batch: Batch) -> Tensor:
        """The loss of a result of the model. ValueError unless it has one element."""
        loss = result.loss if self.loss is None else self.loss(result, *batch.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor with one element, got {got}")
        return loss

    def evaluate(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> tuple[Any, Tensor]:
        """The model's result and its loss, with the same random numbers in every call."""
        with self.seeded(), borrowing(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            if parameters is None:
                result = self.model(*batch.arguments, **batch.keywords)
            else:
                result = functional_call(self.model, dict(parameters), batch.arguments, dict(batch.keywords))
            return result, self.loss_of(result, batch)

    @torch.no_grad()
    def loss_at(self, batch: Batch, displacement: Tensor) -> float:
        """The loss at ``theta + displacement``.  # (P,)"""
        pieces = zip(self.layers.names, self.layers.parameters, self.layers.split(displacement), strict=True)
        return float(self.evaluate(batch, {k: p.detach() + x.to(p) for k, p, x in pieces})[1])

    def declare(self, maker: GradientMaker, batch: Batch) -> None:
        """Declare the calls of a batch to a maker."""
        result = maker.setup_model_call(self.model, *batch.arguments, **batch.keywords)
        if self.loss is None:
            maker.setup_loss_repr(result.loss)
        else:
            maker.setup_loss_call(self.loss, result, *batch.targets)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Context in which the global generators start from the seed of the problem."""
        with torch.random.fork_rng(devices=_devices(self.layers.parameters)):
            torch.manual_seed(self.seed)
            yield

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Context without ``.grad``, after which ``.grad``, buffers and the global random state are as before."""
        parameters = list(self.model.parameters())
        gradients = [(p, p.grad) for p in parameters]
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        try:
            for p in parameters:
                p.grad = None
            with torch.random.fork_rng(devices=_devices(parameters)), torch.enable_grad():
                yield
        finally:
            for p, g in gradients:
                p.grad = g
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _devices(parameters: Sequence[Tensor]) -> list[int]:
    return sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
