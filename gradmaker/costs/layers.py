"""The cost of preconditioning by layer: FLOPs, bytes and the predicted overhead of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.costs.counting import Recorder
from gradmaker.costs.flops import OWN
from gradmaker.costs.prediction import explained
from gradmaker.costs.trial import PredictedMaker, arguments, build_like, trying
from gradmaker.curvature.evidence import Gradient
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import FactoredAxes
from gradmaker.schedule import as_schedule

__all__ = ["CostReport", "LayerCost", "cost_report", "module_flops"]

HEADER = ("parameters", "step", "statistic", "refresh", "apply", "bytes", "overhead")


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


def cost_report(maker: PredictedMaker, batch: Any) -> CostReport:
    """Report FLOPs and bytes by layer, from shapes alone: the blocks of a maker work on tensors without data.

    The statistic of a layer-wise curvature is estimated: ``2 N d^2`` for a factor of side ``d`` and ``N`` positions, without
    extra backward passes. All else is counted. FLOPs are not seconds, which `cost` predicts.
    CostError, with the reason, for a model or a method whose steps need data.

    batch: the input of the model, a tensor or a tuple of arguments
    """
    with explained(), trying(maker.model, build_like(maker), batch) as (loop, recorder):
        passes = module_flops(loop.model, loop.batch)
        rows, spent = [], 0.0
        for block in loop.maker.plan.blocks:
            if block.cache:
                found = _block_rows(maker, block, passes, recorder)
                rows += found
                spent += sum(row.overhead * row.step if row.step else 0.0 for row in found)
    total = passes[""]
    return CostReport(rows, spent / total if total else float("inf"))


def module_flops(model: nn.Module, batch: Any) -> dict[str, float]:
    """FLOPs of forward and backward pass by module, three times those of the forward pass; of the model under an empty name.

    Model and batch may be on the meta device.
    """
    args, kwargs = arguments(batch)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=OWN) as counter:
        model(*args, **kwargs)
    name = type(model).__name__
    found = {module: float(3 * sum(ops.values())) for module, ops in counter.get_flop_counts().items()}
    inner = {module.removeprefix(f"{name}."): flops for module, flops in found.items() if module not in ("Global", name)}
    return {**inner, "": found.get("Global", 0.0)}


def _count(recorder: Recorder, run: Callable[[], object]) -> float:
    recorder.start()
    with torch.no_grad():
        run()
    return recorder.work.total_flops


def _block_rows(maker: PredictedMaker, block: Block, passes: dict[str, float], recorder: Recorder) -> list[LayerCost]:
    g = block.frame.zeros(*block.frame.shape)
    refresh = _count(recorder, lambda: block.refreshed(block.state, block.cache))
    apply = _count(recorder, lambda: block.applied(block.cache, g))
    held = sum(t.numel() * t.element_size() for part in (block.state, block.cache) for t in part.values())
    every = [
        as_schedule("", interval).interval(maker.step_state.now.index)
        for interval in (maker.config.curvature_interval, maker.config.preconditioner_interval)
    ]
    total = sum(slot.stop - slot.start for slot in block.slots)
    rows = []
    for site, slot in zip(block.sites, block.slots, strict=True):
        share = (slot.stop - slot.start) / total
        step = _step(maker.model, site, passes)
        statistic = _statistic(block, site, g, step, share, recorder)
        spent = statistic / every[0] + refresh * share / every[1] + apply * share
        names = ", ".join(site.parameters)
        ratio = spent / step if step else float("inf")
        rows.append(LayerCost(names, step, statistic, refresh * share, apply * share, int(held * share), ratio))
    return rows


def _step(model: nn.Module, site: Site, passes: dict[str, float]) -> float:
    """FLOPs of the passes of a site: the share of its parameters in the modules that own them, by size."""
    total = 0.0
    for name in site.parameters:
        module = name.rpartition(".")[0]
        owned = sum(p.numel() for p in model.get_submodule(module).parameters(recurse=False))
        total += passes.get(module, 0.0) * prod(site.shape) / owned / len(site.parameters)
    return total


def _statistic(block: Block, site: Site, g: Tensor, step: float, share: float, recorder: Recorder) -> float:
    """FLOPs of one measurement of a site, which has the given share of a stack."""
    representation = block.triple.representation
    if kinds(Gradient) <= representation.takes & block.triple.curvature.gives:
        state = {k: v.clone() for k, v in block.state.items()}
        return share * _count(recorder, lambda: representation.update(state, Gradient(g), Fold(0.9, 0.1, 0.1)))
    weights = prod(site.shape) - (prod(site.shape[:-1]) if site.bias else 0)
    positions = step / (6 * max(weights, 1))  # a forward pass multiplies and adds once for each weight and position
    sides = block.frame.shape if isinstance(representation, FactoredAxes) else (prod(block.frame.shape),)
    blocks = prod(site.shape) / prod(block.frame.shape)
    longest = block.frame.longest or max(sides)
    widths = [1 if k in block.frame.diagonal else min(d, longest) for k, d in enumerate(sides)]
    return blocks * sum(2 * positions * d * width for d, width in zip(sides, widths, strict=True))
