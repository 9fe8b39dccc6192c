"""`Tuning` and `Budget`: how options of a row are searched, and how long one training lasts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmaker.compare.errors import InputError

UNITS = ("epochs", "steps", "seconds")


@dataclass(frozen=True)
class Budget:
    """The length of every training: `Budget(500, "steps")`, or as text "20 epochs", "500 steps", "60 seconds"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, value: "Budget | str | int") -> "Budget":
        """A budget from text; a number counts epochs. InputError for any other."""
        if isinstance(value, Budget):
            return value
        amount, _, unit = (
            f"{value} epochs".strip().partition(" ") if isinstance(value, int) else str(value).strip().partition(" ")
        )
        unit = unit.strip() if unit.strip().endswith("s") else f"{unit.strip()}s"
        try:
            number = float(amount)
        except ValueError:
            number = 0.0
        whole = unit == "seconds" or number == int(number)
        if unit not in UNITS or number <= 0 or not whole:
            raise InputError(f"budget={value!r}: expected a positive number of {', '.join(UNITS)}, as in '20 epochs'")
        return cls(number, unit)

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the learning rate and other options of every row are chosen, on validation alone.

    Args:
        search: `grid` (extends itself at its edge until the best is inside), `random` or `optuna` (the extra `tune`).
        trials: trainings of the search, the same for every row; None: the grid and what it is extended by, or 10.
        space: what is searched, by name: `learning_rate`, options of the methods (`damping`, `decay`, `interval`, ...),
            options of the optimizer (`weight_decay`, `momentum`). A list of values, or `{low, high, log, int}`. A row takes
            those that it has; its own key `space` goes before.
        extend: how many rates a grid may add at its edges.
        seed: of the random search and of Optuna.
    """

    search: str = "grid"
    trials: int | None = None
    space: Mapping[str, Any] = field(default_factory=dict)
    extend: int = 4
    seed: int = 0

    @classmethod
    def parse(cls, value: Any) -> "Tuning":
        """From a name of a search, a mapping, the path of a YAML file, or a `Tuning`. InputError for any other."""
        if value in ("grid", cls()):
            return cls()
        raise NotImplementedError(f"tuning={value!r}")
