"""SMW-NG and SENG by the rows of their own step: equal to the formed gradient in float64, and only where that is proven."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import by_rows
from gradmaker.curvature import FisherExact, FisherMC
from gradmaker.curvature.evidence import Outer
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.planned import PlannedMaker
from gradmaker.representations import Rows, Sketched
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import Gram
from tests import models, oracles
from tests.methods.test_kronecker_methods import make_of, step
from tests.models import Case

ONCE: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1}
METHODS_HERE = ["smw_ng", "seng"]


def net(bias: bool = True) -> Case:
    layers = partial(nn.Linear, 9, 8, bias=bias), nn.Tanh, partial(nn.Linear, 8, 3, bias=bias)
    case = models.build(lambda: nn.Sequential(*(layer() for layer in layers)), 4, 9)
    return case._replace(t=torch.arange(4) % 3, loss=F.cross_entropy)


def sequences() -> Case:
    case = net()
    x = torch.randn(3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return case._replace(x=x, t=torch.arange(15).view(3, 5) % 3, loss=lambda z, t: F.cross_entropy(z.mT, t))


def masked() -> Case:
    case = sequences()
    t = case.t.clone()
    t[0, 2:], t[1, 4] = -100, -100
    return case._replace(t=t)


def summed() -> Case:
    return net()._replace(loss=partial(F.cross_entropy, reduction="sum", weight=torch.tensor([1.0, 0.5, 2.0]).double()))


CASES = {"vectors": net, "no bias": partial(net, False), "sequences": sequences, "masked": masked, "weighted sum": summed}


@contextmanager
def formed() -> Iterator[None]:
    """Context in which no gradient is held by rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedMaker, "row_layers", lambda self: [])
        yield


@contextmanager
def counted(found: list[bool]) -> Iterator[None]:
    """Context that notes which steps of a block were solved from its evidence alone."""
    solve = by_rows.solve_own

    def noted(*args: Any) -> Any:
        value = solve(*args)
        found.append(value is not None)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_rows, "solve_own", noted)
        yield


def both(method: str, make: Any, steps: int = 3, **options: Any) -> tuple[list[bool], list[float]]:
    """Which blocks of which steps needed no gradient, and the errors against the formed one."""
    one, other, own = make(), make(), list[bool]()
    makers = make_of(method, one, **options), make_of(method, other, **options)
    errors = []
    for k in range(steps):
        with counted(own):
            found = step(makers[0], one._replace(t=one.t.roll(k, 0)))
        with formed():
            errors.append(oracles.relative_error(found, step(makers[1], other._replace(t=other.t.roll(k, 0)))))
    return own, errors


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_own_gradients_need_not_be_formed(name: str, method: str, damping: float) -> None:
    own, errors = both(method, CASES[name], damping=damping, **ONCE)
    assert own and all(own) and max(errors) < 1e-10


@pytest.mark.parametrize("method", METHODS_HERE)
def test_the_weight_gradients_are_not_computed(method: str) -> None:
    """The backward pass ends at the outputs, and ``.grad`` gets ``P g`` alone."""
    case = net()
    maker = make_of(method, case, **ONCE)
    step(maker, case)
    weight, seen = case.model.get_parameter("0.weight"), list[Any]()
    with pytest.MonkeyPatch.context() as patch:
        refreshed = type(maker)._refresh

        def look(self: Any, *args: Any) -> Any:
            seen.append(weight.grad)
            return refreshed(self, *args)

        patch.setattr(type(maker), "_refresh", look)
        step(maker, case)
    assert seen == [None] and weight.grad is not None


def test_smw_is_the_dense_inverse() -> None:
    """``(F + damping)^-1 g`` with per-example gradients by autograd."""
    case = net()
    maker = make_of("smw_ng", case, damping=0.02)
    parameters, rows = list(case.model.parameters()), []
    for k in range(4):
        loss = F.cross_entropy(case.model(case.x[k : k + 1]), case.t[k : k + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    J = torch.stack(rows)
    expected = torch.linalg.solve(J.mT @ J / 4 + 0.02 * torch.eye(J.shape[1]).double(), J.mean(0))
    assert oracles.relative_error(step(maker, case), expected) < 1e-10


@pytest.mark.parametrize("method", METHODS_HERE)
def test_with_an_older_cache_the_gradient_is_needed(method: str) -> None:
    """Measured at every step, refreshed at every other one."""
    together: dict[str, Any] = {"stagger": False} if method == "seng" else {}
    own, errors = both(method, net, 4, curvature_interval=1, preconditioner_interval=2, damping=0.1, **together)
    first = len(own) // 4
    assert max(errors) < 1e-10 and own[:first] == [True] * first and own[first : 2 * first] == [False] * first


def test_seng_projects_rows_on_rows_of_an_older_step() -> None:
    one, other = wide(), wide()
    makers = [make_of("seng", case, preconditioner_interval=5, curvature_interval=5, damping=0.3) for case in (one, other)]
    for k in range(4):
        found = step(makers[0], one._replace(t=one.t.roll(k)))
        with formed():
            assert oracles.relative_error(found, step(makers[1], other._replace(t=other.t.roll(k)))) < 1e-10


def wide() -> Case:
    """Layers so wide that a product of rows with rows is less work than one with a gradient."""
    layers = partial(nn.Linear, 40, 30), nn.Tanh, partial(nn.Linear, 30, 24), nn.Tanh, partial(nn.Linear, 24, 3)
    case = models.build(lambda: nn.Sequential(*(layer() for layer in layers)), 4, 40)
    return case._replace(t=torch.arange(4) % 3, loss=F.cross_entropy)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k, r", [(1, 1), (2, 1), (2, 3)])
def test_solve_rows_is_solve(bias: bool, k: int, r: int) -> None:
    held, solver = Rows(granularity="layer"), Gram(damping=0.3)
    shape = (20, 18 + bias)
    state = held.init(Frame(1, shape, frozenset(), torch.float64, torch.device("cpu")))
    draw = partial(torch.randn, dtype=torch.float64)
    held.update(state, Outer(draw(1, 3, r, 18), draw(k, 1, 3, r, 20), bias=bias), Fold(0.0, 0.5, 1.0, of_step=1.0))
    held.update(state, Outer(draw(1, 2, r, 18), draw(k, 1, 2, r, 20), bias=bias), Fold(1.0, 0.5, 0.0, of_step=1.0))
    cache, rows = solver.prepare(held, state, None), FactoredGradient(draw(1, 4, 20), draw(1, 4, shape[1]))
    value = solver.solve_rows(held, cache, rows)
    assert isinstance(value, FactoredGradient) and value.count == 4 + 5 * r
    assert oracles.relative_error(value.form(), solver.solve(held, cache, rows.form())) < 1e-12
    P = solver.operator(held, state)
    assert oracles.relative_error(value.form().reshape(-1), P[0] @ rows.form().reshape(-1)) < 1e-10


@pytest.mark.parametrize("held", [Rows(granularity="layer"), Sketched(coordinates=5, above=10)], ids=["rows", "sampled"])
@pytest.mark.parametrize("options", [{}, {"power": -0.5}, {"tail": "none"}, {"scale_preserving": True}], ids=str)
def test_own_coefficients_solve_as_the_gradient_does(held: Any, options: dict[str, Any]) -> None:
    """For every function of the matrix, over two micro-batches; sampled coordinates too: ``P J^T = J^T (K + damping)^-1``."""
    solver = Gram(damping=0.2, **options)
    if solver.refuse(held):
        return
    state = held.init(Frame(1, (8, 10), frozenset(), torch.float64, torch.device("cpu")))
    g, draw = torch.zeros(1, 8, 10).double(), partial(torch.randn, dtype=torch.float64)
    for weight, fold in ((0.25, Fold(0.0, 0.25, 1.0, of_step=1.0)), (0.75, Fold(1.0, 0.75, 0.0, of_step=1.0))):
        evidence, own = Outer(draw(1, 3, 1, 9), draw(1, 1, 3, 1, 8), bias=True), draw(3)
        held.update(state, Outer(evidence.inputs, evidence.gradients, bias=True, own=own), fold)
        g = g + weight * evidence.combine(own.unsqueeze(0))
    cache = solver.prepare(held, state, None)
    (found,) = solver.solve_own(held, state, cache) or []
    assert isinstance(found, FactoredGradient)
    assert oracles.relative_error(found.form(), solver.solve(held, cache, g)) < 1e-10
    assert solver.solve_own(held, {**state, "0.0.inputs": state["0.0.inputs"].clone()}, cache) is None  # of another step


STREAMS: dict[str, dict[str, Any]] = {
    "mfac": {"window": 3, "damping": 1e-3},
    "mfac warm": {"window": 4, "damping": 0.1, "warmup": "mean"},
    "tonga": {"rank": 2, "window": 2, "damping": 0.01, "decay": 0.9},
    "tonga_unit": {"rank": 2, "window": 2, "damping": 0.1, "scale_preserving": True},
    "ggt": {"window": 3, "beta1": 0.0, "decay": 0.8},
    "ggt tail": {"window": 3, "beta1": 0.0, "tail": "sigma_min"},
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("attached", [False, True])
def test_the_newest_row_of_a_stream_is_the_gradient(name: str, attached: bool) -> None:
    """``P g`` needs no projection of it on the rows, of which it is the last."""
    method, own = name.split(maxsplit=1)[0], list[bool]()

    def run(case: Case, maker: Any, k: int) -> Tensor:
        moved = case._replace(t=case.t.roll(k), x=case.x * (1 + 0.2 * k))
        if not attached:
            return step(maker, moved)
        case.model.zero_grad()
        moved.run().backward()
        optimizers[id(maker)].step()
        return oracles.gradient_vector(case.model)

    one, other = net(), net()
    makers = [make_of(method, case, **STREAMS[name]) for case in (one, other)]
    optimizers = {id(m): torch.optim.SGD(c.model.parameters(), lr=0.0) for m, c in zip(makers, (one, other), strict=True)}
    for maker in makers if attached else ():
        maker.attach(optimizers[id(maker)])
    for k in range(6):
        with counted(own):
            found = run(one, makers[0], k)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(by_rows, "solve_own", lambda *args: None)
            assert oracles.relative_error(found, run(other, makers[1], k)) < 1e-9, k
    assert all(own) and len(own) == 6 * len(makers[0].plan.blocks)


def test_a_stream_that_is_averaged_takes_the_gradient() -> None:
    own, errors = both("ggt", net, damping=0.1, window=3, beta1=0.9)
    assert not any(own) and max(errors) < 1e-10


# --- where a gradient is not that of the rows, or not known to be ------------------------------------------------------------
class Penalised(nn.Module):
    """A weight that the loss also depends on outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh()) + self.first.weight.square().sum()
        return out


class Twice(Penalised):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first(x), self.first(2 * x)], 1)
        out: Tensor = self.second(x[:, :8] * x[:, 8:])
        return out


def with_model(make: Any) -> Any:
    def case() -> Case:
        made = models.build(make, 4, 9)
        return made._replace(t=torch.arange(4) % 3, loss=F.cross_entropy)

    return case


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("make", [Penalised, Twice])
def test_other_uses_of_a_weight_are_formed(method: str, make: Any) -> None:
    own, errors = both(method, with_model(make), damping=0.1, **ONCE)
    assert max(errors) < 1e-10
    assert method == "seng" or not any(own)


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_hook_on_a_weight_sees_its_gradient(method: str) -> None:
    def case() -> Case:
        made = net()
        made.model.get_parameter("0.weight").register_hook(lambda g: 0.5 * g)
        return made

    own, errors = both(method, case, damping=0.1, self_check="off", **ONCE)
    assert max(errors) < 1e-10 and sum(own) == (3 if method == "seng" else 0)  # the other layer, in three steps


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("fisher", [FisherMC(samples=1), FisherExact()])
def test_other_fisher_matrices_have_other_rows(method: str, fisher: Any) -> None:
    own, errors = both(method, net, damping=0.1, fisher=fisher, **ONCE)
    assert not any(own) and max(errors) < 1e-10


@pytest.mark.parametrize("options", [{"beta1": 0.5}, {"grafting": "keep"}], ids=str)
def test_averages_and_kept_lengths_take_the_gradient(options: dict[str, Any]) -> None:
    own, errors = both("smw_ng", net, damping=0.1, **ONCE, **options)
    assert not any(own) and max(errors) < 1e-10


@pytest.mark.parametrize("method", METHODS_HERE)
def test_micro_batches_add_up(method: str) -> None:
    whole, parts = net(), net()
    one, other = (make_of(method, c, damping=0.1, **ONCE) for c in (whole, parts))
    for k in range(2):
        found = step(one, whole._replace(t=whole.t.roll(k)))
        parts.model.zero_grad(set_to_none=True)
        for rows in (slice(0, 1), slice(1, 4)):
            y = other.setup_model_call(parts.model, parts.x[rows])
            other.setup_loss_call(parts.loss, y, parts.t.roll(k)[rows])
            other.accumulate((rows.stop - rows.start) / 4)
        other.precondition()
        assert oracles.relative_error(oracles.gradient_vector(parts.model), found) < 1e-10, k


def test_an_earlier_gradient_is_added_to() -> None:
    case, other = net(), net()
    maker, twin = (make_of("smw_ng", c, damping=0.1) for c in (case, other))
    P_g = step(twin, other)
    case.model.zero_grad()
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    assert oracles.relative_error(oracles.gradient_vector(case.model), P_g + 1) < 1e-12


@pytest.mark.filterwarnings("ignore::gradmaker.loops.attachment.ChangedGradientWarning")
@pytest.mark.parametrize("method", METHODS_HERE)
def test_in_an_attached_loop_the_loops_gradient_is_preconditioned(method: str) -> None:
    """As it is then: clipped, or scaled, it is not what the rows make up."""
    declared, attached = net(), net()
    twin = step(make_of(method, declared, damping=0.1, **ONCE), declared)
    optimizer = torch.optim.SGD(attached.model.parameters(), lr=1.0)
    maker = make_of(method, attached, damping=0.1, **ONCE).attach(optimizer)
    before, own = [p.detach().clone() for p in attached.model.parameters()], list[bool]()
    for scale in (1.0, 0.25):
        with torch.no_grad():
            for p, b in zip(attached.model.parameters(), before, strict=True):
                p.copy_(b)
        optimizer.zero_grad()
        attached.run().backward()
        for p in attached.model.parameters():
            assert p.grad is not None
            if scale != 1.0:
                p.grad.mul_(scale)
        with counted(own):
            optimizer.step()
        moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, attached.model.parameters(), strict=True)])
        assert oracles.relative_error(moved, scale * twin) < 1e-10
    assert not any(own)
    maker.remove()


@pytest.mark.parametrize("method", ["seng", "skfac"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_loop_may_write_the_next_batch_into_the_same_tensor(method: str, bias: bool) -> None:
    """What is held for later steps does not change with it."""
    one, other = net(bias), net(bias)
    x = one.x.clone()
    later: dict[str, Any] = {"curvature_interval": 5, "preconditioner_interval": 5, "damping": 0.1, "stagger": False}
    later |= {"warmup_steps": 0} if method == "skfac" else {}
    makers = [make_of(method, case, **later) for case in (one, other)]
    for k in range(3):
        x.copy_(other.x.roll(k, 0) * (1 + k))
        found = step(makers[0], one._replace(x=x))
        assert oracles.relative_error(found, step(makers[1], other._replace(x=x.clone()))) < 1e-12, k


def test_after_a_failed_refresh_the_gradient_meets_the_rows_of_another_step() -> None:
    def failing(self: Any, K: Tensor, roundoff: Any) -> Any:
        return {"middle": K, "gain": K[:, 0, 0]}, torch.ones(1).bool()

    found, own = [], list[bool]()
    for case in (net(), net()):
        maker = make_of("smw_ng", case, damping=0.1)
        step(maker, case)
        with pytest.MonkeyPatch.context() as patch, counted(own):
            patch.setattr(Gram, "_invert", failing)
            if found:
                with formed():
                    found.append(step(maker, case._replace(t=case.t.roll(1))))
            else:
                found.append(step(maker, case._replace(t=case.t.roll(1))))
        assert int(maker.plan.blocks[0].cache["failures"]) == 1
    assert not any(own) and oracles.relative_error(*found) < 1e-10
