"""The experiment on the deep autoencoder: its task, its clock, its search, and the page that it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.docs.test_docs import ROOT, script

example: Any = script(ROOT / "examples" / "mnist_autoencoder.py")
page: Any = script(ROOT / "docs" / "make_autoencoder.py")


# --- the task -------------------------------------------------------------------------------------------------------------
def test_the_published_network() -> None:
    layers = list(example.autoencoder(example.WIDTHS["full"]))
    linear = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    half = [(784, 1000), (1000, 500), (500, 250), (250, 30)]
    assert linear == [*half, *((o, i) for i, o in reversed(half))]
    kinds = "".join("L" if isinstance(m, nn.Linear) else "s" for m in layers)
    assert kinds == "Ls" * 3 + "L" + "Ls" * 3 + "L"  # code and output are linear


def test_sparse_initialisation() -> None:
    first, again, other = (example.autoencoder((250, 125, 62, 30)) for _ in range(3))
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        example.initialise(model, seed)
    values = []
    for layer, twin, stranger in zip(*(model[::1] for model in (first, again, other)), strict=True):
        if isinstance(layer, nn.Linear):
            assert (layer.weight != 0).sum(1).tolist() == [15] * layer.out_features and not layer.bias.any()
            assert torch.equal(layer.weight, twin.weight) and not torch.equal(layer.weight, stranger.weight)
            values.append(layer.weight[layer.weight != 0])
            patterns = {tuple(row.nonzero().flatten().tolist()) for row in layer.weight}
            assert len(patterns) == layer.out_features  # every unit has drawn its own
    drawn = torch.cat(values).detach()
    assert drawn.mean().abs() < 5 / len(drawn) ** 0.5 and abs(float(drawn.std()) - 1) < 5 / (2 * len(drawn)) ** 0.5


def test_error_and_loss_by_loops(double: None) -> None:
    model, images = example.autoencoder((5, 3), 6), torch.rand(7, 6)
    error = loss = 0.0
    with torch.no_grad():
        for x in images:
            for z, t in zip(model(x).tolist(), x.tolist(), strict=True):
                p = 1 / (1 + math.exp(-z))
                error += (p - t) ** 2 / 7
                loss -= (t * math.log(p) + (1 - t) * math.log(1 - p)) / 7
    assert example.evaluate(model, images) == pytest.approx((error, loss), rel=1e-12)
    assert example.cross_entropy(model(images), images).item() == pytest.approx(loss, rel=1e-12)


def test_batches_are_epochs() -> None:
    images = torch.arange(10.0).unsqueeze(1)
    supply, twin = (example.batches(images, 3, 1) for _ in range(2))
    epochs = [torch.cat([next(supply) for _ in range(3)]).flatten().tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert next(twin).flatten().tolist() == epochs[0][:3]
    assert next(example.batches(images, 3, 2)).flatten().tolist() != epochs[0][:3]
    assert len(next(example.batches(images, 50, 1))) == 10  # larger than the data: all of it


def test_the_learning_rate_falls_to_zero_at_the_end() -> None:
    config = {"lr": 2.0, "decay": 0.5}
    assert [example.rate(config, s) for s in (0, 0.25, 0.5, 0.75, 1)] == [2.0, 2.0, 2.0, 1.0, 0.0]
    assert [example.rate({"lr": 2.0, "decay": 0.0}, s) for s in (0, 0.5, 1)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("method", [None, {"method": "gradient"}])
def test_a_step_is_that_of_the_optimizer(method: Any, double: None) -> None:
    model, x = example.autoencoder((5, 3), 6), torch.rand(4, 6)
    before = [p.detach().clone() for p in model.parameters()]
    slopes = torch.autograd.grad(example.cross_entropy(model(x), x), list(model.parameters()))
    config = {"batch": 4, "lr": 0.1, "optimizer": ["SGD", {"momentum": 0.9}]} | ({"method": method} if method else {})
    step, _ = example.stepper(model, config)
    step(x)
    for p, old, g in zip(model.parameters(), before, slopes, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g, rtol=1e-12, atol=1e-14)


def moved(config: Any) -> list[Tensor]:
    """Parameters after two steps."""
    model = example.autoencoder((5, 3), 6)
    example.initialise(model, 0)
    step, _ = example.stepper(model, config)
    for k in range(2):
        step(torch.rand(4, 6, generator=torch.Generator().manual_seed(k)))
    return [p.detach() for p in model.parameters()]


def test_the_clip_is_that_of_kfac(double: None) -> None:
    config = example.kfac(4, 0.1, 0.01)
    bare = {k: v for k, v in config["method"].items() if not k.startswith("clip")}
    torch.testing.assert_close(moved({**config, "method": bare, "clip": 0.01}), moved(config), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(moved({**config, "method": bare})[0], moved(config)[0], atol=1e-3)


def test_the_clip_bounds_a_plain_gradient(double: None) -> None:
    model, x = example.autoencoder((5, 3), 6), torch.rand(4, 6)
    before = [p.detach().clone() for p in model.parameters()]
    slopes = torch.autograd.grad(example.cross_entropy(model(x), x), list(model.parameters()))
    length = torch.cat([g.flatten() for g in slopes]).norm()
    step, _ = example.stepper(model, example.sgd(4, 0.1, 0.0, clip=float(length / 3) ** 2) | {"optimizer": ["SGD", {}]})
    step(x)
    for p, old, g in zip(model.parameters(), before, slopes, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g / 3, rtol=1e-12, atol=1e-14)


# --- the clock ------------------------------------------------------------------------------------------------------------
class Clock:
    """CPU time that passes where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def process_time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(example.time, "process_time", made.process_time)
    return made


def trained(monkeypatch: pytest.MonkeyPatch, clock: Clock, each: float, limit: float) -> dict[str, Any]:
    """With steps of this many seconds, and evaluations that take long."""

    def stepper(model: Any, config: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), config["lr"])

        def step(x: Tensor) -> Tensor:
            clock.now += each
            return x

        return step, optimizer

    def evaluate(model: Any, images: Any) -> tuple[float, float]:
        clock.now += 1000.0
        return 1.0, 2.0

    monkeypatch.setattr(example, "stepper", stepper)
    monkeypatch.setattr(example, "evaluate", evaluate)
    config = {"batch": 2, "lr": 1.0, "optimizer": ["SGD", {}]}
    done: dict[str, Any] = example.train(example.autoencoder((3, 2), 4), torch.rand(4, 4), config, 0, limit)
    return done


def test_evaluations_are_outside_of_the_clock(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    done = trained(monkeypatch, clock, 1.0, 240.0)
    assert (done["steps"], done["seconds"], done["epochs"]) == (240, 240.0, 120.0)
    assert [(t, n) for t, n, *_ in done["curve"]] == [(10.0 * k, 10 * k) for k in range(25)]


def test_a_step_that_would_end_too_late_is_not_begun(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    done = trained(monkeypatch, clock, 7.0, 24.0)
    assert (done["steps"], done["seconds"]) == (3, 21.0) and len(done["curve"]) == 25
    assert [t for t, *_ in done["curve"]] == [0.0] + [7.0] * 7 + [14.0] * 7 + [21.0] * 10


# --- all trainings, and the page ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST of 24 random images in a dozen shapes."""
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    home = tmp_path_factory.mktemp("mnist")
    pixels = torch.randint(256, (24, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    columns = {"image": [image.fromarray(p.numpy()) for p in pixels], "label": [0] * 24}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for part in ("train", "test"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(home / f"{part}.parquet"))
    torch.save(pixels, home / "pixels.pt")
    return home


@pytest.mark.filterwarnings("ignore")
def test_pixels_are_those_of_the_images(folder: Path) -> None:
    train, test = example.pixels("mnist", folder, 10)
    expected = torch.load(folder / "pixels.pt").flatten(1) / 255
    torch.testing.assert_close(train, expected[:10], atol=1e-6, rtol=0)
    torch.testing.assert_close(test, expected, atol=1e-6, rtol=0)
    assert train.min() >= 0 and train.max() <= 1


FEW = {
    "sgd": [example.sgd(6, 1e-9, 0.9), example.sgd(6, 1e-3, 0.9)],
    **{row: settings[:1] for row, settings in example.ROWS.items() if row != "sgd"},
}


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search over two settings of SGD and one of the others, with batches of six images."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(example, "ROWS", {row: [{**c, "batch": 6} for c in settings] for row, settings in FEW.items()})
        patch.setitem(example.WIDTHS, "quarter", (12, 8))
        for rows in ("sgd", ",".join(example.ROWS)):  # the second goes on from the first
            example.main(folder, out, rows, "quarter", 12, 0.15, 2)
    return out


@pytest.mark.filterwarnings("ignore")
def test_every_row_is_searched_and_repeated(finished: Path) -> None:
    saved = json.loads((finished / "results.json").read_text())
    assert saved["settings"] == {"width": "quarter", "images": 12, "limit": 0.15} and "processor" in saved["machine"]
    assert [(t["row"], t["seed"]) for t in saved["trials"] if t["row"] == "sgd"] == [("sgd", s) for s in (0, 0, 1, 2)]
    for row in example.ROWS:
        search, fresh = page.of_row(saved, row)
        assert len(search) == len(FEW[row]) and [t["seed"] for t in fresh] == [1, 2]
        assert all(t["config"] == search[0]["config"] and t["steps"] > 0 for t in fresh)
        assert len({t["curve"][0][2] for t in fresh}) == 2  # weights by seed
    starts = {t["seed"]: set() for t in saved["trials"]}
    for t in saved["trials"]:
        starts[t["seed"]].add(t["curve"][0][2])
    assert all(len(errors) == 1 for errors in starts.values())  # and the same for all rows


@pytest.mark.filterwarnings("ignore")
def test_the_best_settings_are_chosen(finished: Path) -> None:
    saved = json.loads((finished / "results.json").read_text())
    assert page.of_row(saved, "sgd")[0][0]["config"]["lr"] == 1e-3 == example.chosen(saved["trials"], "sgd")["lr"]
    assert page.final({"curve": [[0, 0, None, None]]}) == example.final({"curve": [[0, 0, math.nan, 1.0]]}) == math.inf


@pytest.mark.filterwarnings("ignore")
def test_other_settings_are_refused(folder: Path, finished: Path) -> None:
    with pytest.raises(example.typer.BadParameter, match="choose another --out"):
        example.main(folder, finished, "sgd", "quarter", 12, 0.2, 2)
    with pytest.raises(example.typer.BadParameter, match="adma; legal are sgd, adam"):
        example.main(folder, finished, "sgd,adma", "quarter", 12, 0.15, 2)
    with pytest.raises(example.typer.BadParameter, match="legal are full, quarter"):
        example.main(folder, finished, "sgd", "half", 12, 0.15, 2)


@pytest.mark.filterwarnings("ignore")
def test_page_and_picture(finished: Path, tmp_path: Path) -> None:
    saved = page.take(finished)
    text = "".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in ("results", "search", "settings"))
    written = page.render(text, saved)
    assert "old" not in written and page.render(written, saved) == written
    for row in example.ROWS:
        assert f"\n| {row} | " in written
    page.draw(saved, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_goal_is_reached_between_two_evaluations() -> None:
    curves = [[[0.0, 0, 8.0, 0.0], [2.0, 1, 4.0, 0.0]], [[0.0, 0, 10.0, 0.0], [4.0, 1, 2.0, 0.0]]]
    found = [{"curve": curve} for curve in curves]  # on average 9 at 0, 3 at 3
    assert page.reached(found, 6.0) == pytest.approx(1.5) and page.reached(found, 2.0) is None


def test_the_page_is_current() -> None:
    saved = json.loads(page.SAVED.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, saved) == text, "run python docs/make_autoencoder.py"
    tried = {row: [t["config"] for t in page.of_row(saved, row)[0]] for row in page.rows_of(saved)}
    for row, settings in example.ROWS.items():
        assert len(tried[row]) == len(settings) and all(config in tried[row] for config in settings)
    assert page.PICTURE.is_file()
