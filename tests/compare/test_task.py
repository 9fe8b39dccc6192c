"""Tasks: all forms of data, batches and metrics, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from gradmaker.compare import Comparison, InputError, Metric, Task, compare, load_task
from gradmaker.compare.problem import prepare
from tests.compare.toy import net, tensors, toy_task

pytestmark = pytest.mark.usefixtures("bare")
X, T = tensors()


def run(task: Task, out: Path, methods: Any = ("sgd", "kfac"), **options: Any) -> Comparison:
    chosen = {"learning_rates": [0.1], "seeds": 1, "budget": "2 epochs", **options}
    return compare(task, methods, out=out, progress=False, **chosen)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x, t) for x, t in zip(X[:80], T[:80], strict=True)])


def batches() -> list[Any]:
    return [(x, t) for x, t in zip(X[:80].split(16), T[:80].split(16), strict=True)]


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": lambda: {"train": (X[:80], T[:80])},
    "dictionary": lambda: {
        "train": {"input": X[:80], "labels": T[:80]},
        "test": {"input": X[80:], "labels": T[80:]},
        "targets": "labels",
    },
    "dataset": lambda: {"train": TensorDataset(X[:80], T[:80]), "test": TensorDataset(X[80:], T[80:])},
    "loader": lambda: {"train": DataLoader(TensorDataset(X[:80], T[:80]), 16, shuffle=True)},
    "list of batches": lambda: {"train": batches(), "validation": (X[80:], T[80:])},
    "function": lambda: {"train": batches, "validation": batches},
    "generator function": lambda: {"train": lambda: iter(batches()), "validation": batches},
    "stream": lambda: {"train": DataLoader(Stream(), 16), "validation": batches},
    "custom sampler": lambda: {
        "train": DataLoader(TensorDataset(X[:80], T[:80]), sampler=list(range(0, 80, 2)), batch_size=8),
        "validation": batches,
    },
}


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_data_train(form: str, tmp_path: Path) -> None:
    result = run(toy_task(**FORMS[form]()), tmp_path)
    for row in result.rows:
        assert [record.status for record in row.finals] == ["finished"], (row.row.label, row.finals[0].message)
    assert result.metric == "accuracy" and (tmp_path / "trials.csv").exists()


def test_equal_data_in_several_forms_train_equally(tmp_path: Path) -> None:
    """A validation part apart, so that all of train is trained on, in the order of the seed."""
    given = {"validation": (X[80:], T[80:])}
    loader = DataLoader(TensorDataset(X[:80], T[:80]), 16, shuffle=True)
    forms: dict[str, Any] = {"a": (X[:80], T[:80]), "b": TensorDataset(X[:80], T[:80]), "c": loader}
    results = {name: run(toy_task(train=train, **given), tmp_path / name, ["sgd"]) for name, train in forms.items()}
    curves = {name: result.rows[0].finals[0].curve_loss for name, result in results.items()}
    assert curves["a"] == pytest.approx(curves["b"])
    assert curves["a"] == pytest.approx(curves["c"])


def test_loaders_give_every_method_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmaker.compare.trial import Session

    seen: dict[str, list[Tensor]] = {}
    step = Session.step

    def spy(self: Session, call: Any) -> Tensor:
        seen.setdefault(type(self.maker).__name__, []).append(call.args[0].clone())
        torch.rand(0 if self.maker is None else 3)  # as a method does that samples
        return step(self, call)

    monkeypatch.setattr(Session, "step", spy)

    def augmented(items: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in items]) + torch.randn(1), torch.stack([t for _, t in items])

    loader = DataLoader(TensorDataset(X[:80], T[:80]), 16, shuffle=True, collate_fn=augmented)
    assert run(toy_task(train=loader), tmp_path, ["sgd", "kfac"]).trained
    first, second = seen.values()
    assert len(first) == len(second) > 4 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


class Tokens(nn.Module):
    """A model of sequences, with several inputs and a dictionary of outputs where it is asked for."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 8), nn.Linear(8, classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        out: Tensor = self.linear(torch.tanh(x if mask is None else x * mask[..., None]))
        return out


def sequences(classes: int = 5, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(11, (60, length), generator=generator)
    targets = tokens % classes
    targets[:, -2:] = -100
    return tokens, torch.ones(60, length), targets


def test_token_logits_train_in_every_row(tmp_path: Path) -> None:
    tokens, mask, targets = sequences()
    task = Task(model=Tokens, train=(tokens, mask, targets), test=(tokens, mask, targets), batch_size=12)
    result = run(task, tmp_path, ["sgd", "torch.Adam", "kfac", "shampoo", "adam"], budget="60 steps", learning_rates=[0.03])
    assert all(row.finished for row in result.rows), [row.finals[0].message for row in result.rows]
    problem = prepare(task, "cpu")
    model = problem.initial_model(0)
    logits = model(tokens, mask)
    kept = targets != -100
    expected = {
        "loss": F.cross_entropy(logits[kept], targets[kept]).item(),
        "accuracy": (logits.argmax(-1) == targets)[kept].double().mean().item(),
    }
    assert problem.evaluate(model, problem.test) == pytest.approx(expected, rel=1e-5)


def test_a_loss_over_batches_of_unequal_size_is_that_of_all_targets() -> None:
    tokens, mask, targets = sequences()
    targets[::3, 1:] = -100
    parts = [(tokens[:7], mask[:7], targets[:7]), (tokens[7:], mask[7:], targets[7:])]
    task = Task(model=Tokens, train=(tokens, mask, targets), validation=parts)
    problem = prepare(task, "cpu")
    model = problem.initial_model(0)
    kept = targets != -100
    expected = F.cross_entropy(model(tokens)[kept], targets[kept]).item()
    assert problem.evaluate(model, problem.validation)["loss"] == pytest.approx(expected, rel=1e-5)


def test_dictionaries_go_to_the_arguments_of_forward(tmp_path: Path) -> None:
    tokens, mask, targets = sequences()
    data = {"tokens": tokens, "mask": mask, "labels": targets, "id": torch.arange(60)}

    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())

    def right(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs.argmax(-1) == batch["labels"])[batch["labels"] != -100].float()

    task = Task(model=Tokens, train=data, test=data, loss=loss, metrics={"right": right}, batch_size=12)
    whole = run(task, tmp_path / "a", ["sgd", "kfac"])
    parts = Task(model=Tokens, train=data, test=data, inputs=["tokens", "mask"], targets="labels", batch_size=12)
    named = run(parts, tmp_path / "b", ["sgd", "kfac"])
    for one, other in zip(whole.rows, named.rows, strict=True):
        assert one.finals[0].status == "finished", one.finals[0].message
        assert one.finals[0].curve_loss == pytest.approx(other.finals[0].curve_loss)
        assert one.ends("right") == pytest.approx(other.ends("accuracy"))


def test_metrics_of_the_user(tmp_path: Path) -> None:
    x, t = tensors(classes=False)
    metrics = {
        "error": Metric(function=lambda y, t: (y - t).abs(), higher=False),
        "correlation": Metric(function=lambda y, t: torch.corrcoef(torch.stack([y.flatten(), t.flatten()]))[0, 1], whole=True),
    }
    task = toy_task(model=lambda: net(1), train=(x[:80], t[:80]), test=(x[80:], t[80:]), loss=F.mse_loss, metrics=metrics)
    result = run(task, tmp_path, ["sgd"], learning_rates=[0.01, 0.1], tuning={"extend": 0}, budget="4 epochs")
    assert (
        result.metric == "error"
        and not result.higher
        and list(result.rows[0].finals[0].test) == ["loss", "error", "correlation"]
    )
    ends = [(record.end("validation", "error"), record.learning_rate) for record in result.rows[0].search]
    assert result.rows[0].learning_rate == min(ends)[1]
    problem = prepare(task, "cpu")
    model = problem.initial_model(0)
    y = model(x[80:])
    known = problem.evaluate(model, problem.test)
    assert known["error"] == pytest.approx((y - t[80:]).abs().mean().item(), rel=1e-5)
    expected = torch.corrcoef(torch.stack([y.flatten(), t[80:].flatten()]))[0, 1].item()
    assert known["correlation"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_split_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"input": X.tolist(), "label": T.tolist()})
    task = toy_task(train=split, test=split, inputs="input", targets="label")
    result = run(task, tmp_path, ["sgd"])
    assert result.rows[0].finals[0].status == "finished" and result.data["train"] == 108


def test_a_model_instance_is_copied(tmp_path: Path) -> None:
    model = net()
    before = [parameter.clone() for parameter in model.parameters()]
    result = run(toy_task(model=model), tmp_path, ["sgd"], seeds=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    first, second = (record.curve_loss for record in result.rows[0].finals)
    assert first != second  # other batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model: expected an nn.Module or a function"),
        ({"model": lambda: 3}, "the function returned a int"),
        ({"model": nn.ReLU()}, "no parameter that requires a gradient"),
        ({"model": lambda: nn.Linear(7, 4)}, "the model cannot be called with a batch: RuntimeError: mat1 and mat2"),
        ({"loss": F.mse_loss}, "the loss cannot be computed: "),
        ({"loss": lambda y, t: y.mean(0)}, "loss: expected a tensor with one value, got a tensor of shape (4,)"),
        ({"loss": lambda y, t: 3.0}, "loss: expected a tensor with one value, got a float"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss: reduction='sum' depends on the size of a batch"),
        ({"metrics": {"good": 3}}, "'good': expected a function"),
        ({"metrics": {"loss": lambda y, t: y.mean()}}, "give the metric another name"),
        ({"metrics": {"bad": lambda y, t: y[:, 9]}}, "the metric 'bad' cannot be computed: IndexError"),
        ({"train": (X, T[:3])}, "have 3, 120 rows"),
        ({"train": (X, T.tolist())}, "a tuple or dictionary holds tensors"),
        ({"train": [X, T]}, "a list holds batches"),
        ({"train": []}, "the list of batches is empty"),
        ({"train": iter(batches())}, "an iterator is used up after one epoch"),
        ({"train": batches()}, "give Task(validation=...)"),
        ({"train": 3}, "train: expected a tuple of tensors"),
        ({"train": {"a": X, "b": T}}, "the entries a, b and the model takes input: say by Task(inputs=...)"),
        ({"train": {"input": X, "b": T}, "targets": "c"}, "targets='c'"),
        ({"targets": "c"}, "a name is for batches that are dictionaries"),
    ],
)
def test_tasks_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(toy_task(**options), "cpu")


def test_logits_with_two_readings_are_refused() -> None:
    tokens, mask, targets = sequences(classes=7)
    with pytest.raises(InputError, match="two axes that may be the classes"):
        prepare(Task(model=lambda: Tokens(7), train=(tokens, mask, targets)), "cpu")


def test_tasks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "toy_of_mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom gradmaker.compare import Task\n"
        "def make_task():\n"
        "    x = torch.randn(30, 3)\n"
        "    return Task(model=nn.Linear(3, 2), train=(x, (x[:, 0] > 0).long()))\n"
        "ready = make_task()\n"
        "def broken():\n    raise KeyError('x')\n"
        "def other():\n    return 3\n"
    )
    (tmp_path / "toy_broken.py").write_text("import no_such_module_at_all\n")
    assert load_task("toy_of_mine:make_task").name == "task" and load_task("toy_of_mine:ready").test is None
    first, again = (load_task("toy_of_mine:make_task").model for _ in range(2))
    assert isinstance(first, nn.Linear) and isinstance(again, nn.Linear) and torch.equal(first.weight, again.weight)
    for path, message in {
        "toy_of_mine": "expected my_module:make_task",
        "toy_of_yours:make_task": "no such module here or installed",
        "toy_broken:make_task": "ModuleNotFoundError: No module named 'no_such_module_at_all'",
        "toy_of_mine:make_tsak": "did you mean 'make_task'",
        "toy_of_mine:broken": "broken raised KeyError: 'x'",
        "toy_of_mine:other": "other returned a int, expected a Task",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            load_task(path)
    for name in ("toy_of_mine", "toy_broken"):
        sys.modules.pop(name, None)
