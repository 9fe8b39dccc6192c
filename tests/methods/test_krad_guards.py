"""KrADagrad's guards: a warning where the held inverse does not move, roots that are kept where LAPACK gives up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.curvature import Gradient
from gradmaker.representations import InverseDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.inverse_arrays import array_spectrum
from tests.refreshing import take


# --- the warning ----------------------------------------------------------------------------------------------------------
def feed(options: dict[str, Any], parameter: Tensor, steps: int, scale: float = 1.0) -> list[str]:
    model = nn.ParameterList([nn.Parameter(parameter.clone())])
    maker = from_config(model, options)
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model[0].grad = scale * torch.randn(parameter.shape, generator=generator)
            maker.precondition()  # type: ignore[attr-defined]
    return [str(w.message) for w in caught]


def test_an_inverse_that_does_not_move_is_reported_once() -> None:
    matrix = torch.zeros(40, 30)
    published = {"method": "kradagrad_star", "compat": "kradagrad", "damping": 1e-8}
    assert feed(published, matrix, 99) == []
    (message,) = feed(published, matrix, 210)
    assert message.startswith("preconditioner inactive: after 100 gradients") and "denominator='exact'" in message
    (message,) = feed({"method": "kradagrad", "start": None}, matrix, 120, scale=1e-3)
    assert "start=1.0" in message


@pytest.mark.parametrize(
    "options, shape",
    [
        ({"method": "kradagrad_star"}, (40, 30)),
        ({"method": "kradagrad_star", "denominator": "d-tr"}, (3, 2)),
        ({"method": "kradagrad_star", "denominator": "tr"}, ()),
        ({"method": "kradagrad_star", "denominator": "fro"}, (6, 6)),  # no direction is steeper: near the identity, but moved
        ({"method": "kradagrad_star", "denominator": "fro", "decay": 0.95}, (12, 5)),
        ({"method": "kradagrad"}, (12, 5)),
        ({"method": "kradagrad", "start": None}, (12, 5)),
    ],
)
def test_an_inverse_that_moves_is_not(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert feed(options, torch.zeros(shape), 120) == []


def test_a_new_direction_is_no_idle_inverse() -> None:
    representation = InverseDims(denominator="d-tr")
    state = representation.init(Frame(1, (3, 3), frozenset(), torch.float64, torch.device("cpu")))
    for t in range(100):
        gradient = torch.zeros(1, 3, 3, dtype=torch.float64)
        gradient[0, t // 99, t // 99] = 1
        take(representation, state, Gradient(gradient), Fold(1.0, 1.0, 1.0, summed=True), t)


# --- a decomposition that fails -------------------------------------------------------------------------------------------
def broken(monkeypatch: pytest.MonkeyPatch, name: str, fails: Callable[[Tensor], bool], silent: bool = False) -> None:
    """LAPACK gives up on some finite matrices, a stack with such a member as a whole, or returns what is none of its values."""
    working = getattr(torch.linalg, name)

    def attempt(A: Tensor) -> Any:
        if not any(fails(member) for member in A.reshape(-1, *A.shape[-2:])):
            return working(A)
        if silent:
            return [2 * x for x in working(A)]
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, name, attempt)


def test_an_array_that_lapack_refuses_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    C = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(2))
    refused = C[1] @ C[1].mT
    broken(monkeypatch, "eigh", lambda A: A.dtype == torch.float32 and torch.allclose(A, refused))
    s, U = array_spectrum(C)
    assert s.dtype == U.dtype == torch.float32
    torch.testing.assert_close((U * s.unsqueeze(-2)) @ U.mT, C @ C.mT)
    assert torch.equal(s[2:], array_spectrum(C[2:])[0])  # the others keep their bits


@pytest.mark.parametrize(
    "options, routine, silent",
    [
        ({"method": "kradagrad_star"}, "eigh", False),
        ({"method": "kradagrad_star", "denominator": "tr"}, "eigh", False),
        ({"method": "kradagrad_star", "denominator": "tr"}, "eigh", True),
        ({"method": "kradagrad"}, "eigh", False),
        ({"method": "kradagrad"}, "eigh", True),
    ],
)
def test_a_block_that_cannot_be_decomposed_keeps_its_root(
    options: dict[str, Any], routine: str, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, 4))])
    maker: Any = from_config(model, {**options, "grafting": "none", "warmup_steps": 9})
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))

    def root() -> Tensor:
        for _ in range(3):
            model[0].grad = g.clone()
            maker.precondition()
        assert model[0].grad.isfinite().all() and not torch.equal(model[0].grad, g)
        found: Tensor = maker.plan.blocks[0].cache["root_0"].clone()
        return found

    known, working = list[Tensor](), getattr(torch.linalg, routine)
    monkeypatch.setattr(torch.linalg, routine, lambda A: [known.extend(A.reshape(-1, *A.shape[-2:]).clone()), working(A)][1])
    first, second = root(), root()
    assert not torch.allclose(first, second, rtol=1e-3)
    monkeypatch.setattr(torch.linalg, routine, working)
    # on matrices that it has not decomposed before: LAPACK does the same again on the others
    broken(monkeypatch, routine, lambda A: not any(torch.equal(A, each) for each in known), silent)
    torch.testing.assert_close(root(), second, rtol=1e-6, atol=0)
    assert maker.plan.blocks[0].cache["failures"].tolist() == ([0] if options["method"] == "kradagrad" else [3])
