"""Replicas of a model: gradients that are summed over the ranks, and wrappers that would reduce them a second time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from gradmaker.scale.ranks import Ranks, RefusedError

__all__ = ["agree_on_gradients", "local_gradients", "sum_gradients"]

TOLERANCE = 1e-9
"""Relative difference of the sums of gradients, in float64, that replicas may have."""


@contextmanager
def local_gradients() -> Iterator[None]:
    """Context of a pass in which no `DistributedDataParallel` reduces gradients: the maker does that, once for the pass.

    Its buffers are exchanged as ever. RefusedError for `static_graph`, which reduces in any case, and inside of ``join()``.
    """
    found: list[tuple[DistributedDataParallel, bool]] = []

    def before(module: nn.Module, args: Any) -> None:
        for inner in (module, *module.children()):  # a compiled module calls what it holds by no hook
            if isinstance(inner, DistributedDataParallel) and all(inner is not known for known, _ in found):
                refuse_wrapper(inner)
                found.append((inner, inner.require_backward_grad_sync))
                inner.require_backward_grad_sync = False

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for wrapper, synchronised in found:
            wrapper.require_backward_grad_sync = synchronised
            wrapper.require_forward_param_sync = True  # the next forward pass exchanges the buffers


def refuse_wrapper(wrapper: DistributedDataParallel) -> None:
    """RefusedError for options that reduce gradients at moments of their own."""
    if getattr(wrapper, "static_graph", False):
        raise RefusedError(
            "DistributedDataParallel(static_graph=True) reduces gradients in its first backward pass whatever it is told, and "
            "not after further ones: leave static_graph out; find_unused_parameters is not needed with a maker either"
        )
    if getattr(getattr(wrapper, "_join_config", None), "enable", False):
        raise RefusedError(
            "DistributedDataParallel.join() answers the collectives of its own model alone, and those of the maker would wait: "
            "make equally many steps on all ranks, with empty batches on those that have run out of data"
        )


@torch.no_grad()
def sum_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their sums over the ranks; a rank without one counts as zeros."""
    if any(p.grad is not None and p.grad.layout is not torch.strided for p in parameters):
        raise RefusedError("several processes: sparse gradients are not summed over the ranks; use sparse=False")
    holders = ranks.present([p.grad is not None for p in parameters])
    held = [p for p, owners in zip(parameters, holders, strict=True) if owners]
    for p in held:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    ranks.sum_([p.grad for p in held if p.grad is not None])


@torch.no_grad()
def agree_on_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter], finite: bool, own: list[float]) -> tuple[bool, bool]:
    """Whether the step is finite on all ranks, and whether findings differ. RefusedError for other gradients or passes.

    parameters: whose gradients another loop has reduced; own: the number of measured passes, and of findings
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    dense = [g.to_dense() if g.layout is not torch.strided else g for g in gradients]
    real = [torch.view_as_real(g) if g.is_complex() else g for g in dense]
    sums = torch.stack([_sums(g) for g in real]).cpu() if real else None
    weighed = 0.0 if sums is None else float((sums[:, 0] * torch.arange(1, len(sums) + 1)).sum())
    size = 0.0 if sums is None else float((sums[:, 1] * torch.arange(1, len(sums) + 1)).sum())
    table = ranks.meet([float(finite), float(len(gradients)), weighed, size, *own])
    if not all(row[0] for row in table):
        return False, False
    first = table[0]
    if any(row[4] != first[4] for row in table):
        raise RefusedError(f"the ranks have measured {[int(row[4]) for row in table]} passes in one step: make equally many")
    if any(row[1] != first[1] or abs(row[2] - first[2]) > TOLERANCE * max(first[3], row[3]) for row in table):
        raise RefusedError(
            "the gradients differ between ranks at the step: wrap the model in DistributedDataParallel, end no_sync() with a "
            "pass that synchronises, or average .grad over the ranks before optimizer.step()"
        )
    return True, len({row[5] for row in table}) > 1


def _sums(g: Tensor) -> Tensor:
    """The sum of the entries, and of their sizes, in float64.  # (2,)"""
    wide = torch.float64
    return torch.stack([g.sum(dtype=wide), torch.linalg.vector_norm(g, 1, dtype=wide)])
