"""Searches: grids that extend themselves, random points, Optuna, budgets, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from gradmaker.compare import Budget, Comparison, InputError, Tuning, compare
from gradmaker.compare.parsing import parse_rows
from gradmaker.compare.search.budgets import Clock
from gradmaker.compare.search.searches import RATE, GridSearch, OptunaSearch, RandomSearch, Score, Search, between, next_rate
from gradmaker.compare.search.spaces import Space, parse_space
from tests.compare.toy import toy_task


def played(search: Search, optimum: float, diverges: float = math.inf) -> list[dict[str, Any]]:
    """All choices of a search whose score falls with the distance of the rate from an optimum."""
    choices = []
    while asked := search.ask():
        for choice in asked:
            rate = choice[RATE]
            bad = rate >= diverges
            distance = abs(math.log(rate / optimum)) + sum(abs(v) for k, v in choice.items() if k != RATE)
            search.tell(choice, Score(not bad, -math.inf if bad else -distance, 0.0, diverged=bad))
            choices.append(choice)
    return choices


@pytest.mark.parametrize(
    ("optimum", "diverges", "expected"),
    [
        (0.1, math.inf, [0.03, 0.1, 0.3]),
        (1.0, math.inf, [0.03, 0.1, 0.3, 1.0, 3.0]),
        (1.0, 1.0, [0.03, 0.1, 0.3, 1.0]),  # the edge diverges: the best is inside
        (0.003, math.inf, [0.03, 0.1, 0.3, 0.01, 0.003, 0.001]),
        (1e9, math.inf, [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]),  # bounded
        (0.003, 0.01, [0.03, 0.1, 0.3, 0.01, 0.003, 0.001]),  # all diverge at first
    ],
)
def test_a_grid_extends_itself_until_the_best_is_inside(optimum: float, diverges: float, expected: list[float]) -> None:
    assert [choice[RATE] for choice in played(GridSearch((0.03, 0.1, 0.3), [], 4, None), optimum, diverges)] == expected


def test_grids_that_stay() -> None:
    assert len(played(GridSearch((0.03, 0.1, 0.3), [], 0, None), 9.0)) == 3
    assert len(played(GridSearch((0.1,), [], 4, None), 9.0)) == 1  # one rate is no grid
    failing = GridSearch((0.1, 0.3), [], 4, None)
    for choice in failing.ask():
        failing.tell(choice, Score(False, -math.inf, -math.inf))
    assert failing.ask() == []  # a failure that is no divergence is not one of the rate


def test_a_grid_with_equal_budget_refines_what_it_has_left() -> None:
    for optimum in (0.1, 3.0, 0.15):
        rates = [choice[RATE] for choice in played(GridSearch((0.03, 0.1, 0.3), [], 4, 7), optimum)]
        assert len(rates) == 7 == len(set(rates))
        best = min(rates, key=lambda rate: abs(math.log(rate / optimum)))
        assert min(rates) < best < max(rates) and abs(math.log(best / optimum)) < math.log(2)
    with pytest.raises(InputError, match="trials=2: the grid has 3 trainings"):
        GridSearch((0.03, 0.1, 0.3), [], 4, 2)


def test_a_grid_of_several_options_extends_the_rate_at_the_best_others() -> None:
    choices = played(GridSearch((0.1, 0.3), [Space("damping", (0.0, 1.0))], 4, None), 1.0)
    assert len(choices) == 4 + 2 and choices[-1] == {RATE: 3.0, "damping": 0.0}


def test_next_rates() -> None:
    assert [next_rate(*pair) for pair in ((0.1, 0.3), (0.03, 0.1), (0.1, 0.03), (0.003, 0.001))] == [1.0, 0.3, 0.01, 3e-4]
    assert next_rate(0.1, 0.2) == 0.4 and next_rate(0.02, 0.06) == 0.18 and next_rate(0.2, 0.02) == 0.002
    assert between([0.1, 0.2, 0.8], 0.2) == 0.4 and between([0.1, 0.101], 0.1) is None


def test_random_points_are_those_of_a_hypercube_and_common_to_rows() -> None:
    rate, other = Space(RATE, low=1e-4, high=1e-1, log=True), Space("damping", low=0.0, high=1.0)
    first, second = RandomSearch([rate, other], 10, 3).ask(), RandomSearch([other], 10, 3).ask()
    cells = sorted(int(10 * (math.log10(choice[RATE]) + 4) / 3 * 0.99999) for choice in first)
    assert cells == list(range(10)) and sorted(int(10 * choice["damping"] * 0.99999) for choice in first) == list(range(10))
    assert [choice["damping"] for choice in first] == [choice["damping"] for choice in second]
    assert RandomSearch([rate], 10, 4).ask() != RandomSearch([rate], 10, 3).ask()


def test_optuna_finds_the_optimum_and_repeats_itself() -> None:
    pytest.importorskip("optuna")
    spaces = [
        Space(RATE, low=1e-4, high=1e0, log=True),
        Space("momentum", (0.0, 0.5)),
        Space("interval", low=1, high=9, integer=True),
    ]

    def tried() -> list[dict[str, Any]]:
        search, choices = OptunaSearch(spaces, 25, 1), []
        while asked := search.ask():
            (choice,) = asked
            search.tell(choice, Score(choice[RATE] < 0.5, -abs(math.log(choice[RATE] / 0.01)), 0.0))
            choices.append(choice)
        return choices

    first = tried()
    assert len(first) == 25 and first == tried()
    assert min(abs(math.log(choice[RATE] / 0.01)) for choice in first) < 0.7
    assert {choice["momentum"] for choice in first} == {0.0, 0.5} and all(
        isinstance(choice["interval"], int) for choice in first
    )


def test_spaces() -> None:
    assert parse_space("a", [1, "x"]).grid() == (1, "x")
    assert parse_space("a", {"low": 1e-4, "high": 1e-2, "log": True}).grid() == (1e-4, 1e-3, 1e-2)
    assert parse_space("a", {"low": 1, "high": 100, "log": True, "int": True, "points": 5}).grid() == (1, 3, 10, 32, 100)
    assert parse_space("a", {"low": 0, "high": 1}).at(0.25) == 0.25


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "expected a list of values"),
        ([], "expected a list of values"),
        ({"low": 1}, "low=1, high=None: expected two numbers"),
        ({"low": 2, "high": 1}, "the lower one first"),
        ({"low": 0, "high": 1, "log": True}, "begins above 0"),
        ({"lo": 0, "high": 1}, "did you mean 'low'"),
        ({"low": 0, "high": 1, "points": 1}, "points=1"),
    ],
)
def test_illegal_spaces(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Tuning(space={"damping": given})


def test_tuning_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "tuning:\n  search: random\n  trials: 4\n  space:\n"
        "    damping: {low: 1e-4, high: 1e-2, log: true}\n    weight_decay: [0, 1e-4]\n"
    )
    tuning = Tuning.parse(str(tmp_path / "t.yaml"))
    assert tuning == Tuning.parse(tmp_path / "t.yaml") and tuning.search == "random" and tuning.trials == 4
    sgd, kfac = parse_rows(["sgd", {"method": "kfac", "space": {"learning_rate": [0.5]}}])
    assert set(tuning.spaces(sgd)) == {"weight_decay"} and set(tuning.spaces(kfac)) == {"damping", "weight_decay", RATE}
    assert all(choice[RATE] == 0.5 for choice in tuning.of(kfac).ask()) and len(tuning.of(sgd).ask()) == 4
    other = kfac.with_options({"damping": 0.5, "weight_decay": 1e-4, "interval": 7})
    assert other.maker == {"method": "kfac", "damping": 0.5, "curvature_interval": 7, "preconditioner_interval": 7}
    assert other.options["weight_decay"] == 1e-4 and kfac.maker == {"method": "kfac"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gird", "did you mean 'grid'"),
        ({"trials": 0}, "trials=0"),
        ({"extend": -1}, "extend=-1"),
        ({"serach": "grid"}, "did you mean 'search'"),
        ({"space": {"dampnig": [1]}}, "none of the rows has an option 'dampnig'"),
        ({"space": [1]}, "expected a mapping"),
        (3, "tuning=3: expected grid, random, optuna"),
        ("absent.yaml", "cannot read"),
    ],
)
def test_illegal_tuning(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Tuning.parse(given).check(parse_rows(["sgd", "kfac"]))


@pytest.mark.parametrize("value", ["20", "20 miles", "-1 steps", "0.5 epochs", "x steps", 0, "nan seconds", "inf steps"])
def test_illegal_budgets(value: Any) -> None:
    with pytest.raises(InputError, match="expected a positive number of epochs, steps, seconds"):
        Budget.parse(value)


def test_budgets() -> None:
    texts = {3: "3 epochs", "1 epoch": "1 epoch", "1500000 steps": "1500000 steps", "0.5 seconds": "0.5 seconds"}
    assert {value: str(Budget.parse(value)) for value in texts} == texts
    assert all(Budget.parse(text) == Budget.parse(str(Budget.parse(text))) for text in texts.values())


@pytest.mark.parametrize(
    ("budget", "marks"),
    [("3 epochs", [8, 16, 24]), ("20 steps", list(range(1, 21))), ("50 steps", [3 * k for k in range(1, 17)] + [50])],
)
def test_marks_of_a_clock(budget: str, marks: list[int]) -> None:
    clock, found = Clock(Budget.parse(budget), 8), []
    while not clock.over:
        steps = 0
        while clock.goes_on(steps, 0.0):
            steps += 1
        clock.end_leg(steps, 0.0)
        found.append(clock.steps)
    assert found == marks and clock.done(marks[-1]) == 1.0


def test_a_clock_of_seconds() -> None:
    clock, ends = Clock(Budget.parse("10 seconds"), 8), []
    while not clock.over:
        steps = 0
        while clock.goes_on(steps, 0.2 * steps):
            steps += 1
        clock.end_leg(steps, 0.2 * steps)
        ends.append(clock.seconds)
    assert len(ends) <= 20 and 10 <= ends[-1] < 10.3 and clock.done(0) >= 1.0


def run(out: Path, methods: Any, **options: Any) -> Comparison:
    return compare(toy_task(), methods, out=out, progress=False, **{"seeds": 1, "budget": "1 epoch", **options})


@pytest.mark.usefixtures("bare")
def test_searches_of_a_comparison(tmp_path: Path) -> None:
    tuning = {"search": "random", "trials": 3, "space": {"damping": {"low": 1e-3, "high": 1e-1, "log": True}}}
    result = run(tmp_path, ["sgd", "kfac"], tuning=tuning)
    sgd, kfac = result.rows
    assert [len(row.search) for row in result.rows] == [3, 3] and sgd.chosen == {} and set(kfac.chosen) == {"damping"}
    assert kfac.finals[0].config["maker"]["damping"] == kfac.chosen["damping"] == kfac.config["maker"]["damping"]
    assert kfac.summary()["damping"] == kfac.chosen["damping"] and "damping" in (tmp_path / "results.csv").read_text()
    assert result.tuning["search"] == "random"
    grown = run(tmp_path, [{"optimizer": "SGD", "label": "slow", "learning_rates": [1e-6, 3e-6]}])
    assert [record.learning_rate for record in grown.rows[0].search] == [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4]
    assert "lr at the edge of its grid" in grown.rows[0].summary()["note"]


@pytest.mark.usefixtures("bare")
def test_settings_are_varied_one_at_a_time(tmp_path: Path) -> None:
    given = {"batch_size": [8, 40], "interval": [1, 3]}
    result = run(tmp_path, ["sgd", "kfac"], learning_rates=[0.1], seeds=2, vary=given)
    lines = {(line.label, line.parameter, line.value): line for line in result.sensitivity}
    assert set(lines) == {(row, "batch_size", size) for row in ("sgd", "kfac") for size in (8, 40)} | {
        ("kfac", "interval", every) for every in (1, 3)
    }
    kept = [record for record in result.records() if record.parameters.get("interval") == 3]
    assert len(kept) == 2 and all(record.config["maker"]["curvature_interval"] == 3 for record in kept)
    ends = [record.end("test", "accuracy") for record in kept]
    assert lines["kfac", "interval", 3].metric == pytest.approx(sum(ends) / 2)
    assert Comparison.from_json(tmp_path).sensitivity == result.sensitivity
    with pytest.raises(InputError, match="vary: none of the rows has an option 'intervall'"):
        run(tmp_path, ["sgd"], vary={"intervall": [1]})
    with pytest.raises(InputError, match="vary: interval=3: expected a list"):
        run(tmp_path, ["kfac"], vary={"interval": 3})


@pytest.mark.usefixtures("bare")
def test_budgets_of_a_comparison(tmp_path: Path) -> None:
    steps = run(tmp_path, ["sgd"], learning_rates=[0.1], budget="30 steps").rows[0].finals[0]
    assert steps.marks[-1] == 30 and len(steps.marks) == 15 == len(steps.test["accuracy"]) and len(steps.curve_loss) == 30
    seconds = run(tmp_path, ["sgd"], learning_rates=[0.1], budget="0.1 seconds").rows[0].finals[0]
    assert seconds.status == "finished" and 0.1 <= seconds.seconds[-1] < 1.0
    with pytest.raises(InputError, match="trainings at a time slow each other"):
        run(tmp_path, ["sgd"], budget="1 second", workers=2)
