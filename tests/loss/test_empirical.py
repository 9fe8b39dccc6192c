"""The empirical Fisher of one loss is one matrix, whatever its spelling and its cut: ``C = sum_n M_n g_n g_n^T``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import LayerNaturalGradientConfig, LayerNaturalGradientMaker
from gradmaker.curvature import FisherEmp
from gradmaker.loss.weights import numbers
from gradmaker.representations import Dense, Diagonal, Kron
from tests import models, oracles
from tests.measure import custom
from tests.models import CLASSES, Case

N, R = 6, 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.3]).double()
LABELS = torch.arange(N * R).reshape(N, R) % CLASSES
IGNORED = LABELS.masked_fill(torch.arange(N * R).reshape(N, R) % 5 == 1, -100)
FLIPPED = F.one_hot(LABELS.flip(0), CLASSES).double()
VALUES = torch.arange(N * R * CLASSES).double().cos().reshape(N, R, CLASSES)
ce, mse, bce = F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits

Loss = Callable[[Tensor], Tensor]  # of logits (n, r, C)


def flat(z: Tensor) -> Tensor:
    return z.flatten(0, 1)


def squares(z: Tensor, **options: Any) -> Tensor:
    return mse(z, VALUES, **options)


def entropy(z: Tensor, t: Tensor = LABELS, **options: Any) -> Tensor:
    return ce(flat(z), t.flatten(), **options)


def fit(z: Tensor, **options: Any) -> Tensor:
    return bce(z, VALUES.square(), **options)


TERMS, ELEMENTS = N * R, N * R * CLASSES
SPELLINGS: dict[str, list[Loss]] = {
    "sum": [
        lambda z: entropy(z, reduction="sum"),
        lambda z: entropy(z, reduction="none").sum(),
        lambda z: TERMS * entropy(z),
        lambda z: ce(z.mT, LABELS, reduction="sum"),
        lambda z: F.nll_loss(flat(z).log_softmax(-1), LABELS.flatten(), reduction="sum"),
        lambda z: entropy(z[:, :2], LABELS[:, :2], reduction="sum") + entropy(z[:, 2:], LABELS[:, 2:], reduction="sum"),
    ],
    "mean": [
        entropy,
        lambda z: entropy(z, reduction="none").mean(),
        lambda z: entropy(z, reduction="sum") / TERMS,
        lambda z: 0.5 * entropy(z) + entropy(z) / 2,
        lambda z: nn.CrossEntropyLoss()(flat(z), LABELS.flatten()),
    ],
    "mixed_labels": [
        lambda z: 0.3 * entropy(z) + 0.7 * entropy(z, LABELS.flip(0)),
        lambda z: ce(flat(z), 0.3 * F.one_hot(LABELS, CLASSES).double().flatten(0, 1) + 0.7 * flat(FLIPPED)),
        lambda z: 0.7 * entropy(z, LABELS.flip(0), reduction="sum") / TERMS + 0.3 * entropy(z, reduction="none").mean(),
    ],
    "ignored": [
        lambda z: entropy(z, IGNORED),
        lambda z: entropy(z, IGNORED, reduction="none").sum() / (IGNORED >= 0).sum(),
        lambda z: entropy(z, IGNORED, reduction="sum") / (IGNORED >= 0).sum(),
        lambda z: (entropy(z, reduction="none") * (IGNORED >= 0).flatten()).sum() / (IGNORED >= 0).sum(),
    ],
    "class_weights": [
        lambda z: entropy(z, weight=WEIGHTS),
        lambda z: entropy(z, weight=WEIGHTS, reduction="none").sum() / WEIGHTS[LABELS].sum(),
        lambda z: entropy(z, reduction="none") @ WEIGHTS[LABELS.flatten()] / WEIGHTS[LABELS].sum(),
    ],
    "squares": [
        squares,
        lambda z: squares(z, reduction="none").mean(),
        lambda z: squares(z, reduction="none").sum(-1).mean() / CLASSES,
        lambda z: squares(z, reduction="sum") / ELEMENTS,
        lambda z: mse(flat(z), VALUES.flatten(0, 1)),
        lambda z: mse(z.flatten(), VALUES.flatten()),
        lambda z: mse(VALUES, z),
    ],
    "weighted_squares": [
        lambda z: squares(z, weight=WEIGHTS.expand_as(z)),
        lambda z: (squares(z, reduction="none") * WEIGHTS).sum() / (WEIGHTS.sum() * TERMS),
        lambda z: mse(z.flatten(), VALUES.flatten(), weight=WEIGHTS.repeat(TERMS)),
    ],
    "binary": [
        fit,
        lambda z: fit(z, reduction="none").mean(),
        lambda z: fit(z, reduction="sum") / ELEMENTS,
        lambda z: bce(z.flatten(), VALUES.flatten().square()),
    ],
    "two": [
        lambda z: entropy(z, IGNORED) + squares(z, reduction="sum"),
        lambda z: squares(z, reduction="sum") + entropy(z, IGNORED),
        lambda z: squares(z, reduction="none").sum() + entropy(z, IGNORED, reduction="sum") / (IGNORED >= 0).sum(),
    ],
}


def effective(*omegas: Tensor) -> Tensor:
    """Of each example.  omegas: (n, ...) each"""
    omega = torch.cat([o.reshape(N, -1) for o in omegas], 1)
    return omega.sum(1) / omega.square().sum(1)


KEPT = (IGNORED >= 0).double()
NUMBERS: dict[str, float | Tensor] = {
    "mixed_labels": TERMS,
    "sum": 1.0,
    "mean": TERMS,
    "ignored": float((IGNORED >= 0).sum()),
    "class_weights": effective(WEIGHTS[LABELS] / WEIGHTS[LABELS].sum()),
    "squares": ELEMENTS,
    "weighted_squares": effective((WEIGHTS / (WEIGHTS.sum() * TERMS)).expand(N, R, CLASSES)),
    "binary": ELEMENTS,
    "two": effective(KEPT / KEPT.sum(), torch.ones(N, R, CLASSES).double()),
}
"""``M_n = sum omega / sum omega^2`` over the terms of an example, by hand."""


def case_of(loss: Loss) -> Case:
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))  # noqa: E731
    return models.build(make, N, R, 3)._replace(loss=lambda z, _: loss(z))


def held(loss: Loss, curvature: FisherEmp, representation: Any) -> list[Tensor]:
    case = case_of(loss)
    maker = custom(case.model, curvature, representation)
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    return [block.triple.representation.to_dense(block.state) for block in maker.plan.blocks]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(oracles.relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


BY_TOKEN = {"sum": 5, "mean": 3, "ignored": 4, "class_weights": 3, "squares": 5, "weighted_squares": 2, "binary": 3}
"""Of these the first are of one call, with a term for each position."""


@pytest.mark.parametrize("name, examples", [*((k, "sequence") for k in SPELLINGS), *((k, "token") for k in BY_TOKEN)])
def test_one_loss_has_one_matrix(name: str, examples: Any) -> None:
    """Reductions, factors, layouts, likelihoods and the order of terms are spellings; factors see one set of positions."""
    first, *others = SPELLINGS[name][: BY_TOKEN[name] if examples == "token" else None]
    for representation in (Dense(granularity="full"), Kron(), Diagonal(granularity="layer")):
        curvature = FisherEmp(examples=examples)
        expected = held(first, curvature, representation)
        for k, loss in enumerate(others):
            values = [float(case_of(f).run().detach()) for f in (first, loss)]
            assert values[0] == pytest.approx(values[1], rel=1e-12), k
            assert same(held(loss, curvature, representation), expected), (type(representation).__name__, k)
        scaled = held(lambda z: 3 * first(z), curvature, representation)
        assert same(scaled, [3 * C for C in expected])  # linear in the loss, as the Gauss-Newton matrix is


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_is_that_of_gradients_by_hand(name: str) -> None:
    """The share of an example is what the loss is a sum of: its gradient by masking all other outputs from the graph."""
    loss = SPELLINGS[name][0]
    case = case_of(loss)
    C = torch.zeros(1, dtype=torch.float64)
    parameters = list(case.model.parameters())
    for n in range(N):
        z = case.model(case.x)
        own = torch.arange(N).reshape(-1, 1, 1) == n
        g = torch.autograd.grad(loss(torch.where(own, z, z.detach())), parameters)
        row = torch.cat([x.reshape(-1) for x in g])
        C = C + (torch.as_tensor(NUMBERS[name]).double().expand(N)[n] * torch.outer(row, row))
    maker = custom(case.model, FisherEmp(), Dense(granularity="full"))
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    (block,) = maker.plan.blocks
    found = block.triple.representation.to_dense(block.state)[0]
    order = torch.cat([_order(case.model, site) for site in block.sites])
    assert oracles.relative_error(found, C[order][:, order]) < 1e-12


def _order(model: nn.Module, site: Any) -> Tensor:
    slices = oracles.parameter_slices(model)
    index = [torch.arange(slices[k].start, slices[k].stop).view_as(p) for k, p in site.parameters.items()]
    pieces = [x.reshape(len(x), -1) for x in index]
    return torch.cat(pieces, 1).reshape(-1)


@pytest.mark.parametrize("name", ["squares", "binary"])
def test_its_expectation_under_the_model_is_the_fisher_matrix(name: str) -> None:
    """Of means over elements too: the scale of the empirical matrix is that of the exact one. By enumeration of the model."""
    z = torch.randn(N, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    from gradmaker.loss.likelihood import read_terms
    from gradmaker.loss.recorder import LossRecorder

    def terms(y: Tensor) -> tuple[Any, Tensor]:
        with LossRecorder() as recorder:
            loss = mse(z, y) if name == "squares" else bce(z, y)
        (t,) = read_terms(recorder, loss)
        return t, torch.autograd.grad(loss, z)[0]

    total = torch.zeros(N, CLASSES, dtype=torch.float64)
    for target in (0.0, 1.0):  # both signs of the noise, or both labels, of every element by itself
        shift = (2 * target - 1) * 0.5**0.5
        y = z.detach() + shift if name == "squares" else torch.full_like(z, target)
        p = 0.5 if name == "squares" else (1 - target - z.detach().sigmoid()).abs()
        t, g = terms(y)
        total += p * t.empirical(g, N, numbers([t], N).sqrt().unsqueeze(1))[0].square()
    t, _ = terms(torch.zeros_like(z))
    exact = torch.cat(list(t.exact(N))).square().sum(0)
    assert oracles.relative_error(total, exact) < 1e-12


# ------------------------------------------------------------------ micro-batches
UNEQUAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class weights": lambda z, t: ce(flat(z), t.flatten(), weight=WEIGHTS, reduction="sum"),
    "weights and masks": lambda z, t: ce(flat(z), t.flatten(), weight=WEIGHTS, ignore_index=1, reduction="sum"),
    "smoothed": lambda z, t: ce(z.mT, t, weight=WEIGHTS, label_smoothing=0.2, reduction="sum"),
    "two losses": lambda z, t: ce(z.mT, t, reduction="sum") + 0.1 * mse(z, t.unsqueeze(-1).expand_as(z).double()),
}
"""Sums, or means that are not over examples alone."""


@pytest.mark.parametrize("examples", ["sequence", "token"])
@pytest.mark.parametrize("sizes", [(1, 5), (2, 3, 1)])
@pytest.mark.parametrize("name", UNEQUAL)
def test_micro_batches_of_unequal_weights_add_up(name: str, sizes: tuple[int, ...], examples: Any) -> None:
    """The matrix is a sum over examples, whatever else is in their batch."""
    found = []
    for parts in ((N,), sizes):
        case = case_of(squares)
        maker = custom(case.model, FisherEmp(examples=examples), Dense(granularity="full"), decay=0.0)
        pieces = zip(case.x.split(list(parts)), LABELS.split(list(parts)), strict=True)
        for x, t in pieces:
            maker.setup_loss_call(UNEQUAL[name], maker.setup_model_call(case.model, x), t)
            maker.accumulate(len(x) / N if name == "two losses" else 1.0)
        maker.precondition()
        found.append([b.triple.representation.to_dense(b.state) for b in maker.plan.blocks])
    if name == "two losses":  # a sum beside a mean over the batch: another loss when it is cut
        assert not same(found[1], found[0])
    else:
        assert same(found[1], found[0])


# ------------------------------------------------------------------ tokens of several calls
SHARED: dict[str, list[Loss]] = {
    "one tensor": [lambda z: entropy(z), lambda z: 0.5 * squares(z)],
    "views of one": [lambda z: ce(z.view(-1, CLASSES), LABELS.flatten()), lambda z: 0.5 * squares(z.view(N, R, CLASSES))],
    "flat and not": [lambda z: ce(z.mT, LABELS, reduction="sum"), lambda z: squares(flat(z).view_as(VALUES))],
    "made of each other": [lambda z: entropy(z), lambda z: squares(2 * z)],
    "three": [lambda z: entropy(z), lambda z: squares(z), lambda z: 0.3 * entropy(z, LABELS.flip(0))],
}


@pytest.mark.parametrize("name", SHARED)
def test_a_token_has_one_gradient_of_all_calls(name: str) -> None:
    """Calls of a loss on the same logits: what they share is counted once."""
    calls = SHARED[name]

    def loss(z: Tensor) -> Tensor:
        return torch.stack([call(z) for call in calls]).sum()

    (found,) = held(loss, FisherEmp(examples="token"), Dense(granularity="full"))
    case = case_of(loss)
    z = case.model(case.x)
    leaf = z.detach().requires_grad_()
    slope = torch.autograd.grad(loss(leaf), leaf)[0]
    numbers_of = NUMBERS_OF[name]()
    C = torch.zeros(found.shape[1:], dtype=torch.float64)
    for n in range(N):
        for r in range(R):
            own = torch.zeros_like(slope)
            own[n, r] = slope[n, r]
            g = torch.autograd.grad(z, list(case.model.parameters()), own, retain_graph=True)
            row = torch.cat([x.reshape(-1) for x in g])
            C = C + numbers_of[n, r] * torch.outer(row, row)
    maker = custom(case.model, FisherEmp(), Dense(granularity="full"))
    order = torch.cat([_order(case.model, site) for site in maker.plan.blocks[0].sites])
    assert oracles.relative_error(found[0], C[order][:, order]) < 1e-12


def _of_terms(*weights: tuple[float, int]) -> Tensor:
    """``sum omega / sum omega^2`` of so many terms of these weights.  # (n, r)"""
    total, square = (sum(k * w**power for w, k in weights) for power in (1, 2))
    return torch.full((N, R), total / square, dtype=torch.float64)


NUMBERS_OF: dict[str, Callable[[], Tensor]] = {
    "one tensor": lambda: _of_terms((1 / TERMS, 1), (0.5 / ELEMENTS, CLASSES)),
    "views of one": lambda: _of_terms((1 / TERMS, 1), (0.5 / ELEMENTS, CLASSES)),
    "flat and not": lambda: _of_terms((1.0, 1), (1 / ELEMENTS, CLASSES)),
    "made of each other": lambda: _of_terms((1 / TERMS, 1), (1 / ELEMENTS, CLASSES)),
    "three": lambda: _of_terms((1.3 / TERMS, 1), (1 / ELEMENTS, CLASSES)),
}


# --- a loss that is recognised in part ------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_recognised_part_does_not_weigh_the_whole_loss(factor: float) -> None:
    """A policy's loss beside a value's: the same number whether torch's function or its formula is called, at every step."""

    def by_hand(z: Tensor, v: Tensor) -> Tensor:
        return (z - v).square().mean()

    def measured(value: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 4).double()
        x, a = torch.randn(8, 3).double(), torch.randint(3, (8,))
        gain, v = torch.randn(8).double(), torch.randn(8).double()

        def loss(y: Tensor) -> Tensor:
            chosen = y[:, :3].log_softmax(-1).gather(1, a[:, None])[:, 0]
            return -(chosen * gain).mean() + factor * value(y[:, 3], v)

        maker = LayerNaturalGradientMaker(model, LayerNaturalGradientConfig(fisher=FisherEmp(), decay=0.0))
        found = []
        for _ in range(3):
            model.zero_grad()
            maker.setup_loss_call(loss, maker.setup_model_call(model, x))
            maker.forward_and_backward()
            block: Any = maker.plan.blocks[0]
            found.append(block.triple.representation.to_dense(block.state))
        rows = torch.autograd.functional.jacobian(
            lambda w: torch.stack([8 * loss_of(w, j, x, a, gain, v, factor) for j in range(8)]), matrix(model)
        )
        torch.testing.assert_close(found[0][0].trace(), (rows.square().sum() / 8), rtol=1e-10, atol=0)
        return found

    for one, other in zip(measured(F.mse_loss), measured(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def matrix(model: nn.Linear) -> Tensor:
    return torch.cat([model.weight, model.bias[:, None]], 1).detach()


def loss_of(w: Tensor, j: int, x: Tensor, a: Tensor, gain: Tensor, v: Tensor, factor: float) -> Tensor:
    """The share of one example in the mean."""
    y = w[:, :3] @ x[j] + w[:, 3]
    return (-y[:3].log_softmax(0)[a[j]] * gain[j] + factor * (y[3] - v[j]).square()) / 8
