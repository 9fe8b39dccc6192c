"""Gradients that are held by rows: statistics in a basis, and divisions there, are those of the formed gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature.evidence import Gradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import dense
from gradmaker.linalg.rotation import turned
from gradmaker.linalg.state import State
from gradmaker.representations import Eigenbasis, RotatedDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import Rotate, RotatedDivision
from tests import oracles

STACK, ROWS, OUT, IN = 2, 5, 7, 6
FOLD = Fold(0.8, 0.2, 0.2)


def rows(seed: int) -> FactoredGradient:
    generator = torch.Generator().manual_seed(seed)
    g, a = (torch.randn(STACK, ROWS, d, dtype=torch.float64, generator=generator) for d in (OUT, IN))
    return FactoredGradient(g, a)


def frame(diagonal: frozenset[int] = frozenset()) -> Frame:
    return Frame(STACK, (OUT, IN), diagonal, torch.float64, torch.device("cpu"))


def close(found: Tensor, expected: Tensor) -> None:
    assert oracles.relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("diagonal", [frozenset(), frozenset({1})], ids=["both", "left"])
@pytest.mark.parametrize(
    "options",
    [{}, {"skip_first": True}, {"sequence": "basis_first", "tracking": "qr", "tolerance": 0.01}, {"tracking": "eigh"}],
    ids=str,
)
def test_a_statistic_of_rows_is_that_of_the_gradient(options: dict[str, Any], diagonal: frozenset[int]) -> None:
    """From any state, with and without a refresh, the first evidence and a later micro-batch included."""
    representation = RotatedDims(**options)
    state = representation.init(frame(diagonal))
    for index in range(9):
        G = rows(index)
        own = replace(FOLD, refresh=index % 3 == 0, first=index == 0, index=index)
        if index == 5:
            own = own.of(again=True, first=False)
        other = {k: v.clone() for k, v in state.items()}
        representation.update_rows(other, G, own)
        representation.update(state, Gradient(G.form()), own)
        if index == 0:  # the null space of the first gradient has no basis of its own
            continue
        for key, value in state.items():
            sign = torch.ones_like(value)
            if key.startswith("basis"):  # columns are known but for their signs
                sign = (value * other[key]).sum(-2, keepdim=True).sign()
            error = oracles.relative_error((sign * other[key]).double(), value.double())
            assert error < (1e-9 if own.refresh else 1e-12) or not value.any(), key


def basis(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(STACK, d, d, dtype=torch.float64, generator=generator))[0].contiguous()


def tiled(d: int, width: int) -> Tensor:
    """Bases of blocks along the diagonal, the last one smaller."""
    out = torch.zeros(STACK, d, width, dtype=torch.float64)
    for start in range(0, d, width):
        size = min(width, d - start)
        out[:, start : start + size, :size] = basis(size, start)
    return out


def state_of(left: Tensor | None, right: Tensor | None, names: tuple[str, str]) -> State:
    generator = torch.Generator().manual_seed(9)
    moments = torch.rand(STACK, OUT, IN, dtype=torch.float64, generator=generator)
    found = {"moments": moments, "mass": torch.full((STACK,), 0.7, dtype=torch.float64)}
    return found | {name: Q for name, Q in zip(names, (left, right), strict=True) if Q is not None}


FORMS = {
    "both": (basis(OUT, 1), basis(IN, 2)),
    "left": (basis(OUT, 1), None),
    "right": (None, basis(IN, 2)),
    "neither": (None, None),
    "blocks": (basis(OUT, 1), tiled(IN, 4)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "representation, solver, names",
    [
        (RotatedDims(), RotatedDivision(damping=1e-3, raw=True), ("basis_0", "basis_1")),
        (Eigenbasis(), Rotate(damping=0.1), ("basis_left", "basis_right")),
    ],
    ids=["soap", "ekfac"],
)
def test_a_division_of_rows_is_that_of_the_gradient(representation: Any, solver: Any, names: Any, form: str) -> None:
    """Of the gradient, by its rows or its coordinates: ``Q [scale * (Q^T G)]`` with Kronecker products that are formed."""
    if form == "blocks" and isinstance(representation, RotatedDims):
        return
    state, G = state_of(*FORMS[form], names), rows(3)
    cache = solver.prepare(representation, state, None)
    found = solver.solve_rows(representation, cache, G)
    for b in range(STACK):
        sides = [
            torch.eye(d, dtype=torch.float64) if Q is None else dense(Q)[b] for Q, d in zip(FORMS[form], (OUT, IN), strict=True)
        ]
        Q = oracles.kron(*sides)
        gradient = torch.einsum("ro,ri->oi", G.g[b], G.a[b])
        P = Q @ torch.diag(cache["scale"][b].flatten()) @ Q.T
        close(found[b], (P @ gradient.flatten()).reshape(OUT, IN))
        x = solver.coordinates(representation, cache, G)
        close(x[b], (Q.T @ gradient.flatten()).reshape(OUT, IN))
    close(solver.coordinates(representation, cache, G.form()), x)
    close(solver.solve_coordinates(cache, x), found)
    close(solver.solve(representation, cache, G.form()), found)


@pytest.mark.parametrize("turning", [(True, True), (True, False), (False, False)])
def test_coordinates_follow_a_basis(turning: tuple[bool, bool]) -> None:
    """Those of a gradient in a new basis, from those in the old one."""
    representation, solver, names = RotatedDims(), RotatedDivision(), ("basis_0", "basis_1")
    old = (basis(OUT, 1), basis(IN, 2))
    new = tuple(basis(d, 7) if turns else Q for Q, d, turns in zip(old, (OUT, IN), turning, strict=True))
    before = solver.prepare(representation, state_of(*old, names), None)
    after = solver.prepare(representation, state_of(new[0], new[1], names), None)
    G = rows(4)
    found = turned(solver.coordinates(representation, before, G), solver.bases(before), solver.bases(after))
    close(found, solver.coordinates(representation, after, G))
    assert any(turning) or torch.equal(found, solver.coordinates(representation, before, G))
