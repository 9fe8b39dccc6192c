"""Roots that are held by their eigenvectors, for refreshes at short intervals, are those that are multiplied out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import from_config
from gradmaker.curvature.evidence import Gradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.roots import SMALLEST, converted_roots, in_parts
from gradmaker.linalg.state import State
from gradmaker.representations import CrossDims, KronDims, OneSided
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.roles import duplicate
from gradmaker.solvers import Eigh, PositiveRoot

o, i = SMALLEST, 80
SOLVED: dict[str, tuple[Any, Any]] = {
    "shampoo": (KronDims(), Eigh(power=-0.5, damping=1e-6, split="each", mode="largest")),
    "pi": (KronDims(), Eigh(power=-1.0, damping=1e-3, split="pi")),
    "one-sided": (OneSided(), Eigh(power=-0.5, damping=1e-6, split="each", mode="largest")),
    "kl": (CrossDims(), PositiveRoot()),
}


def measured(held: Any, bad: bool = False) -> State:
    draw = torch.Generator().manual_seed(1)
    state: State = held.init(Frame(2, (o, i), frozenset(), torch.float64, torch.device("cpu")))
    for step in range(3):
        G = torch.randn(2, o, i, dtype=torch.float64, generator=draw)
        held.update(state, Gradient(G), Fold(0.5 * (step > 0), 0.5, 0.5, first=step == 0))
    held.refresh(state)
    if bad:
        for name in state.keys() & {"factor_0", "factor"}:
            state[name][1] = torch.nan
    return state


def at(solver: Any, interval: int | None) -> Any:
    return type(solver)(**{**vars(solver), "interval": interval})


def parts_of(cache: State) -> set[str]:
    return {name for name in cache if name.startswith(("vectors", "basis", "power", "root"))}


@pytest.mark.parametrize("rows", [3, 60, 200])
@pytest.mark.parametrize("name", SOLVED)
def test_parts_apply_as_the_root_does(name: str, rows: int) -> None:
    held, solver = SOLVED[name]
    state = measured(held)
    whole, parted = solver.prepare(held, state, None), at(solver, 1).prepare(held, state, None)
    sides = range(1 if name == "one-sided" else 2)
    assert parts_of(whole) == {f"root_{k}" for k in sides}
    assert parts_of(parted) == {f"{part}_{k}" for k in sides for part in ("basis" if name == "kl" else "vectors", "power")}
    assert name != "kl" or parted["basis_0"] is state["basis_0"], "a basis that the statistic holds is not held twice"
    given = FactoredGradient(torch.randn(2, rows, o, dtype=torch.float64), torch.randn(2, rows, i, dtype=torch.float64))
    expected = solver.solve(held, whole, given.form())
    assert not torch.equal(expected, given.form())
    for cache in (whole, parted):
        for found in (solver.solve(held, cache, given.form()), solver.solve_rows(held, cache, given).form()):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SOLVED)
def test_a_member_that_fails_keeps_its_parts(name: str) -> None:
    held, solver = SOLVED[name][0], at(SOLVED[name][1], 1)
    G = torch.randn(2, o, i, dtype=torch.float64)
    past = solver.prepare(held, measured(held), None)
    kept = solver.prepare(held, measured(held, bad=True), past)
    assert kept["failures"].tolist() == [0, 1]
    assert torch.equal(solver.solve(held, kept, G), solver.solve(held, past, G))
    fresh = solver.prepare(held, measured(held, bad=True), None)
    gain = 1e3 if name == "pi" else 1.0
    torch.testing.assert_close(solver.solve(held, fresh, G)[1], gain * G[1], rtol=1e-12, atol=1e-12)


def test_parts_are_held_where_products_are_few() -> None:
    def held(interval: int | None, *sides: int) -> list[bool]:
        return in_parts(interval, [torch.empty(1, d, d) for d in sides])

    assert held(1, 512, 784) == [True, True] and held(1, SMALLEST - 1, SMALLEST) == [False, True]
    assert held(2, 512, 784) == [False, False] and held(2, 100, 300) == [False, True]
    assert held(511, 512) == [True] and held(512, 512) == [False]
    assert held(None, 512, 784) == [False, False]
    assert in_parts(1, [torch.empty(1, 512), torch.empty(1, 512, 256), torch.empty(1, 512, 512, device="meta")]) == [False] * 3


@pytest.mark.parametrize("method", ["shampoo", "kl_shampoo", "one_sided"])
def test_a_resumed_run_is_the_same(method: str) -> None:
    """With parts in the state, which is bitwise as it was."""

    def made(options: dict[str, Any]) -> tuple[Any, Any, Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(70, 66, dtype=torch.float64)
        return model, from_config(model, {"method": method, "dtype": "float64", **options}), torch.randn(9, 70).double()

    def step(model: Any, maker: Any, x: Tensor, scale: float) -> Tensor:
        model.zero_grad()
        y = maker.setup_model_call(model, scale * x)
        maker.setup_loss_call(lambda y: y.square().mean(), y)
        maker.forward_and_backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()

    options = {"preconditioner_interval": 1, "curvature_interval": 1}
    model, maker, x = made(options)
    for k in range(3):
        step(model, maker, x, 1.0 + k)
    saved = maker.state_dict()
    assert any("power_0" in str(key) for key in _keys(saved))
    other_model, other, _ = made(options)
    other.load_state_dict(saved)
    assert torch.equal(step(model, maker, x, 0.3), step(other_model, other, x, 0.3))
    often, rarely = (made({**options, "warmup_steps": 5, "preconditioner_interval": n}) for n in (1, 10**6))
    for k in range(3):
        found, expected = (step(*each, 1.0 + k) for each in (often, rarely))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SOLVED)
def test_a_cache_is_not_changed_by_a_later_refresh_of_the_statistic(name: str) -> None:
    held, solver = SOLVED[name][0], at(SOLVED[name][1], 1)
    state = measured(held)
    cache = solver.prepare(held, state, None)
    before = {k: v.clone() for k, v in cache.items()}
    state = duplicate(held, state)  # as a step does before it writes to bases
    held.update(state, Gradient(torch.randn(2, o, i, dtype=torch.float64)), Fold(0.5, 0.5, 0.5))
    held.refresh(state)
    assert all(torch.equal(cache[k], before[k]) for k in parts_of(cache))


@pytest.mark.parametrize("name", SOLVED)
def test_a_saved_cache_takes_the_form_of_another_interval(name: str) -> None:
    held, solver = SOLVED[name]
    state, G = measured(held), torch.randn(2, o, i, dtype=torch.float64)
    caches = {interval: at(solver, interval).prepare(held, state, None) for interval in (1, None)}
    expected = solver.solve(held, caches[None], G)
    for saved, like in ((1, None), (None, 1), (1, 1)):
        made = solver.converted(caches[saved], caches[like])
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in caches[like].items()}
        torch.testing.assert_close(solver.solve(held, made, G), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_eigenvectors_are_converted_between_rows_and_columns() -> None:
    columns = at(SOLVED["kl"][1], 1).prepare(SOLVED["kl"][0], measured(SOLVED["kl"][0]), None)
    rows = {k.replace("basis", "vectors"): v.mT.contiguous() if "basis" in k else v for k, v in columns.items()}
    for saved, like in ((rows, columns), (columns, rows)):
        made = converted_roots(saved, like)
        assert made.keys() == like.keys() and all(torch.equal(made[k], like[k]) for k in like)


def test_a_state_is_loaded_under_another_interval() -> None:
    def made(interval: int) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Linear(70, 66, dtype=torch.float64)
        options = {"method": "shampoo", "dtype": "float64", "preconditioner_interval": interval}
        maker: Any = from_config(model, options)
        y = maker.setup_model_call(model, torch.randn(9, 70).double())
        maker.setup_loss_call(lambda y: y.square().mean(), y)
        maker.forward_and_backward()
        return maker

    def weights(maker: Any) -> State:
        return next(block.cache for block in maker.plan.blocks if len(block.frame.shape) == 2)

    often, rarely = made(1), made(10**6)
    saved = {interval: maker.state_dict() for interval, maker in ((1, often), (10**6, rarely))}
    V, w, X = weights(often)["vectors_1"], weights(often)["power_1"], weights(rarely)["root_1"]
    assert X.shape == (1, 70, 70)
    torch.testing.assert_close((V.mT * w.unsqueeze(-2)) @ V, X, rtol=1e-9, atol=1e-9 * float(X.abs().max()))
    rarely.load_state_dict(saved[1])
    torch.testing.assert_close(weights(rarely)["root_1"], X, rtol=1e-9, atol=1e-9 * float(X.abs().max()))
    often.load_state_dict(saved[10**6])
    torch.testing.assert_close(weights(often)["power_1"].sort()[0], w.sort()[0], rtol=1e-6, atol=0)


def _keys(x: Any) -> list[str]:
    return [str(k) for k in x] + [s for v in x.values() for s in _keys(v)] if isinstance(x, dict) else []
