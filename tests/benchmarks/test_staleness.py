"""The measurement of stale bases: what is measured, by hand, and that the page is that of the script."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.docs.test_docs import script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return script(ROOT / "benchmarks" / "staleness.py")


def test_a_row_by_hand(module: ModuleType) -> None:
    """A basis that is turned by an angle: ``B`` has ``(a - b) sin cos`` beside its diagonal."""
    a, b, angle = 1.0, 0.25, torch.tensor(0.2).double()
    c, s = angle.cos(), angle.sin()
    Q = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    now = torch.diag(torch.tensor([a, b]).double())
    before = Q @ now @ Q.T
    row = module.measured(now[None], before[None])
    size = (a**2 + b**2) ** 0.5
    assert row[0] == pytest.approx(float(2**0.5 * (a - b) * s * c) / size, rel=1e-9)
    assert row[1] < row[0] / 3 and row[2] < row[0]  # each step takes off the ratio of the eigenvalues or more
    root = torch.diag(torch.tensor([a + 1e-6 * a, b + 1e-6 * a], dtype=torch.float64) ** -0.25)
    assert row[5] == pytest.approx(float((Q @ root @ Q.T - root).norm() / root.norm()), rel=1e-9)
    still = module.measured(now[None], now[None])
    assert max(still) < 1e-9


def test_a_short_training_is_within_what_the_page_says(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 151)
    page = (ROOT / "benchmarks" / "staleness.md").read_text(encoding="utf-8")
    assert page.startswith(module.HEAD)
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| 0.95 ")]
    written = {int(row[1]): [float(x.split(" ")[0]) for x in row[2:]] for row in rows}
    found = module.train(0.95, 0)
    assert list(written) == list(found) == list(module.AGES)
    for age, values in found.items():
        means = torch.tensor(values).mean(0).tolist()
        assert all(0.4 < x / y < 2.5 for x, y in zip(means, written[age], strict=True)), (age, means)
