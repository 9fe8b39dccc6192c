"""What `Gram` makes of rows that are not finite: what a zero curvature would give, in the units that were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradmaker.curvature import Gradient
from gradmaker.representations import Window
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import Gram
from tests import oracles

OPTIONS: dict[str, tuple[dict[str, Any], float]] = {  # and the gain, of a damping of 0.2
    "inverse": ({}, 5.0),
    "inverse, preserving": ({"scale_preserving": True}, 1.0),
    "spectral inverse": ({"tail": "none"}, 5.0),
    "root": ({"power": -0.5}, 5.0),
    "root, preserving": ({"power": -0.5, "scale_preserving": True}, 1.0),
    "root, damped before": ({"power": -0.5, "placement": "before"}, 0.2**-0.5),
    "root, damped before, preserving": ({"power": -0.5, "placement": "before", "scale_preserving": True}, 0.2**0.5),
    "relative": ({"mode": "largest"}, 1.0),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_before_any_success(name: str) -> None:
    options, gain = OPTIONS[name]
    solver, representation = Gram(damping=0.2, **options), Window(size=3, granularity="layer")
    state = representation.init(Frame(1, (4,), frozenset(), torch.float64, torch.device("cpu")))
    for value in (1.0, torch.inf):
        representation.update(state, Gradient(torch.full((1, 4), value).double()), Fold(1.0, 1.0, 1.0, summed=True))
    cache, g = solver.prepare(representation, state, None), torch.randn(1, 4, dtype=torch.float64)
    assert cache["failures"].tolist() == [1]
    assert oracles.relative_error(solver.solve(representation, cache, g), gain * g) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
def test_after_a_success_the_last_cache_is_kept(name: str) -> None:
    solver, representation = Gram(damping=0.2, **OPTIONS[name][0]), Window(size=3, granularity="layer")
    state = representation.init(Frame(1, (4,), frozenset(), torch.float64, torch.device("cpu")))
    representation.update(state, Gradient(torch.randn(1, 4, dtype=torch.float64)), Fold(1.0, 1.0, 1.0, summed=True))
    good, g = solver.prepare(representation, state, None), torch.randn(1, 4, dtype=torch.float64)
    before = solver.solve(representation, good, g).clone()
    representation.update(state, Gradient(torch.full((1, 4), torch.nan).double()), Fold(1.0, 1.0, 1.0, summed=True))
    kept = solver.prepare(representation, state, good)
    assert torch.equal(solver.solve(representation, kept, g), before) and kept["failing"].tolist() == [1]
