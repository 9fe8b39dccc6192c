"""Trainings in processes, after a kill, without memory; records and event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from gradmaker.compare import Comparison, InputError, compare
from gradmaker.compare.cost import block_of
from gradmaker.compare.store import read_results
from gradmaker.compare.trial import Record, _diverged, _finite
from tests.compare.toy import Hungry, Killed, toy_task

pytestmark = pytest.mark.usefixtures("bare")


def run(out: Path, methods: Any, **options: Any) -> Comparison:
    chosen = {"learning_rates": [0.1], "seeds": 2, "budget": "2 epochs", **options}
    return compare(toy_task(), methods, out=out, progress=False, **chosen)


def test_processes_train_as_this_one_does_and_may_be_killed(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    told: list[str] = []
    own = lambda trial, number, loss: told.append(f"{trial} {number}")  # noqa: E731
    result = run(tmp_path / "many", ["sgd", Killed], workers=2, callback=own)
    sgd, killed = result.rows
    assert [record.status for record in sgd.finals] == ["finished"] * 2 and len(told) == 4
    assert killed.finals[0].status == "failed" and "its process was ended" in killed.summary()["note"]
    one = run(tmp_path / "one", ["sgd"])
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


@pytest.mark.parametrize("edited", ["forward", "loss", "metric"])
def test_an_edited_task_is_trained_again(edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that keeps its name and the initial weights, as that of a lambda or of a `forward`."""
    known = {"forward": torch.tanh, "loss": 1.0, "metric": 1.0}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.outer(known["forward"](self.inner(x)))  # type: ignore[operator]
            return out

    def made() -> Comparison:
        task = toy_task(
            model=Net,
            loss=lambda z, t: known["loss"] * torch.nn.functional.cross_entropy(z, t),
            metrics={"m": lambda z, t: known["metric"] * (z.argmax(1) == t).double()},
        )
        return compare(task, ["sgd"], learning_rates=[0.1], seeds=1, budget="1 epoch", out=tmp_path, progress=False)

    first = made().rows[0].finals[0].key
    assert made().rows[0].finals[0].key == first
    monkeypatch.setitem(known, edited, {"forward": torch.relu, "loss": 0.5, "metric": 2.0}[edited])
    assert made().rows[0].finals[0].key != first


def test_noise_of_a_last_batch_is_no_divergence() -> None:
    def judged(losses: list[float]) -> str:
        record = Record("row", "sgd", {}, 0.1, 0, curve_loss=[*losses], marks=[len(losses) // 2, len(losses)])
        record.validation = {"loss": [1.0]}
        _diverged(record)
        return record.status

    assert judged([1.5, 3.0, 1.5, 2.5, 1.6, 2.4, 1.4, 2.9]) == "finished"
    assert judged([2.0, 2.1, 2.0, 2.2, 2.8, 2.9, 2.8, 2.9]) == "diverged"
    assert judged([2.0, 9.0, 40.0, 900.0]) == "diverged" and judged([1.0, 1.2]) == "finished"


def test_small_values_are_kept() -> None:
    assert _finite(3.123456789e-9) == 3.1234568e-9 and _finite(float("nan")) is None


def test_a_block_of_timed_steps_is_whole_intervals() -> None:
    for interval in (1, 3, 10, 20, 30, 70, 100):
        for step in (1e-5, 7e-4, 0.3, 5.0):
            block = block_of(interval, step)
            assert block % interval == 0 and block >= 5 and block * step >= 0.02, (interval, step)
    assert block_of(1000, 1e-3) == 1000 and block_of(1000, 1.0) == 50
