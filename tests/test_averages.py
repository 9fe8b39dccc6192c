"""Averages in the basis of a solver: the same directions, whatever the interval, and states that load into either form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradmaker import from_config
from gradmaker.representations.roles import PROJECTED
from tests import oracles
from tests.kronecker_reference import on_axis, unfolded

SHAPES = ((5, 4), (4, 4), (3, 2, 4), (6,))
STEPS = 14


class Weights(nn.Module):
    """Parameters whose gradients are given, the second member of a stack as the first."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes)


def gradients(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def step(maker: Any, model: Weights, index: int) -> list[Tensor]:
    """What a step makes of its gradients."""
    for p, g in zip(model.all, gradients(index, tuple(tuple(p.shape) for p in model.all)), strict=True):
        p.grad = g
    maker.precondition()
    return [p.grad.clone() for p in model.all if p.grad is not None]


class Published:
    """SOAP as published, its momentum the average of gradients and projected at every step.

    Without the first step, whose gradient initialises the basis; the damping stands beside the root before its correction.
    """

    def __init__(self, interval: int, beta1: float, nesterov: bool, decay: float, damping: float) -> None:
        self.interval, self.beta1, self.nesterov, self.decay, self.damping = interval, beta1, nesterov, decay, damping
        self.H: list[Tensor] = []
        self.Q: list[Tensor] = []
        self.M, self.V, self.t = torch.zeros(()), torch.zeros(()), 0

    def project(self, g: Tensor, back: bool = False) -> Tensor:
        for axis, Q in enumerate(self.Q):
            g = on_axis(Q if back else Q.T, g, axis)
        return g

    def refresh(self) -> None:
        for axis, (H, Q) in enumerate(zip(self.H, self.Q, strict=True)):
            order = (Q.T @ H @ Q).diagonal().argsort(descending=True)
            self.V = self.V.index_select(axis, order)
            self.Q[axis] = torch.linalg.qr(H @ Q[:, order])[0]

    def __call__(self, g: Tensor, index: int) -> Tensor:
        axes = range(g.ndim) if g.ndim > 1 else ()
        outer = [unfolded(g, k) @ unfolded(g, k).T for k in axes]
        if index == 0:
            self.H = [(1 - self.decay) * S for S in outer]
            self.Q = [torch.linalg.eigh(H)[1].flip(1) for H in self.H]
            self.M, self.V = torch.zeros_like(g), torch.zeros_like(g)
            return torch.zeros_like(g)
        if index % self.interval == 0:
            self.refresh()
        self.t += 1
        self.M = self.beta1 * self.M + (1 - self.beta1) * g
        self.V = self.decay * self.V + (1 - self.decay) * self.project(g).square()
        self.H = [self.decay * H + (1 - self.decay) * S for H, S in zip(self.H, outer, strict=True)]
        M, mass = self.M / (1 - self.beta1**self.t), 1 - self.decay**self.t
        if self.nesterov:
            M = (self.beta1 * self.M + (1 - self.beta1) * g) / (1 - self.beta1 ** (self.t + 1))
        return self.project(mass**0.5 * self.project(M) / (self.V.sqrt() + self.damping), back=True)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("interval", [1, 2, 3, 4, 10])
def test_soap_is_the_published_algorithm(interval: int, nesterov: bool) -> None:
    """To 1e-10, over several refreshes; gradients of full rank, since the basis of a null space is anybody's."""
    options = {"preconditioner_interval": interval, "nesterov_average": nesterov, "damping": 1e-4}
    model = Weights(((4, 4), (4, 4), (2, 2, 4)))
    maker = from_config(model, {"method": "soap", **options})
    rules = [Published(interval, 0.95, nesterov, 0.95, 1e-4) for _ in model.all]
    keys = {key for block in maker.plan.blocks for key in block.average if key != "mass"}
    assert keys == ({"average"} if interval < 3 else {"coordinates"})
    for index in range(25):
        found = step(maker, model, index)
        for rule, x, g in zip(rules, found, gradients(index, tuple(tuple(p.shape) for p in model.all)), strict=True):
            expected = rule(g, index)
            assert oracles.relative_error(x, expected) < 1e-10 or not expected.any(), index


METHODS: dict[str, dict[str, Any]] = {
    "soap": {"method": "soap"},
    "first": {"method": "soap", "skip_first": False, "nesterov_average": True},
    "unmeasured": {"method": "soap", "curvature_interval": 2},
    "eshampoo": {"method": "eshampoo"},
    "blocks": {"method": "soap", "block_size": 3},
    "long": {"method": "soap", "max_dim": 4},
}


def makers(row: str, *intervals: int) -> Iterator[tuple[Any, Weights]]:
    for interval in intervals:
        model = Weights()
        yield from_config(model, {**METHODS[row], "damping": 1e-4, "preconditioner_interval": interval}), model


def held_in(maker: Any, key: str) -> bool:
    """Whether the averages of matrices are held in this form."""
    return all(key in block.average for block in maker.plan.blocks if len(block.frame.shape) > 1)


@pytest.mark.parametrize("row", METHODS)
def test_both_forms_give_the_same(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((rotated, model),) = makers(row, 4)
    monkeypatch.setattr("gradmaker.config.RARE", 100)
    ((plain, other),) = makers(row, 4)
    assert held_in(rotated, "coordinates") and held_in(plain, "average")
    for index in range(STEPS):
        for x, y in zip(step(rotated, model, index), step(plain, other, index), strict=True):
            assert oracles.relative_error(x, y) < 1e-10 or not y.any(), index


@pytest.mark.parametrize("options", [{"grafting": "adam"}, {"preconditioner_interval": 2}, {"beta1": 0.0}], ids=str)
def test_who_averages_gradients(options: dict[str, Any]) -> None:
    """A graft needs the average itself, a short interval pays no turning; a vector has no basis."""
    maker = from_config(Weights(), {"method": "soap", **options})
    assert not any("coordinates" in block.average for block in maker.plan.blocks)
    always = from_config(Weights(), {"method": "soap"})
    assert [len(b.frame.shape) == 1 for b in always.plan.blocks] == ["average" in b.average for b in always.plan.blocks]


@pytest.mark.parametrize("at", [0, 1, 5, 8])
@pytest.mark.parametrize("row", METHODS)
def test_a_resumed_run_is_bitwise_the_same(row: str, at: int) -> None:
    """Also where the next step refreshes, and turns the average from the basis of a loaded cache."""
    (maker, model), (other, again) = makers(row, 4, 4)
    for index in range(at):
        step(maker, model, index)
    other.load_state_dict(maker.state_dict())
    for index in range(at, at + 6):
        assert all(map(torch.equal, step(maker, model, index), step(other, again, index))), index


@pytest.mark.parametrize("at", [0, 1, 5, 8])
@pytest.mark.parametrize("intervals", [(4, 1), (1, 4)])
@pytest.mark.parametrize("row", METHODS)
def test_a_state_of_another_interval_loads(row: str, intervals: tuple[int, int], at: int) -> None:
    """Its average is converted: the next directions are those of a run that held it in its form throughout."""
    (maker, model), (other, again) = makers(row, *intervals)
    for index in range(at):
        step(maker, model, index)
    other.load_state_dict(maker.state_dict())
    held = [p.grad for p in again.all]
    assert held_in(other, "coordinates" if intervals[1] == 4 else "average") and held == [None] * len(held)
    for block, same in zip(other.plan.blocks, maker.plan.blocks, strict=True):
        if not block.cache or len(block.frame.shape) < 2:
            continue
        g = torch.randn(block.frame.stack, *block.frame.shape, dtype=torch.float64)
        found, expected = block.solve(block.held, g)[0], same.solve(same.held, g)[0]
        assert oracles.relative_error(found, expected) < 1e-10


def test_what_is_neither_form_is_refused() -> None:
    (maker, model), (other, _) = makers("soap", 4, 4)
    step(maker, model, 0)
    state = maker.state_dict()
    for parts in state["sites"].values():
        parts["average"]["moment"] = parts["average"].pop("coordinates", torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"average: missing .* unknown .*moment"):
        other.load_state_dict({**state, "holds": []})


def test_a_turned_average_is_undone_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception after the refresh leaves it in the old basis, and a retry turns it once."""
    (maker, model), (other, again) = makers("soap", 4, 4)
    for index in range(4):
        step(maker, model, index), step(other, again, index)
    before = [{k: v.clone() for k, v in block.average.items()} for block in maker.plan.blocks]
    with monkeypatch.context() as patch:
        patch.setattr(type(maker.plan.blocks[0]), "solve", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
        with pytest.raises(RuntimeError, match="planted"):
            step(maker, model, 4)
    for block, kept in zip(maker.plan.blocks, before, strict=True):
        assert all(torch.equal(block.average[k], v) for k, v in kept.items())
    assert all(map(torch.equal, step(maker, model, 4), step(other, again, 4)))


def test_members_that_are_late_or_absent() -> None:
    """A member that joins at a step without a refresh leaves the others' averages as they are; one that is absent keeps its."""
    shapes = ((4, 4), (4, 4), (4, 4))
    model, single = Weights(shapes), [Weights(shapes[:1]) for _ in shapes]
    maker = from_config(model, {"method": "soap", "damping": 1e-4, "preconditioner_interval": 4})
    alone = [from_config(m, {"method": "soap", "damping": 1e-4, "preconditioner_interval": 4}) for m in single]
    for index in range(13):
        given = gradients(index, shapes)
        absent = {2} if index < 2 else {1} if index in (4, 6, 8) else set()
        for member, (p, g) in enumerate(zip(model.all, given, strict=True)):
            p.grad = None if member in absent else g.clone()
            single[member].all[0].grad = None if member in absent else g.clone()
        maker.precondition()
        for member, own in enumerate(alone):
            own.precondition()
            x, y = model.all[member].grad, single[member].all[0].grad
            if member not in absent:
                assert x is not None and y is not None and oracles.relative_error(x, y) < 1e-10, (index, member)


# --- gradients by rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"curvature_interval": 3}, {"nesterov_average": True}, {"skip_first": False}], ids=str)
@pytest.mark.parametrize("method, interval", [("soap", 4), ("soap", 1), ("eshampoo", 4)])
def test_rows_give_the_direction_of_the_formed_gradient(
    method: str, interval: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole steps: where a batch has fewer rows than sides the weights' gradients are not formed.

    The first batch is larger, so that no basis has a null space, where it would be anybody's.
    """
    if method == "eshampoo" and "skip_first" in options:
        return
    found = []
    monkeypatch.setattr("gradmaker.gathering.STACK_LIMIT", 4)  # a stack has no rows
    for by_rows in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False)).double()
        config = {"method": method, "damping": 1e-4, "preconditioner_interval": interval, **options}
        maker: Any = from_config(model, config)
        seen = spy(maker, monkeypatch)
        if not by_rows:
            monkeypatch.setattr("gradmaker.planned.row_layers", lambda *_: [])
        generator = torch.Generator().manual_seed(1)
        for index in range(10):
            x, t = torch.randn(2, 5 if index else 40, 8, dtype=torch.float64, generator=generator)
            model.zero_grad()
            maker.setup_loss_call(nn.functional.mse_loss, maker.setup_model_call(model, x), t)
            maker.forward_and_backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert ("FactoredGradient" in seen) == by_rows
    for x, y in zip(found[:10], found[10:], strict=True):
        assert all(oracles.relative_error(a, b) < 1e-10 or not b.any() for a, b in zip(x, y, strict=True))


def spy(maker: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The types of the gradients that blocks solve for, filled by later steps."""
    seen: set[str] = set()
    for block in maker.plan.blocks:
        original = block.solve

        def solve(held: Any, raw: Any, started: bool = True, original: Any = original) -> Any:
            seen.add(type(raw).__name__)
            return original(held, raw, started)

        monkeypatch.setattr(block, "solve", solve)
    return seen


# --- one projection for the statistic and the direction -------------------------------------------------------------------
class Products(TorchDispatchMode):
    """Counts products of matrices, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_measured_gradient_is_projected_once() -> None:
    """Two products there and two back, whether the step measures or not; and nothing of it stays."""
    model = Weights(((4, 5),))
    options = {"method": "soap", "preconditioner_interval": 4, "curvature_interval": 2, "skip_first": False}
    maker = from_config(model, options)
    for index in range(8):
        with Products() as counted:
            step(maker, model, index)
        if index % 4:
            assert (counted.names["bmm"], counted.names["baddbmm_"]) == (4, 0 if index % 2 else 2), index
    (block,) = maker.plan.blocks
    assert PROJECTED not in block.state and PROJECTED not in str(maker.state_dict().keys())


def test_a_failed_member_is_projected_onto_the_basis_that_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its average is in the basis of the cache, while the statistic has turned."""
    ((maker, model),) = makers("soap", 4)
    for index in range(4):
        step(maker, model, index)
    matrices = [block for block in maker.plan.blocks if len(block.frame.shape) > 1]
    before = [(dict(block.cache), block.average["coordinates"].clone()) for block in matrices]
    monkeypatch.setattr("gradmaker.solvers.rotate.finite_members", lambda *x: torch.zeros(len(x[0]), dtype=torch.bool))
    step(maker, model, 4)
    for block, (cache, average) in zip(matrices, before, strict=True):
        assert all(torch.equal(block.cache[k], cache[k]) for k in cache if k.startswith("basis"))
        assert not torch.equal(block.state["basis_0"], block.cache["basis_0"])
        given = torch.cat([g.unsqueeze(0) for g in gradients(4) if g.shape == block.frame.shape])
        x = block.triple.solver.coordinates(block.triple.representation, cache, given)
        torch.testing.assert_close(block.average["coordinates"], average.lerp(x, 0.05), rtol=1e-10, atol=1e-12)
