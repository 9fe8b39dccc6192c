"""Methods that hold an inverse, by the rows of gradients in whole steps: what they give with formed gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.curvature.probe import _lifted_rows
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.planned import PlannedMaker
from gradmaker.representations import InverseDims, KronQ
from tests import oracles

STEPS = 5
METHODS: dict[str, dict[str, Any]] = {
    "kradagrad_star": {"method": "kradagrad_star", "preconditioner_interval": 2, "warmup_steps": 0},
    "kradagrad_star_decayed": {
        "method": "kradagrad_star",
        "decay": 0.9,
        "denominator": "tr",
        "damping": 0.1,
        "grafting": "none",
    },
    "psgd_whiten": {"method": "psgd_whiten", "damping": 0.0},
    "psgd_whiten_quad": {"method": "psgd_whiten", "damping": 0.0, "geometry": "QUAD", "curvature_interval": 2},
    "psgd_whiten_bounds": {"method": "psgd_whiten", "damping": 0.0, "geometry": "QEP", "curvature_interval": 9},
    "psgd_whiten_graft": {"method": "psgd_whiten", "damping": 0.0, "geometry": "EQ", "grafting": "keep"},
    "kbfgs": {"method": "kbfgs", "beta1": 0.0},
}


def trained(options: dict[str, Any], growth: float = 1.0) -> list[Tensor]:
    """The preconditioned gradients of some steps of one run.  growth: of the loss from step to step"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 34), nn.Tanh(), nn.Linear(34, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    maker: Any = from_config(model, options)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    for t in range(STEPS):
        x = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        y = maker.setup_model_call(model, x)
        maker.setup_loss_call(lambda y, t, scale=growth**t: scale * F.cross_entropy(y, t), y, torch.arange(6) % 5)
        maker.forward_and_backward()
        found.append(oracles.gradient_vector(model))
        optimizer.step()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_steps_by_rows_are_those_of_formed_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[Any] = []
    for kind in (InverseDims, KronQ):
        update_rows = kind.update_rows

        def counted(self: Any, state: Any, rows: Any, fold: Any, original: Any = update_rows) -> None:
            folded.append(rows)
            original(self, state, rows, fold)

        monkeypatch.setattr(kind, "update_rows", counted)
    growth = 10.0 if name == "psgd_whiten_bounds" else 1.0
    by_rows = trained(METHODS[name], growth)
    assert bool(folded) == (name != "kbfgs")
    monkeypatch.setattr(PlannedMaker, "row_layers", lambda self: [])
    count = len(folded)
    formed = trained(METHODS[name], growth)
    assert len(folded) == count
    for t, (found, expected) in enumerate(zip(by_rows, formed, strict=True)):
        assert oracles.relative_error(found, expected) < 1e-10, t


class _Step:
    """What a probe reads of a step."""

    part = 0


def test_the_lift_of_rows_has_the_moments_of_that_of_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """``E[N N^T] = (lift + eps rms)^2 i I``, and of columns alike; a gradient of zero gets none. Five sigma."""
    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr("gradmaker.curvature.probe._generator", lambda *_: generator)
    rows = FactoredGradient(
        torch.randn(2, 3, 4, generator=generator).double(), torch.randn(2, 3, 6, generator=generator).double()
    )
    rows.g[1] = 0
    step: Any = _Step()
    draws, total, squares = 4000, torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for _ in range(draws):
        lifted = _lifted_rows(step, "w", rows, 0.5)
        assert lifted.count == 4 and torch.equal(lifted.form()[1], torch.zeros(4, 6).double())
        N = (lifted.form() - rows.form())[0]
        total += N @ N.T
        squares += (N @ N.T).square()
    mean = total / draws
    spread = (squares / draws - mean.square()).sqrt() / draws**0.5
    assert ((mean - 0.25 * 6 * torch.eye(4).double()).abs() < 5 * spread).all()
    assert _lifted_rows(step, "w", rows, 0.0) is rows
