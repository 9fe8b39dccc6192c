"""`gradmaker compare`: what it prints, what it refuses, and short runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner, Result

from gradmaker.commands import options
from gradmaker.commands.app import app
from gradmaker.compare import cost as cost_module

SHORT = ["--epochs", "1", "--seeds", "1", "--threads", "1", "--hidden", "16", "--lr", "0.1"]


@pytest.fixture(autouse=True)
def short_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "ROUNDS", 3)
    monkeypatch.setattr(cost_module, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(options.torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_short_digits_run_and_its_resume(tmp_path: Path) -> None:
    result = invoke("sgd", "gradient", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.output and "report.html" in result.output and "digits, 1 seed, 1 epoch" in result.output
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in content["report"]["rows"]] == ["sgd", "gradient"] and len(content["trials"]) == 2
    assert invoke("sgd", "gradient", *SHORT, "--out", str(tmp_path), "--quiet").output == ""


@pytest.mark.usefixtures("undrawn")
def test_config_file_and_conv(tmp_path: Path) -> None:
    (tmp_path / "methods.yaml").write_text("- sgd\n- heavy: {method: gradient, optimizer: {name: SGD, momentum: 0.5}}\n")
    options = [*SHORT, "--model", "conv", "--batch-size", "256", "--quiet", "--out", str(tmp_path / "out")]
    result = invoke("--config", str(tmp_path / "methods.yaml"), *options)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["report"]["rows"]
    assert [row["method"] for row in rows] == ["sgd", "heavy"] and rows[1]["config"]["optimizer"]["momentum"] == 0.5


@pytest.mark.usefixtures("registrations", "undrawn")
def test_methods_of_a_module_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    (tmp_path / "my_methods.py").write_text(
        "from gradmaker import AdamGradientMaker, register\n"
        "@register('mine')\n"
        "class MineGradientMaker(AdamGradientMaker):\n"
        "    'Adam under another name.'\n"
    )
    refused = invoke("mine", *SHORT)
    assert refused.exit_code == 2 and "method='mine'" in refused.output
    missing = invoke("mine", "--import", "no_methods", *SHORT)
    assert missing.exit_code == 2 and "--import no_methods: no such module here or installed" in missing.output
    result = invoke("mine", "sgd", "--import", "my_methods", *SHORT, "--quiet", "--out", "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["report"]["rows"]
    assert [row["method"] for row in rows] == ["mine", "sgd"] and rows[0]["config"]["maker"]["method"] == "mine"
    listed = CliRunner().invoke(app, ["methods", "mine", "--import", "my_methods", "--json"])
    assert [(one["name"], one["what"]) for one in json.loads(listed.output)] == [("mine", "Adam under another name.")]
    del sys.modules["my_methods"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kfacc"], "did you mean 'kfac'"),
        (["--data", "mnits"], "did you mean 'mnist'"),
        (["--model", "mpl"], "did you mean 'mlp'"),
        (["--lr", "0"], "expected positive numbers"),
        (["--lr", "-1"], "expected positive numbers"),
        (["--seeds", "0"], "at least one seed"),
        (["--epochs", "0"], "budget='0 epochs': expected a positive number of epochs"),
        (["--hidden", "0"], "hidden=[0]: expected widths of at least 1"),
        (["--threads", "0"], "threads=0: expected an integer of at least 1"),
        (["--device", "abacus"], "device='abacus' cannot be used on this machine: expected cpu"),
        (["--epoch", "1"], "No such option: --epoch"),
        (["--seeds", "few"], "Invalid value for '--seeds'"),
        (["--vary", "32"], "vary='32': expected an option and values, as in batch_size=32,128"),
        (["--task", "no_such_module:make"], "no such module here or installed"),
        (["--task", "json:make", "--model", "mlp"], "--task brings its own model"),
        (["--config", "absent.yaml"], "cannot read"),
        (["--model", "conv", *["--hidden", "4"] * 5], "too many"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert message in result.output and len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_data_files_are_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    result = invoke("--data", name, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "lacks train.parquet and test.parquet" in result.output


def test_unwritable_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("sgd", *SHORT, "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "cannot write" in result.output


@pytest.mark.usefixtures("undrawn")
def test_interrupt_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = invoke("sgd", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "to go on" in result.output and (tmp_path / "report.html").exists()


EXTRA = ["rich", "typer", "matplotlib", "jinja2", "pandas", "yaml", "sklearn", "datasets"]
HIDE = f"import sys; sys.modules.update(dict.fromkeys({EXTRA}))"


def test_library_imports_without_the_extra() -> None:
    code = f"{HIDE}; import gradmaker, gradmaker.compare, gradmaker.cli; gradmaker.cli.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'gradmaker[compare]'" in result.stderr and "Traceback" not in result.stderr


def test_module_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gradmaker", "compare", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "--data-dir" in result.stdout
