"""A task of the user from the command line: what goes wrong in a row, in a file, and in the middle of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")

from gradmaker.compare.store import read_results

ROOT = Path(__file__).parents[2]
TASK = """
import time
import torch
from torch import nn
from gradmaker.compare import Metric, Task


class Hungry(torch.optim.SGD):
    def step(self, closure=None):
        torch.empty(1 << 50)


class Slow(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(0.01)
        super().step(closure)


def make_task():
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    data = {"input": x, "label": (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()}
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    error = Metric(function=lambda y, t: (y.argmax(1) != t).float(), higher=False)
    return Task(name="own", model=model, train=data, test=data, targets="label", metrics={"error": error},
                batch_size=16, options={"budget": "3 epochs"})
"""
ROWS = """
- torch.SGD
- kfac
- wild: {optimizer: SGD, learning_rates: [1e20]}
- hungry: {optimizer: own_task.Hungry}
- refused: {method: full_ng, max_dim: 2}
"""


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    line = [sys.executable, "-m", "gradmaker", "compare", "--task", "own_task:make_task", "--lr", "0.1", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, cwd=folder, env=environment, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_task.py").write_text(TASK)
    (tmp_path / "rows.yaml").write_text(ROWS)
    return tmp_path


def test_rows_that_go_wrong_say_so(folder: Path) -> None:
    output, _ = (process := command(folder, "--config", "rows.yaml", "--seeds", "2", "--out", "out", "--quiet")).communicate()
    assert process.returncode == 0, output
    rows = {row["method"]: row for row in read_results(folder / "out" / "results.json")["report"]["rows"]}
    assert rows["torch.SGD"]["finished"] == rows["kfac"]["finished"] == 2 and rows["kfac"]["test_error"] < 0.6
    assert "2 of 2 seeds diverged" in rows["wild"]["note"]
    assert "out of memory" in rows["hungry"]["note"] and rows["refused"]["note"].startswith("refused: ")
    assert rows["hungry"]["finished"] == rows["wild"]["finished"] == rows["refused"]["finished"] == 0


def test_a_killed_command_goes_on_where_it_was(folder: Path) -> None:
    arguments = ("own_task.Slow", "--seeds", "8", "--out", "out", "--quiet")
    process, results = command(folder, *arguments), folder / "out" / "results.json"
    while not results.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = read_results(results)["trials"]
    assert 1 <= len(done) < 8 and not (folder / "out" / "report.html").exists()
    output, _ = (again := command(folder, *arguments)).communicate()
    assert again.returncode == 0, output
    trials = read_results(results)["trials"]
    assert len(trials) == 8 and {key: trials[key] for key in done} == done and (folder / "out" / "report.html").exists()
