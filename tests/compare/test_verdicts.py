"""Verdicts against numbers by hand and by scipy; what is saved, read again and merged."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from gradmaker import AdamGradientMaker
from gradmaker.compare import Comparison, InputError, compare, write
from gradmaker.compare.parsing import parse_rows
from gradmaker.compare.verdicts import common_target, differences, front, reach
from gradmaker.methods.kfac import KfacGradientConfig
from tests.compare.toy import Own, toy_task

pytestmark = pytest.mark.usefixtures("bare")
ENDS = {
    "a": {0: 0.90, 1: 0.92, 2: 0.91, 3: 0.95},
    "b": {0: 0.93, 1: 0.96, 2: 0.95, 4: 0.1},
    "c": {0: 0.90, 1: 0.92, 2: 0.91, 3: 0.95},
}


def run(out: Path, methods: Any = ("sgd", "kfac"), **options: Any) -> Comparison:
    chosen = {"learning_rates": [0.1], "seeds": 2, "budget": "3 epochs", **options}
    return compare(toy_task(), methods, out=out, progress=False, **chosen)


def test_paired_tests_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    found = {(d.first, d.second): d for d in differences(ENDS, higher=True)}
    assert set(found) == {("b", "a"), ("c", "a"), ("c", "b")}
    one = found["b", "a"]
    first, second = [0.93, 0.96, 0.95], [0.90, 0.92, 0.91]
    expected = stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert (one.t, one.p) == pytest.approx((expected.statistic, expected.pvalue)) and one.seeds == 3
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high)) and one.mean == pytest.approx(0.11 / 3)
    assert one.shown and one.p < 0.05 / 3 and one.reading == "b is better than a"
    assert differences(ENDS, higher=False)[0].reading == "a is better than b"
    same = found["c", "a"]
    assert same.p == 1.0 and not same.shown and same.mean == 0.0 and same.reading == "no difference is shown"


def test_the_level_allows_for_the_number_of_tests() -> None:
    ends = {"a": {0: 0.0, 1: 0.0, 2: 0.0}, "b": {0: 0.9, 1: 1.3, 2: 1.5}}
    (alone,) = differences(ends, higher=True)
    assert 0.05 / 3 < alone.p < 0.05 and alone.shown
    third = {**ends, "c": {0: 3.0, 1: 1.0, 2: -4.0}}
    assert [d.shown for d in differences(third, higher=True)] == [False, False, False]
    assert differences({"a": {0: 1.0}, "b": {0: 2.0}}, higher=True) == []


def test_steps_to_a_target() -> None:
    curves = [([8, 16, 24], [0.5, 0.8, 0.9]), ([8, 16, 24], [0.8, 0.7, 0.9]), ([8, 16, 24], [0.1, None, 0.2])]
    one = reach("a", 0.8, curves, 0.5, higher=True)
    assert (one.steps, one.seconds, one.reached, one.seeds) == (16, 8.0, 2, 3)
    never = reach("a", 0.95, curves, 0.5, higher=True)
    assert (never.steps, never.seconds, never.reached) == (None, None, 0)
    assert reach("a", 0.5, curves, None, higher=False).steps == 8


def test_the_front() -> None:
    points = [("a", 0.9, 1.0), ("b", 0.95, 2.0), ("c", 0.94, 3.0), ("d", 0.9, 1.5), ("e", 0.9, 1.0)]
    assert [point.label for point in front(points, higher=True) if point.front] == ["a", "b", "e"]
    assert [point.label for point in front(points, higher=False) if point.front] == ["a", "e"]


def test_a_comparison_says_what_it_shows(tmp_path: Path) -> None:
    result = run(tmp_path, ["sgd", "kfac", {"optimizer": "SGD", "label": "wild", "learning_rates": 1e20}], seeds=3)
    reaches = {reached.label: reached for reached in result.reaches(0.0)}
    first = result.rows[0].finals[0].marks[0]
    assert reaches["sgd"].steps == first and reaches["sgd"].seconds == first * 0.5  # the cost of the fixture
    assert result.rows[0].summary()["seconds"] == result.rows[0].finals[0].marks[-1] * 0.5
    assert {point.label for point in result.pareto()} == {"sgd", "kfac"} and result.trained
    assert reaches["wild"].steps is None and reaches["wild"].reached == 0  # whatever it passed on its way
    assert "Without a finished training: wild; their notes say why." in result.verdict()
    assert result.verdict()[0] in (tmp_path / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="cost='time'"):
        result.pareto("time")
    nothing = run(tmp_path / "none", [{"optimizer": "SGD", "label": "wild", "learning_rates": 1e20}])
    assert not nothing.trained and nothing.verdict()[0] == "No training came to an end: see the notes of the rows."


def test_a_report_is_written_again_from_its_json(tmp_path: Path) -> None:
    result = run(tmp_path, ["sgd", {"method": "kfac", "damping": 1e-2}, Own], target=0.5)
    again = Comparison.from_json(tmp_path / "results.json")
    assert again.table() == result.table() and again.plain() == result.plain() and again.reaches() == result.reaches()
    before = {name: (tmp_path / name).read_text() for name in ("report.md", "report.html", "results.csv", "trials.csv")}
    again.out = tmp_path / "copy"
    write(again)
    assert {name: (tmp_path / "copy" / name).read_text() for name in before} == before
    assert json.loads((tmp_path / "copy" / "results.json").read_text())["comparison"] == json.loads(json.dumps(result.plain()))


def test_comparisons_are_merged(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", ["sgd"]), run(tmp_path / "b", ["kfac", "torch.Adam"])
    both = one.merge(Comparison.from_json(tmp_path / "b"))
    assert [row["method"] for row in both.table()] == ["sgd", "kfac", "torch.Adam"]
    assert both.table() == one.table() + other.table() and len(both.differences()) == 3
    both.out = tmp_path / "both"
    write(both)
    assert Comparison.from_json(tmp_path / "both").table() == both.table()
    with pytest.raises(InputError, match="two rows are called 'sgd'"):
        one.merge(one)
    with pytest.raises(InputError, match="comparisons of different budget cannot be merged: '3 epochs' and '1 epoch'"):
        one.merge(run(tmp_path / "c", ["kfac"], budget="1 epoch"))
    for name, value, told in (
        ("machine", {**other.machine, "processor": "another"}, "different processor"),
        ("model", "Sequential()", "different models"),
    ):
        with pytest.raises(InputError, match=told):
            one.merge(replace(other, **{name: value}))
    assert one.merge(replace(other, machine={**other.machine, "date": "another"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot read"):
        Comparison.from_json(tmp_path / "empty")


def test_classes_and_configs_are_rows(tmp_path: Path) -> None:
    given = [torch.optim.AdamW, "torch.Adam", "torch.optim.SGD", AdamGradientMaker, KfacGradientConfig(damping=0.5)]
    further = [{"optimizer": torch.optim.NAdam, "label": "n"}, {"optimizer": {"name": "torch.Adam", "eps": 1.0}, "label": "e"}]
    rows = parse_rows([*given, *further])
    assert [row.label for row in rows] == ["AdamW", "torch.Adam", "torch.optim.SGD", "adam", "kfac", "n", "e"]
    assert [row.optimizer for row in rows] == ["AdamW", "Adam", "SGD", "SGD", "SGD", "NAdam", "Adam"]
    assert rows[3].maker == {"method": "adam"} and rows[4].maker is not None and rows[4].maker["damping"] == 0.5
    assert all(row.kind is None for row in rows) and rows[6].options == {"eps": 1.0}
    result = run(tmp_path, given)
    assert all(row.finished for row in result.rows), [row.finals[0].message for row in result.rows]
    bad_names = {
        "torch.optim.Addam": "did you mean 'adam'",
        "os.path.join": "has no 'os.path.join'",
        "no.such": "cannot be imported",
    }
    for bad, message in bad_names.items():
        with pytest.raises(InputError, match=re.escape(message)):
            parse_rows([bad])


def test_a_refused_row_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    result = run(tmp_path, ["sgd", {"method": "newton", "max_dim": 10}])
    sgd, newton = result.rows
    assert sgd.finished and not newton.finals and "max_dim" in newton.refusal
    assert newton.summary()["note"].startswith("refused: ") and newton.summary()["test_accuracy"] is None
    assert "refused: Dense(full)" in (tmp_path / "report.html").read_text()
    assert Comparison.from_json(tmp_path).rows[1].refusal == newton.refusal
    none = run(tmp_path / "none", [{"method": "newton", "max_dim": 10}])
    assert not none.trained and "refused" in (tmp_path / "none" / "report.md").read_text()


@pytest.mark.parametrize("first", [0.93, 0.3])
def test_equal_differences_of_few_seeds_show_nothing(first: float) -> None:
    """Accuracies of a small test part differ by one example in each seed; the last digits are those of rounding."""
    ends = {"a": {0: first, 1: first - 0.22, 2: first + 0.06}, "b": {seed: 0.0 for seed in range(3)}}
    ends["b"] = {seed: value + 0.01 for seed, value in ends["a"].items()}
    (alone,) = differences(ends, higher=True)
    assert alone.p == 0.25 and not alone.shown and alone.mean == pytest.approx(0.01)


def test_the_common_target_is_reached_by_all() -> None:
    two, three, lost = [0.5, 0.7], [0.9, 0.8, 0.6], [0.1, None, None]
    assert common_target([two, three, lost], higher=True) == 0.5 and common_target([three], higher=True) == 0.8
    assert common_target([two, three], higher=False) == 0.8 and common_target([[None], []], higher=True) != 0  # NaN
    assert math.isnan(common_target([lost], higher=True))
    for ends in (two, three):
        curves = [([8], [end]) for end in ends]
        assert reach("row", common_target([two, three], higher=True), curves, None, higher=True).steps == 8


def test_every_row_that_ends_reaches_the_target_of_the_report(tmp_path: Path) -> None:
    result = run(tmp_path, ["sgd", "kfac", "torch.Adam"], seeds=2)
    assert all(one.steps is not None for one in result.reaches())
    assert not any("only" in sentence for sentence in result.verdict())
