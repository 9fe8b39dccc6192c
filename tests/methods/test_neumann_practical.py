"""The practical Neumann optimizer: its trajectory derived again, Nesterov's as a special case, weights without displacement."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.methods.neumann import NeumannPracticalGradientConfig, NeumannPracticalGradientMaker
from tests import models, oracles
from tests.methods.test_methods import reloaded
from tests.models import Case
from tests.passes.test_products import step, trainable

RATE = 0.05


def batch(case: Case, k: int) -> Case:
    rows = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(k))[:4]
    return case._replace(x=case.x[rows], t=case.t[rows])


def flat_gradient(case: Case, w: Tensor) -> Tensor:
    """At given weights, by autograd alone."""
    named, start = {}, 0
    for name, p in case.model.named_parameters():
        named[name] = w[start : start + p.numel()].view_as(p)
        start += p.numel()
    leaves = {k: v.detach().requires_grad_() for k, v in named.items()}
    loss = case.loss(torch.func.functional_call(case.model, leaves, (case.x,)), case.t)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(leaves.values()))])


class Published:
    """Algorithm 2, from the paper's letters: weights ``w``, iterate ``m``, average ``v``, in the order of the listing."""

    def __init__(self, w: Tensor, alpha: float, beta: float, gamma: float, peak: float, K: int) -> None:
        self.w, self.v, self.m, self.t = w.clone(), w.clone(), torch.zeros_like(w), 0
        self.alpha, self.beta, self.gamma, self.peak, self.K, self.next = alpha, beta, gamma, peak, K, 1
        self.resets: list[int] = []

    def step(self, case: Case) -> None:
        self.t += 1
        g = flat_gradient(case, self.w)
        mu = min(self.peak, 1 - 1 / (1 + self.t))
        if self.t == self.next:
            self.resets.append(self.t)
            d, self.m = g, -RATE * g
            self.next, self.K = self.t + self.K, 2 * self.K
        else:
            away = self.w - self.v
            r = float(away.norm())
            d = g
            if r >= 1e-8 * len(g) ** 0.5:
                d = g + (self.alpha * r**2 - self.beta / r**2) * away / r
            self.m = mu * self.m - RATE * d
        self.mu = mu
        self.w = self.w + mu * self.m - RATE * d
        self.v = self.w + self.gamma * (self.v - self.w)


def optimizer_of(case: Case) -> torch.optim.Optimizer:
    return torch.optim.SGD(case.model.parameters(), RATE)


OPTIONS: dict[str, Any] = {"rate": RATE, "alpha": 0.3, "beta": 1e-3, "average": 0.9, "peak": 0.8, "period": 13}


@pytest.mark.parametrize("attached", [False, True])
def test_trajectory_is_the_published_one(attached: bool) -> None:
    """Sixty steps on fresh batches, two further resets among them, by SGD at the rate; in a loop of one's own as well."""
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "neumann_practical", **OPTIONS})
    published = Published(oracles.parameter_vector(case.model), 0.3, 1e-3, 0.9, 0.8, 13)
    optimizer = optimizer_of(case)
    if attached:
        maker.attach(optimizer)
    for k in range(60):
        now = batch(case, k)
        published.step(now)
        if attached:
            optimizer.zero_grad()
            now.run().backward()
        else:
            step(maker, now)
        optimizer.step()
        assert oracles.relative_error(oracles.parameter_vector(case.model), published.w) < 1e-10, k
        with maker.undisplaced():
            bare = oracles.parameter_vector(case.model)
        assert oracles.relative_error(bare, published.w - published.mu * published.m) < 1e-10
    assert published.resets == [1, 14, 40]


def test_defaults_are_the_papers() -> None:
    config = NeumannPracticalGradientConfig()
    assert (config.alpha, config.beta, config.average, config.peak) == (1e-7, None, 0.99, 0.9)
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "neumann_practical", "rate": RATE})
    w = oracles.parameter_vector(case.model)
    published, optimizer = Published(w, 1e-7, 1e-5 * len(w), 0.99, 0.9, 1000), optimizer_of(case)
    for k in range(15):
        published.step(batch(case, k))
        step(maker, batch(case, k))
        optimizer.step()
    assert oracles.relative_error(oracles.parameter_vector(case.model), published.w) < 1e-9


def test_without_regulariser_it_is_nesterovs() -> None:
    """alpha = beta = 0, no further reset, a fixed mu: torch's own, to the last digits."""
    case, twin = models.mlp(), models.mlp()
    options = {"rate": RATE, "alpha": 0.0, "beta": 0.0, "peak": 0.5}
    maker, first = from_config(case.model, {"method": "neumann_practical", **options}), optimizer_of(case)
    second = torch.optim.SGD(twin.model.parameters(), RATE, momentum=0.5, nesterov=True)
    for k in range(20):
        step(maker, batch(case, k))
        first.step()
        second.zero_grad()
        batch(twin, k).run().backward()
        second.step()
    assert oracles.relative_error(oracles.parameter_vector(case.model), oracles.parameter_vector(twin.model)) < 1e-12


class Bowl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return (h * self.w.square()).sum() / 2


def test_closed_form_on_a_quadratic() -> None:
    """(w, m) is a power of a 2 x 2 matrix in every direction."""
    h, mu, model = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float64), 0.5, Bowl()
    options = {"rate": RATE, "alpha": 0.0, "beta": 0.0, "peak": mu}
    maker, start = from_config(model, {"method": "neumann_practical", **options}), model.w.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    case = Case(model, h, torch.zeros(3), lambda y, t: y)
    for _ in range(25):
        step(maker, case)
        optimizer.step()
    for j in range(3):
        e = RATE * float(h[j])
        M = torch.tensor([[1 - e * (1 + mu), mu**2], [-e, mu]], dtype=torch.float64)
        power = torch.linalg.matrix_power(M, 25)
        assert float(model.w[j].detach()) == pytest.approx(float(power[0, 0] * start[j]), rel=1e-10)


def test_series_is_the_inverse_hessian() -> None:
    """What it is called after: one frozen quadratic, gradients at w + rate m add up to H^-1 g."""
    h = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    g, m = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(2000):
        m = m - RATE * (g + h * m)
    assert oracles.relative_error(-m, g / h) < 1e-9


def test_plain_steps_come_first() -> None:
    """Then everything starts as if from there: the first of the series is a reset, with mu = 1/2."""
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "neumann_practical", **OPTIONS, "plain": 3})
    optimizer = optimizer_of(case)
    for k in range(3):
        expected = flat_gradient(batch(case, k), oracles.parameter_vector(case.model))
        assert oracles.relative_error(step(maker, batch(case, k)), expected) < 1e-12
        optimizer.step()
    published = Published(oracles.parameter_vector(case.model), 0.3, 1e-3, 0.9, 0.8, 13)
    for k in range(3, 20):
        published.step(batch(case, k))
        step(maker, batch(case, k))
        optimizer.step()
    assert oracles.relative_error(oracles.parameter_vector(case.model), published.w) < 1e-10 and published.resets == [1, 14]


def test_at_rest_nothing_pushes() -> None:
    """w = v: without the guard the push 1 / r^2 would be infinite."""
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "neumann_practical", **OPTIONS})
    for _ in range(3):
        g = step(maker, case)  # the weights do not move
        assert g.isfinite().all() and float(g.norm()) < 10


def test_undisplaced_puts_everything_back() -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "neumann_practical", **OPTIONS})
    with maker.undisplaced():  # before the first step there is nothing to take off
        assert torch.equal(oracles.parameter_vector(case.model), oracles.parameter_vector(models.mlp().model))
    optimizer = optimizer_of(case)
    for k in range(5):
        step(maker, batch(case, k))
        optimizer.step()
    before, gradients = copy.deepcopy(case.model.state_dict()), [p.grad.clone() for p in trainable(case)]  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError), maker.undisplaced():
        assert not torch.equal(case.model.get_parameter("0.weight"), before["0.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(trainable(case), gradients, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [1, 12, 13, 14, 41])
def test_resume_is_bitwise_around_resets(at: int) -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "neumann_practical", **OPTIONS})
    optimizer = optimizer_of(case)

    def run(maker: Any, case: Case, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
        for k in range(start, stop):
            step(maker, batch(case, k))
            optimizer.step()

    run(maker, case, optimizer, 0, at)
    state, weights = reloaded(maker.state_dict()), copy.deepcopy(case.model.state_dict())
    run(maker, case, optimizer, at, at + 8)
    twin = models.mlp()
    twin.model.load_state_dict(weights)
    second: Any = from_config(twin.model, {"method": "neumann_practical", **OPTIONS})
    second.load_state_dict(state)
    run(second, twin, optimizer_of(twin), at, at + 8)
    assert torch.equal(oracles.parameter_vector(case.model), oracles.parameter_vector(twin.model))
    with maker.undisplaced(), second.undisplaced():
        assert torch.equal(oracles.parameter_vector(case.model), oracles.parameter_vector(twin.model))


def test_micro_batches_and_layers_that_are_left_out() -> None:
    case, twin = models.unused(), models.unused()
    one, two = (from_config(c.model, {"method": "neumann_practical", **OPTIONS}) for c in (case, twin))
    for k in range(4):
        step(one, case)
        twin.model.zero_grad(set_to_none=True)
        n = len(twin.x)
        for rows, weight in ((slice(0, 2), 2 / n), (slice(2, n), (n - 2) / n)):
            two.setup_loss_call(twin.loss, two.setup_model_call(twin.model, twin.x[rows]), twin.t[rows])
            two.accumulate(weight)
        two.precondition()
        for c in (case, twin):
            for p in c.model.parameters():
                with torch.no_grad():
                    p -= 0 if p.grad is None else RATE * p.grad
        assert oracles.relative_error(oracles.parameter_vector(case.model), oracles.parameter_vector(twin.model)) < 1e-12, k


def test_it_trains() -> None:
    """Better than SGD at the same rate in as many steps: that is what the momentum is for."""
    final = {}
    for name in ("neumann_practical", "gradient"):
        case = models.mlp()
        maker = from_config(case.model, {"method": name, **({"rate": RATE, "beta": 0.0} if name != "gradient" else {})})
        optimizer = optimizer_of(case)
        for _ in range(60):
            step(maker, case)
            optimizer.step()
        final[name] = case.run().item()
    assert final["neumann_practical"] < 0.5 * final["gradient"] < F.cross_entropy(torch.zeros(1, 3), torch.tensor([0])).item()


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"beta": -1.0}, {"average": 1.5}, {"peak": 2.0}, {"period": 0}, {"plain": -1}])
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        NeumannPracticalGradientConfig(**bad)
    for options in ({"damping": 0.1}, {"curvature_interval": 3}):
        with pytest.raises(ValueError, match="no effect"):
            NeumannPracticalGradientConfig(**options)
    assert isinstance(from_config(nn.Linear(2, 2), {"method": "neumann_practical"}), NeumannPracticalGradientMaker)
