"""`benchmarks/structure.py` on small sources with known numbers; `benchmarks/operations.py` on work that is counted by hand."""

from __future__ import annotations

import ast
import json

import pytest
import torch

from benchmarks import operations, structure
from tests.structure.floors import Floor
from tests.structure.sources import parse

BRANCHES = {
    "pass": 1,
    "x = a and b or c if d else [e for e in f if g]": 1,
    "if a:\n  pass\nelif b:\n  pass\nelse:\n  pass": 3,
    "if a:\n  pass\nelse:\n  if b:\n    pass": 3,
    "for a in b:\n  pass\nelse:\n  pass": 2,
    "while a:\n  with b:\n    if c:\n      pass": 3,
    "try:\n  pass\nexcept A:\n  pass\nexcept B:\n  pass\nfinally:\n  pass": 3,
    "try:\n  pass\nexcept A:\n  pass\nelse:\n  pass": 3,
    "match a:\n  case 1:\n    pass\n  case _:\n    pass": 2,
    "match a:\n  case 1:\n    pass\n  case [b] if c:\n    pass": 3,
    "match a:\n  case 1:\n    pass\n  case b:\n    pass": 2,
    "match a:\n  case 1:\n    pass\n  case _ if b:\n    pass": 3,
    "def g():\n  if a:\n    pass": 3,
    "class A:\n  def g(self):\n    pass": 2,
    "g = lambda: 1 if a else 2": 1,
}
SOURCES = {
    "solvers/base.py": """
class Root:
    way: ClassVar[str] = "up"

class Solver(Root, ABC):
    needs: ClassVar[type]
    linear: bool = True
    _hidden: int = 0
    idle = {}

    @property
    def power(self) -> float: ...
    @abstractmethod
    def prepare(self, state: Any) -> dict[str, Any]: ...
    def solve(self, state: "Any", g: Literal["not one"]) -> typing.Any: ...
    def _help(self): ...
    def __init__(self): ...
""",
    "solvers/cg.py": """
from typing import cast
from gradmaker.solvers.base import Solver
Free: TypeAlias = Callable[..., Any]

class Cg(base.Solver):
    linear: bool = False
    def solve(self): return cast(Any, self)  # type: ignore[return-value]

class Fast(Cg, Generic[T]):
    idle = 3
    def solve(self):
        return "# type: ignore"

class Other:
    def power(self): ...
""",
    "curvature/base.py": "class Curvature: ...",
    "representations/base.py": "class Representation(Generic[T]):\n    pass\n\nclass Dense(Representation[int]):\n    pass\n",
}


@pytest.mark.parametrize(("body", "expected"), BRANCHES.items())
def test_complexity_is_that_of_ruff(body: str, expected: int) -> None:
    """The numbers are those that ruff's C901 prints with ``max-complexity = 0``."""
    function = ast.parse("def f():\n" + "\n".join(f"  {line}" for line in body.splitlines())).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert structure.complexity(function) == expected


def test_percentiles_are_values() -> None:
    values = list(range(100, 0, -1))
    assert [structure.percentile(values, share) for share in (0.9, 0.99, 1.0)] == [90, 99, 100]
    assert structure.percentile([7], 0.9) == 7


def test_base_classes_by_hand() -> None:
    numbers = structure.measure(parse(SOURCES))
    solver = numbers["base class `Solver`"]
    assert [solver[key] for key in ("members", "annotations", "properties", "methods", "subclasses")] == [7, 4, 1, 2, 2]
    assert solver["overridden by one subclass"] == "2 (idle, linear)"
    assert solver["overridden by none"] == "4 (needs, power, prepare, way)"
    assert numbers["base class `Curvature`"]["members"] == 0
    assert numbers["base class `Representation`"]["subclasses"] == 1


def test_types_by_hand() -> None:
    assert structure.measure(parse(SOURCES))["types"] == {
        "`Any` in annotations": 4,
        "`Any` elsewhere": 2,
        "`cast(`": 1,
        "`# type: ignore`": 1,
    }


def test_sizes_and_borders_by_hand() -> None:
    floors = (Floor(("solvers.cg", "curvature")), Floor(("solvers", "representations")))
    numbers = structure.measure(parse(SOURCES), floors)
    assert numbers["sizes"] == {"files": 4, "lines": 39, "longest file": "17 (solvers/base.py)"}
    assert numbers["lines of a function"]["max"] == "2 (solvers/cg.py: solve)"
    assert numbers["borders"]["imports, pairs of files"] == numbers["borders"]["that run up"] == 1
    assert "| borders | that run up | 1 |" in structure.table(numbers)
    assert json.loads(json.dumps(numbers)) == numbers


def test_operations_and_reads_by_hand() -> None:
    x = torch.arange(6.0)

    def work() -> None:
        y = x.view(2, 3) + 1  # a view, a sum
        y.mul_(2)
        y.tolist()
        bool(y[0, 0] > 0)  # two views, a comparison, a read
        torch.equal(y, y)
        y.nonzero()

    count = operations.counted(work)
    assert (count.operations, count.views) == (9, 3)
    assert count.reads == {"tolist": 1, "_local_scalar_dense": 1, "equal": 1, "nonzero": 1}


def test_backward_passes_are_counted() -> None:
    w = torch.ones(3, requires_grad=True)
    forward = operations.counted(lambda: (w * w).sum()).operations
    assert operations.counted(lambda: (w * w).sum().backward()).operations > forward + 2


def test_a_report_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of all kinds, by what they have to do."""
    monkeypatch.setattr(operations, "MANY", 3)
    found = operations.measure(("shampoo",), "cpu")
    steps = {kind: count["operations"] for kind, count in found["steps"]["shampoo"].items()}
    assert found["gradient"]["operations"] < steps["idle"] < min(steps["measured"], steps["refreshed"])
    assert max(steps, key=lambda kind: steps[kind]) == "measured and refreshed"
    assert found["gradient"]["reads"] == found["steps"]["shampoo"]["idle"]["reads"] == {}
    text = operations.report(found)
    assert text.startswith(f"torch {torch.__version__}") and text.count("| shampoo |") == 2 * len(operations.KINDS)
