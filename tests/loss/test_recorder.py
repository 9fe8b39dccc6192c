"""Recording changes no value, and reads a loss with both sides in the graph as one of their difference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.loss.likelihood import read_terms
from gradmaker.loss.recorder import LossRecorder
from tests import oracles

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
label = torch.tensor([0, 2, -100, 1, 1])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


Loss = Callable[[Tensor, Tensor], Tensor]
BOTH: dict[str, Loss] = {
    "mean": F.mse_loss,
    "sum": lambda a, b: F.mse_loss(a, b, reduction="sum"),
    "none": lambda a, b: F.mse_loss(a, b, reduction="none").amax(1).sum(),
    "keywords": lambda a, b: F.mse_loss(target=a, input=b),
    "module": torch.nn.MSELoss(),
    "weight": lambda a, b: F.mse_loss(a, b, weight=torch.arange(15.0).reshape(5, 3).to(a)),
    "weight_sum": lambda a, b: F.mse_loss(a, b, reduction="sum", weight=torch.arange(15.0).reshape(5, 3).to(a)),
    "twice": lambda a, b: F.mse_loss(a, b) + 0.5 * F.mse_loss(b, a, reduction="sum"),
    "one_side": lambda a, b: F.mse_loss(a, b.detach()),
    "other_side": lambda a, b: F.mse_loss(a.detach(), b),
    "soft": lambda a, b: F.cross_entropy(a, b.softmax(-1)),
    "hard": lambda a, b: F.cross_entropy(a, label) + b.sum() * 0,
    "smoothed": lambda a, b: F.cross_entropy(a, label, label_smoothing=0.1, reduction="sum") + b.sum() * 0,
    "nll": lambda a, b: F.nll_loss(a.log_softmax(-1), label) + b.sum() * 0,
    "binary": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid()),
}


def evaluated(loss: Loss, a: Tensor, b: Tensor, record: bool) -> list[Tensor]:
    """The value and both gradients."""
    a, b = (x.clone().requires_grad_() for x in (a, b))
    if record:
        with LossRecorder() as recorder:
            value = loss(a, b)
        read_terms(recorder, value)
    else:
        value = loss(a, b)
    found = torch.autograd.grad(value, (a, b), allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if g is None else g for g in found)]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_recorded_loss_is_bitwise_the_unrecorded_one(name: str, dtype: torch.dtype) -> None:
    a, b = drawn(5, 3, dtype=dtype), drawn(5, 3, seed=1, dtype=dtype)
    plain, seen = (evaluated(BOTH[name], a, b, record) for record in (False, True))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(plain, seen, strict=True))


@pytest.mark.parametrize("name", ["mean", "sum", "none"])
def test_also_under_autocast(name: str) -> None:
    """Which raises half-precision inputs before it takes their difference."""
    a, b = drawn(5, 3, dtype=torch.bfloat16), drawn(5, 3, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain, seen = (evaluated(BOTH[name], a, b, record) for record in (False, True))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(plain, seen, strict=True))


@pytest.mark.parametrize("shapes", [((5, 3), (3,)), ((5, 1), (5, 3)), ((1, 3), (5, 1)), ((), (5, 3))])
@pytest.mark.parametrize("mixed", [False, True])
def test_also_of_sides_that_are_broadcast(shapes: Any, mixed: bool) -> None:
    """With the warning of torch, once; and where the dtypes differ."""
    a = drawn(*shapes[0], dtype=torch.float32 if mixed else torch.float64)
    b = drawn(*shapes[1], seed=1)
    found = []
    for record in (False, True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found.append((evaluated(F.mse_loss, a, b, record), [str(w.message) for w in told]))
    (plain, expected), (seen, messages) = found
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(plain, seen, strict=True))
    assert messages == expected and len(messages) == 1


@pytest.mark.parametrize("name", ["mean", "sum", "keywords", "weight", "twice"])
def test_the_curvature_is_that_of_the_difference(name: str) -> None:
    """Against the Hessian of the loss in both sides, which is quadratic in them."""
    a, b = drawn(5, 3), drawn(5, 3, seed=1)
    both = torch.stack([a, b]).requires_grad_()
    with LossRecorder() as recorder:
        loss = BOTH[name](both[0], both[1])
    G = torch.zeros(30, 30, dtype=torch.float64)
    for t in read_terms(recorder, loss):
        for s in torch.cat(list(t.exact(5))):
            for row in range(5):  # a column holds one vector for each example
                alone = torch.where(torch.arange(5).unsqueeze(1) == row, s, 0.0)
                (v,) = torch.autograd.grad(t.z, both, alone, retain_graph=True)
                G += torch.outer(v.reshape(-1), v.reshape(-1))
    H = torch.autograd.functional.hessian(lambda x: BOTH[name](x[0], x[1]), both.detach()).reshape(30, 30)
    assert oracles.relative_error(G, H) < 1e-12


def test_soft_targets_in_the_graph_are_held_fixed() -> None:
    """The matrix is that in the logits alone; nothing is refused, and the targets' own gradient stays in the loss."""
    z, q = drawn(5, 3).requires_grad_(), drawn(5, 3, seed=1).requires_grad_()
    with LossRecorder() as recorder:
        loss = F.cross_entropy(z, q.softmax(-1))
    (t,) = read_terms(recorder, loss)
    assert t.z is z
    p = z.softmax(-1).detach()
    expected = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 5
    s = torch.cat(list(t.exact(5)))
    assert oracles.relative_error(torch.einsum("knc,knd->ncd", s, s), expected) < 1e-12
    assert torch.autograd.grad(loss, q)[0].any()


def test_a_weight_that_cannot_be_placed_is_refused() -> None:
    a, b = drawn(5, 1).requires_grad_(), drawn(5, 3, seed=1).requires_grad_()
    with LossRecorder(), pytest.raises(ValueError, match=r"\(5, 1\).*\(5, 3\).*expand the input"):
        F.mse_loss(a, b, weight=torch.ones(5, 1, dtype=torch.float64))


class Tagged(Tensor):
    """A subclass that stays one."""


def test_subclasses_stay_what_they_are() -> None:
    a, b = (drawn(5, 3, seed=k).as_subclass(Tagged).requires_grad_() for k in (0, 1))
    with LossRecorder() as recorder:
        loss = F.mse_loss(a, b)
    assert type(loss) is Tagged and torch.equal(loss, F.mse_loss(a, b))
    assert len(recorder.calls) == 1 and recorder.calls[0].is_all_of(loss)
