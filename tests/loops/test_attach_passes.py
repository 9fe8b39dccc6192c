"""Attached: which passes are part of a step. The others leave no trace, and what the step's own bring is a float64 oracle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import gradmaker as gm
from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.representations import Dense
from gradmaker.solvers import Cholesky
from tests.loops.test_attach import CONFIGS, maker_of
from tests.models import Case, mlp
from tests.test_state import equal_states


# --- a dense oracle -------------------------------------------------------------------------------------------------------
def dense(curvature: Any, decay: float | None = 0.0) -> Any:
    full = Dense(granularity="full")
    return gm.CustomGradientConfig(curvature=curvature, representation=full, solver=Cholesky(), decay=decay)


def statistic(maker: Any) -> Tensor:
    (block,) = maker.plan.blocks
    return block.triple.representation.to_dense(block.state)[0]


def gauss_newton(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """``J^T H J`` of all parameters in order, by `torch.func`."""
    p = {k: v.detach().clone() for k, v in model.named_parameters()}

    def logits(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,)).reshape(-1)

    J = torch.cat([j.flatten(1) for j in jacrev(logits)(p).values()], 1)
    z = logits(p)
    return J.T @ hessian(lambda z: loss(z.reshape(len(x), -1)))(z) @ J


def second_moment(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """``(1/N) sum_n grad_n grad_n^T``, one example after another."""
    rows = []
    for n in range(len(x)):
        found = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), t[n : n + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    J = torch.stack(rows)
    return J.T @ J / len(x)


def twin(case: Case) -> nn.Module:
    """The model at its weights of now, without hooks."""
    made = mlp(bias=False).model
    made.load_state_dict(case.model.state_dict())
    return made


def wanted(case: Case, curvature: Any, x: Tensor, t: Tensor) -> Tensor:
    if isinstance(curvature, FisherEmp):
        return second_moment(twin(case), x, t)
    return gauss_newton(twin(case), x, lambda z: F.cross_entropy(z, t))


def ride(curvature: Any, **options: Any) -> tuple[Case, torch.optim.Optimizer, Any]:
    case = mlp(bias=False)  # else biases lie between the rows of weights
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = maker_of(case.model, dense(curvature))
    maker.attach(optimizer, "categorical", **options)
    return case, optimizer, maker


EXACT_AND_EMP = pytest.mark.parametrize("curvature", [FisherExact(), FisherEmp()], ids=["exact", "emp"])
NONE_OR_ZERO = pytest.mark.parametrize("to_none", [True, False])


# --- passes of no step, against the oracle --------------------------------------------------------------------------------
@EXACT_AND_EMP
@NONE_OR_ZERO
def test_sharpness_aware_minimisation_is_measured_where_its_gradient_is(curvature: Any, to_none: bool) -> None:
    case, optimizer, maker = ride(curvature)
    for _ in range(3):
        case.run().backward()
        with torch.no_grad():
            moves = [0.3 * p.grad / p.grad.norm() for p in case.model.parameters()]  # type: ignore[operator, union-attr]
            for p, e in zip(case.model.parameters(), moves, strict=True):
                p += e
        optimizer.zero_grad(to_none)
        expected = wanted(case, curvature, case.x, case.t)
        case.run().backward()
        with torch.no_grad():
            for p, e in zip(case.model.parameters(), moves, strict=True):
                p -= e
        optimizer.step()
        optimizer.zero_grad(to_none)
        torch.testing.assert_close(statistic(maker), expected, rtol=1e-10, atol=1e-12)


@EXACT_AND_EMP
def test_adversarial_examples(curvature: Any) -> None:
    case, optimizer, maker = ride(curvature)
    inputs = case.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.loss(case.model(inputs), case.t), inputs)
    attacked = case.x + 0.3 * slope.sign()
    expected = wanted(case, curvature, attacked, case.t)
    case.loss(case.model(attacked), case.t).backward()
    optimizer.step()
    torch.testing.assert_close(statistic(maker), expected, rtol=1e-10, atol=1e-12)


@EXACT_AND_EMP
@NONE_OR_ZERO
def test_micro_batches_that_are_left_out(curvature: Any, to_none: bool) -> None:
    """Two are dropped together; of those that follow both count."""
    case, optimizer, maker = ride(curvature, accumulation=2)
    for scale in (3.0, 5.0):
        (case.loss(case.model(scale * case.x), case.t) / 2).backward()
    optimizer.zero_grad(to_none)
    parts = [(case.x, case.t), (0.5 * case.x, case.t.roll(1, 0))]
    expected = sum(wanted(case, curvature, x, t) for x, t in parts) / 2
    for x, t in parts:
        (case.loss(case.model(x), t) / 2).backward()
    optimizer.step()
    torch.testing.assert_close(statistic(maker), expected, rtol=1e-10, atol=1e-12)


@NONE_OR_ZERO
def test_two_networks_against_each_other(to_none: bool) -> None:
    """The critic's statistic is that of its own two batches; its part in the generator's step is none of its passes."""

    def networks() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double(), nn.Linear(4, 1, bias=False).double()

    (generator, critic), real = networks(), torch.randn(5, 4, dtype=torch.float64)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (generator, critic)]
    makers = [maker_of(m, dense(FisherExact())) for m in (generator, critic)]
    makers[0].attach(steps[0], "gaussian")
    makers[1].attach(steps[1], "bernoulli")
    loss = F.binary_cross_entropy_with_logits
    one, zero = torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    plain = networks()[1]
    for _ in range(3):
        noise = torch.randn(5, 2, dtype=torch.float64)
        steps[1].zero_grad(to_none)
        fake = generator(noise)
        plain.load_state_dict(critic.state_dict())
        expected = gauss_newton(plain, real, lambda z: loss(z, one)) + gauss_newton(
            plain, fake.detach(), lambda z: loss(z, zero)
        )
        loss(critic(real), one).backward()
        loss(critic(fake.detach()), zero).backward()
        steps[1].step()
        torch.testing.assert_close(statistic(makers[1]), expected, rtol=1e-10, atol=1e-12)
        steps[0].zero_grad(to_none)
        loss(critic(fake), one).backward()
        steps[0].step()
        torch.testing.assert_close(statistic(makers[1]), expected, rtol=1e-10, atol=1e-12)
    assert [m.step for m in makers] == [3, 3]


# --- passes of no step, against a loop without them -----------------------------------------------------------------------
def skipped(case: Case, optimizer: Any) -> None:
    case.loss(case.model(3 * case.x), case.t).backward()
    optimizer.zero_grad()


def skipped_in_place(case: Case, optimizer: Any) -> None:
    for scale in (3, 5):
        case.loss(case.model(scale * case.x), case.t).backward()
    optimizer.zero_grad(set_to_none=False)


def by_the_model(case: Case, optimizer: Any) -> None:
    case.loss(case.model(3 * case.x), case.t).backward()
    case.model.zero_grad()


def inputs_alone(case: Case, optimizer: Any) -> None:
    x = case.x.clone().requires_grad_()
    torch.autograd.grad(case.loss(case.model(x), case.t), x, create_graph=True)


def gradients_apart(case: Case, optimizer: Any) -> None:
    torch.autograd.grad(case.run(), list(case.model.parameters()))


def jacobian(case: Case, optimizer: Any) -> None:
    z = case.model(case.x)
    directions = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    torch.autograd.grad(z, list(case.model.parameters()), directions, is_grads_batched=True)


def attack(case: Case, optimizer: Any) -> None:
    x = case.x.clone().requires_grad_()
    for _ in range(2):
        case.loss(case.model(x), case.t).backward()
        optimizer.zero_grad()


def failure_forward(case: Case, optimizer: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        case.model(case.x[:, :2])


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        raise RuntimeError("broken")


def failure_backward(case: Case, optimizer: Any) -> None:
    """After the output's gradient has arrived."""
    x = case.x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="broken"):
        case.loss(case.model(Broken.apply(x)), case.t).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()


def transformed(case: Case, optimizer: Any) -> None:
    gauss_newton(case.model, case.x, lambda z: F.cross_entropy(z, case.t))


def traced(case: Case, optimizer: Any) -> None:
    torch.jit.trace(case.model, case.x)


def no_loss(case: Case, optimizer: Any) -> None:
    case.model(case.x + 1)


OTHERS = [
    skipped,
    skipped_in_place,
    by_the_model,
    inputs_alone,
    gradients_apart,
    jacobian,
    attack,
    failure_forward,
    failure_backward,
    transformed,
    traced,
    no_loss,
]


def trajectory(config: Any, other: Callable[[Case, Any], None] | None, between: bool = False) -> tuple[list[Tensor], Any]:
    """between: the other passes come between the micro-batches of a step, with a gradient in ``.grad``"""
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02, momentum=0.5)
    maker = maker_of(case.model, config).attach(optimizer, "categorical", 2)
    for _ in range(4):
        for j, (x, t) in enumerate(zip(case.x.chunk(2), case.t.chunk(2), strict=True)):
            if other and between == (j == 1):
                other(case, optimizer)
            (case.loss(case.model(x), t) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in case.model.parameters()], maker.state_dict()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", ["adam", "shampoo", "kfac_exact", "kfac_emp", "kfac_mc", "unit_ng"])
@pytest.mark.parametrize("other", OTHERS)
def test_passes_of_no_step_leave_no_trace(other: Callable[[Case, Any], None], name: str) -> None:
    """Statistics, clocks, counters and random numbers are bitwise those of the loop without them."""
    found, state = trajectory(CONFIGS[name](), other)
    expected, clean = trajectory(CONFIGS[name](), None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and equal_states(state, clean)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", ["shampoo", "kfac_exact", "kfac_emp", "kfac_mc"])
@pytest.mark.parametrize("other", [inputs_alone, gradients_apart, jacobian, failure_forward, transformed, no_loss])
def test_passes_between_micro_batches_leave_no_trace(other: Callable[[Case, Any], None], name: str) -> None:
    found, state = trajectory(CONFIGS[name](), other, between=True)
    expected, clean = trajectory(CONFIGS[name](), None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and equal_states(state, clean)


@EXACT_AND_EMP
@pytest.mark.parametrize("where", ["before forward", "before backward", "after step"])
@NONE_OR_ZERO
def test_gradients_may_be_zeroed_anywhere(where: str, to_none: bool, curvature: Any) -> None:
    case, optimizer, maker = ride(curvature, accumulation=3)
    for k in range(3):
        expected: Any = 0
        for j in range(3):
            if j == 0 and where == "before forward":
                optimizer.zero_grad(to_none)
            x = case.x * (1 + j + k)
            expected = expected + wanted(case, curvature, x, case.t) / 3
            loss = case.loss(case.model(x), case.t) / 3
            if j == 0 and where == "before backward":
                optimizer.zero_grad(to_none)
            loss.backward()
        optimizer.step()
        torch.testing.assert_close(statistic(maker), expected, rtol=1e-10, atol=1e-12)
        if where == "after step":
            optimizer.zero_grad(to_none)
    assert maker.step == 3


def test_a_gradient_penalty_is_measured_in_the_pass_that_counts() -> None:
    """The output's gradient arrives twice: first for the penalty, which writes no ``.grad``."""
    case, optimizer, maker = ride(FisherExact())
    x = case.x.clone().requires_grad_()
    expected = wanted(case, FisherExact(), case.x, case.t)
    loss = case.loss(case.model(x), case.t)
    (slope,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(statistic(maker), expected, rtol=1e-10, atol=1e-12)
    assert slope.shape == x.shape


def test_two_backward_passes_of_one_forward_pass() -> None:
    case, optimizer, maker = ride(FisherExact())
    loss = case.run()
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, list(case.model.parameters()), retain_graph=True)
    with pytest.raises(RuntimeError, match="one forward pass was differentiated twice"):
        loss.backward()
    optimizer.zero_grad()
    case.run().backward()
    optimizer.step()
    assert maker.step == 1
