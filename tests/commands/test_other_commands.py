"""`gradmaker methods`, `train` and `show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")

import torch
from typer.testing import CliRunner, Result

from gradmaker import METHODS
from gradmaker.commands import options
from gradmaker.commands.app import app
from gradmaker.commands.methods import described
from gradmaker.compare import cost as cost_module

SHORT = ["--hidden", "8", "--quiet", "--budget", "4 steps"]


@pytest.fixture(autouse=True)
def in_folder(undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost_module, "ROUNDS", 1)
    monkeypatch.setattr(cost_module, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(options.torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_methods_are_listed_with_triple_memory_and_source() -> None:
    assert invoke("methods", "--names").output.split() == list(METHODS)
    found = {one["name"]: one for one in json.loads(invoke("methods", "kron", "--json").output)}
    assert {"kfac", "kflr", "shampoo"} <= set(found) and "adam" not in found
    assert found["kfac"]["triple"] == "FisherMC x Kron x Cholesky" and found["kfac"]["interval"] == "10 / 10"
    assert "arXiv:1503.05671" in found["kfac"]["source"]
    assert found["kfac"]["memory"] == pytest.approx(4, rel=0.01)  # two factors and their inverses, each as large as the weight
    table = invoke("methods", "2018", "hessian").output
    assert "psgd_kf" in table and "lissa" not in table
    wrong = invoke("methods", "kfacc")
    assert wrong.exit_code == 2 and "did you mean 'kfac'" in wrong.output


def test_memory_is_what_a_method_holds() -> None:
    assert described("adam").memory == pytest.approx(2, rel=0.01) and described("adagrad").memory == pytest.approx(1, rel=0.01)
    assert described("unit_ng").memory == pytest.approx(64, rel=0.01)  # of 32 units a matrix 32 x 32 and its inverse
    assert described("gradient").memory is None


def test_a_training_writes_curves_and_a_checkpoint_that_goes_on() -> None:
    result = invoke("train", "kfac", *SHORT, "--lr", "0.02", "--out", "one", "--seed", "3")
    assert result.exit_code == 0, result.output
    saved = torch.load("one/checkpoint.pt", weights_only=True)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    model.load_state_dict(saved["model"])
    maker = METHODS["kfac"](model)
    maker.load_state_dict(saved["maker"])
    assert saved["optimizer"]["param_groups"][0]["initial_lr"] == 0.02 and saved["maker"]["step"] == 4
    content = json.loads(Path("one/results.json").read_text())
    (record,) = content["trials"].values()
    assert record["seed"] == 3 and record["learning_rate"] == 0.02 and len(record["curve_loss"]) == 4
    two = invoke("train", "methods.yaml")
    assert two.exit_code == 2


def test_reports_are_written_again_and_merged() -> None:
    for name in ("sgd", "adam"):
        assert invoke("compare", name, *SHORT, "--lr", "0.01", "--seeds", "1", "--out", name).exit_code == 0
    Path("sgd/report.html").unlink()
    assert invoke("show", "sgd").output == "report: sgd/report.html\n" and Path("sgd/report.html").exists()
    both = invoke("show", "sgd", "adam/results.json", "--out", "both")
    assert both.exit_code == 0, both.output
    rows = json.loads(Path("both/results.json").read_text())["report"]["rows"]
    assert [row["method"] for row in rows] == ["sgd", "adam"]
    twice = invoke("show", "sgd", "sgd")
    assert twice.exit_code == 2 and "two rows are called 'sgd'" in twice.output


@pytest.mark.parametrize(
    ("path", "message"),
    [("absent.json", "cannot read 'absent.json'"), (".", "is it the folder of a report?"), ("text.json", "is no report")],
)
def test_what_is_no_report_is_refused(path: str, message: str) -> None:
    Path("text.json").write_text("[]")
    result = invoke("show", path)
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1
