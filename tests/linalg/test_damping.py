"""One vocabulary of damping: every mode of every solver of powers against eigenvalues taken one by one."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.damping import RIDGES, Mode, damp
from gradmaker.linalg.factor_roots import FactorRoot
from gradmaker.representations import Dense, KronSum, RootKronDims
from gradmaker.solvers import AxisMean, DenmanBeavers, Eigh, HigherOrder, NewtonRoot, NewtonSchulz, SvdRoot
from gradmaker.solvers.rooting import Root, rooting

pytestmark = pytest.mark.usefixtures("double")
MODES = get_args(Mode)
ITERATED = [NewtonRoot, HigherOrder, NewtonSchulz, DenmanBeavers]


def statistic(d: int, condition: float = 1e4) -> Tensor:
    Q = torch.linalg.qr(torch.randn(d, d)).Q
    return Q @ torch.diag(7 * torch.logspace(0, -torch.tensor(condition).log10().item(), d)) @ Q.T


def judged(A: Tensor, damping: float, mode: str, exponent: float) -> Tensor:
    s, Q = torch.linalg.eigh(A)
    top, mean = s.max().item(), s.mean().item()
    rule = {
        "absolute": lambda x: (x + damping) ** exponent,
        "largest": lambda x: (x + damping * top) ** exponent,
        "trace": lambda x: (x + damping * mean) ** exponent,
        "clamp": lambda x: max(x, damping * top) ** exponent,
        "pseudo": lambda x: x**exponent if x > damping * top else 0.0,
    }[mode]
    return Q @ torch.diag(torch.tensor([rule(x) for x in s.tolist()])) @ Q.T


def dense(H: Tensor) -> dict[str, Tensor]:
    return {"matrix": H[None], "mass": torch.ones(1)}


@pytest.mark.parametrize("mode", RIDGES)
@pytest.mark.parametrize("make", ITERATED)
def test_iterations_damp_as_eigenvalues_do(make: Any, mode: str) -> None:
    H = statistic(9)
    solver = make(power=-0.5, damping=1e-3, mode=mode, tolerance=1e-12)
    cache = solver.prepare(Dense(), dense(H), None)
    torch.testing.assert_close(cache["root_0"][0], judged(H, 1e-3, mode, -0.5), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solver.operator(Dense(), dense(H))[0], judged(H, 1e-3, mode, -0.5), rtol=1e-10, atol=1e-10)
    ridge = {"absolute": 1e-3, "largest": 1e-3 * 7, "trace": 1e-3 * H.trace().item() / 9}[mode]
    assert cache["diagnosis"][0, 0, 3].item() == pytest.approx(ridge, rel=0.05)  # the largest eigenvalue is estimated
    assert cache["failures"].item() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damping", [1e-2, 0.0])
def test_singular_values_damp_as_eigenvalues_do(mode: str, damping: float) -> None:
    L, R = torch.randn(20, 5), torch.randn(20, 4)
    factors = [x.T @ x for x in (L, R)]
    state = {"factor_0": torch.linalg.qr(L).R[None], "factor_1": torch.linalg.qr(R).R[None], "mass": torch.ones(1)}
    solver = SvdRoot(damping=damping, mode=mode)
    cache = solver.prepare(RootKronDims(), state, None)
    for k, F in enumerate(factors):
        torch.testing.assert_close(cache[f"root_{k}"][0], judged(F, damping, mode, -0.25), rtol=1e-10, atol=1e-10)
    expected = torch.kron(*(judged(F, damping, mode, -0.25) for F in factors))
    torch.testing.assert_close(solver.operator(RootKronDims(), state)[0], expected, rtol=1e-10, atol=1e-10)
    assert (cache["diagnosis"][..., 1] < 1e-10).all()


@pytest.mark.parametrize("root", get_args(FactorRoot))
@pytest.mark.parametrize("mode", RIDGES)
def test_a_kronecker_sum_has_every_root_and_ridge(root: FactorRoot, mode: Mode) -> None:
    L, R = statistic(5, 100.0), statistic(4, 100.0)
    state = {"factor_0": L[None], "factor_1": R[None], "mass": torch.ones(1)}
    solver = AxisMean(damping=1e-2, root=root, mode=mode)
    cache = solver.prepare(KronSum(2), state, None)
    X, Y = (judged(F, 1e-2, mode, -0.25) for F in (L, R))
    g = torch.randn(5, 4)
    J = (X @ g + g @ Y) / 2
    torch.testing.assert_close(solver.solve(KronSum(2), cache, g[None])[0], (X @ J + J @ Y) / 2, rtol=1e-5, atol=1e-5)
    mean = (torch.kron(X, torch.eye(4)) + torch.kron(torch.eye(5), Y)) / 2
    torch.testing.assert_close(solver.operator(KronSum(2), state)[0], mean @ mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["clamp", "pseudo"])
def test_a_kronecker_sum_may_cut_its_spectra(mode: Mode) -> None:
    """At a bound between two eigenvalues: on one of them rounding would decide."""
    L, R = statistic(5), statistic(4)
    state = {"factor_0": L[None], "factor_1": R[None], "mass": torch.ones(1)}
    solver = AxisMean(damping=3e-2, mode=mode)
    X, Y = (judged(F, 3e-2, mode, -0.25) for F in (L, R))
    mean = (torch.kron(X, torch.eye(4)) + torch.kron(torch.eye(5), Y)) / 2
    found = solver.solve(KronSum(2), solver.prepare(KronSum(2), state, None), torch.eye(20).reshape(20, 1, 5, 4)[3])
    torch.testing.assert_close(found.reshape(-1), (mean @ mean)[3], rtol=1e-10, atol=1e-10)


def test_a_pseudo_inverse_ends_at_the_roundoff() -> None:
    s = torch.tensor([[1.0, 1e-3, 3e-16, 0.0]])
    assert torch.equal(damp(s, 0.0, "pseudo"), torch.tensor([[1.0, 1e-3, torch.inf, torch.inf]]))
    x = torch.randn(4, 2)
    H = x @ x.T  # of rank two
    cache = (solver := Eigh(power=-1.0, damping=0.0, split="each", mode="pseudo")).prepare(Dense(), dense(H), None)
    torch.testing.assert_close(cache["root_0"][0], torch.linalg.pinv(H, hermitian=True), rtol=1e-9, atol=1e-9)
    assert cache["failures"].item() == 0 and solver.exponent == -1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_only_absolute_damping_knows_a_scale(scale: float) -> None:
    H = statistic(6)
    for mode in MODES:
        solver = Eigh(power=-0.5, damping=1e-2, split="each", mode=mode)
        one, other = (solver.prepare(Dense(), dense(c * H), None)["root_0"] for c in (1.0, scale))
        same = torch.allclose(one, other * scale**0.5, rtol=1e-8, atol=0)
        assert same == (mode != "absolute" or scale == 1.0)


@pytest.mark.parametrize("make", [*ITERATED, SvdRoot, lambda **given: Eigh(power=-0.5, split="each", **given)])
def test_a_block_that_never_succeeded_has_the_gain_of_its_mode(make: Any) -> None:
    bad = {"factor_0": torch.full((1, 3, 3), torch.nan), "mass": torch.ones(1)}
    held: Any = RootKronDims() if make is SvdRoot else Dense()
    state = bad if make is SvdRoot else {"matrix": bad["factor_0"], "mass": bad["mass"]}
    for mode, gain in (("absolute", 0.01**-0.5), ("largest", 1.0), ("trace", 1.0)):
        solver = make(damping=0.01, mode=mode)
        g = torch.randn(1, 3)
        torch.testing.assert_close(solver.solve(held, solver.prepare(held, state, None), g), gain * g)


def test_refusals() -> None:
    for make in ITERATED:
        with pytest.raises(ValueError, match="mode='clamp': expected absolute, largest, trace"):
            make(mode="clamp")
    with pytest.raises(ValueError, match="mode='pseudo': expected"):
        Eigh(split="pi", mode="pseudo")
    with pytest.raises(ValueError, match="expected absolute, largest, trace"):
        AxisMean(root="newton", mode="pseudo")
    with pytest.raises(ValueError, match=f"root='qr': expected {', '.join(get_args(Root))}"):
        rooting("qr", 1e-6)  # type: ignore[arg-type]
