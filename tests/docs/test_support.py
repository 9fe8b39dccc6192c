"""What `setup.cfg` declares is what `docs/support.md` says was run."""

from __future__ import annotations

import re
from configparser import ConfigParser

from tests.docs.test_packaging import ROOT


def declared() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def rows() -> list[list[str]]:
    """Of the table: Python, torch, NumPy, tests, passed, skipped, failed."""
    lines = (ROOT / "docs" / "support.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split(".")[:2])


def test_every_declared_python_was_run() -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)", declared()["metadata"]["classifiers"])
    assert [minor(row[0]) for row in rows()] == [minor(version) for version in classifiers]
    assert declared()["options"]["python_requires"] == f">={classifiers[0]}"


def test_the_lowest_torch_was_run() -> None:
    (lowest,) = re.findall(r"torch>=([\d.]+)", declared()["options"]["install_requires"])
    assert min(minor(row[1]) for row in rows()) == minor(lowest)


def test_the_pinned_torch_is_a_row() -> None:
    (pinned,) = re.findall(r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned in [row[1] for row in rows()]
