"""docs/command.md is what the subcommands say of themselves."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_the_command_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    sys.modules.pop("make_command", None)
    from make_command import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python docs/make_command.py"
