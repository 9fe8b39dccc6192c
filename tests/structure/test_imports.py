"""No import runs up, and none in a circle: the check on small trees with planted faults, then on the library."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.structure.floors import FLOORS, Floor, Plan
from tests.structure.imports import Edge, circles, edges, entangled, loops, unplaced, up_runs
from tests.structure.sources import parse, read

TABLE = (Floor(("options", "linalg"), in_order=True), Floor(("solvers",)), Floor(("plan", "state")), Floor(("__init__", "cli")))


def tree(**files: str) -> dict[str, str]:
    """Small sources by path: ``solvers__cg`` is solvers/cg.py, ``plan`` is gradmaker/plan.py."""
    made = {}
    for name, text in files.items():
        path = name.replace("__", "/")
        made[f"{path}.py" if path.startswith("solvers/") else f"gradmaker/{path}.py"] = text
    return made


SOUND = {
    "gradmaker/__init__.py": "from gradmaker.plan import Plan",
    **tree(
        options__checks="import torch",
        linalg__roots="from gradmaker.options.checks import check",
        solvers__base="from gradmaker.linalg.roots import root\nfrom gradmaker.options import checks",
        solvers__cg="from gradmaker.solvers.base import Solver",
        plan="import gradmaker.solvers.cg\nfrom gradmaker.state import State",
        state="from collections.abc import Sequence",
        cli="import gradmaker",
    ),
}


def test_a_sound_tree_passes() -> None:
    sources = parse(SOUND)
    assert (up_runs(sources, TABLE), circles(sources, TABLE), unplaced(sources, TABLE)) == ([], [], [])
    assert Edge("gradmaker.solvers.base", "gradmaker.options.checks", 2) in edges(sources)
    assert Edge("gradmaker.plan", "gradmaker.solvers.cg", 1) in edges(sources)
    assert len(edges(sources)) == 8


@pytest.mark.parametrize(
    "planted",
    [
        "from gradmaker.plan import Plan",
        "import gradmaker.plan",
        "import gradmaker.plan as p",
        "from gradmaker import plan",
        "from ..plan import Plan",
        "from .. import plan",
        "def solve():\n    from gradmaker.plan import Plan",
        "async def solve():\n    import gradmaker.plan",
        "if TYPE_CHECKING:\n    from gradmaker.plan import Plan",
        "try:\n    import yaml\nexcept ImportError:\n    import gradmaker.plan",
        "class Cg:\n    def solve(self):\n        if self:\n            from gradmaker.plan import Plan",
        "def solve():\n    importlib.import_module('gradmaker.plan')",
        "plan = _import_module('gradmaker.plan')",
        "plan = __import__('gradmaker.plan')",
    ],
)
def test_an_up_run_is_named(planted: str) -> None:
    (said,) = up_runs(parse(SOUND | {"solvers/cg.py": f"import torch\n{planted}\n"}), TABLE)
    line = 2 + planted.count("\n")
    assert said == f"solvers/cg.py:{line} (floor 1, solvers) imports gradmaker.plan (floor 2, plan)"


def test_the_package_itself_is_at_the_top() -> None:
    (said,) = up_runs(parse(SOUND | {"solvers/cg.py": "from gradmaker import METHODS"}), TABLE)
    assert said == "solvers/cg.py:1 (floor 1, solvers) imports gradmaker (floor 3, __init__)"


def test_a_name_of_a_folder_leads_to_its_init() -> None:
    files = SOUND | {"solvers/__init__.py": "from gradmaker.solvers.cg import Cg", "linalg.py": ""}
    (said,) = up_runs(parse(files | {"gradmaker/linalg/roots.py": "from gradmaker.solvers import Cg"}), TABLE)
    assert said == "gradmaker/linalg/roots.py:1 (floor 0, linalg) imports gradmaker.solvers (floor 1, solvers)"


def test_rooms_in_order_import_from_those_before_them() -> None:
    planted = {"gradmaker/options/checks.py": "from gradmaker.linalg.roots import root", "gradmaker/linalg/roots.py": ""}
    assert up_runs(parse(SOUND | planted), TABLE) == [
        "gradmaker/options/checks.py:1 (floor 0, options) imports gradmaker.linalg.roots (floor 0, linalg)"
    ]
    assert up_runs(parse(SOUND | planted), (Floor(("options", "linalg")), *TABLE[1:])) == []


def test_what_only_looks_like_an_import_is_none() -> None:
    looks = '"""from gradmaker.plan import Plan"""\nimport gradmaker_plan\nfrom planner import gradmaker  # gradmaker.plan\n'
    assert up_runs(parse(SOUND | {"solvers/cg.py": looks}), TABLE) == []


# --- circles --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("planted", ["{}", "def later():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_circle_is_named(planted: str) -> None:
    files = SOUND | {"gradmaker/state.py": planted.format("from gradmaker.plan import Plan")}
    assert circles(parse(files), TABLE) == ["gradmaker.plan -> gradmaker.state -> gradmaker.plan"]
    assert up_runs(parse(files), TABLE) == []


def test_a_circle_through_the_folder_is_named() -> None:
    files = {
        "solvers/__init__.py": "from gradmaker.solvers.cg import Cg",
        "solvers/cg.py": "from gradmaker.solvers import base",
    }
    files["solvers/base.py"] = "from gradmaker.solvers import Cg"
    assert circles(parse(files), TABLE) == [
        "gradmaker.solvers -> gradmaker.solvers.cg -> gradmaker.solvers.base -> gradmaker.solvers"
    ]


def test_a_circle_over_floors_is_an_up_run() -> None:
    sources = parse(SOUND | {"solvers/cg.py": "from gradmaker.plan import Plan"})
    assert circles(sources, TABLE) == [] and len(up_runs(sources, TABLE)) == 1
    assert entangled(edges(sources)) == {"gradmaker.plan", "gradmaker.solvers.cg"}


def test_circles_are_those_of_the_closure() -> None:
    """Against Warshall's closure, on random graphs."""
    draw, sides = random.Random(0), range(7)
    for _ in range(200):
        arrows = {(a, b) for a in sides for b in sides if a != b and draw.random() < 0.18}
        closure = set(arrows)
        for k in sides:
            closure |= {(a, b) for a in sides for b in sides if (a, k) in closure and (k, b) in closure}
        classes = {frozenset(b for b in sides if (a, b) in closure and (b, a) in closure) for a in sides} - {frozenset()}
        graph = [Edge(str(a), str(b), 1) for a, b in sorted(arrows)]
        found = loops(graph)
        homes = [next(group for group in classes if int(circle[0]) in group) for circle in found]
        assert len(set(homes)) == len(homes) == len(classes)
        for circle, group in zip(found, homes, strict=True):
            assert circle[0] == circle[-1] and set(map(int, circle)) <= group
            assert all((int(a), int(b)) in arrows for a, b in pairwise(circle))
        assert {int(name) for name in entangled(graph)} == {a for group in classes for a in group}


# --- the table ------------------------------------------------------------------------------------------------------------
def test_the_longest_entry_places_a_module() -> None:
    plan = Plan((Floor(("solvers.base",)), Floor(("solvers", "__init__"))))
    found = [plan.place(f"gradmaker{name}") for name in ("", ".solvers", ".solvers.base", ".solvers.base_two", ".cli")]
    assert [place.floor if place else None for place in found] == [1, 1, 0, 1, None]


def test_a_room_stands_on_one_floor() -> None:
    with pytest.raises(ValueError, match="solvers: stands on floor 0 and on floor 1"):
        Plan((Floor(("solvers",)), Floor(("cli", "solvers"))))


def test_what_the_table_does_not_place_is_named() -> None:
    sources = parse({path: text for path, text in SOUND.items() if "state" not in path} | {"gradmaker/utils.py": ""})
    assert unplaced(sources, TABLE) == [
        "gradmaker/utils.py: stands on no floor",
        "state: no such file or folder, though floor 2 names it",
    ]


# --- the library ----------------------------------------------------------------------------------------------------------
def test_its_sources_are_found() -> None:
    sources = read()
    for module in ("gradmaker", "gradmaker.curvature", "gradmaker.representations", "gradmaker.solvers"):
        assert module in sources
    assert len(edges(sources)) > len(sources)


def test_every_file_stands_on_a_floor() -> None:
    found = unplaced(read(), FLOORS)
    assert not found, "\n".join(found)


def test_no_import_runs_up() -> None:
    found = up_runs(read(), FLOORS)
    assert not found, "\n".join(found)


def test_no_imports_run_in_a_circle() -> None:
    found = circles(read(), FLOORS)
    assert not found, "\n".join(found)
