"""Searches of one row, which are asked for trials and told their scores: a grid that extends itself, random points, Optuna."""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gradmaker.compare.errors import InputError, require_extra
from gradmaker.compare.search.spaces import Space

Choice = dict[str, Any]
RATE = "learning_rate"
LADDER = (2.9, 3.5)  # ratios of grids of ones and threes


@dataclass(frozen=True, order=True)
class Score:
    """How good a trial was on validation: finished ones before others, then the metric, then the loss; higher is better."""

    finished: bool
    metric: float
    loss: float
    diverged: bool = field(default=False, compare=False)


class Search(ABC):
    """Proposes options of a row and learns how good they were."""

    @abstractmethod
    def ask(self) -> list[Choice]:
        """Options to be tried next, in any order; none when the search has ended."""

    @abstractmethod
    def tell(self, choice: Choice, score: Score) -> None:
        """Take the score of a choice."""


class GridSearch(Search):
    """All combinations of values; then further learning rates beyond an edge, until the best one is inside."""

    def __init__(self, rates: Sequence[float], others: Sequence[Space], extend: int, trials: int | None) -> None:
        self.extend, self.trials = (extend if len(set(rates)) > 1 else 0), trials
        combined = itertools.product(*(space.grid() for space in others))
        names = [space.name for space in others]
        self.waiting = [{RATE: rate, **dict(zip(names, values, strict=True))} for values in combined for rate in rates]
        if trials is not None and len(self.waiting) > trials:
            raise InputError(f"trials={trials}: the grid has {len(self.waiting)} trainings: raise it, or take search: random")
        self.scores: list[tuple[Choice, Score]] = []

    def ask(self) -> list[Choice]:
        asked, self.waiting = self.waiting or self._further(), []
        return asked

    def tell(self, choice: Choice, score: Score) -> None:
        self.scores.append((choice, score))

    def _further(self) -> list[Choice]:
        if self.trials is not None and len(self.scores) >= self.trials:
            return []
        best, score = max(self.scores, key=lambda scored: scored[1])
        others = {name: value for name, value in best.items() if name != RATE}
        rates = sorted(choice[RATE] for choice, _ in self.scores if {**choice, RATE: 0} == {**others, RATE: 0})
        if not score.finished and not any(told.diverged for _, told in self.scores):
            return []
        rate = self._beyond(rates, best[RATE] if score.finished else rates[0])
        if rate is None and score.finished and self.trials is not None:
            rate = between(rates, best[RATE])
        return [] if rate is None else [{**others, RATE: rate}]

    def _beyond(self, rates: list[float], best: float) -> float | None:
        """The next rate beyond the edge at which the best one stands."""
        if not self.extend or len(rates) < 2 or best not in (rates[0], rates[-1]):
            return None
        self.extend -= 1
        return next_rate(rates[-2], rates[-1]) if best == rates[-1] else next_rate(rates[1], rates[0])


class RandomSearch(Search):
    """Points of a Latin hypercube; an option has the same places of its range in every row."""

    def __init__(self, spaces: Sequence[Space], trials: int, seed: int) -> None:
        columns = {space.name: [space.at(u) for u in strata(trials, f"{seed} {space.name}")] for space in spaces}
        self.waiting = [{name: column[k] for name, column in columns.items()} for k in range(trials)]

    def ask(self) -> list[Choice]:
        asked, self.waiting = self.waiting, []
        return asked

    def tell(self, choice: Choice, score: Score) -> None:
        """Nothing: points do not depend on scores."""


class OptunaSearch(Search):
    """Optuna's tree-structured Parzen estimator, one trial after the other."""

    def __init__(self, spaces: Sequence[Space], trials: int, seed: int) -> None:
        require_extra(["optuna"], extra="tune")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna: Any = optuna
        self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self.ranges = {space.name: self._distribution(space) for space in spaces}
        self.left = trials
        self.open: Any = None

    def ask(self) -> list[Choice]:
        if not self.left:
            return []
        self.left -= 1
        self.open = self.study.ask(self.ranges)
        return [dict(self.open.params)]

    def tell(self, choice: Choice, score: Score) -> None:
        if score.finished and math.isfinite(score.metric):
            self.study.tell(self.open, score.metric)
        else:
            self.study.tell(self.open, state=self.optuna.trial.TrialState.FAIL)

    def _distribution(self, space: Space) -> Any:
        kinds = self.optuna.distributions
        if space.values:
            return kinds.CategoricalDistribution(space.values)
        if space.integer:
            return kinds.IntDistribution(int(space.low), int(space.high), log=space.log)
        return kinds.FloatDistribution(space.low, space.high, log=space.log)


def next_rate(inner: float, edge: float) -> float:
    """The rate beyond an edge, at the same ratio; a grid of ones and threes goes on with these."""
    ratio, mantissa = edge / inner, f"{edge:.3e}"[:5]
    if LADDER[0] <= max(ratio, 1 / ratio) <= LADDER[1] and mantissa in ("1.000", "3.000"):
        half = round(2 * math.log10(edge) + math.copysign(1, ratio - 1))
        return float(f"{(1, 3)[half % 2]}e{half // 2}")
    return float(f"{edge * ratio:.3g}")


def between(rates: Sequence[float], best: float) -> float | None:
    """The geometric mean of the best rate and the neighbour that is further away; None where they are within 5 per cent."""
    place = rates.index(best)
    gaps = [(abs(math.log(best / rates[k])), rates[k]) for k in (place - 1, place + 1) if 0 <= k < len(rates)]
    gap, neighbour = max(gaps, default=(0.0, best))
    return float(f"{math.sqrt(best * neighbour):.3g}") if gap > 2 * math.log(1.05) else None


def strata(count: int, seed: str) -> list[float]:
    """A point at random in each of so many equal parts of the unit interval, in random order."""
    drawn = random.Random(seed)
    points = [(k + drawn.random()) / count for k in range(count)]
    drawn.shuffle(points)
    return points
