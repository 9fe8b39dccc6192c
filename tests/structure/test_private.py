"""No private name of another file is used: the check on small trees with planted faults, then on the library."""

from __future__ import annotations

import pytest

from tests.structure.private import inherited, unused, uses
from tests.structure.sources import parse, read

MAKER = """
class Maker:
    _count: int = 0

    def __init__(self):
        self._open = False

    def _run(self):
        return self._open, _helper()

    def join(self, other):
        return other._open and other._run() and type(self)._count and super().__init__()

def _helper():
    return Maker()._count
"""


def named(text: str, allowed: tuple[str, ...] = (), path: str = "gradmaker/loop.py") -> list[str]:
    return [use.said for use in uses(parse({"gradmaker/maker.py": MAKER, path: text}), allowed)]


def test_a_file_may_use_its_own() -> None:
    assert uses(parse({"gradmaker/maker.py": MAKER})) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(maker):\n    return maker._open", "maker._open"),
        ("def f(maker):\n    maker._open = True", "maker._open"),
        ("def f(maker):\n    del maker._open", "maker._open"),
        ("def f(maker):\n    maker._open += 1", "maker._open"),
        ("class A:\n    def f(self):\n        return self.maker._run()", "self.maker._run"),
        ("class A:\n    def f(self):\n        self.maker._open = 1", "self.maker._open"),
        ("def f(maker):\n    return lambda: [m._open for m in maker.all()]", "m._open"),
        ("def f(maker):\n    return getattr(maker, '_open', None)", "maker._open"),
        ("def f(maker):\n    setattr(maker, '_open', 1)", "maker._open"),
        ("def f(maker):\n    return maker.__open", "maker.__open"),
        ("from gradmaker.maker import _helper", "from gradmaker.maker import _helper"),
        ("from gradmaker.maker import _helper as helper", "from gradmaker.maker import _helper"),
        ("def f():\n    from gradmaker.maker import _helper", "from gradmaker.maker import _helper"),
        ("from gradmaker.maker import Maker\nMaker._count", "Maker._count"),
        ("from gradmaker.solvers._roots import root", "from gradmaker.solvers._roots import root"),
        ("import gradmaker.solvers._roots", "import gradmaker.solvers._roots"),
        ("class Held(Protocol):\n    _open: bool\n\ndef f(maker: Held):\n    return maker._open", "maker._open"),
        ("class Held(Protocol[T]):\n    _open: bool\n\ndef f(maker: Held):\n    return maker._open", "maker._open"),
    ],
)
def test_a_use_is_named(text: str, said: str) -> None:
    assert named(text) == [said]


@pytest.mark.parametrize(
    "text",
    [
        "def f(maker):\n    return maker.open, maker.__class__, maker.__dict__",
        "for _ in range(3):\n    pass",
        "class A:\n    _open = 1\n\ndef f(a):\n    return a._open",
        "class A:\n    def __init__(self):\n        object.__setattr__(self, '_open', 1)\n\ndef f(a):\n    return a._open",
        "from torch.nn.modules.conv import _ConvNd\n\ndef f(m):\n    return isinstance(m, _ConvNd)",
        "from gradmaker.maker import Maker as _Maker",
        "def f(maker):\n    return getattr(maker, 'open')",
        "def f(ts):\n    torch._foreach_add_(ts, 1)",
        "class B(Maker):\n    def f(self):\n        return self._open",
    ],
)
def test_what_is_no_use_of_another_file(text: str) -> None:
    assert named(text) == []


def test_a_module_of_a_folder_is_private_to_it() -> None:
    assert named("from gradmaker.solvers._roots import root", path="solvers/cg.py") == []


def test_allowed_names_are_let_through_and_missed_when_unused() -> None:
    text = "def f(p):\n    return p._version, p._base"
    assert named(text) == ["p._base", "p._version"]
    assert named(text, ("_version", "_base", "_modules")) == []
    assert unused(parse({"gradmaker/loop.py": text}), ("_version", "_base", "_modules")) == ["_modules"]


def test_uses_through_self_are_told_apart() -> None:
    text = (
        "class B(Maker):\n    def f(self):\n        return self._open, self._mine\n\n    def _mine(self):\n        self._else"
    )
    found = inherited(parse({"gradmaker/maker.py": MAKER, "gradmaker/loop.py": text}))
    assert [str(use) for use in found] == ["gradmaker/loop.py:3: self._open"]


# --- the library ----------------------------------------------------------------------------------------------------------
def test_every_allowed_name_is_used() -> None:
    assert unused(read()) == []


def test_no_private_name_of_another_file_is_used() -> None:
    found = uses(read())
    assert not found, "\n".join(map(str, found))
