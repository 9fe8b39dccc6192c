"""The report of a comparison of curvatures."""

from __future__ import annotations

from pathlib import Path

from gradmaker.fidelity.values import Values

__all__ = ["write_page"]


def write_page(result: Values, folder: Path, text: str) -> dict[str, Path]:
    """Write JSON and report into a folder; returns the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.json").write_text(text + "\n", encoding="utf-8")
    return {"json": folder / "fidelity.json"}
