"""Costs of a step: parts, intervals, memory and FLOPs against counts by hand, and the files of a study."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer")

import torch
from typer.testing import CliRunner, Result

from gradmaker.commands import options
from gradmaker.commands.app import app
from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import parse_rows
from gradmaker.costs.floor import record
from gradmaker.costs.timing import Ratio
from gradmaker.step_costs import cell as cell_module
from gradmaker.step_costs.cell import Cell, How, measured
from gradmaker.step_costs.steps import INTERVALS, clocks_of, make, with_intervals
from gradmaker.step_costs.study import Costs, read, study
from gradmaker.step_costs.subjects import Subject, builtin

WIDTH, BATCH = 16, 4
SIDES = ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10))
WEIGHTS = sum(i * o + o for i, o in SIDES)
HOW = How(windows=1, seconds=0.0, floors=False)
TIMES = {"sgd": 1.0, "plain": 3.0, "measuring": 5.0, "all": 12.0, "T10": 4.5}


@pytest.fixture
def subject() -> Subject:
    return builtin("digits", None, None, WIDTH)


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of each kind take as long as `TIMES` says."""

    def measure(steps: dict[str, object], *args: object, **kwargs: object) -> dict[str, Ratio]:
        return {kind: Ratio(TIMES[kind], 2 * TIMES[kind], 2.0, 1, 1, 0.0) for kind in steps}

    monkeypatch.setattr(cell_module, "measure", measure)


def of(method: str, subject: Subject) -> Cell:
    (row,) = parse_rows([method])
    return measured(row, subject, BATCH, HOW)


@pytest.fixture(scope="module")
def kfac() -> Cell:
    """What was measured of K-FAC, for tests that read it."""
    return of("kfac", builtin("digits", None, None, WIDTH))


@pytest.mark.usefixtures("known_times")
def test_parts_are_differences_of_kinds_and_intervals_average_them(subject: Subject) -> None:
    cell = of("kfac", subject)
    assert cell.status == "measured", cell.message
    assert {name: part.ms for name, part in cell.parts.items()} == {
        "passes": 2.0,
        "application": 4.0,
        "statistics": 4.0,
        "refresh": 14.0,
    }
    assert cell.ms["1"] == 24.0 and cell.ms["10"] == pytest.approx(2 * TIMES["T10"])
    once = 10 * 9.0 - 9 * 6.0 - 24.0  # what ten steps take beside nine plain ones and one that measures and refreshes
    for T in (10, 100):
        assert cell.ms[str(T)] == pytest.approx(((T - 1) * 6.0 + 24.0 + once) / T)
        assert cell.ratio[str(T)] == pytest.approx(cell.ms[str(T)] / 2.0)
    sgd = of("sgd", subject)
    assert sgd.ratio == {"1": 1.0, "10": 1.0, "100": 1.0} and sgd.memory_ratio == 1.0
    adam = of("torch.Adam", subject)
    assert list(adam.parts) == ["passes", "all that is added"] and adam.ms["1"] == adam.ms["100"] == 24.0


def test_flops_of_parts_are_those_by_hand(subject: Subject) -> None:
    """Passes: 2 B i o forward and for the weights, as much for the inputs of all layers but the first."""
    size = 64  # larger than all sides: gradients are formed, not held by the rows of the batch
    cell = measured(parse_rows(["kfac"])[0], subject, size, HOW)
    passes = sum(2 * size * i * o * (2 if layer == 0 else 3) for layer, (i, o) in enumerate(SIDES))
    padded = [(i + 1, o) for i, o in SIDES]  # with the bias
    applied = sum(2 * i * o * (i + o) for i, o in padded)
    factors = sum(2 * size * (i * i + o * o) for i, o in SIDES)  # the bias needs no product
    sampled = sum(2 * size * i * o for i, o in SIDES[1:])  # the backward pass of sampled targets, without weights
    assert cell.parts["passes"].flops == passes
    assert cell.parts["application"].flops == pytest.approx(applied, rel=0.01)
    assert cell.parts["statistics"].flops == factors + sampled
    # the longest factor is held as a triangle: two solves for its rows of the gradient and for two probes, less one product
    (d, rows), others = padded[0], [side for pair in padded for side in pair if side != padded[0][0]]
    decompositions = d**3 / 3 + sum(side**3 for side in others)  # Cholesky, and the inverse of all but the longest
    probes = sum(20 * side * side for side in (d, *others))  # ten products with vectors certify each
    assert cell.parts["refresh"].flops == pytest.approx(
        decompositions + probes + 2 * d * d * (rows + 2) - 2 * d * d * rows, rel=1e-3
    )


def test_memory_and_state(subject: Subject, kfac: Cell) -> None:
    assert of("torch.Adam", subject).state_bytes == pytest.approx(4 * 2 * WEIGHTS, rel=0.01)
    factors = sum((i + 1) ** 2 + o**2 for i, o in SIDES)
    momentum = 0 if parse_rows(["kfac"])[0].options["momentum"] == 0 else WEIGHTS
    assert kfac.state_bytes == pytest.approx(4 * (2 * factors + momentum), rel=0.05)
    assert kfac.predicted_held == pytest.approx(4 * 2 * factors, rel=0.05)
    assert kfac.memory_ratio is not None and kfac.memory_ratio > 1.5
    assert kfac.peak_bytes is not None and kfac.peak_bytes > kfac.state_bytes + 8 * WEIGHTS


def test_predictions_stand_beside_what_is_measured(kfac: Cell) -> None:
    assert 0 < kfac.predicted_ms["100"] < kfac.predicted_ms["10"] < kfac.predicted_ms["1"]


def test_kinds_of_steps_do_what_they_say(subject: Subject) -> None:
    """A plain step has neither the products of the factors nor decompositions."""
    (row,) = parse_rows(["kfac"])
    clocks = clocks_of(row, subject, "cpu")
    assert clocks == ("warmup_steps", *INTERVALS)
    found = {}
    for name, (measure, refresh) in {"plain": (10**9, 10**9), "measuring": (1, 10**9), "all": (1, 1)}.items():
        made = make(with_intervals(row, clocks, measure, refresh), subject, BATCH, "cpu")
        for _ in range(2):
            made()
        found[name] = record(made).counts
        made.close()
    choleskys = {kind: sum(n for key, n in counts.items() if "cholesky" in str(key[0])) for kind, counts in found.items()}
    assert choleskys["plain"] == choleskys["measuring"] == 0 < choleskys["all"]
    assert sum(found["plain"].values()) < sum(found["measuring"].values())


def test_a_refused_row_is_a_cell_that_says_why(subject: Subject) -> None:
    (row,) = parse_rows([{"method": "full_ng", "max_dim": 2}])
    cell = measured(row, subject, BATCH, HOW)
    assert cell.status == "refused" and "max_dim" in cell.message and not cell.ms


def test_a_study_resumes_and_is_merged(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = parse_rows(["sgd", "torch.Adam"])
    first = study(rows, [subject], [2, 4], HOW, tmp_path)
    assert [(cell.batch_size, cell.row) for cell in first.cells] == [
        (2, "sgd"),
        (2, "torch.Adam"),
        (4, "sgd"),
        (4, "torch.Adam"),
    ]
    assert read(tmp_path / "cost.json") == first
    monkeypatch.setattr("gradmaker.step_costs.study.measured", lambda *args: pytest.fail("measured again"))
    assert study(rows, [subject], [4], HOW, tmp_path).cells == first.cells[2:]
    other = Costs(first.machine, first.setting, [replace(first.cells[0], row="mine")])
    assert [cell.row for cell in first.merged(other).cells] == ["sgd", "torch.Adam", "sgd", "torch.Adam", "mine"]
    with pytest.raises(InputError, match="not comparable"):
        first.merged(Costs({**first.machine, "cores": 1000}, first.setting, []))


# ------------------------------------------------------------------ the command
@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options.torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cost", *arguments])


@pytest.mark.usefixtures("in_folder")
def test_costs_are_predicted() -> None:
    result = invoke("sgd", "kfac", "newton", "--hidden", "200", "--batch-size", "8", "--interval", "1", "--interval", "100")
    assert result.exit_code == 0, result.output
    head, sgd, kfac, reason = result.output.splitlines()
    assert head.split() == "method ms x SGD x Adam T=1 ms T=100 ms MB held MB in a step".split()
    assert sgd.split()[0] == "sgd" and float(sgd.split()[2]) == pytest.approx(1, abs=0.05)
    assert kfac.split()[0] == "kfac" and float(kfac.split()[4]) > float(kfac.split()[5]) > 0
    assert reason.startswith("newton: Dense(full) would hold")


@pytest.mark.usefixtures("in_folder")
def test_a_study_from_one_file_writes_its_figures_and_tables() -> None:
    Path("study.yaml").write_text(
        "methods: [sgd, kfac, {method: full_ng, max_dim: 2}]\nwidth: [8]\nbatch-size: [2, 8]\nmeasure: true\n"
        "windows: 1\nseconds: 0\nfloors: false\nout: costs\n"
    )
    result = invoke("--config", "study.yaml")
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == 7 and result.output.endswith("report: costs/cost.md\n")
    for name in ("throughput.svg", "throughput_interval.svg", "memory.svg", "config.yaml"):
        assert (Path("costs") / name).exists()
    with open("costs/cost.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 and float(lines[1]["T=1 x SGD"]) > 1 and "max_dim" in lines[2]["note"]
    page = Path("costs/cost.md").read_text()
    assert "## mlp 8-8, digits" in page and "T=10: predicted / measured" in page and "- full_ng, batch 2: " in page
    known = json.loads(Path("costs/cost.json").read_text())
    again = CliRunner().invoke(app, ["show", "costs", "--out", "shown"])
    assert again.exit_code == 0 and json.loads(Path("shown/cost.json").read_text()) == known
    assert Path("shown/cost.md").read_text() == page


@pytest.mark.usefixtures("in_folder")
def test_nothing_measured_has_status_1() -> None:
    Path("rows.yaml").write_text("methods: [{method: full_ng, max_dim: 2}]\n")
    result = invoke("--config", "rows.yaml", "--measure", "--batch-size", "2")
    assert result.exit_code == 1 and "nothing was measured" in result.output


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["adam", "--model", "mpl"], "did you mean"),
        (["kfak"], "kfac"),
        (["sgd", "--data", "x"], "data='x'"),
        (["sgd", "--batch-size", "0"], "batch_size=0: expected"),
        (["sgd", "--interval", "0"], "interval=0: expected"),
        (["sgd", "--width", "8", "--hidden", "4"], "not both"),
        (["sgd", "--task", "a:b", "--width", "8"], "--task brings its own model"),
    ],
)
def test_illegal_costs(arguments: list[str], reason: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and reason in result.output and len(result.output.splitlines()) == 1


@pytest.mark.usefixtures("in_folder")
def test_costs_of_a_task_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "cost_task", raising=False)
    Path("cost_task.py").write_text(
        "import torch\nfrom torch import nn\nfrom gradmaker.compare import Task\n"
        "def make():\n"
        "    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))\n"
        "    train = (x, x.sum(1, keepdim=True))\n"
        "    return Task(name='line', model=lambda: nn.Linear(3, 1), train=train, loss=nn.functional.mse_loss)\n"
    )
    result = invoke("sgd", "--task", "cost_task:make", "--batch-size", "8", "--measure", "--windows", "1", "--seconds", "0")
    assert result.exit_code == 0 and "line, batch 8, sgd: T=1 1.00" in result.output, result.output
    many = invoke("sgd", "--task", "cost_task:make", "--batch-size", "64", "--measure", "--out", "many")
    assert "batch_size=64" in many.output


def test_a_clock_of_a_device_reads_seconds() -> None:
    from gradmaker.costs.timing import clock

    now = clock("cpu")
    start = now()
    torch.randn(200, 200).matmul(torch.randn(200, 200))
    assert now() >= start
