"""The comparison on a small GPT: its text, its schedule, its rows, a run from text to page, and the published page."""

from __future__ import annotations

import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.compare.errors import InputError
from tests.docs.test_docs import ROOT, script

sys.path.insert(0, str(ROOT / "examples"))
from char_gpt import experiment, report, text
from char_gpt.model import Gpt
from char_gpt.rows import ROWS
from char_gpt.setting import Setting, read_setting

sys.path.remove(str(ROOT / "examples"))

TINY: dict[str, Any] = {
    "layers": 1,
    "heads": 2,
    "width": 8,
    "context": 8,
    "batch_size": 4,
    "steps": 2,
    "trial_steps": 1,
    "evaluate_every": 1,
    "windows": 4,
    "extensions": 0,
    "seeds": 2,
}
SMALL = Setting(**TINY)


# --- text, schedule, model ------------------------------------------------------------------------------------------------
def test_parts_follow_each_other() -> None:
    whole = "".join(random.Random(0).choices("abcd\n", k=400))
    found = text.encode(whole)
    ids = torch.cat([found.train, found.validation, found.test])
    assert "".join(found.characters[k] for k in ids) == whole and [len(found.train), len(found.validation)] == [360, 20]


def test_windows_and_batches_see_the_next_character() -> None:
    part = torch.arange(100)
    x, t = text.windows(part, 8)
    assert x.flatten().tolist() == list(range(96)) and torch.equal(t, x + 1)
    some, _ = text.windows(part, 8, 3)
    assert some[:, 0].tolist() == [0, 32, 64]
    x, t = text.batch(part, 500, 8, torch.Generator().manual_seed(0))
    assert torch.equal(t, x + 1) and (int(x.min()), int(t.max())) == (0, 99) and x.shape == (500, 8)
    with pytest.raises(InputError, match="a window needs 9"):
        text.windows(part[:8], 8)


def test_the_schedule_rises_and_falls() -> None:
    shares = [Setting(warmup=0.1).share(t, 100) for t in range(1, 101)]
    assert shares[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert all(a > b for a, b in pairwise(shares[9:])) and shares[-1] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 90 / 91))


def test_the_model_is_causal(double: None) -> None:
    torch.manual_seed(0)
    model = Gpt(SMALL, 5)
    x = torch.randint(5, (2, 8))
    y = model(x)
    model(x)  # nothing is kept between calls
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % 5
    difference = (model(changed) - y).abs().amax(-1)
    assert difference[:, :5].max() == 0 and difference[:, 5:].min() > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [("width: 6", "multiple of the 4 heads"), ("seeds: 1", "at least 2"), ("depth: 3", "no setting depth")],
)
def test_bad_settings_are_refused(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(given)
    with pytest.raises(InputError, match=message):
        read_setting(tmp_path / "bad.yaml")


# --- rows -----------------------------------------------------------------------------------------------------------------
def step(model: Gpt, optimizers: list[torch.optim.Optimizer], x: Tensor, t: Tensor) -> None:
    F.cross_entropy(model(x).flatten(0, 1), t.flatten()).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def polar(G: Tensor) -> Tensor:
    """Muon's polynomial, five times."""
    X = G / G.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def test_muon_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, double: None) -> None:
    """With torch's iteration in the precision of the parameters, the two rows are one."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda G, *_: polar(G))
    models = {}
    for row in ("muon", "torch_muon"):
        torch.manual_seed(0)
        model = models[row] = Gpt(SMALL, 5)
        optimizers = ROWS[row].build(model, 0.01, SMALL)
        for _ in range(4):
            step(model, optimizers, torch.randint(5, (4, 8)), torch.randint(5, (4, 8)))
    for p, q in zip(models["muon"].parameters(), models["torch_muon"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # the two guard a division by zero in their own ways


@pytest.mark.parametrize("row", ["muon", "soap", "shampoo"])
def test_the_same_matrices_are_hidden(row: str) -> None:
    model = Gpt(SMALL, 5)
    (optimizer,), (theirs, _) = (ROWS[name].build(model, 0.01, SMALL) for name in (row, "torch_muon"))
    hidden = {p for group in optimizer.param_groups if group["method"] == row for p in group["params"]}
    assert hidden == {p for group in theirs.param_groups for p in group["params"]} and len(hidden) == 4


# --- from text to page ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    """The script, its output folder and the arguments of a run."""
    out = tmp_path_factory.mktemp("out")
    (out / "input.txt").write_text("".join(random.Random(0).choices("abcde \n", k=800)))
    (out / "tiny.yaml").write_text(json.dumps(TINY))
    arguments = {"data_dir": out, "config": out / "tiny.yaml", "out": out / "runs", "publish_to": out / "docs"}
    module = script(ROOT / "examples" / "char_gpt.py")
    module.main(**arguments)
    return module, out, arguments


def test_a_run_is_fair_and_complete(finished: tuple[Any, Path, dict[str, Any]]) -> None:
    content = json.loads((finished[1] / "docs" / "data" / "char_gpt.json").read_text())
    trainings = content["trainings"]
    assert content["setting"] == vars(SMALL) and content["text"] == {
        "characters": 7,
        "train": 720,
        "validation": 40,
        "test": 40,
    }
    for row in ROWS:
        tried, ended = report.search(trainings, row), report.final(trainings, row)
        assert {r["seed"] for r in tried} == {0} and not any("test" in r for r in tried) and len(tried) == 5
        best = min(tried, key=lambda r: r["validation"])["lr"]
        assert [(r["seed"], r["lr"]) for r in ended] == [(1, best), (2, best)]
        for r in ended:
            assert [point[0] for point in r["curve"]] == [1, 2] and r["validation"] == r["curve"][-1][2] and r["test"] < 3


def test_the_page_states_the_numbers(finished: tuple[Any, Path, dict[str, Any]]) -> None:
    _, out, _ = finished
    page = (out / "docs" / "data" / "char_gpt.md").read_text()
    trainings = json.loads((out / "docs" / "data" / "char_gpt.json").read_text())["trainings"]
    for row, (label, *_) in ROWS.items():
        losses = [r["test"] for r in report.final(trainings, row)]
        assert f"| {label} |" in page and f" | {mean(losses):.3f} ± {stdev(losses):.3f} | " in page
    assert "(../images/char_gpt.png)" in page and (out / "docs" / "images" / "char_gpt.png").stat().st_size > 10000
    assert max(map(len, (line for line in page.splitlines() if not line.startswith("|")))) <= 128


def test_nothing_is_trained_twice(finished: tuple[Any, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    module, out, arguments = finished
    monkeypatch.setattr(experiment, "train", lambda *arguments: pytest.fail("trained again"))
    module.main(**arguments)
    (out / "other.yaml").write_text(json.dumps({**TINY, "steps": 3}))
    with pytest.raises(InputError, match="another setting or text"):
        module.main(**{**arguments, "config": out / "other.yaml"})


def test_the_search_goes_on_beyond_its_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = text.encode("abc" * 100)

    def trial(row: str, lr: float, *rest: Any) -> dict[str, Any]:
        return {"status": "finished", "validation": abs(math.log(lr / 0.05)), "seconds": 0.0}

    monkeypatch.setattr(experiment, "train", trial)
    trainings = experiment.Trainings(tmp_path, Setting(**{**TINY, "extensions": 3}), found, "cpu")
    tried = experiment.search("adamw", trainings)
    assert [r["lr"] for r in tried] == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128]
    assert experiment.choose("adamw", tried) == 0.064


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks input\.txt"):
        text.read_text(tmp_path)


# --- the published page ---------------------------------------------------------------------------------------------------
def published() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "docs" / "data" / "char_gpt.json").read_text(encoding="utf-8"))
    return content


def test_the_published_page_is_that_of_its_numbers() -> None:
    content = published()
    page = report.markdown(content, "../images/char_gpt.png", "char_gpt.json")
    assert (ROOT / "docs" / "data" / "char_gpt.md").read_text(encoding="utf-8") == page
    assert content["setting"] == vars(Setting()), "the defaults have changed since"


def test_no_method_is_behind_its_peer() -> None:
    """Muon beside torch's Muon, all but K-FAC beside AdamW, at equal steps."""
    trainings = published()["trainings"]
    gaps = report.differences(trainings, "muon", "torch_muon")
    assert len(gaps) == 3 and mean(gaps) < stdev(gaps)
    for row in ("muon", "soap", "shampoo"):
        assert max(report.differences(trainings, row, "adamw")) < 0, row
