"""What is checked anew, what is remembered, what a check costs, and what it leaves alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.errors import SelfCheckWarning
from tests.models import Case
from tests.self_checks.planted import Count, build, checks_of, is_right, labels, maker_of, step


class Tokens(nn.Module):
    """A linear map of tokens, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(torch.tanh(self.body(x))))
        return y.flatten(0, -2)


def tokens(*size: int, seed: int = 0) -> Case:
    return build(Tokens, *size, 3, loss=F.cross_entropy, t=labels(int(torch.tensor(size).prod())), seed=seed)


# --- what is a new structure ----------------------------------------------------------------------------------------------
def test_padding_to_another_length_checks_nothing_anew(count: Count) -> None:
    model = tokens(6, 5).model
    maker = maker_of(Case(model, *tokens(6, 5)[1:]), "layer")
    found = [checks_of(count, maker, model, tokens(6, r, seed=r)) for r in (5, 5, 7, 4, 9)]
    assert found == [1, 0, 0, 0, 0]
    assert [checks_of(count, maker, model, tokens(n, 9, seed=n)) for n in (5, 8)] == [0, 0]  # nor do other batches


@pytest.mark.parametrize(
    ("size", "why"),
    [((6, 5, 2), "a rank"), ((6, 6), "a size that coincides"), ((6, 1), "a size of one"), ((6,), "a lower rank")],
)
def test_other_ranks_and_coincidences_are_checked_once(count: Count, size: tuple[int, ...], why: str) -> None:
    model = tokens(6, 5).model
    maker = maker_of(Case(model, *tokens(6, 5)[1:]), "layer")
    assert checks_of(count, maker, model, tokens(6, 5)) == 1
    assert [checks_of(count, maker, model, tokens(*size)) for _ in range(3)] == [1, 0, 0], why
    assert checks_of(count, maker, model, tokens(6, 5)) == 0
    assert is_right(maker, Case(model, *tokens(6, 5)[1:]))


def test_training_and_evaluation_are_checked_each(count: Count) -> None:
    case = tokens(6, 5)
    maker = maker_of(case, "layer")
    found = []
    for training in (True, False, True, False):
        case.model.train(training)
        found.append(checks_of(count, maker, case.model, case))
    assert found == [1, 1, 0, 0]


class Branches(nn.Module):
    """Which layer is called is an attribute; ``swap`` moves rows in one branch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.way = "left"

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(getattr(self, self.way)(x))
        h = h - h.mean(0) if self.way == "right" else h
        y: Tensor = self.head(h)
        return y


def test_another_set_of_layers_is_checked(count: Count) -> None:
    case = build(Branches, 6, 3, loss=F.cross_entropy, t=labels(6))
    maker: Any = maker_of(case, "full")
    model: Any = case.model
    assert checks_of(count, maker, model, case) == 1
    model.way = "right"
    with pytest.warns(SelfCheckWarning, match="right: no axis"):
        assert checks_of(count, maker, model, case) == 1
    assert is_right(maker, case)
    for way in ("left", "right"):
        model.way = way
        assert checks_of(count, maker, model, case) == 0
        assert is_right(maker, case)


# --- rows that data select ------------------------------------------------------------------------------------------------
class Selecting(nn.Module):
    """Logits of the tokens that are kept: those below the example's first number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 3)
        self.lengths = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1]) < self.lengths.unsqueeze(1)
        y: Tensor = self.head(torch.tanh(self.body(x))[keep])
        return y


def test_rows_that_data_select_are_looked_at_in_every_batch(count: Count) -> None:
    case = build(Selecting, 4, 5, 1, loss=F.cross_entropy, t=labels(12))
    model: Any = case.model
    maker = maker_of(case, "full")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for lengths in ([3, 3, 3, 3], [1, 5, 2, 4], [3, 3, 3, 3], [5, 1, 4, 2]):
            model.lengths = torch.tensor(lengths)
            assert checks_of(count, maker, model, case) == 1
            assert is_right(maker, case), lengths
    assert 1 <= len([w for w in said if w.category is SelfCheckWarning]) <= 2  # of layers, or of all of them


def test_rows_that_the_model_selects_by_a_constant_are_not_looked_at_again(count: Count) -> None:
    class Last(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.body(x)))[:, -1]
            return y

    case = build(Last, 6, 5, 3, loss=F.cross_entropy, t=labels(6))
    maker = maker_of(case, "layer")
    assert [checks_of(count, maker, case.model, case) for _ in range(3)] == [1, 0, 0]


# --- nothing to prove anything by -----------------------------------------------------------------------------------------
def test_layers_without_a_gradient_are_looked_at_again_three_times(count: Count) -> None:
    case = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), 6, 3, loss=F.cross_entropy, t=labels(6))
    head: Any = case.model[2]  # type: ignore[index]
    with torch.no_grad():
        head.weight.zero_()
    maker = maker_of(case, "layer")
    for expected in (1, 1, 1, 0, 0):
        assert checks_of(count, maker, case.model, case) == expected
        assert list(maker.summary().unchecked) == ["0"]
    assert is_right(maker, case)


def test_a_fault_behind_a_head_of_zeros_is_found_when_it_shows(count: Count) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.body(x)) + F.linear(x, self.body.weight))
            return y

    case = build(Hidden, 6, 3, loss=F.cross_entropy, t=labels(6))
    maker = maker_of(case, "layer")
    step(maker, case)
    with torch.no_grad():
        for p in case.model.parameters():
            p.sub_(p.grad)  # type: ignore[arg-type]
    case.model.zero_grad()
    with pytest.warns(SelfCheckWarning, match=r"body\.weight"):
        step(maker, case)
    assert is_right(maker, case)


def test_nothing_is_concluded_from_numbers_that_are_not_finite(count: Count) -> None:
    case = tokens(6, 5)
    maker = maker_of(case, "layer", self_check="error")
    broken = case._replace(x=torch.full_like(case.x, float("nan")))
    assert checks_of(count, maker, case.model, broken) == 0 and maker.skipped == 1
    case.model.zero_grad()
    assert [checks_of(count, maker, case.model, case) for _ in range(2)] == [1, 0]
    assert is_right(maker, case)


# --- where examples are ---------------------------------------------------------------------------------------------------
class Sequence(nn.Module):
    """Time first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)).mean(0))
        return y


@pytest.mark.parametrize("r", [5, 6])
def test_batch_axis_says_where_the_examples_are(r: int) -> None:
    case = build(Sequence, r, 6, 3, loss=F.cross_entropy, t=labels(6))
    maker = maker_of(case, "full", batch_axis=1, self_check="error")
    step(maker, case)
    assert is_right(maker, case)


@pytest.mark.parametrize("r", [3, 4, 6])
def test_without_batch_axis_the_examples_are_found_or_the_batch_is_one(r: int) -> None:
    """Of 6 sequences: 4 does not divide their loss, 3 does, 6 is as many."""
    case = build(Sequence, r, 6, 3, loss=F.cross_entropy, t=labels(6))
    maker = maker_of(case, "full")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step(maker, case)
    assert is_right(maker, case)
    assert [w.category for w in said] == ([] if r == 6 else [SelfCheckWarning]), [str(w.message) for w in said]


def test_a_batch_axis_that_is_not_there_is_an_error() -> None:
    case = build(Tokens, 6, 3, loss=F.cross_entropy, t=labels(6))
    with pytest.raises(ValueError, match=r"batch_axis=2: the first tensor that goes into the model has shape \(6, 3\)"):
        step(maker_of(case, "layer", batch_axis=2), case)


# --- costs ----------------------------------------------------------------------------------------------------------------
def passes(count: Count, case: Case, **options: Any) -> list[int]:
    """Calls of autograd in each of three steps."""
    maker = maker_of(case, "layer", **options)
    found = []
    for _ in range(3):
        before = count.passes
        step(maker, case)
        found.append(count.passes - before)
    return found


RIGHT: dict[str, Callable[[], Case]] = {
    "tokens": lambda: tokens(6, 5),
    "deep": lambda: build(
        lambda: nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(3, 3), nn.Tanh()))),
        6,
        3,
        loss=F.cross_entropy,
        t=labels(6),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_checks_take_a_few_passes_once_whatever_the_depth(name: str, count: Count) -> None:
    off, on = passes(count, RIGHT[name](), self_check="off"), passes(count, RIGHT[name]())
    assert off[0] == off[1] == off[2]
    assert on[1:] == off[1:]
    assert 0 < on[0] - off[0] <= 8
