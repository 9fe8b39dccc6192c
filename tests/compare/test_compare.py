"""The comparison on a problem that trains in milliseconds."""

import csv
import json
import math
import os
import platform
import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("vl_convert")
pytest.importorskip("rich")

from gradmaker.compare import (
    Comparison,
    InputError,
    Task,
    compare,
    cost as cost_module,
    trial as trial_module,
)
from gradmaker.compare.batches.reading import Call
from gradmaker.compare.batches.sources import TensorSamples
from gradmaker.compare.data import IMAGES, Data, load
from gradmaker.compare.page import shown_command
from gradmaker.compare.parsing import parse_rows, read_yaml
from gradmaker.compare.problem import prepare
from gradmaker.compare.rates import DEFAULTS, FALLBACK
from gradmaker.compare.row_result import select
from gradmaker.compare.rows import optimizers
from gradmaker.compare.store import Store
from gradmaker.compare.trial import Record, Session
from gradmaker.compare.trials import pool as pool_module
from gradmaker.reporting import Document

pytestmark = pytest.mark.usefixtures("bare")  # but the fixture `done`, which is made before
METHODS = ["sgd", "gradient", "adam"]
FIXED = {"extend": 0}  # grids stay as they are


def tiny_data(classes: bool = True) -> Data:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(120, 6, generator=generator)
    targets = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long() if classes else inputs[:, :2].sum(1, keepdim=True)
    return Data("tiny", inputs[:80], targets[:80], inputs[80:], targets[80:])


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def task_of(data: Data, model: object = tiny_model, **options: object) -> Task:
    parts = {"train": (data.train_inputs, data.train_targets), "test": (data.test_inputs, data.test_targets)}
    return Task(model=model, name=data.name, **parts, **options)  # type: ignore[arg-type]


def run(out: Path, methods: object = METHODS, **options: object) -> Comparison:
    chosen = {"seeds": 2, "budget": 2, "batch_size": 16, "learning_rates": [0.01, 0.1], "tuning": FIXED, **options}
    return compare(task_of(tiny_data()), methods, out=out, progress=False, **chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_module, "ROUNDS", 3)
        return run(tmp_path_factory.mktemp("done"), command="gradmaker compare --tiny")


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that are trained, not read."""
    names: list[str] = []
    train = trial_module.run_trial

    def counted(trial: trial_module.Trial, *rest: object) -> Record:
        names.append(str(trial))
        return train(trial, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pool_module, "run_trial", counted)
    return names


def test_methods_share_initialisation_and_batches_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[torch.Tensor] = []
    batches: list[torch.Tensor] = []
    step = Session.step

    def spy(self: Session, call: Call) -> torch.Tensor:
        if self.scheduler.last_epoch == 0:
            starts.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
            batches.append(call.args[0].clone())
        return step(self, call)

    monkeypatch.setattr(Session, "step", spy)
    run(tmp_path, ["sgd", "adam", "adamw"], seeds=[3, 4], learning_rates=[0.1])
    assert len(starts) == 6
    first, second = starts[0::2], starts[1::2]
    assert all(torch.equal(start, first[0]) for start in first) and all(torch.equal(start, second[0]) for start in second)
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(batch, batches[0]) for batch in batches[0::2])
    assert not torch.equal(batches[0], batches[1])


def test_batch_order_covers_the_epoch_and_changes_with_it() -> None:
    source = TensorSamples(torch.arange(20))
    first, second, again = (torch.stack(list(source.epoch(6, 1, epoch))) for epoch in (1, 2, 1))
    assert first.shape == (3, 6) == (source.steps(6), 6) and len(set(first.flatten().tolist())) == 18
    assert not torch.equal(first, second) and torch.equal(first, again)
    assert [len(batch) for batch in TensorSamples(torch.arange(5)).epoch(64, 0, 1)] == [5]


def test_gradient_maker_with_sgd_is_sgd(done: Comparison) -> None:
    sgd, gradient = done.rows[0], done.rows[1]
    assert sgd.learning_rate == gradient.learning_rate
    torch.testing.assert_close(sgd.finals[0].curve_loss, gradient.finals[0].curve_loss)


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run(tmp_path, ["sgd"], seeds=1)
    assert torch.equal(torch.rand(1), expected)


def test_resume_reads_finished_trials(tmp_path: Path, trainings: list[str]) -> None:
    first = run(tmp_path, METHODS)
    assert len(trainings) == 3 * (2 + 1)
    trainings.clear()
    again = run(tmp_path, METHODS)
    assert trainings == []
    assert again.table() == first.table()


def test_changed_setting_trains_again_and_keeps_the_old(tmp_path: Path, trainings: list[str]) -> None:
    run(tmp_path, ["sgd"], seeds=1)
    trainings.clear()
    changed = run(tmp_path, ["sgd"], seeds=1, budget=3)
    assert len(trainings) == 2
    assert [len(record.marks) for record in changed.rows[0].finals] == [3]
    assert len(Store(tmp_path).records) == 4


def test_a_label_is_no_part_of_the_key(tmp_path: Path, trainings: list[str]) -> None:
    run(tmp_path, ["sgd"], seeds=1)
    trainings.clear()
    renamed = run(tmp_path, [{"label": "mine", "optimizer": "SGD"}], seeds=1)
    assert trainings == [] and renamed.table()[0]["method"] == "mine"


def test_interrupt_keeps_results_and_resume_completes(tmp_path: Path, trainings: list[str]) -> None:
    def interrupt(trial: trial_module.Trial, epoch: int, loss: float) -> None:
        if trial.row.label == "adam" and epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["sgd", "adam"], callback=interrupt)
    assert len(trainings) == 4  # three of sgd, the interrupted one of adam
    assert {record.label for record in Store(tmp_path).records.values()} == {"sgd"}
    assert "Interrupted" in (tmp_path / "report.html").read_text() and "Interrupted" in (tmp_path / "report.md").read_text()
    trainings.clear()
    complete = run(tmp_path, ["sgd", "adam"])
    assert len(trainings) == 3 and complete.complete
    assert "Interrupted" not in (tmp_path / "report.html").read_text()


def test_divergence_and_failure_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Session.step

    def failing(self: Session, call: Call) -> torch.Tensor:
        if isinstance(self.optimizer, torch.optim.RMSprop) and self.scheduler.last_epoch >= 2:
            raise RuntimeError("planted")
        return step(self, call)

    monkeypatch.setattr(Session, "step", failing)
    rows = [{"optimizer": "SGD", "learning_rates": [0.1, 1e20]}, {"label": "wild", "optimizer": "SGD", "learning_rates": 1e20}]
    result = run(tmp_path, [*rows, "rmsprop"])
    mild, wild, failed = result.rows
    assert [record.status for record in mild.search] == ["finished", "diverged"] and mild.learning_rate == 0.1
    assert "diverged at lr 1e+20" in mild.summary()["note"]
    assert wild.summary()["test_accuracy"] is None and "2 of 2 seeds diverged" in wild.summary()["note"]
    assert failed.finals[0].status == "failed" and "RuntimeError: planted" in failed.finals[0].message
    assert "2 of 2 seeds diverged" in (tmp_path / "report.html").read_text()
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_failed_trials_are_run_again(tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trial_module, "_train", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        run(tmp_path, ["sgd"], seeds=1, learning_rates=[0.1])
    trainings.clear()
    assert run(tmp_path, ["sgd"], seeds=1, learning_rates=[0.1]).rows[0].finals[0].status == "finished"
    assert len(trainings) == 1


def test_report_is_self_contained_and_complete(done: Comparison) -> None:
    page = done.files["html"].read_text(encoding="utf-8")
    text = re.sub(r'<script type="text/plain".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*(?!["']data:)|url\(|@import|https?://(?!vega\.github\.io/schema)""", text)
    for result in done.rows:
        assert f"</span>{result.row.label}</td>" in page and f"<summary>{result.row.label}</summary>" in page
    assert Document.from_json(done.files["document"].read_text()).answer == tuple(done.verdict())
    assert "gradmaker compare --tiny" in page and done.machine["torch"] in page and "validation" in page
    assert platform.node() not in done.machine.values()


def test_report_names_no_folder_of_the_machine() -> None:
    assert (
        shown_command("gradmaker compare a/b.yaml --out /x/y --data-dir=/a/b")
        == "gradmaker compare a/b.yaml --out y --data-dir=b"
    )


def test_files_agree(done: Comparison) -> None:
    table = done.table()
    stored = json.loads(done.files["json"].read_text())["report"]["rows"]
    with done.files["csv"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    markdown = done.files["markdown"].read_text(encoding="utf-8")
    page = done.files["html"].read_text(encoding="utf-8")
    assert (
        [row["method"] for row in table] == METHODS == [line["method"] for line in lines] == [row["method"] for row in stored]
    )
    for row, line, kept, result in zip(table, lines, stored, done.rows, strict=True):
        assert float(line["test_accuracy"]) == pytest.approx(row["test_accuracy"]) == kept["test_accuracy"]
        assert float(line["learning_rate"]) == row["learning_rate"] == kept["learning_rate"]
        told = result.cells()[2].split(" (")[0]  # the metric with its deviation
        assert f"| {result.row.label} | " in markdown and told in markdown and f">{told}</td>" in page
        ends = [record.end("test", "accuracy") for record in result.finished]
        assert row["test_accuracy"] == pytest.approx(sum(ends) / len(ends))


def test_figures_are_files(done: Comparison) -> None:
    assert done.files["overview"].read_bytes().startswith(b"\x89PNG")
    for name in (
        "front_seconds",
        "front_memory_ratio",
        "loss_steps",
        "loss_seconds",
        "metric_steps",
        "metric_seconds",
        "search",
    ):
        assert done.files[f"{name}.pdf"].read_bytes().startswith(b"%PDF")
        picture = done.files[f"{name}.svg"].read_text(encoding="utf-8")
        assert picture.startswith("<svg") and all(result.row.label in picture for result in done.rows if result.finished)


def test_ratios(done: Comparison) -> None:
    sgd, gradient, adam = (result.cost for result in done.rows)
    assert sgd is not None and gradient is not None and adam is not None
    assert sgd.step_ratio == 1.0 and sgd.memory_ratio == 1.0
    assert gradient.step_ratio > 0 and adam.memory_ratio is not None and adam.memory_ratio >= 1.0


def test_peak_memory_counts_model_gradient_momentum() -> None:
    model = lambda: nn.Linear(6, 50_000)  # noqa: E731
    problem = prepare(task_of(tiny_data(), model, loss=lambda y, t: y.square().mean()), "cpu")
    calls = problem.first_calls(16, 4)
    parameters = 4 * (6 + 1) * 50_000
    peak = cost_module.peak_bytes(parse_rows(["sgd"])[0], problem, calls)
    assert peak is not None
    adam = cost_module.peak_bytes(parse_rows(["adam"])[0], problem, calls)
    assert adam is not None and adam > peak + 0.9 * parameters  # two moments against one
    assert 3 * parameters < peak < 3 * parameters + 6 * 4 * 16 * 50_000  # and a few activations of the batch


def test_selection_is_by_validation_alone() -> None:
    def record(rate: float, validation: float, test: float, loss: float = 0.5, status: str = "finished") -> Record:
        parts = {"validation": (validation, loss), "test": (test, loss)}
        known = {part: {"accuracy": [value], "loss": [own]} for part, (value, own) in parts.items()}
        return Record("m", "m", {}, rate, 0, status=status, **known)  # type: ignore[arg-type]

    def best(*records: Record, metric: str = "accuracy", higher: bool = True) -> float:
        return select(records, metric, higher).learning_rate

    assert best(record(1, 0.8, 0.99), record(2, 0.9, 0.5)) == 2
    assert best(record(1, 0.8, 0.99), record(2, 0.9, 0.5), higher=False) == 1
    assert best(record(1, 0.9, 0.9, 0.5), record(2, 0.9, 0.1, 0.4)) == 2
    assert best(record(1, 0.9, 0.9, status="diverged"), record(2, 0.1, 0.1)) == 2
    assert best(record(3, 0, 0, math.nan), record(1, 0, 0, 0.3), record(2, 0, 0, 0.4), metric="loss", higher=False) == 1


def test_training_never_sees_validation_samples() -> None:
    data = tiny_data()
    parts, again = (prepare(task_of(data), "cpu", 0.25) for _ in range(2))
    assert parts.train.size == 60 and parts.validation.size == 20
    train, held, test, same = (next(part.all(80))[0] for part in (parts.train, parts.validation, parts.test, again.train))
    assert not {tuple(row.tolist()) for row in train} & {tuple(row.tolist()) for row in held}
    assert torch.equal(train, same) and torch.equal(test, data.test_inputs)


def test_grid_of_a_row_and_labels(tmp_path: Path) -> None:
    methods = ["sgd", {"method": "gradient", "label": "own", "learning_rates": [0.5, 0.2, 0.05]}]
    result = run(tmp_path, methods, seeds=1)
    assert [record.learning_rate for record in result.rows[1].search] == [0.5, 0.2, 0.05]
    assert [record.learning_rate for record in result.rows[0].search] == [0.01, 0.1]


def test_regression_reports_losses(tmp_path: Path) -> None:
    model = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    options = {"seeds": 1, "budget": 2, "batch_size": 16, "out": tmp_path, "progress": False}
    result = compare(task_of(tiny_data(classes=False), model, loss=nn.MSELoss()), ["sgd"], **options)  # type: ignore[arg-type]
    line = result.table()[0]
    assert "test_accuracy" not in line and line["test_loss"] > 0 and "test loss" in (tmp_path / "report.md").read_text()


def test_rows_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "- sgd\n- {method: gradient, learning_rates: [1e-3, 1E2]}\n- small: {optimizer: {name: Adam, eps: 1e-6}}\n"
    )
    sgd, gradient, small = parse_rows([tmp_path / "m.yaml"])
    assert sgd.maker is None and sgd.options == {"momentum": DEFAULTS["SGD"].momentum}
    assert gradient.maker == {"method": "gradient"} and gradient.learning_rates == (1e-3, 100.0)
    assert small.label == "small" and small.options == {"eps": 1e-6} and small.optimizer == "Adam"
    assert parse_rows({"a": "adam"})[0].options == {"momentum": 0.0}
    assert parse_rows(["adamw"], momentum=0.5)[0].options == {} and parse_rows(["sgd"], momentum=0.5)[0].options == {
        "momentum": 0.5
    }
    assert parse_rows(["adamw"])[0].learning_rates == FALLBACK["optimizer"].learning_rates
    twice = parse_rows(["adam", {"method": "adam", "optimizer": "Adam"}])
    assert [row.label for row in twice] == ["adam", "adam (optimizer=Adam)"]
    assert "lbfgs" not in optimizers()


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ([], {}, "at least one method"),
        (["kfacc"], {}, "did you mean 'kfac'"),
        (["adam", "adam"], {}, "two rows are called 'adam'"),
        ([{"optimizer": "Adan"}], {}, "did you mean"),
        ([{"optimizer": "Adam", "eps": 1}], {}, "belongs inside"),
        ([{"x": 3}], {}, "names no method"),
        ([3], {}, "a method is a name"),
        (["sgd"], {"learning_rates": [0.1, 0.0]}, "expected positive numbers"),
        (["sgd"], {"learning_rates": [math.nan]}, "expected positive numbers"),
        (["sgd"], {"learning_rates": []}, "at least one learning rate"),
        ([{"method": "adam", "learning_rates": "high"}], {}, "expected numbers"),
        (["sgd"], {"seeds": 0}, "at least one seed"),
        (["sgd"], {"budget": 0}, "budget=0: expected a positive number"),
        (["sgd"], {"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        (["sgd"], {"momentum": 1.0}, "momentum=1.0: expected 0 <= momentum < 1"),
        (["sgd"], {"schedule": "cosin"}, "did you mean 'cosine'"),
        (["sgd"], {"validation": 1.0}, "validation=1.0"),
        ([{"method": "adam", "nonsense_option": 1}], {}, "nonsense_option"),
        ([{"optimizer": {"name": "Adam", "nonsense": 1}}], {}, "nonsense"),
        (["absent.yaml"], {}, "cannot read"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, methods: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run(tmp_path / "out", methods, **options)


def test_output_folder_must_be_usable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file" / "out", ["sgd"])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="not a results file"):
        run(tmp_path, ["sgd"])


def test_bad_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")


def test_initial_model_depends_on_the_seed_alone() -> None:
    problem = prepare(task_of(tiny_data()), "cpu")
    first, second, other = (next(problem.initial_model(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_digits() -> None:
    data = load("digits")
    assert data.train_inputs.shape == (1437, 1, 8, 8) and data.test_inputs.shape == (360, 1, 8, 8)
    assert data.train_inputs.mean().abs() < 1e-5 and data.test_targets.bincount().min() >= 34
    assert torch.equal(data.train_inputs, load("digits").train_inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(IMAGES))
def test_local_parquet(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    shape = (28, 28) if name == "mnist" else (32, 32, 3)
    pixels = torch.randint(256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    columns = {IMAGES[name][1]: [image.fromarray(p.numpy()) for p in pixels], "label": [0, 1, 2, 3, 4]}
    (tmp_path / name).mkdir()
    for part in ("train", "test"):
        with pytest.raises(InputError, match=f"{part}.parquet"):
            load(name, tmp_path)
        features = datasets.Features({IMAGES[name][1]: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / name / f"{part}.parquet"))
    data = load(name, tmp_path)
    assert data.train_targets.tolist() == [0, 1, 2, 3, 4]
    expected = pixels.float().div(255)
    expected = expected.unsqueeze(1) if name == "mnist" else expected.permute(0, 3, 1, 2)
    deviation, mean = torch.std_mean(expected, dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(data.train_inputs, (expected - mean) / deviation)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("GRADMAKER_DATA" not in os.environ, reason="GRADMAKER_DATA names no folder")
def test_mnist() -> None:
    data = load("mnist")
    assert data.train_inputs.shape == (60_000, 1, 28, 28) and data.test_targets.bincount().tolist()[0] == 980
