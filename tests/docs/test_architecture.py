"""The tour of the code: its picture, its paths and its two ways are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmaker import from_config
from tests.docs.test_docs import ROOT, script
from tests.structure.sources import FOLDERS, module_of

PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
PACKAGES = sorted(path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py"))
STOP = re.compile(r"^(\d+)\. \[`([^`]+)`\]\(\.\./([^)]+)\), `([\w.]+)`: ", re.MULTILINE)


class Stop(NamedTuple):
    """A file of a way, and the function to read there."""

    path: str
    function: str


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def stops(title: str) -> list[Stop]:
    found = STOP.findall(section(title))
    assert [int(number) for number, *_ in found] == list(range(1, len(found) + 1))
    assert all(shown == linked for _, shown, linked, _ in found)
    return [Stop(path, function) for _, path, _, function in found]


# --- the picture and the folders ------------------------------------------------------------------------------------------
def test_the_picture_is_current() -> None:
    made: Any = script(ROOT / "docs" / "make_floors.py")
    assert made.PICTURE.read_text(encoding="utf-8") == made.render(), "run python docs/make_floors.py"


def test_the_picture_shows_every_room_once() -> None:
    made: Any = script(ROOT / "docs" / "make_floors.py")
    shown = re.findall(r'class="m">([^<]+)<', made.render())
    assert sorted(shown) == sorted(made.shown(room) for floor in made.FLOORS for room in floor.rooms)
    boxes = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="26"', made.render())
    assert len(boxes) == len(shown) and all(float(x) + float(width) < made.WIDTH - made.PAD for x, width in boxes)


def test_a_paragraph_for_every_folder() -> None:
    named = re.findall(r"^\[`([\w/]+)/`\]\(\.\./([\w/]+)/__init__\.py\)", section("Folders"), re.MULTILINE)
    assert all(shown == linked for shown, linked in named)
    assert sorted(shown for shown, _ in named) == sorted(path.relative_to(ROOT).as_posix() for path in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_folder_says_what_belongs_in_it(package: Path) -> None:
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    first, _, paragraph = said.partition("\n\n")
    assert first and paragraph.endswith("."), f"{package.name}/__init__.py: a line, then a paragraph of what belongs there"


def test_paths_exist() -> None:
    """A name without a folder lies in the folder that its paragraph is about."""
    count = 0
    for paragraph in TEXT.split("\n\n"):
        folder = next(iter(re.findall(r"^\[`([\w/]+)/`\]", paragraph)), "")
        for name in re.findall(r"`([\w./]+)`", paragraph):
            if "/" in name or name.endswith(".py"):
                count += 1
                assert (ROOT / (name if "/" in name else f"{folder}/{name}")).exists(), f"{PAGE.name}: there is no {name}"
    assert count > 40


# --- the ways -------------------------------------------------------------------------------------------------------------
def code_of(stop: Stop) -> CodeType:
    found: Any = import_module(module_of(stop.path))
    for name in stop.function.split("."):
        found = vars(found)[name]  # its own, not an inherited one
    code: CodeType = inspect.unwrap(getattr(found, "fget", found)).__code__
    assert Path(code.co_filename).resolve() == ROOT / stop.path, f"{stop.function} is not defined in {stop.path}"
    return code


def first_calls(wanted: Sequence[Stop], run: Callable[[], object]) -> list[Stop]:
    """The stops in the order in which their functions are called first."""
    by_code = {code_of(stop): stop for stop in wanted}
    found: dict[Stop, None] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in by_code:
            found.setdefault(by_code[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return [*found]


@pytest.mark.parametrize("title", ["The way of a batch", "The way of an option"])
def test_ten_stops_none_visited_twice(title: str) -> None:
    way = stops(title)
    assert len(way) == len({stop.path for stop in way}) == 10


def test_the_way_of_a_batch() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    maker: Any = from_config(model, {"method": "kfac"})
    way = stops("The way of a batch")

    def setup() -> None:
        y = maker.setup_model_call(model, torch.randn(6, 5))
        maker.setup_loss_call(F.cross_entropy, y, torch.randint(3, (6,)))

    setup()
    maker.forward_and_backward()  # makes the self-checks
    setup()
    assert first_calls(way, maker.forward_and_backward) == way


def test_the_way_of_an_option(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "kfac.yaml").write_text("method: kfac\ndamping: 1e-2\n", encoding="utf-8")
    way = stops("The way of an option")
    made: list[Any] = []
    found = first_calls(way, lambda: made.append(from_config(nn.Sequential(nn.Linear(3, 2)), tmp_path / "kfac.yaml")))
    assert found == way
    assert {block.triple.solver.damping for block in made[0].plan.blocks} == {1e-2}
