"""KrADagrad's quadratic: the problem, the protocol against explicit loops, the claims of the page."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.docs.test_docs import ROOT, script
from tests.methods.test_krad import Release, Star, eye, power

pytest.importorskip("typer")
pytest.importorskip("matplotlib")


def load(folder: str, name: str) -> Any:
    before = dict(sys.modules)
    sys.modules[name] = sys  # dataclasses look their module up
    try:
        return script(ROOT / folder / f"{name}.py")
    finally:
        sys.modules.clear()
        sys.modules.update(before)


quadratic, pages = load("examples", "kradagrad_quadratic"), load("docs", "make_quadratic")


# --- the problem ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("condition", [1e4, 1e8])
def test_the_problem_is_the_published_one(condition: float) -> None:
    """Drawn as the authors draw it: both bases from one seed, in order, then the start from another."""
    n = 20
    torch.manual_seed(4750)
    bases = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2)]
    r = torch.linspace(0, -math.sqrt(math.log10(condition)), n, dtype=torch.float64)
    H = [Q @ torch.diag(10.0 * 10.0 ** -(r**2)) @ Q.T for Q in bases]
    torch.manual_seed(95054)
    X = torch.randn(n, n)
    model = quadratic.Quadratic(n, condition)
    f = model()
    f.backward()
    expected = torch.einsum("ij,ik,kl,lj->", X.double(), H[0], X.double(), H[1])
    assert abs(float(f.detach() - expected)) < 1e-10 * float(expected)
    gradient = 2 * H[0] @ X.double() @ H[1]
    assert float((model.X.grad - gradient).abs().max()) < 1e-7 * float(gradient.abs().max())
    s = torch.linalg.eigvalsh(model.H1)
    assert abs(float(s.max()) - 10) < 1e-9 and abs(float(s.max() / s.min()) / condition - 1) < 1e-4


def test_a_seed_changes_problem_and_start_and_a_move_the_start_a_little() -> None:
    first, second, moved = (quadratic.Quadratic(6, 1e4, *arguments) for arguments in ((0,), (1,), (0, 3)))
    assert not torch.allclose(first.H0, second.H0) and not torch.allclose(first.X, second.X)
    change = ((moved.X - first.X) / first.X).detach().abs()
    assert torch.equal(first.H0, moved.H0) and 1e-7 < float(change.max()) < 1e-5


# --- the protocol ---------------------------------------------------------------------------------------------------------
class Gram:
    """Shampoo with ``H_0 = ridge I``, or ``(ridge + lambda_max) I`` relative to the statistic of now."""

    def __init__(self, ridge: float, relative: bool = False) -> None:
        self.ridge, self.relative, self.H = ridge, relative, [0.0, 0.0]

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.H = [H + S for H, S in zip(self.H, (g @ g.T, g.T @ g), strict=True)]
        unit = [torch.linalg.eigvalsh(H).max() if self.relative else 1.0 for H in self.H]
        L, R = (power(torch.linalg.inv(H + self.ridge * u * eye(len(g))), 0.25) for H, u in zip(self.H, unit, strict=True))
        return L @ m @ R


class Held:
    """A rule whose statistic takes in every gradient and whose roots are those of steps 0, 1, 2, 5, 8, ..."""

    def __init__(self, rule: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self.rule, self.basis = rule, None

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        """``P`` is linear: its columns are what it makes of the unit matrices."""
        n, units = len(g), torch.eye(g.numel(), dtype=g.dtype).reshape(-1, *g.shape)
        columns = [self.rule(g if k == 0 else 0 * g, unit, step).reshape(-1) for k, unit in enumerate(units)]
        if self.basis is None or step < 3 or step % 3 == 2:
            self.basis = torch.stack(columns, 1)
        return (self.basis @ m.reshape(-1)).reshape(n, n)


def loop(model: Any, rule: Any, lr: float, iterations: int, plain: int, start: int, graft: bool) -> list[float]:
    """``f`` by explicit steps: rule, length, the authors' momentum."""
    H0, H1, X = model.H0, model.H1, model.X.detach().double().clone()
    M, values = torch.zeros_like(X), []
    for t in range(iterations):
        values.append(float((X * (H0 @ X @ H1)).sum()))
        g = 2 * H0 @ X @ H1
        U = rule(g, g, t)
        U = g if t < start else U * g.norm() / U.norm() if graft else U
        if t < plain:
            M = 0.9 * M + g
            X = X - lr * 1.8 * g
        else:
            M = 0.9 * (0.9 * M + U) + U
            X = X - lr * M
    return values


RULES: dict[str, Callable[[], Any]] = {
    "Shampoo, float64": lambda: Held(Gram(1e-8)),
    "Shampoo, absolute 1e-8": lambda: Held(Gram(1e-8)),
    "Shampoo, relative 1e-6": lambda: Held(Gram(1e-6, relative=True)),
    "Shampoo, square roots": lambda: Held(Gram(1e-10, relative=True)),
    "KrADagrad*": lambda: Held(Star("d-tr", 1e-8, None, relative=False, published=True)),
    "KrADagrad*, array, 1e-10": lambda: Held(Star("exact", 1e-10, None)),
    "KrADagrad*, array, 1e-6": lambda: Held(Star("exact", 1e-6, None)),
    "KrADagrad*, array, absolute 1e-8": lambda: Held(Star("exact", 1e-8, None, relative=False)),
}


@pytest.mark.parametrize("name", RULES)
def test_rows_take_the_authors_steps(name: str) -> None:
    """In float64, where all forms of a statistic agree."""
    model = quadratic.Quadratic(4, 1e2).double()
    expected = loop(model, RULES[name](), 2e-3, 20, plain=2, start=2, graft=True)
    step, _ = quadratic.session(quadratic.ROWS[name], model, 2e-3, {})
    found = [step() for _ in range(20)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    plain = loop(quadratic.Quadratic(4, 1e2), lambda g, m, t: g, 2e-3, 20, plain=2, start=2, graft=False)
    assert abs(expected[-1] / plain[-1] - 1) > 1e-3


def test_the_alternating_row_takes_its_steps() -> None:
    model = quadratic.Quadratic(5, 1e2).double()
    expected = loop(model, Release(1e-8, 3, None, 3), 1e-3, 25, plain=0, start=0, graft=False)
    step, _ = quadratic.session(quadratic.ROWS["KrADagrad"], model, 1e-3, {})
    torch.testing.assert_close([step() for _ in range(25)], expected, rtol=1e-6, atol=0)


def test_rows_of_their_own_length_have_no_plain_steps() -> None:
    model = quadratic.Quadratic(4, 1e2).double()
    expected = loop(model, Held(Gram(1e-8)), 0.3, 12, plain=0, start=0, graft=False)
    step, _ = quadratic.session(quadratic.ROWS["Shampoo, float64, own length"], model, 0.3, {})
    torch.testing.assert_close([step() for _ in range(12)], expected, rtol=1e-6, atol=0)


def test_array_is_shampoo_in_exact_arithmetic() -> None:
    ends = []
    for parts in (
        {"representation": "KronDims", "solver": {"Eigh": {"power": -0.5, "damping": 1e-4, "split": "each"}}},
        {"representation": {"InverseDims": {"ridge": 1e-4, "relative": False}}, "solver": "PositiveRoot"},
    ):
        row = quadratic.Row({**quadratic.ABSOLUTE, **parts, "dtype": "float64"}, "published", 5e-3)
        ends.append(quadratic.trial(row, quadratic.Quadratic(24, 1e4).double(), 5e-3, 80, {})["end"])
    assert abs(ends[0] / ends[1] - 1) < 1e-6


# --- the claims -----------------------------------------------------------------------------------------------------------
def run(name: str, **options: Any) -> dict[str, Any]:
    row = quadratic.ROWS[name]
    return quadratic.trial(row, quadratic.Quadratic(128, 1e4), row.lr, 250, options)  # type: ignore[no-any-return]


def test_the_published_star_is_nesterov_sgd() -> None:
    star, nesterov, array = run("KrADagrad*"), run("Nesterov-SGD"), run("KrADagrad*, array, 1e-10")
    assert abs(star["end"] / nesterov["end"] - 1) < 0.01
    assert max(star["conditions"]) < 1.2 and star["inactive"]
    assert array["end"] < 0.1 * star["end"] and min(array["conditions"]) > 1e6 and not array["inactive"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in quadratic.ROWS.items() if any(row.reference)])
def test_published_rates_give_the_published_values(name: str) -> None:
    """Within 15 %; within a factor of two where rounding decides, see the ranges on the page."""
    row = quadratic.ROWS[name]
    for condition, reference in zip(quadratic.CONDITIONS, row.reference, strict=True):
        if reference is not None:
            end = quadratic.trial(row, quadratic.Quadratic(128, condition), row.lr, 250, {})["end"]
            slack = 2 if row.rounding else 1.15
            assert reference / slack < end < reference * slack, (condition, end, reference)


def test_saved_numbers_agree_with_the_references() -> None:
    saved = json.loads((ROOT / "docs" / "data" / "quadratic.json").read_text(encoding="utf-8"))
    known = [row for row in saved["published"] if row["reference"] is not None]
    assert len(known) == sum(len([x for x in row.reference if x]) for row in quadratic.ROWS.values())
    for row in known:
        assert 1 / 2 < row["end"] / row["reference"] < 2
        assert row["rounding"] or abs(row["end"] / row["reference"] - 1) < 0.15, row["method"]


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "data" / "quadratic.md").read_text(encoding="utf-8")
    assert page == pages.render(), "run python docs/make_quadratic.py"
    saved = pages.load(ROOT / "docs")
    for name, body in pages.tables(saved).items():
        assert f"<!-- {name} -->\n{body}" in page


# --- the command ----------------------------------------------------------------------------------------------------------
class Scripted:
    """Ends of trials by a formula."""

    def __init__(self, end: Callable[[float], float | None]) -> None:
        self.end = end

    def get(self, name: str, condition: float, seed: int, lr: float, moved: int = 0, start: str = "") -> dict[str, Any]:
        return {"end": self.end(lr)}


@pytest.mark.parametrize(
    "best, rate, edge",
    [(1e-3, 1e-3, False), (1.9e-3, 1.7e-3, False), (5.0, 5.5, False), (2e-5, 1.7e-5, False), (1e-9, 5.5e-7, True)],
)
def test_a_grid_grows_while_the_best_rate_stands_at_its_edge(best: float, rate: float, edge: bool) -> None:
    found = quadratic.tune(Scripted(lambda lr: abs(math.log(lr / best))), "SGD", 1e4, range(2))
    assert found["rate"] == pytest.approx(rate) and found["edge"] is edge
    assert found["grid"][0] <= 1e-4 and found["grid"][1] >= 0.1 and found["grid"][0] <= rate * 2


def test_rates_at_which_a_seed_diverges_are_not_chosen() -> None:
    found = quadratic.tune(Scripted(lambda lr: None if lr > 2e-3 else 1 / lr), "SGD", 1e4, range(2))
    assert found["rate"] == 1.7e-3 and not found["edge"]


def small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[int], None]:
    monkeypatch.setattr(quadratic, "GRID", range(-12, -7, 2))
    monkeypatch.setattr(quadratic, "WIDEST", range(-12, -7, 2))
    monkeypatch.setattr(quadratic, "MOVES", (1,))
    (folder / "docs" / "data").mkdir(parents=True)
    page = "\n".join(f"<!-- {n} -->\n<!-- end {n} -->" for n in ("published", "tuned 1e+04", "starts", "time", "machine"))
    (folder / "docs" / "data" / "quadratic.md").write_text(page)
    return lambda size: quadratic.main(folder / "runs", folder / "docs", size, 12, 1, [1e4], [6])


def test_the_command_writes_the_page_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = small(monkeypatch, tmp_path)
    command(6)
    page = (tmp_path / "docs" / "data" / "quadratic.md").read_text()
    assert all(page.count(f"| {name} |") >= 2 for name, row in quadratic.ROWS.items() if row.tuned and any(row.reference))
    assert (tmp_path / "docs" / "images" / "quadratic.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert all(len(found["curve"]) == 12 for found in results["trials"].values() if found["end"] is not None)
    lost = next(iter(results["trials"]))
    expected = results["trials"].pop(lost)["end"]
    (tmp_path / "runs" / "results.json").write_text(json.dumps(results))
    calls: list[float] = []
    trial = quadratic.trial
    monkeypatch.setattr(quadratic, "trial", lambda row, model, lr, *rest: calls.append(lr) or trial(row, model, lr, *rest))
    command(6)
    again = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert len(calls) == 1 and again["trials"][lost]["end"] == expected
    assert (tmp_path / "docs" / "data" / "quadratic.md").read_text().split("<!-- machine")[0] == page.split("<!-- machine")[0]
    with pytest.raises(Exception, match="holds trials of"):
        command(5)
