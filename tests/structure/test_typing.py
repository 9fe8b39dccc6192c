"""mypy sees the border between representations and solvers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AXES = ("curvature", "representations", "solvers")
LEGAL = """
from gradmaker.representations import Dense, Diagonal, Kron
from gradmaker.solvers import CG, Cholesky, Division, Solver
from gradmaker.solvers.base import AnySolver

Cholesky().prepare(Kron(), {}, None)
CG().prepare(Diagonal(), {}, None)
narrow: Solver[Dense] = Cholesky()
whatever: AnySolver = Division()
"""
ILLEGAL = {
    "Cholesky().prepare(Diagonal(), {}, None)": "[arg-type]",
    "Division().prepare(Kron(), {}, None)": "[arg-type]",
    "wide: Solver[Diagonal] = Cholesky()": "[assignment]",
    "whatever.prepare(Diagonal(), {}, None)": "[arg-type]",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_capability_that_is_lacking_is_a_type_error(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    package = tmp_path / "gradmaker"
    package.mkdir()
    for source in ((ROOT / "gradmaker").iterdir(), (ROOT / axis for axis in AXES)):
        for path in source:
            (package / path.name).symlink_to(path)
    snippet = tmp_path / "snippet.py"
    snippet.write_text(LEGAL + "\n".join(ILLEGAL) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "setup.cfg"), "snippet.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    found = {int(line.split(":")[1]): line for line in told.splitlines() if ": error: " in line}
    first = len(LEGAL.splitlines()) + 1
    assert sorted(found) == list(range(first, first + len(ILLEGAL))), told
    assert [found[line].split()[-1] for line in sorted(found)] == list(ILLEGAL.values()), told
