"""The cost of preconditioning by layer: FLOPs, bytes and the predicted overhead of a step.

`torch.utils.flop_counter` counts matrix products while a refresh and an application run on copies; decompositions, which it
does not count, have textbook formulas. FLOPs are not seconds: on a GPU a decomposition is far slower per FLOP than a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import Gradient, kinds
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import FactoredAxes
from gradmaker.schedule import as_schedule

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["CostReport", "LayerCost", "cost_report"]

HEADER = ("parameters", "step", "statistic", "refresh", "apply", "bytes", "overhead")
aten = torch.ops.aten


def _cubic(factor: float) -> Callable[..., int]:
    """FLOPs of a decomposition of (..., d, d): ``factor d^3``."""

    def count(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return int(factor * prod(shape[:-1]) * shape[-1] ** 2)

    return count


def _product(shape: torch.Size, a: torch.Size, b: torch.Size, **kwargs: Any) -> int:
    """FLOPs of in-place matrix products, which the counter omits.  # (..., n, d), (..., d, m)"""
    return 2 * prod(a) * b[-1]


def _qr(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the QR decomposition of (..., n, d), for ``R`` only: ``2 d^2 (n - d / 3)``."""
    *batch, n, d = shape
    return int(prod(batch) * 2 * min(n, d) ** 2 * (max(n, d) - min(n, d) / 3))


COUNTS: dict[Any, Any] = {
    aten.baddbmm_: _product,
    aten.addmm_: _product,
    aten._linalg_eigh: _cubic(9),
    aten._linalg_svd: _cubic(21),
    aten.linalg_qr: _qr,
    aten.linalg_cholesky_ex: _cubic(1 / 3),
    aten.cholesky_inverse: _cubic(2 / 3),
    aten.linalg_inv_ex: _cubic(2),
    aten.linalg_lu_factor_ex: _cubic(2 / 3),
    aten._linalg_solve_ex: _cubic(2 / 3),
}
"""FLOP formulas of operators: Golub & Van Loan, Matrix Computations, sections 3.2, 4.2, 5.2, 8.3 and 8.6."""


@dataclass(frozen=True)
class LayerCost:
    """The costs of one site: FLOPs of forward and backward pass, of a measurement, a refresh, an application; bytes."""

    name: str
    step: float
    statistic: float
    refresh: float
    apply: float
    bytes: int
    overhead: float
    """Predicted FLOPs of preconditioning in an average step, over those of the passes; infinite if these are zero."""


@dataclass(frozen=True)
class CostReport:
    """The costs of all layers; prints as a table, with the sum in the last row."""

    rows: list[LayerCost]
    overhead: float

    def __str__(self) -> str:
        cells = [HEADER, *[_cells(row) for row in self.rows]]
        widths = [max(len(row[j]) for row in cells) for j in range(len(HEADER))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
        lines = [lines[0], "-" * len(lines[0]), *lines[1:]]
        return "\n".join(
            [*lines, f"all: {self.overhead:.1%} of the FLOPs of a step, {sum(r.bytes for r in self.rows):,} bytes"]
        )


def _cells(row: LayerCost) -> tuple[str, ...]:
    flops = (f"{x:.2g}" for x in (row.step, row.statistic, row.refresh, row.apply))
    return (row.name, *flops, f"{row.bytes:,}", f"{row.overhead:.1%}")


def cost_report(maker: PreconditionedGradientMaker, batch: Any) -> CostReport:
    """Report the costs of the blocks of a maker after its first step: a refresh is repeated on copies of states and caches.

    The statistic of a layer-wise curvature is estimated: ``2 N d^2`` for a factor of side ``d`` and ``N`` positions, without
    extra backward passes. All else is counted. The model is called once, without gradients, and its buffers are restored.
    ValueError for a maker without a finished step.

    batch: the input of the model, a tensor or a tuple of arguments
    """
    if not any(block.cache for block in maker.plan.blocks):
        raise ValueError("cost_report: the maker has not made a step, and has no statistic to refresh: make a step first")
    passes = _passes(maker, batch)
    rows, spent = [], 0.0
    for block in maker.plan.blocks:
        if block.cache:
            found = _block_rows(maker, block, passes)
            rows += found
            spent += sum(row.overhead * row.step if row.step else 0.0 for row in found)
    total = passes[""]
    return CostReport(rows, spent / total if total else float("inf"))


def _passes(maker: PreconditionedGradientMaker, batch: Any) -> dict[str, float]:
    """FLOPs of forward and backward pass by module: three times those of the forward pass."""
    arguments = batch if isinstance(batch, tuple) else (batch,)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTS)
    buffers = {k: b.clone() for k, b in maker.model.named_buffers()}
    with torch.random.fork_rng(), torch.no_grad(), counter:
        maker.model(*arguments)
        for k, b in maker.model.named_buffers():
            b.copy_(buffers[k])
    name = type(maker.model).__name__
    found = {module: float(3 * sum(ops.values())) for module, ops in counter.get_flop_counts().items()}
    inner = {module.removeprefix(f"{name}."): flops for module, flops in found.items() if module not in ("Global", name)}
    return {**inner, "": found.get("Global", 0.0)}


def _count(run: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        run()
    return float(counter.get_total_flops())


def _block_rows(maker: PreconditionedGradientMaker, block: Block, passes: dict[str, float]) -> list[LayerCost]:
    B = block.frame.stack
    state = {k: v.clone() for k, v in block.state.items()}
    cache = {k: v.clone() for k, v in block.cache.items()}
    g = torch.ones(B, *block.frame.shape, dtype=block.frame.dtype, device=block.frame.device)
    refresh = _count(lambda: block.refreshed(state, cache))
    apply = _count(lambda: block.applied(cache, g))
    held = sum(t.numel() * t.element_size() for part in (block.state, block.cache) for t in part.values())
    every = [
        as_schedule("", interval).interval(maker.step)
        for interval in (maker.config.curvature_interval, maker.config.preconditioner_interval)
    ]
    total = sum(slot.stop - slot.start for slot in block.slots)
    rows = []
    for site, slot in zip(block.sites, block.slots, strict=True):
        share = (slot.stop - slot.start) / total
        step = _step(maker, site, passes)
        statistic = _statistic(block, site, g, step, share)
        spent = statistic / every[0] + refresh * share / every[1] + apply * share
        names = ", ".join(site.parameters)
        ratio = spent / step if step else float("inf")
        rows.append(LayerCost(names, step, statistic, refresh * share, apply * share, int(held * share), ratio))
    return rows


def _step(maker: PreconditionedGradientMaker, site: Site, passes: dict[str, float]) -> float:
    """FLOPs of the passes of a site: the share of its parameters in the modules that own them, by size."""
    total = 0.0
    for name in site.parameters:
        module = name.rpartition(".")[0]
        owned = sum(p.numel() for p in maker.model.get_submodule(module).parameters(recurse=False))
        total += passes.get(module, 0.0) * prod(site.shape) / owned / len(site.parameters)
    return total


def _statistic(block: Block, site: Site, g: Tensor, step: float, share: float) -> float:
    """FLOPs of one measurement of a site, which has the given share of a stack."""
    representation = block.triple.representation
    if kinds(Gradient) <= representation.takes & block.triple.curvature.gives:
        state = {k: v.clone() for k, v in block.state.items()}
        return share * _count(lambda: representation.update(state, Gradient(g), Fold(0.9, 0.1, 0.1)))
    weights = prod(site.shape) - (prod(site.shape[:-1]) if site.bias else 0)
    positions = step / (6 * max(weights, 1))  # a forward pass multiplies and adds once for each weight and position
    sides = block.frame.shape if isinstance(representation, FactoredAxes) else (prod(block.frame.shape),)
    blocks = prod(site.shape) / prod(block.frame.shape)
    longest = block.frame.longest or max(sides)
    widths = [1 if k in block.frame.diagonal else min(d, longest) for k, d in enumerate(sides)]
    return blocks * sum(2 * positions * d * width for d, width in zip(sides, widths, strict=True))
