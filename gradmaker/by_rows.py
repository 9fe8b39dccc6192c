"""Blocks whose gradient is held by its rows, see `gradmaker.capture.row_calls`: which they are, and their ``P g``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from gradmaker.averages import basis_of
from gradmaker.block_options import BlockOptions
from gradmaker.capture.row_calls import RowLayer
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import Evidence, Gradient, Outer
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.precision import Precision
from gradmaker.representations.base import Fold, Frame, Representation
from gradmaker.representations.roles import FoldsMoments, FoldsRows, SpansGradient
from gradmaker.solvers.roles import AppliesRows, SolvesOwn
from gradmaker.step.held import Held
from gradmaker.triple import Triple

__all__ = ["Value", "applies", "folds", "layers_of", "owns", "pieces", "solve", "solve_own", "update"]


Value: TypeAlias = Tensor | FactoredGradient | list[FactoredGradient | Tensor]
"""``P g`` of a block: formed, by the rows of its one layer, or in one of these ways for each of its layers."""


def layers_of(sites: Sequence[Site], frame: Frame, full: bool) -> list[RowLayer]:
    """The linear layer that a block is, or those that a block of all layers is; none where it is a stack, or something else.

    full: whether the sites are one block
    """
    layers = [RowLayer.of(site) for site in sites] if full or len(sites) == 1 else []
    found = [x for x in layers if x is not None and x.weight.dtype == frame.dtype]
    found = [x for x in found if full or x.site.shape == (1, *frame.shape)]
    return found if len(found) == len(sites) else []


def folds(triple: Triple) -> bool:
    """Whether the evidence of a gradient may be given by rows."""
    return isinstance(triple.representation, FoldsRows) and triple.curvature.by_rows


def applies(triple: Triple, options: BlockOptions) -> bool:
    """Whether ``P g`` is computed by rows: an average of gradients has none, nor what a grafting rule reads by entries.

    An average of coordinates is made of them.
    """
    solver = triple.solver
    by_rows = isinstance(solver, AppliesRows) and solver.by_rows(triple.representation)
    averaged = bool(options.beta1) and basis_of(triple, options) is None
    plain = options.precision.application is None and not averaged
    rule = options.grafting
    return by_rows and plain and (rule is None or rule.by_rows)


def owns(triple: Triple, options: BlockOptions) -> bool:
    """Whether ``P g`` may be computed from the evidence of the step alone, as its rows make up ``g``."""
    known = isinstance(triple.solver, SolvesOwn) and isinstance(triple.representation, SpansGradient)
    plain = options.precision == Precision() and not options.beta1 and options.grafting is None
    return known and plain and (triple.curvature.by_rows or {"main_backward", "examples"} <= triple.curvature.needs)


def update(representation: Representation, state: State, evidence: Evidence, fold: Fold) -> None:
    """Fold evidence into ``state`` in place, by rows where it is given so."""
    if isinstance(evidence, RowGradient):
        rows = evidence.factored
        if type(rows) is FactoredGradient and rows.cancels():
            representation.update(state, Gradient(rows.form()), fold)
            return
        assert isinstance(representation, FoldsRows)
        representation.update_rows(state, rows, fold)
        return
    if isinstance(evidence, Outer) and not isinstance(representation, FoldsMoments):
        evidence = evidence.settled()
    representation.update(state, evidence, fold)


def solve(triple: Triple, options: BlockOptions, cache: State, raw: FactoredGradient) -> FactoredGradient | Tensor:
    """The preconditioned gradient, rescaled as configured, where `applies`."""
    solver, rule = triple.solver, options.grafting
    assert isinstance(solver, AppliesRows)
    value: FactoredGradient | Tensor = solver.solve_rows(triple.representation, cache, raw)
    if rule is None:
        return value
    formed = value if isinstance(value, Tensor) else value.form()  # it is formed anyway, and its length takes less than by rows
    return rule.rescale_rows(formed, raw)


def solve_own(triple: Triple, options: BlockOptions, held: Held, rows: Sequence[FactoredGradient]) -> Value | None:
    """The same for a step whose evidence is in the statistic, from that alone, where `owns`; None where it has to be given.

    rows: the gradients that are held by rows alone, in the order of the layers
    """
    if not owns(triple, options) or (triple.curvature.of_passes and not rows):
        return None
    solver = triple.solver
    assert isinstance(solver, SolvesOwn)
    found: Value | None = solver.solve_own(triple.representation, held.state, held.cache)
    if not isinstance(found, list):
        return found
    if [tuple(x.shape) for x in found] != [x.shape for x in rows]:
        return None
    return found if triple.representation.grain == "full" else found[0]


def pieces(value: Value, slots: Sequence[slice], full: bool) -> Sequence[Tensor | FactoredGradient]:
    """What each site gets of the ``P g`` of its block.  slots: of the sites; full: whether they are one block"""
    if isinstance(value, Tensor):
        return [value[0, slot] if full else value[slot] for slot in slots]
    return value if isinstance(value, list) else [value]
