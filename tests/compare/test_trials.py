"""Trainings in processes, after a kill, without memory; records and event files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from gradmaker.compare import Comparison, InputError, compare
from gradmaker.compare.store import Store, read_results
from tests.compare.toy import Hungry, Killed, toy_task

pytestmark = pytest.mark.usefixtures("bare")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from gradmaker.compare import compare, cost
from tests.compare.toy import toy_task
cost.measure = lambda rows, *_: {}
def slowly(trial, number, loss):
    time.sleep(0.02)
given = {"learning_rates": [0.1], "seeds": 40, "budget": "2 epochs", "progress": False}
compare(toy_task(), ["sgd", "gradient"], out=sys.argv[1], callback=slowly, **given)
"""


def run(out: Path, methods: Any, **options: Any) -> Comparison:
    chosen = {"learning_rates": [0.1], "seeds": 2, "budget": "2 epochs", **options}
    return compare(toy_task(), methods, out=out, progress=False, **chosen)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    results = tmp_path / "results.json"
    while not results.exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = read_results(results)["trials"]
    assert 1 <= len(done) < 80 and not (tmp_path / "report.html").exists()
    told: list[str] = []
    result = run(tmp_path, ["sgd", "gradient"], seeds=40, callback=lambda trial, number, loss: told.append(trial.key()))
    assert result.trained and len(set(told)) == 80 - len(done) and not set(told) & set(done)
    assert {key: record.test for key, record in Store(tmp_path).records.items() if key in done} == {
        key: record["test"] for key, record in done.items()
    }


def test_processes_train_as_this_one_does_and_may_be_killed(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    told: list[str] = []
    own = lambda trial, number, loss: told.append(f"{trial} {number}")  # noqa: E731
    result = run(tmp_path / "many", ["sgd", Killed], workers=2, seeds=3, callback=own)
    sgd, killed = result.rows
    assert [record.status for record in sgd.finals] == ["finished"] * 3 and len(told) == 6
    assert killed.finals[0].status == "failed" and "its process was ended" in killed.summary()["note"]
    one = run(tmp_path / "one", ["sgd"], seeds=3)
    for first, second in zip(one.rows[0].finals, sgd.finals, strict=True):
        assert first.curve_loss == pytest.approx(second.curve_loss) and first.key == second.key


def test_a_row_without_memory_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, [Hungry, "sgd"])
    hungry, sgd = result.rows
    assert [record.status for record in hungry.finals] == ["out of memory"] and sgd.finished
    assert "1 of 1 seed out of memory" in hungry.summary()["note"] and "allocate" in hungry.summary()["note"]


def test_a_record_has_config_seed_versions_and_machine(tmp_path: Path) -> None:
    run(tmp_path, ["kfac"])
    for record in read_results(tmp_path / "results.json")["trials"].values():
        assert record["config"]["maker"]["damping"] > 0 and record["seed"] in (0, 1) and record["batch_size"] == 16
        assert {"torch", "python", "processor", "threads"} <= set(record["machine"])


def test_a_cost_that_cannot_be_measured_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmaker.compare import cost

    def priced(rows: Any, *_: object) -> dict[str, cost.Cost]:
        if any(row.label == "gradient" for row in rows.values()):
            raise RuntimeError("planted")
        return {key: cost.Cost(0.5, 1.0, 8, 1.0) for key in rows}

    monkeypatch.setattr(cost, "measure", priced)
    sgd, gradient = run(tmp_path, ["sgd", "gradient"]).rows
    assert sgd.cost is not None and gradient.cost is None and gradient.summary()["seconds"] is None


def test_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path, ["sgd"], tensorboard=True)
    record = result.rows[0].finals[1]
    (folder,) = [path for path in (tmp_path / "tensorboard" / "sgd").iterdir() if record.key[:6] in path.name]
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Scalars("test/accuracy")
    assert [event.step for event in scalars] == record.marks
    assert [event.value for event in scalars] == pytest.approx(record.test["accuracy"])
    assert len(events.Scalars("train/loss")) == len(record.curve_loss)


@pytest.mark.parametrize("workers", [0, -1])
def test_illegal_workers(workers: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"workers={workers}"):
        run(tmp_path, ["sgd"], workers=workers)
