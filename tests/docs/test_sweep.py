"""Every legal triple of the registries trains on digits, and every other one is refused; docs/legality.md lists them.

One rule for all: 50 full-batch steps of SGD on 128 digits, default options; it counts if at any learning rate of `RATES`
all is finite and the last loss at most 95 % of the first. Where a step forms matrices of all parameters or solves by CG, the
MLP is 16-8-10 on digits of 4 x 4, instead of 64-16-10: 226 parameters, not 1210.
The whole sweep takes minutes (``-m slow``); a cover, in which every curvature, every representation at every granularity and
every solver occurs, runs always.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import TripleError, from_config
from gradmaker.curvature import CURVATURES
from gradmaker.representations import REPRESENTATIONS
from gradmaker.solvers import SOLVERS
from tests.docs.test_docs import script
from tests.test_triples import LEGAL, REFUSED, mapping

datasets = pytest.importorskip("sklearn.datasets")

RATES = (0.1, 1.0, 0.01, 1e-3, 1e-4)
STEPS = 50
SHARE = 0.95
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "legality.md"
Row = tuple[str, str, str]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def small_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)
    )


def mlp_for(row: Row) -> Callable[[], nn.Module]:
    chain = row[0] == "FisherRecursive"  # which takes no pooling
    return small_mlp if not chain and (row[2] == "CG" or row[1].startswith(("Dense", "TriangularQ"))) else mlp


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))


def digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    return torch.tensor(found.data[:128] / 16, dtype=torch.float32), torch.tensor(found.target[:128])


def train(make: Callable[[], nn.Module], row: Row, rate: float, x: Tensor, t: Tensor, **options: Any) -> tuple[float, float]:
    """The loss before the first and after the last step; infinite as soon as a gradient is not finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    maker = from_config(model, mapping(*row) | options)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    first = F.cross_entropy(model(x), t).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
        _, loss = maker.forward_and_backward()
        if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()) or loss > 100 * first:
            return first, float("inf")
        optimizer.step()
    return first, F.cross_entropy(model(x), t).item()


def learns(make: Callable[[], nn.Module], row: Row) -> bool:
    x, t = digits()
    return any(last <= SHARE * first for first, last in (train(make, row, rate, x, t) for rate in RATES))


def cover(rows: list[Row]) -> list[Row]:
    """Rows in which every part occurs: always one that brings the most parts that were not there, the quickest ones first."""
    slow = {"CG", "FisherExact"}
    missing = {part for row in rows for part in row}
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: (len(missing & set(row)), -len(slow & set(row)))))
        missing -= set(chosen[-1])
    return chosen


COVER = cover(LEGAL)
REST = [row for row in LEGAL if row not in COVER]
IMAGES = list({row[:2]: row for row in reversed(LEGAL) if row[0] != "FisherRecursive"}.values())  # which is for chains alone


def test_the_cover_has_every_part() -> None:
    assert {row[0] for row in COVER} == set(CURVATURES)
    assert {row[1].split("(")[0] for row in COVER} == set(REPRESENTATIONS)
    assert {row[2] for row in COVER} == set(SOLVERS)
    assert {row[1] for row in COVER} == {row[1] for row in LEGAL}  # at every granularity


@pytest.mark.parametrize("row", COVER, ids="-".join)
def test_a_cover_of_the_parts_trains(row: Row) -> None:
    assert learns(mlp_for(row), row)


def test_newton_steps_need_a_damping_above_the_negative_curvature() -> None:
    """Which is -0.13 at the start; with less they end in a saddle point."""
    row, rate, (x, t) = ("Hessian", "Dense(full)", "LU"), 1.0, digits()
    assert train(small_mlp, row, rate, x, t)[1] < 1.0
    assert train(small_mlp, row, rate, x, t, damping=1e-3)[1] > 2.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", REST, ids="-".join)
def test_every_legal_triple_trains(row: Row) -> None:
    assert learns(mlp_for(row), row)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", IMAGES, ids="-".join)
def test_every_pair_of_curvature_and_representation_trains_a_convolution(row: Row) -> None:
    assert learns(convolution, row)


def listed() -> set[Row]:
    """The triples that the page gives as legal."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    tables = [(text.partition("\n")[0], line.strip("| ").split(" | ")) for text in sections for line in text.splitlines()]
    rows = [(curvature, cells) for curvature, cells in tables if len(cells) == 2 and cells[0] != "representation"]
    return {(curvature, label, solver) for curvature, (label, solvers) in rows for solver in solvers.split(", ")}


def test_the_page_lists_what_is_legal() -> None:
    assert listed() == set(LEGAL)


def test_the_script_of_the_sweep_runs_and_goes_on(tmp_path: Path) -> None:
    generated = script(DOCS / "make_sweep.py")
    data, page = tmp_path / "sweep.json", tmp_path / "sweep.md"
    name = "mlp/BatchGradient/Diagonal(tensor)/Division"
    generated.main(only=name, data=data, page=page)
    first = data.read_text(encoding="utf-8")
    (found,) = json.loads(first)["results"].values()
    assert found["learns"] and found["after"] < 0.95 * found["before"]
    text = page.read_text(encoding="utf-8")
    assert "1 of 1 triples learn" in text and "| Diagonal(tensor) | Division | MLP |" in text
    assert f"{len(list(generated.rows())) - 1} legal triples have not been run yet" in text
    generated.main(only=name, data=data, page=page)
    assert data.read_text(encoding="utf-8") == first


@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_other_triple_is_refused_with_its_sentence(curvature: str) -> None:
    model = nn.Linear(2, 2)
    for row in REFUSED:
        if row[0] == curvature:
            with pytest.raises(TripleError) as caught:
                from_config(model, mapping(*row[:3]))
            assert str(caught.value) == row[3]
            assert re.search(r"(Curvatures|Solvers) that fit [^:]*: .", row[3])
