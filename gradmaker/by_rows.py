"""Blocks whose gradient is held by its rows, see `gradmaker.capture.row_calls`: which they are, and their ``P g``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmaker.averages import basis_of
from gradmaker.block_options import BlockOptions
from gradmaker.capture.row_calls import RowLayer
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold, Frame, Representation
from gradmaker.representations.roles import FoldsRows
from gradmaker.solvers.roles import AppliesRows
from gradmaker.triple import Triple

__all__ = ["applies", "folds", "layer_of", "solve", "update"]


def layer_of(sites: Sequence[Site], frame: Frame) -> RowLayer | None:
    """The linear layer that a block is; None where a block is something else, or a stack."""
    layer = RowLayer.of(sites[0]) if len(sites) == 1 else None
    same = layer is not None and (1, *frame.shape) == layer.site.shape and layer.weight.dtype == frame.dtype
    return layer if same else None


def folds(triple: Triple) -> bool:
    """Whether the evidence of a gradient may be given by rows."""
    return isinstance(triple.representation, FoldsRows) and triple.curvature.by_rows


def applies(triple: Triple, options: BlockOptions) -> bool:
    """Whether ``P g`` is computed by rows: an average of gradients has none, one of coordinates is made of them.

    Nor has an element-wise grafting rule.
    """
    solver = triple.solver
    by_rows = isinstance(solver, AppliesRows) and solver.by_rows(triple.representation)
    averaged = bool(options.beta1) and basis_of(triple, options) is None
    plain = options.precision.application is None and not averaged
    return by_rows and plain and (options.grafting is None or options.grafting.by_rows)


def update(representation: Representation, state: State, evidence: Evidence, fold: Fold) -> None:
    """Fold evidence into ``state`` in place, by rows where it is given so."""
    if isinstance(evidence, RowGradient):
        assert isinstance(representation, FoldsRows)
        representation.update_rows(state, evidence.factored, fold)
    else:
        representation.update(state, evidence, fold)


def solve(triple: Triple, options: BlockOptions, cache: State, raw: FactoredGradient) -> FactoredGradient | Tensor:
    """The preconditioned gradient, rescaled as configured, where `applies`."""
    solver, rule = triple.solver, options.grafting
    assert isinstance(solver, AppliesRows)
    value: FactoredGradient | Tensor = solver.solve_rows(triple.representation, cache, raw)
    return value if rule is None else _scaled(value, rule.scale(raw.length(), _length(value)))


def _length(value: FactoredGradient | Tensor) -> Tensor:
    """The length of each member.  # (B,)"""
    return value.length() if isinstance(value, FactoredGradient) else torch.linalg.vector_norm(value.flatten(1), dim=1)


def _scaled(value: FactoredGradient | Tensor, factors: Tensor) -> FactoredGradient | Tensor:
    return value.scaled(factors) if isinstance(value, FactoredGradient) else value * factors.view(-1, 1, 1)
