"""Damping of K-FAC by the rule of Levenberg and Marquardt, against a derivation by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradmaker import METHODS
from gradmaker.curvature import Categorical, FisherExact
from gradmaker.solvers import AdaptiveDamping
from tests import models, oracles
from tests.models import CLASSES, Case

EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}


def network(*between: Callable[[], nn.Module], n: int = 12) -> Case:
    """Two linear layers."""
    case = models.build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *(m() for m in between), nn.Linear(6, CLASSES)), n, 4)
    with torch.no_grad():
        for p in case.model.parameters():
            p *= 2
    return case


def maker_of(case: Case, method: str = "kfac", interval: int = 1, omega: float = 19 / 20, **options: Any) -> Any:
    rule = {k: options.pop(k) for k in ("penalised", "low", "high", "most", "least") if k in options}
    adaptive = AdaptiveDamping(interval=interval, omega=omega, **rule)
    return METHODS[method](case.model, METHODS[method].Config(adaptive_damping=adaptive, **{**EVERY_STEP, **options}))


def passes(maker: Any, case: Case, x: Tensor | None = None, t: Tensor | None = None) -> Tensor:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x if x is None else x)
    maker.setup_loss_call(case.loss, y, case.t if t is None else t)
    loss: Tensor = maker.forward_and_backward()[1]
    return loss


def move(case: Case, lr: float) -> None:
    with torch.no_grad():
        for p in case.model.parameters():
            p -= 0 if p.grad is None else lr * p.grad


# --- the oracle -----------------------------------------------------------------------------------------------------------
def ratio(case: Case, before: Tensor, after: Tensor, state: Tensor, penalty: float = 0.0) -> float:
    """rho with a dense Fisher matrix, a row of the Jacobian at a time; the random numbers are those of the step."""
    names = oracles.parameter_slices(case.model)
    model = copy.deepcopy(case.model)

    def output(theta: Tensor) -> Tensor:
        values = {k: theta[where].view_as(model.get_parameter(k)) for k, where in names.items()}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            y: Tensor = functional_call(model, values, (case.x,))
            return y

    theta = before.clone().requires_grad_()
    z = output(theta)
    (g,) = torch.autograd.grad(F.cross_entropy(z, case.t), theta, retain_graph=True)
    J = torch.stack([torch.autograd.grad(v, theta, retain_graph=True)[0] for v in z.reshape(-1)]).view(*z.shape, -1)
    p = z.detach().softmax(-1)
    fisher = sum(J[n].mT @ (torch.diag(p[n]) - torch.outer(p[n], p[n])) @ J[n] for n in range(len(z))) / len(z)
    d = after - before
    predicted = g @ d + d @ (fisher + penalty * torch.eye(len(d))) @ d / 2
    with torch.no_grad():
        change = F.cross_entropy(output(after), case.t) - F.cross_entropy(z.detach(), case.t)
    return float(change / predicted) if predicted < 0 else -torch.inf


def judged(damping: float, rho: float, omega: float) -> float:
    return damping * omega if rho > 0.75 else damping / omega if rho < 0.25 else damping


def factored(case: Case, damping: float) -> dict[str, Tensor]:
    """P g of K-FAC with the exact Fisher of this batch alone, by loops over examples."""
    found = {}
    columns = oracles.exact_columns("categorical", case.t)
    reference = copy.deepcopy(case.model)
    raw = torch.autograd.grad(case.run(), list(case.model.parameters()))
    g = dict(zip(oracles.parameter_slices(case.model), raw, strict=True))
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear):
            ((A, B),) = oracles.kfac_factors(reference, case.x, name, columns, len(case.x))
            joint = torch.cat([g[f"{name}.weight"], g[f"{name}.bias"].unsqueeze(1)], 1)
            value = oracles.kfac_direction(joint, A, B, damping=damping)
            found[f"{name}.weight"], found[f"{name}.bias"] = value[:, :-1], value[:, -1]
    return found


RUNS = {"falls": (0.3, 0.5), "grows": (0.1, 10.0), "both": (0.3, 4.0)}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("run", RUNS)
def test_thirty_steps_by_hand(run: str) -> None:
    """Against an oracle that takes its own steps with its own lambda."""
    first, lr = RUNS[run]
    case, twin = network(n=6), network(n=6)
    maker = maker_of(case, "kflr", interval=2, damping=first, decay=0.0)
    damping, rho, history = first, None, []
    for k in range(30):
        passes(maker, case)
        assert maker.damping == pytest.approx(damping, rel=1e-10), k
        assert rho is None or maker.damping_ratio == pytest.approx(rho, rel=1e-6)
        history.append(damping)
        move(case, lr)
        before = oracles.parameter_vector(twin.model)
        step = factored(twin, damping)
        with torch.no_grad():
            for name, p in twin.model.named_parameters():
                p -= lr * step[name]
        after = oracles.parameter_vector(twin.model)
        assert oracles.relative_error(oracles.parameter_vector(case.model), after) < 1e-8, k
        case.model.load_state_dict(twin.model.state_dict())  # long steps amplify rounding
        if k % 2:
            rho = ratio(twin, before, after, torch.get_rng_state())
            damping = judged(damping, rho, 0.95**2)
    rises, falls = (sum(sign * (b - a) > 0 for a, b in pairwise(history)) for sign in (1, -1))
    assert {"falls": falls > 5 and not rises, "grows": rises > 5 and not falls, "both": rises > 2 and falls > 2}[run], (
        rises,
        falls,
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_dropout_is_replayed(method: str, penalised: bool) -> None:
    """The steps are the optimizer's, with momentum; masks are drawn from the global generator, which is not disturbed."""
    case = network(lambda: nn.Dropout(0.3))
    maker = maker_of(case, method, interval=5, damping=0.5, penalised=penalised)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.2, momentum=0.9, weight_decay=1e-2)
    damping, waiting, seen = 0.5, None, []
    for k in range(30):
        state, before = torch.get_rng_state(), oracles.parameter_vector(case.model)
        passes(maker, case)
        if waiting is not None:
            rho = ratio(case, *waiting, penalty=damping if penalised else 0.0)
            assert maker.damping_ratio == pytest.approx(rho, rel=1e-8)
            damping, waiting = judged(damping, rho, 0.95**5), None
        assert maker.damping == pytest.approx(damping, rel=1e-10)
        mask = torch.get_rng_state()
        optimizer.step()
        if k % 5 == 4:
            waiting = before, oracles.parameter_vector(case.model), state
        seen.append(damping)
        assert torch.equal(mask, torch.get_rng_state())
    assert len(set(seen)) > 2


def test_the_draws_of_the_model_are_those_of_a_maker_without() -> None:
    """Global random numbers, buffers and modes are as if nothing had been evaluated again."""
    states = []
    for adaptive in (None, AdaptiveDamping(interval=1, omega=1 - 1e-15)):
        torch.manual_seed(3)
        case = network(lambda: nn.Dropout(0.3), lambda: nn.BatchNorm1d(6))
        maker: Any = METHODS["kfac"](case.model, METHODS["kfac"].Config(adaptive_damping=adaptive, damping=0.1, **EVERY_STEP))
        for _ in range(4):
            passes(maker, case)
            move(case, 0.1)
        states.append((torch.get_rng_state(), {k: v.clone() for k, v in case.model.state_dict().items()}))
    assert torch.equal(states[0][0], states[1][0])
    for key, value in states[0][1].items():
        assert oracles.relative_error(states[1][1][key].double(), value.double()) < 1e-12, key


# --- what is judged -------------------------------------------------------------------------------------------------------
def test_micro_batches_are_one_step() -> None:
    whole, parts = network(), network()
    one, other = (maker_of(c, "kflr", damping=0.01) for c in (whole, parts))
    for _ in range(6):
        passes(one, whole)
        parts.model.zero_grad(set_to_none=True)
        for rows in (slice(0, 3), slice(3, 12)):
            y = other.setup_model_call(parts.model, parts.x[rows])
            other.setup_loss_call(parts.loss, y, parts.t[rows])
            other.accumulate((rows.stop - rows.start) / 12)
        other.precondition()
        assert other.damping == pytest.approx(one.damping, rel=1e-12) and other.damping_ratio == (
            None if one.damping_ratio is None else pytest.approx(one.damping_ratio, rel=1e-9)
        )
        for case in (whole, parts):
            move(case, 1.0)
    assert one.damping != 0.01


def test_weights_that_did_not_move_say_nothing() -> None:
    case = network()
    maker = maker_of(case, damping=0.1)
    for _ in range(3):
        passes(maker, case)
    assert maker.damping == 0.1 and maker.damping_ratio is None


def test_a_loss_that_is_not_finite_is_a_failure() -> None:
    case = network()
    maker = maker_of(case, damping=0.1)
    passes(maker, case)
    with torch.no_grad():
        case.model.get_parameter("0.weight").fill_(torch.nan)
    passes(maker, case)
    assert maker.damping == pytest.approx(0.1 / 0.95) and maker.damping_ratio == -torch.inf and maker.skipped == 1
    case.model.load_state_dict(network().model.state_dict())
    passes(maker, case)
    assert maker.damping == pytest.approx(0.1 / 0.95)  # a step that was skipped is not judged


def test_bounds_and_thresholds() -> None:
    case = network()
    maker = maker_of(case, damping=0.1, low=-1e9, high=1e9)
    bounded = maker_of(case, damping=0.1, least=0.09, high=-1e9, low=-2e9, omega=0.5)
    for m in (maker, bounded):
        for _ in range(3):
            passes(m, case)
            move(case, 0.1)
    assert maker.damping == 0.1 and bounded.damping == 0.09


def test_before_the_start_nothing_is_judged() -> None:
    case = network()
    maker = maker_of(case, damping=0.1, start_step=3)
    found = []
    for _ in range(6):
        passes(maker, case)
        found.append(maker.damping)
        move(case, 0.1)
    assert found[:4] == [0.1] * 4 and len(set(found[3:])) == 3


@pytest.mark.parametrize("kind", ["nll", "likelihood", "weighted"])
def test_other_forms_of_a_loss(kind: str) -> None:
    """The same loss by another way has the same lambda."""
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options: dict[str, Any] = {"likelihood": Categorical()} if kind == "likelihood" else {}
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "nll": lambda y, t: F.nll_loss(y.log_softmax(-1), t),
        "likelihood": lambda y, t: -y.log_softmax(-1)[torch.arange(len(t)), t].mean(),
        "weighted": lambda y, t: (F.cross_entropy(y, t, weight=weights, reduction="none") / weights[t].sum()).sum(),
    }
    plain = F.cross_entropy if kind != "weighted" else lambda y, t: F.cross_entropy(y, t, weight=weights)
    ratios = []
    for loss, more in ((plain, {}), (losses[kind], options)):
        case = network()
        maker = maker_of(case, damping=0.01, fisher=FisherExact(), **more)
        for _ in range(4):
            case.model.zero_grad(set_to_none=True)
            y = maker.setup_model_call(case.model, case.x)
            maker.setup_loss_call(loss, y, case.t)
            maker.setup_logits_repr(y)
            maker.forward_and_backward()
            move(case, 1.0)
        ratios.append((maker.damping_ratio, maker.damping))
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-9)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_convolutions_tokens_and_regression(loss: Any) -> None:
    """Against `oracles.loss_ggn`, on a model with positions and shared weights."""
    case = models.tagger(mix=True) if loss is F.cross_entropy else models.convolution(2, groups=2)
    if loss is not F.cross_entropy:
        case = case._replace(loss=loss, t=torch.rand(3, CLASSES, dtype=torch.float64))
    maker = maker_of(case, damping=0.1, fisher=FisherExact())
    before = oracles.parameter_vector(case.model)
    first = passes(maker, case)
    G = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    g = torch.cat([v.reshape(-1) for v in torch.autograd.grad(case.run(), [*case.model.parameters()])])
    move(case, 0.3)
    d = oracles.parameter_vector(case.model) - before
    change = case.run().detach() - first
    passes(maker, case)
    assert maker.damping_ratio == pytest.approx(float(change / (g @ d + d @ G @ d / 2)), rel=1e-8)


class Square(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = 2 * x * gradient
        return out


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("unknown loss", ValueError, "the quadratic model needs the Fisher matrix of the loss: a recognised loss"),
        ("no derivative", RuntimeError, "differentiated forwards, which this model does not support .*implement the jvp"),
    ],
)
def test_what_it_needs(kind: str, error: type[Exception], text: str) -> None:
    case = network()
    maker = maker_of(case, damping=0.1, fisher="FisherEmp")

    def once() -> None:
        case.model.zero_grad()
        known = kind != "unknown loss"
        y = maker.setup_model_call(lambda x: Square.apply(case.model(x)) if known else case.model(x), case.x)
        maker.setup_loss_call(F.cross_entropy if known else lambda y, t: y.square().mean(), y, case.t)
        maker.forward_and_backward()

    once()
    move(case, 0.1)
    with pytest.raises(error, match=text):
        once()
