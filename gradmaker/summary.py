"""A table of what treats which parameters."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.plan import Plan

__all__ = ["Summary", "summarise"]

HEADER = ("parameters", "block", "curvature", "representation", "solver", "bytes")


@dataclass(frozen=True)
class Summary:
    """Rows of (parameters, block, curvature, representation, solver, bytes); prints as a table."""

    rows: list[tuple[str, str, str, str, str, int]]

    @property
    def bytes(self) -> int:
        """All statistics and caches."""
        return sum(row[-1] for row in self.rows)

    def __str__(self) -> str:
        cells = [HEADER, *[(*row[:-1], f"{row[-1]:,}") for row in self.rows]]
        widths = [max(len(row[j]) for row in cells) for j in range(len(HEADER))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"total {self.bytes:,} bytes"])


def summarise(plan: Plan, reached: set[str]) -> Summary:
    """One row for each site and each plain parameter; sites that no pass has reached are marked once passes have been made."""
    rows = []
    for block in plan.blocks:
        tensors = [t for part in (block.state, block.cache, block.average, block.norm_state) for t in part.values()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        total = sum(slot.stop - slot.start for slot in block.slots)
        for site, slot in zip(block.sites, block.slots, strict=True):
            mark = " (not reached)" if reached and site.name not in reached else ""
            count = slot.stop - slot.start
            shape = f"{1 if block.full else count} x {tuple(block.frame.shape)}"
            parts = (block.triple.curvature, block.triple.representation, block.triple.solver)
            names = ", ".join(site.parameters) + mark
            rows.append((names, shape, *(str(p) for p in parts), size * count // total))
    rows += [(name, "-", reason, "-", "plain gradient", 0) for name, reason in plan.plain.items()]
    return Summary(rows)
