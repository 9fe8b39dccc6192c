"""The tagging experiment: its methods against explicit formulas, its data and statistics, a run from parquet to page."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import AdamGradientConfig, AdamGradientMaker
from gradmaker.compare.errors import InputError
from tests.docs.test_docs import ROOT, script

sys.path.insert(0, str(ROOT / "examples"))
from ud_tagger import experiment, report, treebank
from ud_tagger.methods import METHODS, DecoupledSGD
from ud_tagger.model import Tagger
from ud_tagger.setting import Setting, read_setting

sys.path.remove(str(ROOT / "examples"))

TINY = {
    "layers": 1,
    "heads": 2,
    "width": 8,
    "hidden": 8,
    "fraction": 0.5,
    "steps": 4,
    "evaluate_every": 1,
    "trials": 2,
    "seeds": 2,
}
POINT = {"lr": 0.02, "one_minus_beta1": 0.15, "one_minus_beta2": 0.04, "weight_decay": 0.3, "warmup": 0.1}


# --- methods --------------------------------------------------------------------------------------------------------------
class Words(nn.Module):
    """An embedding whose vocabulary axis is long, and a linear map with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(12, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(x))


def gradients(model: nn.Module, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randint(10, (6, 4), generator=generator), torch.randint(5, (6, 4), generator=generator)


def test_decoupled_descent_on_adam_is_adamw(double: None) -> None:
    torch.manual_seed(1)
    ours, theirs = Words(), Words()
    ours.load_state_dict(theirs.state_dict())
    maker = AdamGradientMaker(ours, AdamGradientConfig(beta1=0.85, decay=0.96))
    optimizer = DecoupledSGD(ours.parameters(), POINT["lr"], POINT["weight_decay"])
    plain, adamw = METHODS["adamw"](theirs, POINT, Setting())
    for x, t in gradients(ours, 6):
        experiment.step(maker, optimizer, x, t)
        experiment.step(plain, adamw, x, t)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def root(H: Tensor) -> Tensor:
    """``(H + 1e-6 lambda_max)^(-1/4)`` of a matrix, or of a diagonal."""
    if H.ndim == 1:
        return torch.diag((H + 1e-6 * H.max()) ** -0.25)
    s, Q = torch.linalg.eigh(H)
    return Q @ torch.diag((s + 1e-6 * s.max()) ** -0.25) @ Q.T


def direction(method: str, L: Tensor, R: Tensor, M: Tensor) -> Tensor:
    P, Q = root(L), root(R)
    if method == "shampoo":
        return P @ M @ Q
    return (P @ P @ M + 2 * P @ M @ Q + M @ Q @ Q) / 4


class Oracle:
    """One tensor's trajectory, from the formulas: Nesterov average, axes, length of NAdam's step, decoupled decay."""

    def __init__(self, w: Tensor, method: str, long: bool) -> None:
        self.w, self.method, self.long, self.t = w.detach().clone(), method, long, 0
        self.history: list[Tensor] = []

    def averaged(self, decay: float, values: list[Tensor]) -> Tensor:
        weights = [decay ** (len(values) - 1 - k) for k in range(len(values))]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)  # type: ignore[return-value]

    def step(self, g: Tensor) -> None:
        self.history.append(g.clone())
        b1, b2 = 1 - POINT["one_minus_beta1"], 1 - POINT["one_minus_beta2"]
        m = sum((1 - b1) * b1 ** (len(self.history) - 1 - k) * v for k, v in enumerate(self.history))
        M = (b1 * m + (1 - b1) * g) / (1 - b1 ** (len(self.history) + 1))
        if g.ndim == 1:
            U = M / (self.averaged(b2, [v.square() for v in self.history]).sqrt() + 1e-8)
        else:
            L = self.averaged(b2, [v @ v.T for v in self.history])
            R = self.averaged(b2, [v.T @ v for v in self.history])
            U = direction(self.method, L.diagonal() if self.long else L, R, M)
        V = M / (self.averaged(0.999, [v.square() for v in self.history]).sqrt() + 1e-8)
        self.w = (1 - POINT["lr"] * POINT["weight_decay"]) * self.w - POINT["lr"] * U * V.norm() / U.norm()


@pytest.mark.parametrize("method", ["shampoo", "caspr"])
def test_methods_follow_their_formulas(method: str, double: None) -> None:
    torch.manual_seed(1)
    model = Words()
    maker, optimizer = METHODS[method](model, POINT, Setting(max_dim=8))
    oracles = {name: Oracle(p, method, name == "embedding.weight") for name, p in model.named_parameters()}
    for x, t in gradients(model, 5):
        loss = F.cross_entropy(model(x).flatten(0, 1), t.flatten())
        found = torch.autograd.grad(loss, list(model.parameters()))
        experiment.step(maker, optimizer, x, t)
        for (name, p), g in zip(model.named_parameters(), found, strict=True):
            oracles[name].step(g)
            torch.testing.assert_close(p.detach(), oracles[name].w, rtol=1e-9, atol=1e-12)
    assert maker.config.preconditioner_interval == 20  # type: ignore[attr-defined]


def test_a_block_size_cuts_the_vocabulary() -> None:
    maker, _ = METHODS["caspr"](Words(), POINT, Setting(block_size=4))
    assert {site.shape[1:] for b in maker.plan.blocks for site in b.sites if "embedding" in site.name} == {(4, 3)}  # type: ignore[attr-defined]


# --- setting --------------------------------------------------------------------------------------------------------------
def test_configurations_fill_their_ranges() -> None:
    setting = Setting()
    points = setting.points()
    assert points == Setting().points() and len(points) == setting.trials
    for name in ("lr", "one_minus_beta1", "one_minus_beta2", "weight_decay"):
        low, high = map(math.log, getattr(setting, name))
        strata = [math.floor((math.log(p[name]) - low) / (high - low) * setting.trials) for p in points]
        assert sorted(strata) == list(range(setting.trials)), name
    assert {p["warmup"] for p in points} <= {*setting.warmup}


def test_schedules() -> None:
    linear, root_decay = Setting(steps=100), Setting(steps=75000, schedule="inverse_sqrt")
    assert [linear.share(t, 0.05) for t in (1, 5, 6)] == [0.2, 1.0, 1.0]
    assert linear.share(100, 0.05) == pytest.approx(1 / 95)
    flax = [0.05 * min(1, t / 7500) / math.sqrt(max(t, 7500)) for t in (10, 7500, 30000, 75000)]
    ours = [0.05 / math.sqrt(7500) * root_decay.share(t, 0.1) for t in (10, 7500, 30000, 75000)]
    assert ours == pytest.approx(flax, rel=1e-12)


def test_the_full_version() -> None:
    full = read_setting(ROOT / "examples" / "ud_tagger_full.yaml")
    model = (full.layers, full.heads, full.width, full.hidden, full.length, full.batch_size, full.steps, full.block_size)
    assert model == (6, 8, 512, 2048, 256, 64, 75000, 1024)
    assert (full.fraction, full.schedule, full.dropout, full.interval) == (1.0, "inverse_sqrt", 0.3, 20)
    for name in ("lr", "one_minus_beta1", "one_minus_beta2", "weight_decay", "warmup"):
        assert getattr(full, name) == getattr(Setting(), name), name


@pytest.mark.parametrize(
    ("text", "message"),
    [("width: 6", "multiple of twice"), ("schedule: cosine", "legal are linear, inverse_sqrt"), ("seeds: 1", "at least 2")],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_setting(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("depth: 3")
    with pytest.raises(InputError, match="no setting depth; legal are layers"):
        read_setting(tmp_path / "bad.yaml")


# --- data and model -------------------------------------------------------------------------------------------------------
def test_words_and_tags_become_indices() -> None:
    sentences = {
        "train": [(["The", "the", "cat"], ["DT", "DT", "NN"]), (["cat", "sat", "x"], ["NN", "VB", "_"])],
        "validation": [(["Sat", "cat", "the", "cat"], ["JJ", "NN", "DT", "NN"])],
        "test": [],
    }
    bank = treebank.encode(sentences, Setting(length=3, least=2))  # type: ignore[arg-type]
    assert (bank.words, bank.tags) == (4, 3)  # pad, unknown, cat, the; DT, NN, VB
    words, tags = bank.parts["validation"][0]
    assert words.tolist() == [1, 2, 3] and tags.tolist() == [3, 1, 0]  # JJ is none of the tags; the fourth word is cut
    assert [t.tolist() for _, t in bank.parts["train"]] == [[0, 0, 1], [1, 2, treebank.IGNORED]]


def test_batches_are_epochs_of_similar_lengths() -> None:
    rows = [(torch.full((1 + k % 20,), 2 + k), torch.zeros(1 + k % 20, dtype=torch.long)) for k in range(100)]
    stream = treebank.batches(rows, 8, 0)
    epoch = [next(stream)[0] for _ in range(12)]  # 8 of 64, then 4 of the other 36: the last 4 sentences are left out
    seen = [int(row[0]) for x in epoch for row in x]
    assert len(seen) == len(set(seen)) == 96
    lengths = [int((row != treebank.PAD).sum()) for x in epoch for row in x]
    spans = [max(lengths[k : k + 8]) - min(lengths[k : k + 8]) for k in range(0, 96, 8)]
    assert mean(spans) < 7  # 16.5 for sentences drawn at random
    for seed, same in ((0, True), (1, False)):
        again = treebank.batches(rows, 8, seed)
        assert all(torch.equal(x, next(again)[0]) for x in epoch) == same


def test_pads_change_nothing(double: None) -> None:
    model = Tagger(Setting(layers=2, heads=2, width=16, hidden=16), 30, 7).eval()
    short, long = torch.randint(2, 30, (1, 5)), torch.randint(2, 30, (1, 9))
    together = torch.cat([F.pad(short, (0, 4)), long])
    torch.testing.assert_close(model(together)[0, :5], model(short)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(together)[1], model(long)[0], rtol=1e-12, atol=1e-12)
    turned = model(long.flip(1)).flip(1)
    assert (turned - model(long)).abs().max() > 1e-2  # positions count


def test_accuracy_counts_tokens() -> None:
    echo = nn.Embedding.from_pretrained(torch.eye(9))  # the tag is the word
    rows = [(torch.tensor([3, 4, 5, 6]), torch.tensor([3, 4, 7, -100])), (torch.tensor([2]), torch.tensor([9]))]
    assert experiment.accuracy(echo, rows, "cpu") == 2 / 4


# --- statistics -----------------------------------------------------------------------------------------------------------
def test_the_paired_test_of_two_seeds_is_cauchy() -> None:
    pair = report.Pair("caspr", "adamw", [0.80, 0.83], [0.79, 0.80])
    t = mean([1.0, 3.0]) / (stdev([1.0, 3.0]) / math.sqrt(2))
    assert pair.t == pytest.approx(t, rel=1e-9)
    assert pair.p == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
    assert pair.half == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    assert (pair.mean, pair.first, pair.second) == (pytest.approx(2.0), "CASPR", "AdamW")


def test_verdicts() -> None:
    b = [0.7 + 0.01 * k for k in range(6)]
    noise = [0.001, -0.001, 0.0005, -0.0005, 0.0008, -0.0008]
    clear = report.Pair("caspr", "shampoo", [x + 0.01 + e for x, e in zip(b, noise, strict=True)], b)
    assert clear.p < 1e-4 and clear.verdict(3) == "CASPR is better than Shampoo"
    weak = report.Pair("caspr", "shampoo", [x - 0.0011 + e for x, e in zip(b, noise, strict=True)], b)
    assert 0.05 / 3 < weak.p < 0.05 and weak.verdict(3).startswith("CASPR looks worse, but")
    none = report.Pair("caspr", "shampoo", [x + e for x, e in zip(b, noise, strict=True)], b)
    assert none.p > 0.9 and none.verdict(3) == "no difference is shown"
    assert report.Pair("caspr", "shampoo", b, b).verdict(3) == "no difference is shown"


def test_shared_trials_are_compared_by_signs() -> None:
    trainings = [
        {"method": method, "phase": "search", "number": k, "status": "finished", "dev": dev}
        for method, devs in {"adamw": [0.5] * 5, "shampoo": [0.6] * 4 + [0.4], "caspr": [0.6] * 5}.items()
        for k, dev in enumerate(devs)
    ]
    first, second, third = report.wins(trainings).splitlines()
    assert first == "- Shampoo is above AdamW in 4 of 5 trials, median +10.00 points, p = 0.38 by the sign test."  # 12 / 2^5
    assert second.endswith("5 of 5 trials, median +10.00 points, p = 0.062 by the sign test.")  # 2 / 2^5
    assert third.endswith("1 of 5 trials, median +0.00 points, p = 1 by the sign test.")  # one trial differs


def test_what_diverged_is_not_chosen() -> None:
    records = [
        {"status": "diverged", "dev": 0.9, "point": {"lr": 1.0}},
        {"status": "finished", "dev": 0.7, "point": {"lr": 0.1}},
        {"status": "finished", "dev": 0.8, "point": {"lr": 0.2}},
    ]
    assert experiment.choose("caspr", records) == {"lr": 0.2}
    with pytest.raises(InputError, match="every configuration diverged"):
        experiment.choose("caspr", records[:1])


# --- from parquet to page -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A treebank of made-up words; a third of a word's tags are random."""
    from datasets import Dataset

    home, draw = tmp_path_factory.mktemp("treebank"), random.Random(0)
    for part, size in (("train", 80), ("validation", 20), ("test", 20)):
        rows = [[draw.randrange(24) for _ in range(draw.randint(2, 12))] for _ in range(size)]
        tags = [[f"T{w % 4 if draw.random() < 2 / 3 else draw.randrange(4)}" for w in row] for row in rows]
        data = {"tokens": [[f"W{w}" for w in row] for row in rows], "xpos": tags, "text": ["" for _ in rows]}
        Dataset.from_dict(data).to_parquet(home / f"{part}.parquet")
    return home


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    """The script, its output folder and the arguments of a run."""
    out = tmp_path_factory.mktemp("out")
    (out / "tiny.yaml").write_text(json.dumps(TINY))
    arguments = {"data_dir": folder, "config": out / "tiny.yaml", "out": out, "publish_to": out / "docs"}
    module = script(ROOT / "examples" / "ud_tagger.py")
    module.main(**arguments)
    return module, out, arguments


def test_a_run_is_fair_and_complete(finished: tuple[Any, Path, dict[str, Any]]) -> None:
    content = json.loads((finished[1] / "docs" / "data" / "tagger.json").read_text())
    trainings = content["trainings"]
    assert content["setting"] == json.loads(json.dumps(vars(Setting(**TINY))))  # type: ignore[arg-type]
    assert content["treebank"]["train"]["sentences"] == 40 and content["machine"]["threads"] == 1
    tried = {m: [r for r in trainings if (r["method"], r["phase"]) == (m, "search")] for m in METHODS}
    points = [[r["point"] for r in records] for records in tried.values()]
    assert points[0] == points[1] == points[2] == Setting(**TINY).points()  # type: ignore[arg-type]
    assert not any("test" in r for records in tried.values() for r in records)
    first: dict[tuple[str, int], set[float]] = {}
    for r in trainings:
        assert r["status"] == "finished" and r["dev"] == max(dev for _, dev, _ in r["curve"]) and len(r["curve"]) == 4
        first.setdefault((r["phase"], r["number"]), set()).add(r["curve"][0][2])
        if r["phase"] == "final":
            assert r["point"] == max(tried[r["method"]], key=lambda record: record["dev"])["point"] and 0 <= r["test"] <= 1
    assert len(trainings) == 12 and all(len(losses) == 1 for losses in first.values())  # same weights, same batch, same dropout
    assert len({next(iter(losses)) for (phase, _), losses in first.items() if phase == "final"}) == 2


def test_the_page_states_the_numbers(finished: tuple[Any, Path, dict[str, Any]]) -> None:
    _, out, _ = finished
    page = (out / "docs" / "data" / "tagger.md").read_text()
    trainings = json.loads((out / "results.json").read_text())["trainings"]
    test = {m: [100 * r["test"] for r in trainings if (r["method"], r["phase"]) == (m, "final")] for m in METHODS}
    for method, label in report.LABELS.items():
        assert f"| {label} | {mean(test[method]):.2f} ± {stdev(test[method]):.2f} |" in page
    gaps = [a - b for a, b in zip(test["caspr"], test["shampoo"], strict=True)]
    assert f"| CASPR - Shampoo | {mean(gaps):+.2f} ± {stdev(gaps):.2f} |" in page
    assert "(../images/tagger.png)" in page and (out / "docs" / "images" / "tagger.png").stat().st_size > 10000
    assert max(map(len, (line for line in page.splitlines() if not line.startswith("|")))) <= 128


def test_nothing_is_trained_twice(finished: tuple[Any, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    module, out, arguments = finished
    before = (out / "results.json").read_text()
    monkeypatch.setattr(experiment, "train", lambda *arguments: pytest.fail("trained again"))
    module.main(**arguments)
    assert (out / "results.json").read_text() == before
    (out / "other.yaml").write_text(json.dumps({**TINY, "steps": 5}))
    with pytest.raises(InputError, match="another setting or treebank"):
        module.main(**{**arguments, "config": out / "other.yaml"})


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").touch()
    with pytest.raises(InputError, match=r"lacks validation\.parquet and test\.parquet"):
        treebank.read_treebank(Setting(), tmp_path)


def test_the_published_page_is_that_of_its_numbers() -> None:
    content = json.loads((ROOT / "docs" / "data" / "tagger.json").read_text(encoding="utf-8"))
    page = report.markdown(content, "../images/tagger.png", "tagger.json")
    assert (ROOT / "docs" / "data" / "tagger.md").read_text(encoding="utf-8") == page
    assert content["setting"] == json.loads(json.dumps(vars(Setting()))), "the defaults have changed since"
