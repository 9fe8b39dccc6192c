"""What a comparison found, in sentences: for the head of its report and the end of the command."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gradmaker.compare.verdicts import Difference, Point, Reach

OPEN = "not told apart from"
LISTED = 4  # names that a sentence lists before it counts


@dataclass(frozen=True)
class Found:
    """The numbers that the sentences are about.

    Args:
        ends: mean of the metric on the test part, for the rows with a finished training.
        plain: rows without a method, as `adam` of torch.
        bad: rows without a finished training.
        finished: "2 of 3", for the rows of which only some trainings finished.
    """

    metric: str
    higher: bool
    ends: Mapping[str, float]
    plain: Collection[str]
    tests: Sequence[Difference]
    reaches: Sequence[Reach]
    points: Sequence[Point]
    bad: Sequence[str]
    finished: Mapping[str, str] = field(default_factory=dict)


def sentences(found: Found) -> list[str]:
    """The race to the target, the best end, the front, and rows without an end."""
    if not found.ends:
        return ["No training came to an end: see the notes of the rows.", *_without_end(found)]
    return [*_race(found), *_ends(found), *_front(found), *_without_end(found)]


def rival(reaches: Sequence[Reach], plain: Collection[str]) -> Reach | None:
    """What the race is told against: the first row without a method, else the second of all that reach the target."""
    ranked = _ranked(reaches)
    second = ranked[min(1, len(ranked) - 1)] if ranked else None
    return next((reach for reach in ranked if reach.label in plain), second)


def written(metric: str, number: float) -> str:
    """A value of the metric as text."""
    return f"{100 * number:.2f} %" if metric == "accuracy" else f"{number:.4g}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: the first of many."""
    if len(names) > LISTED + 1:
        return f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)


# --- sentences ------------------------------------------------------------------------------------------------------------
def _ranked(reaches: Sequence[Reach]) -> list[Reach]:
    """Those that reach the target, the fewest steps first."""
    return sorted((reach for reach in reaches if reach.steps is not None), key=lambda reach: reach.steps or 0.0)


def _race(found: Found) -> Iterable[str]:
    """Who is first by steps, and who by time."""
    base = rival(found.reaches, found.plain)
    if base is None:
        return
    target = f"{written(found.metric, base.target)} of test {found.metric}"
    others = [reach for reach in _ranked(found.reaches) if reach.label != base.label]
    if not others:
        yield f"On this model only {base.label} reaches {target}, in {base.steps:g} steps."
        return
    yield f"On this model {others[0].label} reaches {target} in {_ratio(others[0], base)}."
    timed = [reach for reach in others if reach.seconds is not None]
    fastest = min(timed, key=lambda reach: reach.seconds or 0.0, default=others[0])
    if fastest is not others[0]:
        yield f"By time, {fastest.label} is the first beside {base.label}: {_ratio(fastest, base)}."


def _ratio(reach: Reach, base: Reach) -> str:
    steps = f"{_times((reach.steps or 0.0) / (base.steps or 1.0))} {base.label}'s steps ({reach.steps:g} and {base.steps:g})"
    if reach.seconds is None or not base.seconds:
        return steps
    return f"{steps} and {_times(reach.seconds / base.seconds)} its time"


def _times(ratio: float) -> str:
    """A ratio as text, which "2 of the steps" is not."""
    return f"{ratio:.2g} {'of' if ratio < 0.995 else 'times'}"


def _ends(found: Found) -> Iterable[str]:
    """Which row ends best, and whether paired tests tell it from the others."""
    label, best = (max if found.higher else min)(found.ends.items(), key=lambda end: end[1])
    lost = f" over the {found.finished[label]} of its seeds that finished" if label in found.finished else ""
    told = f"{label} ends with the best test {found.metric}, {written(found.metric, best)}{lost}"
    tests = [test for test in found.tests if label in (test.first, test.second)]
    if not tests:
        unknown = "; with fewer than two common seeds, no test says whether that is chance" if len(found.ends) > 1 else ""
        yield f"{told}{unknown}."
        return
    read: dict[str, list[str]] = {}
    for test in tests:
        better = (test.mean > 0) is ((test.first == label) is found.higher)
        read.setdefault(("better than" if better else "worse than") if test.shown else OPEN, []).append(_other(test, label))
    parts = [f"{words} {listed(read[words])}" for words in ("better than", "worse than", OPEN) if words in read]
    seeds = {test.seeds for test in tests}
    count = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    yield f"{told}: {', '.join(parts)} by {count} seeds (paired t-tests)."


def _other(test: Difference, label: str) -> str:
    return test.second if test.first == label else test.first


def _front(found: Found) -> Iterable[str]:
    if len(found.points) > 1:
        front = [point.label for point in sorted(found.points, key=lambda point: point.cost) if point.front]
        yield f"No row is better in both test {found.metric} and time than {listed(front)}."


def _without_end(found: Found) -> Iterable[str]:
    if found.bad:
        yield f"Without a finished training: {listed(found.bad)}; their notes say why."
