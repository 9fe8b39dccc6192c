"""Muon: torch's own, the coefficients of Polar Express, and what a polar factor owes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.solvers.polar_factor import MUON, _value, polar_express, polar_factor
from tests import oracles
from tests.methods.test_kronecker_dims import gradients, run


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("adjust, scale", [("original", "aspect"), ("match_rms_adamw", "rms")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_torch_agrees(shape: tuple[int, int], adjust: str, scale: str, nesterov: bool) -> None:
    """torch iterates in bfloat16 on the whole way, and so does ``half``."""
    start = gradients(*shape, steps=1, seed=3)[0].float()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    model = nn.Module()
    model.w = ours
    maker = from_config(model, {"method": "muon", "half": True, "scale": scale, "nesterov_average": nesterov})
    muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust)
    sgd = torch.optim.SGD([ours], lr=0.02)
    for g in gradients(*shape, steps=30):
        ours.grad, theirs.grad = g.float(), g.float()
        maker.precondition()
        with torch.no_grad():
            ours.mul_(1 - 0.02 * 0.1)
        sgd.step()
        muon.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 3e-2 * moved  # single entries round differently: the average is scaled by its mass


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("adjust, scale", [("original", "aspect"), ("match_rms_adamw", "rms")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_torch_agrees_in_float64(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], adjust: str, scale: str, nesterov: bool
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # the one place where torch leaves the precision
    start = gradients(*shape, steps=1, seed=3)[0]
    model = nn.Module()
    model.w = ours = nn.Parameter(start.clone())
    theirs = nn.Parameter(start.clone())
    maker = from_config(model, {"method": "muon", "scale": scale, "nesterov_average": nesterov})
    muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust)
    sgd = torch.optim.SGD([ours], lr=0.02)
    for g in gradients(*shape, steps=30):
        ours.grad, theirs.grad = g.clone(), g.clone()
        maker.precondition()
        with torch.no_grad():
            ours.mul_(1 - 0.02 * 0.1)
        sgd.step()
        muon.step()
    assert oracles.relative_error(ours.detach(), theirs.detach()) < 1e-10


def test_thirty_steps_by_hand() -> None:
    steps = gradients(3, 5, steps=30)
    found = run({"method": "muon", "scale": "none"}, [[g] for g in steps])[0]
    M = torch.zeros(3, 5, dtype=torch.float64)
    for g in steps:
        M = 0.95 * M + 0.05 * g
    X = 0.05 * steps[-1] + 0.95 * M
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = MUON[0] * X + (MUON[1] * A + MUON[2] * A @ A) @ X
    assert oracles.relative_error(found, X) < 1e-9


def test_polar_express_is_the_published_list() -> None:
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    ]
    for ours, theirs in zip(polar_express(1e-3, 8), published, strict=False):
        unsafe = tuple(c * 1.01**k for c, k in zip(ours, (1, 3, 5), strict=True))
        assert unsafe == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    "quintics, low, high",
    [((MUON,) * 5, 0.68, 1.14), (polar_express(1e-3, 5), 0.87, 1.13), (polar_express(1e-3, 8), 0.99, 1.01)],
)
def test_ranges_of_singular_values(quintics: Any, low: float, high: float) -> None:
    for x in torch.logspace(-1, 0, 200).tolist():
        for quintic in quintics:
            x = _value(quintic, x)
        assert low <= x <= high


def test_polar_express_is_the_polar_factor() -> None:
    U, _, Vh = torch.linalg.svd(gradients(4, 7, steps=1)[0], full_matrices=False)
    G = (U * torch.logspace(0, -2.5, 4, dtype=torch.float64)) @ Vh
    assert oracles.relative_error(polar_factor(G[None], polar_express(1e-3, 8))[0], U @ Vh) < 1e-3
    exact = run({"method": "muon", "iteration": "svd", "scale": "none", "beta1": 0.0}, [[G]])[0]
    assert oracles.relative_error(exact, U @ Vh) < 1e-12


def test_nuclear_scale_is_spectral_descent() -> None:
    G = gradients(4, 6, steps=1)[0]
    found = run({"method": "muon", "iteration": "svd", "scale": "nuclear", "beta1": 0.0}, [[G]])[0]
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    assert oracles.relative_error(found, s.sum() * U @ Vh) < 1e-12


def test_what_a_polar_factor_owes() -> None:
    G, quintics = gradients(4, 6, steps=1), (MUON,) * 5
    P, Q = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in (4, 6))

    def polar(X: Tensor) -> Tensor:
        return polar_factor(X[None], quintics)[0]

    X = polar(G[0])
    assert oracles.relative_error(polar(P @ G[0] @ Q), P @ X @ Q) < 1e-10
    assert oracles.relative_error(polar(1e-20 * G[0]), X) < 1e-10
    torch.testing.assert_close(polar(G[0].T.contiguous()), X.T, rtol=1e-10, atol=1e-12)
    assert torch.equal(polar(0 * G[0]), 0 * G[0])


def test_vectors_and_named_tensors_get_adam() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4))
    maker: Any = from_config(model, {"method": "muon", "elementwise": ("0.*",)})
    parts = {s.name: type(b.triple.solver).__name__ for b in maker.plan.blocks for s in b.sites}
    assert parts == {"0.weight": "Division", "1.weight": "PolarFactor", "1.bias": "Division"}


@pytest.mark.parametrize("iteration", ["quintic", "polar_express", "svd"])
@pytest.mark.parametrize("scale", ["aspect", "rms", "none"])
def test_verify_knows_the_formula(iteration: str, scale: str) -> None:
    model = nn.Linear(4, 3).double()
    maker: Any = from_config(model, {"method": "muon", "iteration": iteration, "scale": scale})
    y = maker.setup_model_call(model, torch.randn(6, 4, dtype=torch.float64))
    maker.setup_loss_call(nn.functional.mse_loss, y, torch.randn(6, 3, dtype=torch.float64))
    maker.forward_and_backward()
    assert maker.verify().passed
