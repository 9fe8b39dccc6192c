"""Failed refreshes in a row: counted on the device, read without waiting for it, an error beyond a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.linalg.state import State
from gradmaker.step.held import Held

__all__ = ["Failures", "Report"]


@dataclass(frozen=True)
class Report:
    """Counters that are being copied to the host."""

    blocks: list[Block]
    sizes: list[int]
    counters: Tensor  # failures in a row, and in all  # (2, members)
    arrived: torch.Event | None  # None: the copy is complete
    step: int


class Failures:
    """Raises when the refresh of a block has failed more than ``allowed`` times in a row; its last good root stays in use.

    Counters are copied to the host after a refresh, without waiting: on a CPU they are checked at once, on an
    accelerator by the first step that finds the copy complete. ``allowed=None`` never raises.

    Reference: Distributed Shampoo (Shi et al. 2023, arXiv:2309.06497), whose tolerated failures these are.
    """

    def __init__(self, allowed: int | None) -> None:
        self.allowed = allowed

    def count(self, refreshed: Sequence[tuple[Block, Held]], step: int) -> tuple[Report, ...]:
        """Start to copy the counters of refreshed blocks to the host."""
        if self.allowed is None:
            return ()
        counted = [(b, c) for b, held in refreshed for c in (held.state, held.cache) if "failing" in c]
        devices = dict.fromkeys(b.frame.device for b, _ in counted)
        return tuple(_report([(b, c) for b, c in counted if b.frame.device == device], device, step) for device in devices)

    def check(self, reports: tuple[Report, ...]) -> tuple[Report, ...]:
        """Check the reports that have arrived, return the others. RuntimeError for a block beyond the limit."""
        for number, report in enumerate(reports):
            if report.arrived is not None and not report.arrived.query():
                return reports[number:]
            self._judge(report)
        return ()

    def _judge(self, report: Report) -> None:
        in_a_row, in_all = report.counters.tolist()  # on the host already
        if self.allowed is None or max(in_a_row, default=0) <= self.allowed:
            return
        worst = in_a_row.index(max(in_a_row))
        members = [(b, name) for b, size in zip(report.blocks, report.sizes, strict=True) for name in _names(b, size)]
        block, name = members[worst]
        parts = (block.triple.curvature, block.triple.representation, block.triple.solver)
        raise RuntimeError(
            f"{name} ({' x '.join(type(part).__name__ for part in parts)}): at step {report.step} its refresh failed for the "
            f"{in_a_row[worst]}. time in a row, {in_all[worst]} times in all. It keeps its last good root; the "
            f"statistic is not finite, indefinite or too ill-conditioned: a larger damping or dtype='float64' may help. "
            f"failures_allowed={self.allowed}; None sets no limit"
        )


def _report(counted: Sequence[tuple[Block, State]], device: torch.device, step: int) -> Report:
    counters = torch.cat([torch.stack([c["failing"], c["failures"]]) for _, c in counted], 1)
    blocks, sizes = [b for b, _ in counted], [len(c["failing"]) for _, c in counted]
    if device.type in ("cpu", "meta"):
        return Report(blocks, sizes, counters, None, step)
    here = counters.to("cpu", non_blocking=True)
    event = torch.Event(device)
    event.record()
    return Report(blocks, sizes, here, event, step)


def _names(block: Block, size: int) -> list[str]:
    return block.members() if len(block.members()) == size else [block.name] * size
