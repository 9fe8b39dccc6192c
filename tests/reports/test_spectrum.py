"""`gradmaker.reports.spectrum` against dense matrices, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.reports.spectrum import diagonal, eigenpairs, fvp, ggnvp, hvp, ntk_vp, spectral_density, trace
from tests import models, oracles
from tests.live import Live
from tests.models import CLASSES, Case
from tests.passes.test_products import dense, noisy, vectors

CASES: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "bernoulli": models.mlp_bernoulli,
    "gaussian": models.mlp_gaussian,
    "tagger": partial(models.tagger, "torch"),
}


def matvec(case: Case, matrix: str) -> Callable[[Tensor], Tensor]:
    return partial(hvp if matrix == "hessian" else ggnvp, case.model, case.run)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_leading_eigenpairs(matrix: Any, method: Any) -> None:
    """Property 34."""
    case = models.mlp()
    C = dense(case, "hessian" if matrix == "hessian" else "ggn")
    expected = torch.linalg.eigvalsh(C)
    expected = expected[expected.abs().argsort(descending=True)][:3]
    values, V = eigenpairs(case.model, case.run, 3, matrix, method, iterations=43 if method == "lanczos" else 500)
    assert oracles.relative_error(values, expected) < 1e-6
    assert oracles.relative_error(V @ V.mT, torch.eye(3, dtype=torch.float64)) < 1e-10
    assert oracles.relative_error(V @ C, values.unsqueeze(1) * V) < 1e-5


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_all_eigenpairs(method: Any) -> None:
    """Also where the matrix is singular: Lanczos starts in its range and beyond."""
    case = models.build(lambda: nn.Linear(2, 1), 6, 2, loss=F.mse_loss)
    case = case._replace(t=case.x[:, :1])
    H = dense(case, "hessian")
    values, V = eigenpairs(case.model, case.run, 3, method=method, iterations=2000)
    assert oracles.relative_error(values.sort()[0], torch.linalg.eigvalsh(H)) < 1e-6
    assert oracles.relative_error(V.mT @ torch.diag(values) @ V, H) < 1e-6


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_trace(matrix: Any) -> None:
    """Property 35, and the standard error by the known variance of random signs, twice the squares off the diagonal."""
    case = models.mlp()
    C = dense(case, "hessian" if matrix == "hessian" else "ggn")
    mean, error = trace(case.model, case.run, 400, matrix)
    assert abs(mean - float(C.trace())) < 4 * error
    exact = float((2 * (C.square().sum() - C.diagonal().square().sum()) / 400).sqrt())
    assert 0.8 < error / exact < 1.25
    assert trace(case.model, case.run, 10, matrix, seed=3) == trace(case.model, case.run, 10, matrix, seed=3)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_diagonal(matrix: Any) -> None:
    """Within the standard error, which is that of the known variance, ``sum_(j != i) C_ij^2``, entry by entry."""
    case = models.mlp()
    C = dense(case, matrix)
    found, error = diagonal(case.model, case.run, 400, matrix)
    exact = ((C.square().sum(1) - C.diagonal().square()) / 400).sqrt()
    assert float(((found - C.diagonal()).abs() / exact).max()) < 5
    assert float((error / exact - 1).abs().max()) < 0.25
    probes = [hvp(case.model, case.run, v) * v for v in signs_of(5, 3)]  # mean and error of a few, by torch
    few, spread = diagonal(case.model, case.run, 3, seed=5)
    assert oracles.relative_error(few, torch.stack(probes).mean(0)) < 1e-12
    assert oracles.relative_error(spread, torch.stack(probes).std(0) / 3**0.5) < 1e-9


def signs_of(seed: int, count: int) -> list[Tensor]:
    """The vectors that are drawn from a seed on."""
    generators = (torch.Generator().manual_seed(seed + j) for j in range(count))
    return [torch.where(torch.randn(43, dtype=torch.float64, generator=g) < 0, -1.0, 1.0).double() for g in generators]


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_modes_of_the_hessian(mode: Any) -> None:
    """Everything that is made of products with the Hessian can be had from any of them."""
    case, tolerance = models.mlp(), 1e-9 if mode == "forward" else 1e-5
    for look in (partial(eigenpairs, count=2), partial(trace, samples=5), partial(diagonal, samples=5)):
        for found, expected in zip(look(case.model, case.run, mode=mode), look(case.model, case.run), strict=True):
            assert oracles.relative_error(torch.as_tensor(found), torch.as_tensor(expected)) < tolerance
    found, expected = (spectral_density(case.model, case.run, 2, 5, mode=m).nodes for m in (mode, "reverse"))
    assert oracles.relative_error(found, expected) < tolerance
    with pytest.raises(ValueError, match=rf"mode='{mode}' would have no effect"):
        trace(case.model, case.run, matrix="ggn", mode=mode)


def test_vectors_that_are_held() -> None:
    """Lanczos has one for each of its iterations, the trace a handful, an exact Fisher product none for each class."""
    case = models.build(lambda: nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 30)), 8, 50)
    size, run = 8 * 8130, lambda: F.cross_entropy(case.model(case.x), case.t)  # bytes
    calls: list[tuple[Callable[[], Any], int]] = [
        (lambda: trace(case.model, run, 30), 0),
        (lambda: diagonal(case.model, run, 30), 0),
        (lambda: eigenpairs(case.model, run, 1, iterations=60), 60),
        (lambda: eigenpairs(case.model, run, 2, method="power", iterations=20), 2),
        (lambda: spectral_density(case.model, run, 2, 40), 40),
        (lambda: fvp(case.model, run, torch.ones(8130, dtype=torch.float64)), 0),
    ]
    for call, vectors_held in calls:
        with Live() as live:
            call()
        assert live.peak < (vectors_held + 16) * size


def test_many_classes() -> None:
    """The matrix of a term is applied, not formed: one of 30000 x 30000 would take 7 GB."""
    case = models.build(lambda: nn.Linear(2, 30_000), 3, 2)
    v = torch.randn(90_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W, b = v[:60_000].view(-1, 2), v[60_000:]
    p, u = case.model(case.x).detach().softmax(-1), case.x @ W.mT + b
    w = p * (u - (p * u).sum(1, keepdim=True)) / 3
    expected = torch.cat([(w.mT @ case.x).reshape(-1), w.sum(0)])
    for multiply in (fvp, ggnvp):
        assert oracles.relative_error(multiply(case.model, case.run, v), expected) < 1e-12


def test_spectral_density() -> None:
    case = models.mlp()
    H = dense(case, "hessian")
    density = spectral_density(case.model, case.run, probes=200, steps=43)
    assert float(density.weights.sum()) == pytest.approx(1.0, abs=1e-10)
    mean, square = (float((density.weights * density.nodes**k).sum()) for k in (1, 2))
    spread = float((2 * (H.square().sum() - H.diagonal().square().sum()) / 200).sqrt()) / 43
    assert abs(mean - float(H.trace()) / 43) < 4 * spread
    assert square == pytest.approx(float(H.square().sum()) / 43, rel=0.1)
    grid = torch.linspace(-3, 6, 4000, dtype=torch.float64)
    curve = density.smooth(grid, 0.05)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1.0, abs=1e-6)
    exact = (-((grid[:, None] - torch.linalg.eigvalsh(H)) / 0.05).square() / 2).exp().mean(1) / (0.05 * (2 * torch.pi) ** 0.5)
    assert float(torch.trapezoid((curve - exact).abs(), grid)) < 0.15


# --- the other products ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_exact_fisher_is_the_gauss_newton_matrix(name: str) -> None:
    case = CASES[name]()
    G = dense(case, "ggn")
    for v in vectors(case):
        assert oracles.relative_error(fvp(case.model, case.run, v), G @ v) < 1e-12


def test_empirical_fisher() -> None:
    case, tokens = models.mlp(), models.tagger("torch")
    E = oracles.empirical_fisher(case.model, case.x, lambda y, n: F.cross_entropy(y, case.t[n : n + 1]), 6)
    loss = lambda z, n, r: F.cross_entropy(z[None], tokens.t[n, r][None])  # noqa: E731
    T = oracles.empirical_fisher_tokens(tokens.model, tokens.x, loss, tokens.t.numel(), select=lambda y: y.mT)
    for which, C in ((case, E), (tokens, T)):
        for v in vectors(which):
            assert oracles.relative_error(fvp(which.model, which.run, v, "empirical"), C @ v) < 1e-12
    squares = lambda y, t: F.cross_entropy(y, t) + F.mse_loss(y, torch.ones_like(y))  # noqa: E731
    both = case._replace(loss=squares)  # two terms on the same logits: an example has one gradient
    E = oracles.empirical_fisher(case.model, case.x, lambda y, n: squares(y, case.t[n : n + 1]) / 6, 1.0)
    E = E * (1 + 1) / (6 / 6**2 + 18 / 18**2)  # 6 terms of weight 1/6, 18 elements of weight 1/18
    for v in vectors(both):
        assert oracles.relative_error(fvp(both.model, both.run, v, "empirical"), E @ v) < 1e-12


def test_sampled_fisher_is_unbiased() -> None:
    case = models.mlp()
    G, (v,) = dense(case, "ggn"), vectors(case, 1)
    draws = torch.stack([fvp(case.model, case.run, v, "mc", samples=20, seed=j) for j in range(100)])
    error = draws.std(0) / 10
    assert float(((draws.mean(0) - G @ v).abs() / error.clamp(min=1e-12)).max()) < 5
    few = fvp(case.model, case.run, v, "mc", seed=1)
    assert torch.equal(few, fvp(case.model, case.run, v, "mc", seed=1)) and oracles.relative_error(few, G @ v) > 1e-2


@pytest.mark.parametrize("name", ["mlp", "conv2d_groups", "batch_norm", "frozen"])
def test_tangent_kernel(name: str) -> None:
    case = models.ZOO[name]()
    J = oracles.batch_jacobian(case.model, case.x)
    u = torch.randn(len(case.x), CLASSES, dtype=torch.float64)
    found = ntk_vp(case.model, lambda: case.model(case.x), u)
    assert oracles.relative_error(found.reshape(-1), J @ J.mT @ u.reshape(-1)) < 1e-12


# --- no trace -------------------------------------------------------------------------------------------------------------
def test_nothing_is_left_behind() -> None:
    case = noisy()
    (v,) = vectors(case, 1)
    case.run().backward()
    state = {k: t.clone() for k, t in case.model.state_dict().items()}
    before = oracles.gradient_vector(case.model), torch.get_rng_state()
    calls: list[Callable[[], Any]] = [
        lambda: hvp(case.model, case.run, v),
        lambda: hvp(case.model, case.run, v, "forward"),
        lambda: ggnvp(case.model, case.run, v),
        lambda: fvp(case.model, case.run, v, "mc"),
        lambda: ntk_vp(case.model, lambda: case.model(case.x), torch.ones(8, CLASSES, dtype=torch.float64)),
        lambda: eigenpairs(case.model, case.run),
        lambda: trace(case.model, case.run, 3),
        lambda: diagonal(case.model, case.run, 3, mode="difference"),
        lambda: spectral_density(case.model, case.run, 2, 3),
    ]
    for call in calls:
        call()
        with torch.no_grad():
            call()
        assert torch.equal(torch.get_rng_state(), before[1])
        assert torch.equal(oracles.gradient_vector(case.model), before[0])
        for key, value in case.model.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert all(p.grad is not None and p.grad.grad_fn is None for p in case.model.parameters())


def test_low_precision() -> None:
    case = models.mlp()
    G, (v,) = dense(case, "ggn"), vectors(case, 1)
    model = case.model.bfloat16()
    found = ggnvp(model, lambda: F.cross_entropy(model(case.x.bfloat16()), case.t), v.float())
    assert found.dtype == torch.float32 and oracles.relative_error(found.double(), G @ v) < 5e-2


def test_bad_input_is_refused() -> None:
    case = models.mlp()
    (v,) = vectors(case, 1)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: hvp(case.model, case.run, v[:-1]), r"shape \(42,\), expected \(43,\)"),
        (lambda: hvp(case.model, case.run, v, "backward"), "mode='backward'"),  # type: ignore[arg-type]
        (lambda: hvp(case.model, lambda: case.model(case.x), v), "one element"),
        (lambda: fvp(case.model, lambda: case.model(case.x).sum(), v), "recognised loss"),
        (lambda: fvp(case.model, case.run, v, "true"), "kind='true'"),  # type: ignore[arg-type]
        (lambda: ggnvp(case.model, lambda: case.model(case.x).square().sum(), v), "recognised loss"),
        (lambda: eigenpairs(case.model, case.run, 44), "expected 1 to 43"),
        (lambda: eigenpairs(case.model, case.run, 1, "kfac"), "matrix='kfac'"),  # type: ignore[arg-type]
        (lambda: trace(case.model, case.run, 1), "at least 2"),
        (lambda: diagonal(case.model, case.run, 1), "at least 2"),
        (lambda: spectral_density(case.model, case.run, 0), "probes=0"),
        (lambda: hvp(case.model.requires_grad_(False), case.run, v), "no trainable parameter"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=words):
            call()
