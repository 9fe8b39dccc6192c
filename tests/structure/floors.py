"""The floors of the library, from the ground: a file imports from below, or from its own floor without a circle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.structure.sources import LIBRARY


@dataclass(frozen=True)
class Floor:
    """Folders and single modules under ``gradmaker``; the longest entry that a module begins with is its room."""

    rooms: tuple[str, ...]
    in_order: bool = False
    """Whether each room imports from those before it alone, as if they were floors."""


INIT = "__init__"
"""The room of ``gradmaker/__init__.py`` itself."""

FLOORS = (
    Floor(("version", "errors", "trees", "reentrant", "options", "linalg", "loss", "capture", "passes"), in_order=True),
    Floor(("curvature",)),
    Floor(("representations",)),
    Floor(("solvers",)),
    Floor(
        (
            "averages",
            "blocks",
            "block_options",
            "by_rows",
            "config",
            "elementwise",
            "failures",
            "gathering",
            "grafting",
            "groups",
            "own_parameters",
            "placement",
            "plan",
            "precision",
            "presets",
            "scale",
            "schedule",
            "stack",
            "stacking",
            "state_format",
            "step",
            "triple",
            "trust_region",
            "usage",
        )
    ),
    Floor(("checkpoint", "costs", "loops", "reports", "self_checks")),
    Floor(("maker", "measuring", "on_ranks", "planned", "preconditioner")),
    Floor(("methods",)),
    Floor(("damping_sweep", "front_door")),
    Floor((INIT, "__main__", "cli", "commands", "compare", "fidelity", "reporting", "step_costs")),
)


@dataclass(frozen=True)
class Place:
    """Where a module stands."""

    floor: int
    room: str
    rank: int = 0  # among the rooms of a floor that is in order

    @property
    def height(self) -> tuple[int, int]:
        return self.floor, self.rank


class Plan:
    """Finds the place of a module. ValueError for a table that names a room twice."""

    def __init__(self, floors: Sequence[Floor]) -> None:
        self.rooms: dict[str, Place] = {}
        for number, floor in enumerate(floors):
            for rank, room in enumerate(floor.rooms):
                if room in self.rooms:
                    raise ValueError(f"{room}: stands on floor {self.rooms[room].floor} and on floor {number}")
                self.rooms[room] = Place(number, room, rank if floor.in_order else 0)

    def place(self, module: str) -> Place | None:
        """None for a module that the table does not place."""
        parts = [INIT] if module == LIBRARY else module.split(".")[1:]
        ahead = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
        return next((self.rooms[name] for name in ahead if name in self.rooms), None)
