"""No file only hands on what others define: the check on small files with planted faults, then on the library."""

from __future__ import annotations

import pytest

from tests.structure.shims import re_exports, shims, stars
from tests.structure.sources import parse, read

SHIMS = [
    "from gradmaker.solvers import Cg",
    '"""Moved."""\nfrom __future__ import annotations\nfrom gradmaker.solvers import Cg as Cg\n\n__all__ = ["Cg"]\n',
    "from gradmaker import solvers\n\nCg = solvers.Cg\nCholesky: type = solvers.direct.Cholesky",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gradmaker.solvers import Cg\n\n__all__ = ['Cg']",
    "try:\n    from gradmaker.solvers import Cg\nexcept ImportError:\n    pass",
    "from gradmaker.solvers import *",
]
OWN = [
    "",
    '"""Nothing yet."""',
    "from __future__ import annotations\n\nLIMIT = 3",
    "from gradmaker.solvers import Cg\n\nLIMIT = 3",
    "from gradmaker.solvers import Cg\n\nPARTS = {'Cg': Cg}",
    "from gradmaker.solvers import Cg\n\nclass Faster(Cg):\n    pass",
    "from gradmaker.cli import main\n\nmain()",
    "from gradmaker.cli import main\n\nif __name__ == '__main__':\n    main()",
    "from gradmaker.options import moved\n\ndef __getattr__(name):\n    return moved(name)",
]


@pytest.mark.parametrize("text", SHIMS)
def test_a_shim_is_named(text: str) -> None:
    assert shims(parse({"gradmaker/cg.py": text, "gradmaker/loops/__init__.py": text})) == ["gradmaker/cg.py"]


@pytest.mark.parametrize("text", OWN)
def test_a_file_with_something_of_its_own_is_none(text: str) -> None:
    assert shims(parse({"gradmaker/cg.py": text})) == []


def test_names_that_are_handed_on_are_named() -> None:
    text = "from m import A, B, C as C\nimport d\n\n__all__ = ['A', 'E', 'd']\n\nclass E(B):\n    pass\n"
    assert re_exports(parse({"gradmaker/cg.py": text})["gradmaker.cg"]) == ["A", "C", "d"]


def test_stars_are_named() -> None:
    assert stars(parse({"gradmaker/cg.py": "import m\nfrom m import *\nfrom m import a"})) == ["gradmaker/cg.py:2"]


# --- the library ----------------------------------------------------------------------------------------------------------
def test_no_file_is_a_shim() -> None:
    assert shims(read()) == []


def test_no_file_imports_a_star() -> None:
    assert stars(read()) == []


def test_names_are_public_where_they_are_defined() -> None:
    found = [f"{s.path}: {', '.join(names)}" for s in read().values() if not s.package and (names := re_exports(s))]
    assert not found, "\n".join(found)
