"""`summary`: a table of the parts that precondition each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.costs.prediction import StepCost
from gradmaker.linalg.diagnosis import COLUMNS
from gradmaker.plan import Plan
from gradmaker.self_checks import SelfChecks
from gradmaker.self_checks.checks import OUTSIDE, WHOLE

__all__ = ["Summary", "summarise"]

DIAGNOSIS = ("factor", *COLUMNS, "failures")
HEADER = ("parameters", "block", "curvature", "representation", "solver", "bytes")


@dataclass(frozen=True)
class Summary:
    """Rows of (parameters, block, curvature, representation, solver, bytes); prints as a table.

    ``refreshes`` has a row for the last refresh of every factor: its name, `gradmaker.linalg.diagnosis.COLUMNS`, and the number
    of failures of its block. ``unchecked`` says what the self-checks could not prove, and why; ``notes`` what they
    found of the loss; ``step`` the predicted cost of a step, for a batch that was given.
    """

    rows: list[tuple[str, str, str, str, str, int]]
    refreshes: list[tuple[str, int, float, float, float, int, int]] = field(default_factory=list)
    unchecked: Mapping[str, str] = field(default_factory=dict)  # by site, or "loss"
    notes: Mapping[str, str] = field(default_factory=dict)
    step: StepCost | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all statistics and caches."""
        return sum(row[-1] for row in self.rows)

    def __str__(self) -> str:
        lines = _table([HEADER, *[(*row[:-1], f"{row[-1]:,}") for row in self.rows]])
        if self.refreshes:
            shown = [(name, str(n), *(f"{x:.2g}" for x in xs), str(r), str(f)) for name, n, *xs, r, f in self.refreshes]
            lines += ["", *_table([DIAGNOSIS, *shown]), ""]
        lines += [f"unchecked, {name}: {reason}" for name, reason in self.unchecked.items()]
        lines += [f"{name}: {text}" for name, text in self.notes.items()]
        lines += [f"predicted: {self.step}"] if self.step else []
        return "\n".join([*lines, f"total {self.bytes:,} bytes"])


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first row underlined."""
    widths = [max(len(row[j]) for row in cells) for j in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def summarise(plan: Plan, reached: Set[str], checks: SelfChecks, step: StepCost | None = None) -> Summary:
    """One row for each site and each parameter that keeps its plain gradient.

    Once passes have been made, sites without evidence are marked; so are sites that are not measured through their layer.
    """
    rows = []
    for block in plan.blocks:
        size = block.bytes
        total = sum(slot.stop - slot.start for slot in block.slots)
        for site, slot in zip(block.sites, block.slots, strict=True):
            mark = " (not reached)" if reached and site.name not in reached else _how_measured(block, site, checks)
            count = slot.stop - slot.start
            shape = f"{1 if block.full else count} x {tuple(block.frame.shape)}"
            parts = (block.triple.curvature, block.triple.representation, block.triple.solver)
            names = ", ".join(site.parameters) + mark
            rows.append((names, shape, *(str(p) for p in parts), size * count // total))
    rows += [(name, "-", reason, "-", "plain gradient", 0) for name, reason in plan.plain.items()]
    return Summary(rows, _refreshes(plan.blocks), _unchecked(plan, reached, checks), _notes(checks), step)


def _how_measured(block: Block, site: Site, checks: SelfChecks) -> str:
    """How a site is measured, if that is not through its layer for all examples at once."""
    own = checks.arrangement
    if "calls" not in block.triple.curvature.needs:
        return ""
    if own.direct.intersection(site.parameters):
        return " (measured directly)"
    apart = any(order is None and key[0] in site.modules for key, order in own.orders.items())
    return " (measured apart)" if apart else ""


def _unchecked(plan: Plan, reached: Set[str], checks: SelfChecks) -> dict[str, str]:
    """What the self-checks could not prove, with the reason."""
    found, own = {}, checks.arrangement
    for block in plan.blocks:
        for site in block.sites if "calls" in block.triple.curvature.needs else ():
            if site.name not in reached or own.direct.intersection(site.parameters):
                continue
            if checks.mode == "off":
                found[site.name] = "self_check='off'"
            elif site.modules and not checks.proven(site.modules):
                found[site.name] = "its gradient was zero in every pass so far, or no pass was checked"
    if "loss" in own.notes:
        found["loss"] = f"{own.notes['loss']}, so that its curvature was not compared"
    if "groups" in own.notes:
        found["groups"] = own.notes["groups"]
    return found


def _notes(checks: SelfChecks) -> dict[str, str]:
    """How the loss is measured, if not by its recognised terms or not as a whole."""
    return {name: checks.arrangement.notes[name] for name in (WHOLE, OUTSIDE) if name in checks.arrangement.notes}


def _refreshes(blocks: Sequence[Block]) -> list[tuple[str, int, float, float, float, int, int]]:
    """Diagnoses of the last refresh in the caches, with one host read."""
    names, found = [], []
    for block in blocks:
        if "diagnosis" not in block.cache:
            continue
        factors = block.cache["diagnosis"].double()  # (B, m, 5)
        failures = block.cache["failures"].double().view(-1, 1, 1).expand(-1, factors.shape[1], 1)
        found.append(torch.cat([factors, failures], -1).flatten(0, 1).cpu())
        names += [f"{name}.{k}" for name in block.members() for k in range(factors.shape[1])]
    values = torch.cat(found).tolist() if found else []
    return [(name, int(n), e, top, r, int(t), int(f)) for name, (n, e, top, r, t, f) in zip(names, values, strict=True)]
