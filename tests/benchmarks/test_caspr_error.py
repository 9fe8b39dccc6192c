"""`benchmarks/caspr_error.py`: its measures on matrices with known answers, and a small run from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from tests import oracles
from tests.docs.test_docs import script
from tests.methods.test_kronecker_dims import gradients

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module() -> Any:
    before = list(sys.path)
    loaded = script(ROOT / "benchmarks" / "caspr_error.py")
    sys.path[:] = before
    return loaded


def test_distance_is_to_the_nearest_multiple(module: Any) -> None:
    X, Y = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 0.0], [3.0, 4.0]))
    assert module.distance(X, 5 * X) < 1e-12
    assert module.distance(X, Y) == pytest.approx(0.8)  # 3 X is the nearest, 4 of 5 are left


def test_full_matrix_adagrad_is_the_target(module: Any) -> None:
    steps = gradients(4, 3, steps=30)
    A = torch.stack([torch.outer(g.flatten(), g.flatten()) for g in steps]).sum(0)
    ridge = 1e-6 * torch.linalg.eigvalsh(A)[-1] * torch.eye(12, dtype=A.dtype)
    target = module.preconditioner(module.FULL, [g.reshape(1, -1) for g in steps])
    assert oracles.relative_error(target, oracles.matrix_power(A + ridge, -0.5)) < 1e-10
    found = module.errors(target, target)
    assert set(found) == {"stat", "root", "inv"} and max(found.values()) < 1e-6


def test_errors_by_hand(module: Any) -> None:
    """For one column everything with an exact row factor is full-matrix AdaGrad; of its diagonal the errors are known."""
    steps = gradients(5, 1, steps=20)
    flat = [g.reshape(1, -1) for g in steps]
    target = module.preconditioner(module.FULL, flat)
    for name in ("one-sided",):
        assert max(module.errors(module.preconditioner(module.METHODS[name], steps), target).values()) < 1e-6
    A = oracles.matrix_power(target, -2.0)
    d = A.diagonal()
    found = module.errors(module.preconditioner(module.METHODS["diagonal"], steps), target)
    for metric, p in (("stat", 1.0), ("root", 0.5), ("inv", -0.5)):
        P = oracles.matrix_power(A, p)
        cosine = (P.diagonal() * d**p).sum() / P.norm() / (d**p).norm()
        assert found[metric] == pytest.approx(float((1 - cosine**2) ** 0.5), rel=1e-4)


def test_units_are_the_diagonal_blocks(module: Any) -> None:
    steps = gradients(3, 4, steps=9)
    A = torch.stack([torch.outer(g.flatten(), g.flatten()) for g in steps]).sum(0)
    found = module.preconditioner(module.METHODS["unit-wise"], steps)
    for k in range(3):
        own = slice(4 * k, 4 * k + 4)
        ridge = 1e-6 * torch.linalg.eigvalsh(A[own, own])[-1] * torch.eye(4, dtype=A.dtype)
        assert oracles.relative_error(found[own, own], oracles.matrix_power(A[own, own] + ridge, -0.5)) < 1e-8
    assert torch.count_nonzero(found) == 3 * 16


def test_links_by_hand(module: Any) -> None:
    """Four times the identity, 3 x 3: A is 12 in one direction, L = R = 4 I, and sqrt(r) is just enough there."""
    found = module.links([torch.eye(3, dtype=torch.float64)] * 4)
    size = 3**0.5 * 12e-6**-0.5
    assert found["r"] == 3 and abs(found["sqrt(r) AdaGrad - X(1)"]) < 1e-13
    assert found["AdaGrad - X(1)"] == pytest.approx((12**-0.5 - 4**-0.5) / size, rel=1e-5)


@pytest.mark.parametrize("name", ["kron", "lowrank", "sum", "mlp"])
def test_the_chain_holds_and_methods_differ(module: Any, name: str) -> None:
    recorded = module.problems(None)[name](0, 40)
    assert recorded.gradients[0].shape == (12, 10) and len(recorded.gradients) == 40
    found = module.cell(recorded)
    links = {k: v for k, v in found["links"].items() if k not in ("r", "AdaGrad - X(1)")}
    assert len(links) == 5 and min(links.values()) > -1e-9
    assert found["links"]["r"] == (1 if name == "lowrank" else 10)
    assert len({round(e["stat"], 6) for e in found["errors"].values()}) == len(module.METHODS)
    again = module.problems(None)[name](0, 40)
    assert all(torch.equal(g, h) for g, h in zip(recorded.gradients, again.gradients, strict=True))


def test_the_transformer_learns_a_text(module: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    query, up = (module.problems(text)[name](0, 60) for name in ("query", "up"))
    assert query.gradients[0].shape == (16, 16) and up.gradients[0].shape == (32, 16) and query.losses == up.losses
    assert query.losses[1] < 0.8 * query.losses[0]
    x = torch.zeros(1, 32, dtype=torch.int64)
    model = sys.modules["caspr_problems"].Transformer(5, 32).double()
    before, after = (model(y)[0] for y in (x, x.index_fill(1, torch.tensor([20]), 1)))
    assert torch.equal(before[:20], after[:20]) and not torch.equal(before[20:], after[20:])  # no look ahead


def test_a_small_run(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed)
    text, out, docs = tmp_path / "text.txt", tmp_path / "out", tmp_path / "docs"
    names = ["kron", "digits"]
    options = {"text": text, "out": out, "seeds": 2, "drawn": 20, "recorded": 12, "only": names}
    module.main(publish_to=docs, **options)
    content = json.loads((docs / "data" / "caspr_error.json").read_text())
    assert [(c["problem"], c["seed"]) for c in content["cells"]] == [(n, s) for n in names for s in (0, 1)]
    shapes = {c["problem"]: tuple(c["shape"]) for c in content["cells"]}
    assert shapes == {"kron": (12, 10), "digits": (16, 10)}
    assert all((c["losses"] is None) == (c["problem"] == "kron") for c in content["cells"])
    page = (docs / "data" / "caspr.md").read_text()
    first = [c["errors"]["CASPR p=2"]["stat"] for c in content["cells"] if c["problem"] == "digits"]
    assert f"{sum(first) / 2:.3f} ± " in page and "(../images/caspr_error.png)" in page
    assert (docs / "images" / "caspr_error.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(module, "cell", lambda recorded: pytest.fail("a finished cell was repeated"))
    module.main(publish_to=None, **options)
    with pytest.raises(typer.BadParameter, match="other settings"):
        module.main(publish_to=None, **{**options, "recorded": 13})
    with pytest.raises(typer.BadParameter, match="unknown problems"):
        module.main(publish_to=None, **{**options, "only": ["nothing"]})


def test_the_page_is_that_of_the_numbers(module: Any) -> None:
    content = json.loads((ROOT / "docs" / "data" / "caspr_error.json").read_text())
    expected = module.render(content).replace("(caspr_error.png)", "(../images/caspr_error.png)")
    assert (ROOT / "docs" / "data" / "caspr.md").read_text() == expected, "run python benchmarks/caspr_error.py --publish docs"
