"""Options from YAML files, the configuration that is printed and written, and exit statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")

import yaml
from typer.testing import CliRunner, Result

from gradmaker.commands import options
from gradmaker.commands.app import app
from gradmaker.compare import cost as cost_module
from gradmaker.version import __version__

TASK = """
import torch
from torch import nn
from gradmaker.compare import Task

def make_task():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return Task(name="signs", model=lambda: nn.Linear(4, 2), train=(x, (x[:, 0] > 0).long()), batch_size=16,
                options={"budget": "2 epochs"})
"""


@pytest.fixture(autouse=True)
def in_folder(undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost_module, "ROUNDS", 1)
    monkeypatch.setattr(cost_module, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(options.torch, "set_num_threads", lambda count: None)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a task of the user, in a module of the working folder."""
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "signs_task", raising=False)
    Path("signs_task.py").write_text(TASK)
    return "signs_task:make_task"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def printed(*arguments: str) -> dict[str, object]:
    result = invoke(*arguments, "--print-config")
    assert result.exit_code == 0, result.output
    found: dict[str, object] = yaml.safe_load(result.output)
    return found


def test_version_and_help() -> None:
    assert invoke("--version").output == f"gradmaker {__version__}\n"
    text = invoke("--help").output
    assert all(name in text for name in ("compare", "cost", "train", "methods", "show", "Exit status: 0"))
    for name in ("compare", "cost", "train", "methods", "show"):
        assert invoke(name, "--help").exit_code == 0
    wrong = invoke("compere")
    assert wrong.exit_code == 2 and wrong.output.startswith("error: No such command 'compere'")


def test_options_of_a_file_stand_behind_those_of_the_command_line() -> None:
    Path("mine.yaml").write_text("methods: [sgd, {method: kfac, damping: 0.1}]\nseeds: 2\nlr: [0.1, 0.2]\nbatch-size: 32\n")
    found = printed("compare", "--config", "mine.yaml", "--seeds", "5")
    assert found["methods"] == ["sgd", {"method": "kfac", "damping": 0.1}]
    assert (found["seeds"], found["lr"], found["batch_size"]) == (5, [0.1, 0.2], 32)
    assert printed("compare", "adam", "--config", "mine.yaml")["methods"] == ["adam"]


def test_the_printed_configuration_is_complete_and_prints_itself() -> None:
    found = printed("compare", "sgd", "--vary", "batch_size=32,128", "--vary", "interval=1")
    assert found["vary"] == {"batch_size": [32, 128], "interval": [1]} and found["gradmaker"] == __version__
    assert (found["budget"], found["tuning"], found["schedule"], found["device"]) == ("20 epochs", "grid", "cosine", "cpu")
    Path("again.yaml").write_text(yaml.safe_dump(found))
    assert printed("compare", "--config", "again.yaml") == found
    measured = printed("cost", "--measure", "--width", "8", "--width", "16")
    Path("cost.yaml").write_text(yaml.safe_dump(measured))
    assert printed("cost", "--config", "cost.yaml") == measured and measured["interval"] == [1, 10, 100]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch: 3", "did you mean 'batch_size'"),
        ("seeds: many", "Invalid value for '--seeds'"),
        ("3", "expected options by name, or a list of methods"),
        ("methods: [a", "is not valid YAML"),
        ("methods: [kfacc]", "did you mean 'kfac'"),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str, message: str) -> None:
    Path("wrong.yaml").write_text(text)
    result = invoke("compare", "--config", "wrong.yaml")
    assert result.exit_code == 2 and message in result.output
    assert len(result.output.splitlines()) == 1 and result.output.startswith("error: ")


def test_a_run_of_the_user_and_the_same_from_its_config(task: str) -> None:
    first = invoke("compare", "sgd", "--task", task, "--lr", "0.1", "--seeds", "1", "--quiet")
    assert first.exit_code == 0, first.output
    kept = yaml.safe_load(Path("runs/signs/config.yaml").read_text())
    assert (kept["task"], kept["budget"], kept["methods"], "out" in kept) == (task, "2 epochs", ["sgd"], False)
    again = invoke("compare", "--config", "runs/signs/config.yaml", "--out", "again", "--quiet")
    assert again.exit_code == 0 and Path("again/report.html").exists()
    assert yaml.safe_load(Path("again/config.yaml").read_text()) == kept


def test_a_refused_row_is_a_row_and_nothing_trained_has_status_1(task: str) -> None:
    Path("rows.yaml").write_text("- sgd\n- {method: full_ng, max_dim: 2}\n")
    run = ["--task", task, "--lr", "0.1", "--seeds", "1", "--quiet"]
    some = invoke("compare", "--config", "rows.yaml", *run)
    assert some.exit_code == 0, some.output
    Path("rows.yaml").write_text("- {method: full_ng, max_dim: 2}\n")
    none = invoke("compare", "--config", "rows.yaml", *run, "--out", "none")
    assert none.exit_code == 1 and "nothing trained" in none.output and Path("none/report.html").exists()
    one = invoke("train", "rows.yaml", "--task", task, "--quiet")
    assert one.exit_code == 1 and "error: nothing trained: " in one.output and "max_dim" in one.output


POSTER = sorted((Path(__file__).resolve().parents[2] / "examples" / "poster").glob("*.yaml"))


@pytest.mark.parametrize("path", POSTER, ids=lambda path: path.stem)
def test_files_of_the_poster_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from gradmaker.commands import compare
    from gradmaker.compare import Task
    from gradmaker.compare.parsing import parse_rows

    tiny = Task(name="tiny", model=nn.Linear(2, 2), train=(torch.zeros(4, 2), torch.zeros(4).long()))
    monkeypatch.setattr(compare, "task_of", lambda *given: tiny)
    subcommand = "cost" if path.stem.startswith("cost") else "compare"
    found = printed(subcommand, "--config", str(path), "--device", "cpu")
    rows = parse_rows(found["methods"])
    assert [row.label for row in rows] == ["SGD", "AdamW", "K-FAC", "Shampoo", "PSGD-KF", "K-BFGS", "SENG"]
    for row in rows:
        row.check()


def test_help_does_not_read_the_file_beside_it() -> None:
    assert invoke("compare", "--config", "absent.yaml", "--help").exit_code == 0
