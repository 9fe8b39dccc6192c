"""CASPR-adaptive: whole runs against the release re-derived, what its factors estimate, roots that fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import CasprAdaptiveGradientConfig, from_config
from gradmaker.representations import Diagonal, OneWayDims
from gradmaker.representations.base import Fold
from tests import models, oracles
from tests.kronecker_reference import inverse_root
from tests.methods.test_kronecker_dims import Matrices, gradients, run

AT_ONCE: dict[str, Any] = {"method": "caspr_adaptive", "start_step": 0}
AVERAGED = Fold(0.9, 0.1, 0.1)


def damped(S: Tensor) -> Tensor:
    return S + 1e-6 * torch.linalg.eigvalsh(S)[-1] * torch.eye(len(S), dtype=S.dtype)


class Nadam:
    """AlgoPerf's NAdamW, less the weight decay: ``m = (b1 m + (1 - b1) g) / (1 - b1^t)``, ``m / (sqrt(v) + 1e-8)``."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def __call__(self, g: Tensor) -> tuple[Tensor, Tensor]:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        momentum = (0.9 * self.m + 0.1 * g) / (1 - 0.9**self.t)
        return momentum, momentum / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)

    @property
    def excess(self) -> float:
        """Its Nesterov average has weights that sum to this; ours sum to one."""
        return (1 - 0.9 ** (self.t + 1)) / (1 - 0.9**self.t)


class Release:
    """One matrix, in the order of the released code; steps count from one, but for roots, which count from zero here."""

    def __init__(self, shape: tuple[int, int], T: int, start: int) -> None:
        m, n = shape
        self.T, self.start, self.nadam = T, start, Nadam()
        eye = torch.eye(max(m, n), dtype=torch.float64)
        self.L, self.past, self.R = 1e-6 * eye[:m, :m], 1e-6 * eye[:m, :m], eye[:n, :n]
        self.PL, self.PR = eye[:m, :m], eye[:n, :n]

    def __call__(self, G: Tensor) -> Tensor:
        momentum, plain = self.nadam(G)
        t, b2, m = self.nadam.t, 0.999, len(G)
        c = 1.0
        if self.T == 1 or self.rooted(t - 1):
            c = max(0.0, float((self.PL @ damped(self.past) @ self.PL).trace())) / m
            self.past = self.L
        self.L = b2 * self.L + (1 - b2) * G @ G.T
        K = G.T @ self.PL
        self.R = b2 * c * self.R + (1 - b2) * K @ K.T / m
        if self.rooted(t):
            self.PL, self.PR = (inverse_root(S, 1e-6, -0.5) for S in (self.L, self.R))
        if t <= self.start:
            return plain
        U = self.PL @ momentum @ self.PR
        return U * plain.norm() / U.norm()

    def rooted(self, t: int) -> bool:
        """At steps 0, T, 2T, ... from zero, but not at the first, unless at all."""
        return self.T == 1 or (t > 1 and (t - 1) % self.T == 0)


def problem(steps: int, shape: tuple[int, int] = (5, 4)) -> list[Tensor]:
    """Correlated gradients that slowly fall and turn."""
    A, B = (
        torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)))[0] for d in shape
    )
    A, B = A * torch.logspace(0, -1.5, shape[0], dtype=torch.float64), B * torch.logspace(0, -1, shape[1], dtype=torch.float64)
    noise = gradients(*shape, steps=steps)
    return [0.98**t * (A @ Z @ B.T + 0.01 * t * torch.ones(shape, dtype=Z.dtype)) for t, Z in enumerate(noise)]


def follow(config: dict[str, Any], steps: list[Tensor], rule: Callable[[Tensor], Tensor]) -> list[float]:
    """Relative errors of what the maker writes, step by step; ``rule`` gives what is expected."""
    model = Matrices(tuple(steps[0].shape))
    maker: Any = from_config(model, config)
    errors = []
    for g in steps:
        model.w[0].grad = g.clone()
        maker.precondition()
        errors.append(oracles.relative_error(model.w[0].grad, rule(g)))
    return errors


# --- whole runs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("steps, start", [(60, 0), (60, 37), (140, 101)])
@pytest.mark.parametrize("root, tolerance", [("eigh", 1e-9), ("newton", 1e-4)])
def test_the_release_step_by_step(T: int, steps: int, start: int, root: str, tolerance: float) -> None:
    release = Release((5, 4), T, start)
    config = {"method": "caspr_adaptive", "preconditioner_interval": T, "start_step": start, "root": root}
    errors = follow(config, problem(steps), lambda g: release(g) / release.nadam.excess)
    assert max(errors) < tolerance
    assert max(errors[:start], default=0.0) < 1e-12


def test_a_run_of_a_network() -> None:
    """Vectors take NAdam's step, convolutions are matrices; the weights move with the direction."""
    case = models.convolution(2, groups=2)
    twin = case._replace(model=copy.deepcopy(case.model))
    maker = from_config(case.model, {"method": "caspr_adaptive", "preconditioner_interval": 4, "start_step": 5})
    rules: dict[str, Any] = {}
    for name, p in twin.model.named_parameters():
        rules[name] = Nadam() if p.ndim == 1 else Release((len(p), p[0].numel()), 4, 5)
    for _ in range(15):
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
        raw = torch.autograd.grad(twin.run(), list(twin.model.parameters()))
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 1e-2 * p.grad
            for (name, p), g in zip(twin.model.named_parameters(), raw, strict=True):
                rule = rules[name]
                step = rule(g)[1] / rule.excess if p.ndim == 1 else rule(g.flatten(1)).view_as(g) / rule.nadam.excess
                p -= 1e-2 * step
        assert oracles.relative_error(*(oracles.parameter_vector(c.model) for c in (case, twin))) < 1e-9


@pytest.mark.parametrize("method", ["caspr", "caspr_adaptive"])
def test_before_the_start_it_is_nadam(method: str) -> None:
    """101 steps, but for the weights of the Nesterov average, which sum to one here and to 1.9, 1.43, ... there."""
    nadam = Nadam()
    config = {"method": method, **({"grafting": "adam", "start_step": 101} if method == "caspr" else {})}
    errors = follow(config, problem(103), lambda g: nadam(g)[1] / nadam.excess)
    assert max(errors[:101]) < 1e-12
    assert min(errors[101:]) > 1e-2
    assert nadam.excess < 1 + 1e-5


def test_a_transposed_parameter_is_treated_otherwise() -> None:
    """Rows first: the one direction of the method. CASPR itself knows no order."""
    steps = problem(30)
    turned = [g.T.contiguous() for g in steps]
    found = {
        method: tuple(run({"method": method, "start_step": 0}, [[g] for g in each])[0] for each in (turned, steps))
        for method in ("caspr", "caspr_adaptive")
    }
    errors = {method: oracles.relative_error(one, other.T) for method, (one, other) in found.items()}
    assert errors["caspr"] < 1e-9 and errors["caspr_adaptive"] > 1e-2
    release = Release((4, 5), 20, 0)
    assert max(follow(AT_ONCE, turned, lambda g: release(g) / release.nadam.excess)) < 1e-9


# --- what every method owes, at a refresh of its own ----------------------------------------------------------------------
def test_resuming_at_any_step_is_bitwise() -> None:
    steps = problem(13)
    config = {"method": "caspr_adaptive", "preconditioner_interval": 3, "warmup_steps": 2, "start_step": 4}

    def go(maker: Any, model: Matrices, some: list[Tensor]) -> Tensor:
        for g in some:
            model.w[0].grad = g.clone()
            maker.precondition()
        return model.w[0].grad

    straight, twin = Matrices((5, 4)), Matrices((5, 4))
    reference: Any = from_config(straight, config)
    last = go(reference, straight, steps)
    for at in range(1, 13):
        first, second = from_config(straight, config), from_config(twin, config)
        go(first, straight, steps[:at])
        second.load_state_dict(first.state_dict())
        assert torch.equal(go(second, twin, steps[at:]), last)


def test_micro_batches_are_one_batch() -> None:
    case, twin = models.mlp(), models.mlp()
    whole, parts = (from_config(c.model, {**AT_ONCE, "preconditioner_interval": 2}) for c in (case, twin))
    half = len(case.x) // 2
    for _ in range(6):
        case.model.zero_grad()
        twin.model.zero_grad()
        whole.setup_loss_call(case.loss, whole.setup_model_call(case.model, case.x), case.t)
        whole.forward_and_backward()
        for rows in (slice(0, half), slice(half, None)):
            parts.setup_loss_call(twin.loss, parts.setup_model_call(twin.model, twin.x[rows]), twin.t[rows])
            parts.accumulate(weight=len(twin.x[rows]) / len(twin.x))
        parts.precondition()
        assert oracles.relative_error(*(oracles.gradient_vector(c.model) for c in (twin, case))) < 1e-9


def test_blocks_are_tensors_of_their_own() -> None:
    steps = problem(9, (5, 8))
    grid = [(slice(a, min(a + 3, 5)), slice(b, min(b + 3, 8))) for a in (0, 3) for b in (0, 3, 6)]
    config = {**AT_ONCE, "preconditioner_interval": 2}
    (whole,) = run({**config, "block_size": 3}, [[g] for g in steps])
    for where, own in zip(grid, run(config, [[g[where] for where in grid] for g in steps]), strict=True):
        assert torch.equal(whole[where], own)


@pytest.mark.parametrize("grafting", ["none", "adam", "keep"])
@pytest.mark.parametrize("decay", [None, 0.999, 0.0])
def test_zero_gradients_stay_zero(grafting: str, decay: float | None) -> None:
    """The release divides by the length of the step."""
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    config = {**AT_ONCE, "grafting": grafting, "decay": decay, "preconditioner_interval": 2}
    assert torch.equal(run(config, [[zeros]] * 25)[0], zeros)
    found = run(config, [[zeros]] * 25 + [[g] for g in gradients(3, 4, steps=3)])[0]
    assert found.isfinite().all() and found.norm() > 0


def test_rotations_commute_with_the_step() -> None:
    config = {**AT_ONCE, "grafting": "none", "beta1": 0.0, "preconditioner_interval": 2}
    steps = gradients(4, 5)
    U, V = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in (4, 5))
    plain, turned = run(config, [[g] for g in steps])[0], run(config, [[U @ g @ V.T] for g in steps])[0]
    assert oracles.relative_error(turned, U @ plain @ V.T) < 1e-6


def test_vectors_and_long_axes_take_nadams_step() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 40)).double()
    maker: Any = from_config(model, {"method": "caspr_adaptive", "max_dim": 10})
    kinds = {s.name: type(b.triple.representation) for b in maker.plan.blocks for s in b.sites}
    assert kinds == {"0.weight": OneWayDims, "0.bias": Diagonal, "1.weight": Diagonal, "1.bias": Diagonal}
    nadam, y = Nadam(), F.one_hot(torch.arange(6) % 3).double()
    for k in range(4):
        for p in model.parameters():
            p.grad = (k + 1.0) * torch.ones_like(p) * y.mean()
        expected = nadam(model[1].weight.grad)[1] / nadam.excess
        maker.precondition()
        assert oracles.relative_error(model[1].weight.grad, expected) < 1e-12


def test_the_defaults_are_the_releases() -> None:
    model = Matrices((1030, 2), (3, 4), (2, 3, 2, 2))
    maker: Any = from_config(model, {"method": "caspr_adaptive"})
    shapes = {s.name: s.shape[1:] for b in maker.plan.blocks for s in b.sites}
    assert sorted(shapes.values()) == [(2, 12), (3, 4), (6, 2), (1024, 2)]
    assert maker.config.start_step == 101 and maker.config.max_dim == 40000 and maker.config.warmup_steps == 0
    (kind,) = {b.triple.representation for b in maker.plan.blocks}
    assert kind == OneWayDims(at_once=False, damping=1e-6, start=1e-6, later=1.0)
    assert maker.config.preconditioner_interval == 20 and not maker.config.stagger


def test_a_stale_preconditioner_stays_as_it_was() -> None:
    """What is applied between two refreshes does not follow the statistics."""
    config = {
        **AT_ONCE,
        "grafting": "none",
        "beta1": 0.0,
        "preconditioner_interval": 4,
        "stagger": False,
    }
    model, (probe, *steps) = Matrices((3, 4)), gradients(3, 4, steps=9)
    maker: Any = from_config(model, config)
    found = []
    for g in steps:
        model.w[0].grad = g.clone()
        maker.precondition()
        (block,) = maker.plan.blocks
        found.append(block.triple.solver.solve(block.triple.representation, block.cache, probe.unsqueeze(0)))
    assert [torch.equal(a, b) for a, b in pairwise(found)] == [True, True, True, False, True, True, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"preconditioner_interval": 0},
        {"preconditioner_interval": 1.5},
        {"start": 0.0},
        {"start": -1.0},
        {"root": "svd"},
        {"damping": -1.0},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CasprAdaptiveGradientConfig(**wrong)
