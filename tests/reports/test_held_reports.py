"""What methods that hold inverses and bases tell of a renewal: residuals, staleness, and a second attempt in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import from_config
from gradmaker.curvature.evidence import Gradient
from gradmaker.linalg.diagnosis import COLUMNS
from gradmaker.representations import AlternatingInverse, CrossDims, InverseDims, RotatedDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import PositiveRoot
from tests.methods.test_kronecker_dims import Matrices, gradients
from tests.refreshing import follow, take

CPU = torch.device("cpu")
SUM, AVERAGE = Fold(1.0, 1.0, 1.0, summed=True), Fold(0.8, 0.2, 0.2)


def held_after(representation: Any, steps: int, fold: Fold, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The state after some gradients, 5 x 4."""
    state = representation.init(Frame(2, (5, 4), frozenset(), dtype, CPU))
    return follow(representation, state, (Gradient(g.to(dtype)) for g in gradients(2, 5, 4, steps=steps, seed=1)), fold)


def column(table: Tensor, name: str) -> Tensor:
    return table[..., COLUMNS.index(name)]


def misfit(L: Tensor, X: Tensor, p: int, damping: float) -> Tensor:
    """``max|L^(-1/2) X^p L^(-1/2) - I|`` of ``L + damping``.  # (B, d, d) -> (B,)"""
    s, Q = torch.linalg.eigh(L + damping * torch.eye(L.shape[-1], dtype=L.dtype))
    W = Q * s.rsqrt().unsqueeze(-2)
    return (W.mT @ torch.linalg.matrix_power(X, p) @ W - torch.eye(L.shape[-1], dtype=L.dtype)).abs().amax((-2, -1))


# --- positive roots -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("denominator", ["exact", "tr", "d-tr"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_positive_root_tells_its_residual(denominator: Any, damping: float) -> None:
    held, solver = InverseDims(denominator=denominator, ridge=1e-2), PositiveRoot(damping=damping)
    state = held_after(held, 6, SUM)
    table = solver.prepare(held, state, None)["diagnosis"]
    assert table.shape == (2, 2, len(COLUMNS)) and column(table, "residual").max() < 1e-10
    for axis in range(2):
        C = state[f"inverse_{axis}"]
        L = C @ C.mT if denominator == "exact" else C
        torch.testing.assert_close(column(table, "lambda_max")[:, axis], torch.linalg.eigvalsh(L)[:, -1], rtol=1e-10, atol=0)
        assert (column(table, "damping") == damping).all()


@pytest.mark.parametrize("denominator", ["exact", "tr"])
def test_a_wrong_decomposition_shows(denominator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One eigenvalue of many is off by a half; of an array, and of a statistic, a basis in the wrong order."""
    held = InverseDims(denominator=denominator, ridge=1e-2)
    state = held_after(held, 6, SUM)
    right = held.spectra(state)
    wrong = [(s * torch.tensor([1.5] + [1.0] * (s.shape[-1] - 1)), Q) for s, Q in right]
    assert column(held.report(state, right, 0.0), "residual").max() < 1e-10
    turned = [(s, Q.flip(-1)) for s, Q in right if Q is not None]
    assert column(held.report(state, turned, 0.0), "residual").min() > 0.1
    monkeypatch.setattr(InverseDims, "spectra", lambda self, state: wrong)
    table = PositiveRoot().prepare(held, state, None)["diagnosis"]
    assert column(table, "residual").min() > 0.1


@pytest.mark.parametrize("held", [AlternatingInverse(), CrossDims()], ids=["krad", "kl"])
def test_held_roots_tell_of_their_last_renewal(held: Any) -> None:
    state = held_after(held, 7, AVERAGE)
    table = PositiveRoot().prepare(held, state, None)["diagnosis"]
    kept = [state.get(f"inverse_{axis}", state.get(f"factor_{axis}")) for axis in range(2)]
    for axis, L in enumerate(kept):
        assert column(table, "residual")[:, axis].max() < 1e-10
        torch.testing.assert_close(column(table, "lambda_max")[:, axis], torch.linalg.eigvalsh(L)[:, -1], rtol=1e-10, atol=0)
    later = held_after(held, 8, AVERAGE)
    assert not torch.equal(PositiveRoot().prepare(held, later, None)["diagnosis"], table)


def test_the_residual_of_a_root_is_that_of_its_decomposition() -> None:
    """In float32, by the definition, in float64 from what is held."""
    held = AlternatingInverse(start=1.0)
    state = held_after(held, 30, SUM, torch.float32)
    cache = PositiveRoot().prepare(held, state, None)
    for axis in range(2):
        told = column(cache["diagnosis"], "residual")[:, axis]
        found = misfit(state[f"inverse_{axis}"].double(), cache[f"root_{axis}"].double(), 2, 0.0)
        assert (told < 1e-4).all() and (found < 1e-4).all() and (told > 0).all()


# --- tracked bases --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tracking", ["power", "qr", "eigh"])
@pytest.mark.parametrize("tolerance", [0.0, 0.9])
def test_a_tracked_basis_tells_how_stale_it_was(tracking: Any, tolerance: float) -> None:
    held = RotatedDims(tracking=tracking, tolerance=tolerance, sequence="basis_first")
    state = held_after(held, 4, AVERAGE)
    before = [Q.clone() for Q in held.bases(state) if Q is not None]
    take(held, state, Gradient(gradients(2, 5, 4, steps=1, seed=8)[0]), AVERAGE, 4)
    for axis, Q in enumerate(before):
        B = Q.mT @ state[f"factor_{axis}"] @ Q
        off = B - torch.diag_embed(B.diagonal(dim1=-2, dim2=-1))
        share = torch.linalg.matrix_norm(off) / torch.linalg.matrix_norm(B)
        torch.testing.assert_close(column(state["diagnosis"], "residual")[:, axis], share, rtol=1e-10, atol=0)
        renewed = column(state["diagnosis"], "iterations")[:, axis]
        assert torch.equal(renewed, (share > tolerance).to(share.dtype))
        assert (torch.equal(held.bases(state)[axis], Q)) == (renewed == 0).all()  # type: ignore[arg-type]


def test_the_summary_shows_them() -> None:
    for method in ("soap", "eshampoo", "kl_shampoo", "kradagrad", "kradagrad_star"):
        maker: Any = from_config(model := Matrices((5, 4)), {"method": method})
        for g in gradients(5, 4, steps=3):
            for p in model.parameters():
                p.grad = g.reshape(p.shape).to(p.dtype)
            maker.precondition()
        assert len(maker.summary().refreshes) == 2 * len(list(model.parameters())), method


# --- the fallbacks -----------------------------------------------------------------------------------------------------------
HELD: dict[str, Any] = {
    "soap": RotatedDims(),
    "eshampoo": RotatedDims(tracking="eigh", sequence="basis_first"),
    "kl": CrossDims(),
    "krad": AlternatingInverse(),
    "star": InverseDims(denominator="tr", ridge=1e-2),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("how", ["raises", "doubles"])
def test_what_fails_in_float32_is_repeated_in_float64(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, original = HELD[name], torch.linalg.eigh
    expected = held.to_dense(held_after(held, 3, SUM, torch.float32))

    def broken(A: Tensor) -> Any:
        if A.dtype == torch.float64:
            return original(A)
        if how == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        s, Q = original(A)
        return 2 * s, Q

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    state = held_after(held, 3, SUM, torch.float32)
    found = held.to_dense(state)
    monkeypatch.undo()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert "failures" not in state or state["failures"].tolist() == [0, 0]
    if name in ("kl", "krad"):
        assert (column(state["diagnosis"], "retries")[:, 0] == 1).all()
