"""Hessian probes, and diagonals from them: AdaHessian, equilibrated SGD, saddle-free Newton of the diagonal."""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, TripleError, from_config
from gradmaker.curvature import HessianProbe, Pair, Secant, kinds
from gradmaker.representations import ProbeDiagonal, TriangularQ
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import Apply, Division
from gradmaker.triple import Triple
from tests import models, oracles
from tests.live import Live
from tests.measure import site_order
from tests.models import Case

SUM, AVERAGE = Fold(1.0, 1.0, 1.0, summed=True), Fold(0.9, 0.1, 0.1)
DIAGONALS = ("adahessian", "esgd", "saddle_free_diagonal")
PROBES = ("psgd", "psgd_kf", *DIAGONALS)


class Quadratic(nn.Module):
    """``w^T H w / 2`` for every example."""

    H: Tensor

    def __init__(self, H: Tensor, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())
        self.register_buffer("H", H)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.w @ self.H @ self.w / 2
        return loss * x.mean()


def quadratic(H: Tensor) -> Case:
    start = torch.linspace(1, 2, len(H), dtype=torch.float64)
    return Case(Quadratic(H, start), torch.ones(3, 1, dtype=torch.float64), torch.zeros(3), lambda y, t: y)


def symmetric(size: int, seed: int = 0) -> Tensor:
    X = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X + X.mT


def step(maker: Any, case: Case) -> Tensor:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    loss: Tensor = maker.forward_and_backward()[1]
    return loss


def frame(*shape: int) -> Frame:
    return Frame(1, shape, frozenset(), torch.float64, torch.device("cpu"))


def signs(size: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)


# --- what the statistics estimate -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("statistic", ["squares", "signed"])
def test_mean_over_all_sign_vectors(statistic: Any) -> None:
    """E (H v)^2 = diag(H^2) and E v * H v = diag H, by enumeration."""
    H = symmetric(5)
    held = ProbeDiagonal(statistic)
    state = held.init(frame(5))
    for v in signs(5):
        held.update(state, Pair(v[None], (H @ v)[None]), SUM)
    expected = H.diagonal().abs() if statistic == "signed" else H.square().sum(1).sqrt()
    assert oracles.relative_error(held.diagonal(state)[0], expected) < 1e-12
    assert torch.equal(held.to_dense(state)[0].diagonal(), held.diagonal(state)[0])
    v = torch.randn(1, 5, dtype=torch.float64)
    assert torch.equal(held.matvec(state, v), held.diagonal(state) * v)


def test_signs_are_exact_for_a_diagonal_hessian() -> None:
    """Property 42: no variance, at every step, for any signs; and unbiased otherwise."""
    h = torch.tensor([2.0, -3.0, 0.5, -0.1], dtype=torch.float64)
    for method, damping in (("adahessian", 1e-4), ("saddle_free_diagonal", 1e-3)):
        case = quadratic(torch.diag(h))
        maker = METHODS[method](case.model, METHODS[method].Config(damping=damping, beta1=0.0))
        for _ in range(3):
            step(maker, case)
            w = case.model.get_parameter("w")
            assert oracles.relative_error(w.grad, h * w / (h.abs() + damping)) < 1e-12


def test_signed_average_is_unbiased() -> None:
    H = symmetric(4, 3)
    case = quadratic(H)
    config = {"method": "saddle_free_diagonal", "samples": 4096, "decay": 0.0, "damping": 1e-3}
    maker: Any = from_config(case.model, config)
    step(maker, case)
    (block,) = maker.plan.blocks
    found = block.triple.representation.diagonal(block.state)[0]
    sigma = ((H.square().sum(1) - H.diagonal().square()) / 4096).sqrt()
    assert ((found - H.diagonal().abs()).abs() < 5 * sigma).all()


def test_absolute_value_comes_after_the_average() -> None:
    """|mean(v * H v)|, not mean|v * H v|, which is larger wherever an entry changes its sign."""
    H = torch.tensor([[0.1, 1.0], [1.0, -0.2]], dtype=torch.float64)
    held = ProbeDiagonal("signed")
    state = held.init(frame(2))
    for v in signs(2):
        held.update(state, Pair(v[None], (H @ v)[None]), SUM)
    assert oracles.relative_error(held.diagonal(state)[0], torch.tensor([0.1, 0.2], dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 5), (2, 3, 2, 2), (2, 3, 2, 2, 3)])
def test_kernels_are_averaged(shape: tuple[int, ...]) -> None:
    held = ProbeDiagonal("squares", spatial=True)
    state = held.init(frame(*shape))
    h = torch.randn(1, *shape, dtype=torch.float64)
    held.update(state, Pair(torch.ones_like(h), h), AVERAGE)
    expected = h.abs()
    if len(shape) > 2:
        expected = expected.flatten(3).mean(3).reshape(1, *shape[:2], *[1] * (len(shape) - 2)).expand_as(h)
    assert oracles.relative_error(held.diagonal(state), expected) < 1e-12


# --- the methods ------------------------------------------------------------------------------------------------------------
def hand_probe(maker: Any, case: Case, H: Tensor, sample: int = 0) -> dict[str, Tensor]:
    """H v for the signs that the maker drew: they can be drawn again by name and step."""
    v = []
    for name, p in case.model.named_parameters():
        key = hashlib.blake2b(f"0/probe {sample} {name}/{maker.step}/0".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        v.append(torch.randint(0, 2, p.shape, generator=generator).mul(2).sub(1).double().reshape(-1))
    image = H @ torch.cat(v)
    return {name: image[where] for name, where in oracles.parameter_slices(case.model).items()}


@pytest.mark.parametrize("make", [models.mlp, models.bare_scale, lambda: models.convolution(2)])
def test_adahessian_by_hand(make: Callable[[], Case]) -> None:
    """Algorithm 1 with both moments, kernels averaged, over six steps that move the weights."""
    case = make()
    maker = METHODS["adahessian"](case.model)
    m: dict[str, Any] = {}
    v: dict[str, Any] = {}
    for t in range(1, 7):
        H = oracles.hessian(case.model, case.x, lambda y: case.loss(y, case.t))
        image = hand_probe(maker, case, H)
        raw = torch.autograd.grad(case.run(), list(case.model.parameters()))
        step(maker, case)
        for (name, p), g in zip(case.model.named_parameters(), raw, strict=True):
            D = image[name].view_as(p).abs()
            if p.ndim > 2:
                D = D.flatten(2).mean(2).reshape(*p.shape[:2], *[1] * (p.ndim - 2)).expand_as(p)
            m[name] = 0.9 * m.get(name, 0.0) + 0.1 * g
            v[name] = 0.999 * v.get(name, 0.0) + 0.001 * D.square()
            expected = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-4)
            assert oracles.relative_error(p.grad, expected) < 1e-8, (t, name)
            with torch.no_grad():
                p -= 1e-2 * p.grad


def test_adahessian_at_its_limits() -> None:
    """A Hessian power of almost zero leaves ``m / (1 + eps)``; no gradient, no step."""
    case = models.mlp()
    maker = METHODS["adahessian"](case.model, METHODS["adahessian"].Config(power=1e-13, beta1=0.0))
    step(maker, case)
    raw = torch.cat([g.reshape(-1) for g in torch.autograd.grad(case.run(), list(case.model.parameters()))])
    assert oracles.relative_error(oracles.gradient_vector(case.model), raw / (1 + 1e-4)) < 1e-10
    flat = quadratic(symmetric(4))
    with torch.no_grad():
        flat.model.get_parameter("w").zero_()
    step(METHODS["adahessian"](flat.model), flat)
    assert not oracles.gradient_vector(flat.model).any()


def test_adahessian_is_equilibration_with_a_decay() -> None:
    """Without momentum and kernels, on the same signs."""
    one, two = models.convolution(2), models.convolution(2)
    first = METHODS["adahessian"](one.model, METHODS["adahessian"].Config(beta1=0.0, spatial=False, decay=0.9))
    second = METHODS["custom"](
        two.model,
        METHODS["custom"].Config(
            curvature=HessianProbe(), representation=ProbeDiagonal(), solver=Division(damping=1e-4), decay=0.9, damping=None
        ),
    )
    assert second.config.per_tensor
    esgd = METHODS["esgd"].Config(decay=0.9, curvature_interval=1, preconditioner_interval=1)
    triple = esgd.triple(second.plan.blocks[0].sites[0])
    assert (triple.representation, triple.solver) == (ProbeDiagonal(), Division(damping=1e-4))
    for _ in range(4):
        step(first, one)
        step(second, two)
        for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
            assert p.grad is not None and oracles.relative_error(p.grad, q.grad) < 1e-12


def test_equilibration_is_a_mean_over_all_probes() -> None:
    """Twenty steps a probe, and no forgetting: S / n for diagonal Hessians is the mean of (h v)^2; the loss' scale cancels."""
    directions = []
    for scale in (1.0, 7.0):
        H = scale * torch.diag(torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64))
        case = quadratic(H)
        maker: Any = METHODS["esgd"](case.model, METHODS["esgd"].Config(damping=1e-12))
        for _ in range(41):
            step(maker, case)
        (block,) = maker.plan.blocks
        assert float(block.state["mass"]) == 3
        directions.append(oracles.gradient_vector(case.model))
    assert oracles.relative_error(*directions) < 1e-9


def test_signs_of_the_curvature_do_not_matter_to_lengths_of_rows() -> None:
    """H and -H give the same diagonal, and no step of the absolute diagonals ascends."""
    H = symmetric(5, 2)
    for method in ("esgd", "saddle_free_diagonal", "adahessian"):
        found = []
        for sign in (1.0, -1.0):
            case = quadratic(sign * H)
            maker: Any = METHODS[method](case.model)
            step(maker, case)
            w = case.model.get_parameter("w")
            assert w.grad is not None and float(w.grad @ (sign * H @ w.detach())) >= 0
            (block,) = maker.plan.blocks
            found.append(block.triple.representation.diagonal(block.state))
        assert torch.equal(*found)


def test_saddle_is_left() -> None:
    """Along negative curvature the step goes away from the saddle, along positive curvature towards it."""
    case = quadratic(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    step(METHODS["saddle_free_diagonal"](case.model), case)
    w = case.model.get_parameter("w")
    assert w.grad is not None
    towards = (w.grad * w).detach()
    assert towards[0] > 0 > towards[1]


@pytest.mark.parametrize("make", [models.mlp, models.bare_scale, lambda: models.convolution(2)])
@pytest.mark.parametrize("mode", ["reverse", "difference"])
def test_diagonals_that_are_measured_exactly(make: Callable[[], Case], mode: str) -> None:
    """``|diag H|`` and ``diag |H|``, and where they lie: ``|H_ii| <= |H|_ii <= sqrt (H^2)_ii``."""
    case = make()
    H = oracles.hessian(case.model, case.x, lambda y: case.loss(y, case.t))
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(case.run(), list(case.model.parameters()))])
    s, Q = torch.linalg.eigh(H)
    exact = {"hessian": H.diagonal().abs(), "absolute": (Q @ torch.diag(s.abs()) @ Q.mT).diagonal()}
    for entries, d in exact.items():
        twin = make()
        step(from_config(twin.model, {"method": "saddle_free_diagonal", "entries": entries, "mode": mode}), twin)
        error = oracles.relative_error(oracles.gradient_vector(twin.model), g / (d + 1e-3))
        assert error < (1e-9 if mode == "reverse" else 1e-5)
    rounding = 1e-12
    assert (exact["hessian"] <= exact["absolute"] + rounding).all()
    assert (exact["absolute"] <= H.square().sum(1).sqrt() + rounding).all()
    assert float((exact["absolute"] - exact["hessian"]).max()) > 1e-3


# --- probes -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", ["mlp", "convolution", "normed", "embedding_mean", "bare_scale", "tied", "called_twice"])
def test_pairs_are_products_with_the_hessian(distribution: Any, name: str) -> None:
    """Of all parameters at once, laid out as blocks: for layers and for tensors."""
    case: Case = getattr(models, name)()
    H = oracles.hessian(case.model, case.x, lambda y: case.loss(y, case.t))
    seen: list[dict[str, Any]] = []

    class Watching(HessianProbe):
        gives: ClassVar[Any] = kinds(Pair)

        def measure(self, step: Any) -> Any:
            for chunk in super().measure(step):
                seen.append(chunk)
                yield chunk

    config = METHODS["custom"].Config(
        curvature=Watching(distribution=distribution, samples=2), representation=TriangularQ(), solver=Apply(), damping=None
    )
    maker: Any = METHODS["custom"](case.model, config)
    step(maker, case)
    assert len(seen) == 2
    for chunk in seen:
        v, hv = torch.zeros(len(H), dtype=torch.float64), torch.zeros(len(H), dtype=torch.float64)
        for block in maker.plan.blocks:
            for site in block.sites:
                where = site_order(case.model, site)
                v[where], hv[where] = chunk[site.name].v.reshape(-1), chunk[site.name].cv.reshape(-1)
        assert oracles.relative_error(hv, H @ v) < 1e-9
        assert distribution != "rademacher" or torch.equal(v.abs(), torch.ones_like(v))


@pytest.mark.parametrize("method", PROBES)
def test_modes_are_ways_to_one_product(method: str) -> None:
    """Over steps with dropout: products that evaluate the batch again see its masks and leave its statistics."""
    ends = []
    for mode in ("reverse", "forward", "difference"):
        case = dropout(bias=False)
        maker = from_config(case.model, {"method": method, "mode": mode})
        torch.manual_seed(5)
        for _ in range(3):
            step(maker, case)
            with torch.no_grad():
                for p in case.model.parameters():
                    p -= 1e-2 * p.grad / p.grad.norm()  # type: ignore[operator, union-attr]
        ends.append(torch.cat([t.double().reshape(-1) for t in case.model.state_dict().values()]))
    assert oracles.relative_error(ends[1], ends[0]) < 1e-7
    assert oracles.relative_error(ends[2], ends[0]) < 1e-4


def test_gradients_have_no_mode_of_products() -> None:
    with pytest.raises(ValueError, match="mode='forward' would have no effect"):
        METHODS["psgd"].Config(whiten=True, mode="forward")
    with pytest.raises(ValueError, match="mode='backward': expected"):
        METHODS["esgd"].Config(mode="backward")


def test_probes_do_not_depend_on_the_grouping_or_the_dtype() -> None:
    """By name, step and micro-batch: two makers see the same; the next step and the next sample other ones."""
    directions = []
    for method, dtype in (("adahessian", torch.float64), ("adahessian", torch.float32)):
        case = models.mlp()
        case.model.to(dtype)
        maker = METHODS[method](case.model, METHODS[method].Config(damping=0.1))
        step(maker, case._replace(x=case.x.to(dtype)))
        directions.append(oracles.gradient_vector(case.model).double())
    assert oracles.relative_error(*directions) < 1e-4


def dropout(bias: bool = True) -> Case:
    """bias: whether there is one before the norm, where its gradient is rounding"""
    case = models.build(
        lambda: nn.Sequential(nn.Linear(4, 6, bias), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)), 8, 4
    )
    return case._replace(model=case.model.train())


@pytest.mark.parametrize("method", [*PROBES, "lbfgs", "kbfgs", "kbfgs_l"])
def test_buffers_and_random_numbers_are_those_of_one_pass(method: str) -> None:
    """Two steps: what is evaluated again leaves no trace."""
    case, twin = dropout(), dropout()
    maker = from_config(case.model, {"method": method})
    for _ in range(3):
        torch.manual_seed(5)
        step(maker, case)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        twin.model.zero_grad()
        twin.run().backward()
        assert torch.equal(drawn, torch.rand(3))
        for (name, b), other in zip(case.model.named_buffers(), twin.model.buffers(), strict=True):
            assert torch.equal(b, other), name
        with torch.no_grad():
            for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
                p -= 1e-2 * p.grad
                q.copy_(p)


@pytest.mark.parametrize("method", [*PROBES, "lbfgs", "kbfgs", "kbfgs_l"])
def test_memory_is_flat(method: str) -> None:
    """200 steps keep no graph and no batch; K-BFGS(L) with ten pairs."""
    case = models.mlp()
    options = {"pairs": 10} if method == "kbfgs_l" else {}
    maker = from_config(case.model, {"method": method, **options})
    bytes_held = []
    with Live() as live:
        for k in range(200):
            step(maker, case)
            with torch.no_grad():
                for p in case.model.parameters():
                    p -= 1e-3 * p.grad
            if k in (99, 199):
                gc.collect()
                bytes_held.append(live.now)
    assert bytes_held[0] == bytes_held[1]


@pytest.mark.parametrize("method", [*PROBES, "lbfgs", "kbfgs", "kbfgs_l"])
def test_attach_says_what_is_missing(method: str) -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": method})
    with pytest.raises(ValueError, match="has to differentiate or repeat the loss"):
        maker.attach(torch.optim.SGD(case.model.parameters(), 0.1))


def test_whitening_rides_any_loop() -> None:
    """It needs the gradient alone."""
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "psgd_kf", "whiten": True})
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker.attach(optimizer)
    F.cross_entropy(case.model(case.x), case.t).backward()
    raw = oracles.gradient_vector(case.model)
    optimizer.step()
    found = oracles.gradient_vector(case.model)
    assert oracles.relative_error(found, raw) > 1e-3 and float(found @ raw) > 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TripleError, match="ProbeDiagonal is built from Pair"):
        Triple(Secant(), ProbeDiagonal(), Division())
    for bad in ({"distribution": "cauchy"}, {"samples": 0}, {"lift": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HessianProbe(**bad)
    with pytest.raises(ValueError, match="statistic"):
        ProbeDiagonal("cubes")  # type: ignore[arg-type]
