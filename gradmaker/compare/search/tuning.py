"""`Tuning`: how the options of every row are searched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import read_yaml
from gradmaker.compare.rows import Row
from gradmaker.compare.search.searches import RATE, GridSearch, OptunaSearch, RandomSearch, Search
from gradmaker.compare.search.spaces import Space, parse_space
from gradmaker.options.suggestions import did_you_mean

SEARCHES = ("grid", "random", "optuna")
TRIALS = 10  # of a random search, and of Optuna
WIDER = 10**0.5  # a range for the learning rate reaches this far beyond the grid of a row


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the learning rate and other options of every row are chosen, on validation alone.

    Args:
        search: `grid` (extends itself at its edge until the best is inside), `random` or `optuna` (the extra `tune`).
        trials: trainings of the search, the same for every row; None: the grid and what it is extended by, or 10.
        space: what is searched, by name: `learning_rate`, options of the methods (`damping`, `decay`, `interval`, ...),
            options of the optimizer (`weight_decay`, `momentum`). A list of values, or `{low, high, log, int, points}`. A row
            takes those that it has; its own key `space` goes before.
        extend: how many rates a grid may add at its edges.
        seed: of the random search and of Optuna.
    """

    search: str = "grid"
    trials: int | None = None
    space: Mapping[str, Any] = field(default_factory=dict)
    extend: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise InputError(f"search={self.search!r}: {did_you_mean(str(self.search), SEARCHES)}")
        if self.trials is not None and (not isinstance(self.trials, int) or self.trials < 1):
            raise InputError(f"trials={self.trials!r}: expected an integer of at least 1, or none")
        if not isinstance(self.extend, int) or self.extend < 0:
            raise InputError(f"extend={self.extend!r}: expected an integer of at least 0")
        if not isinstance(self.space, Mapping):
            raise InputError(f"space={self.space!r}: expected a mapping of options to values or ranges")
        for name, given in self.space.items():
            parse_space(str(name), given)

    @classmethod
    def parse(cls, value: Any) -> "Tuning":
        """From a name of a search, a mapping, the path of a YAML file, or a `Tuning`. InputError for any other."""
        if isinstance(value, Tuning):
            return value
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
            value = read_yaml(Path(value))
            value = value.get("tuning", value) if isinstance(value, Mapping) else value
        if isinstance(value, str):
            return cls(search=value)
        if not isinstance(value, Mapping):
            raise InputError(f"tuning={value!r}: expected {', '.join(SEARCHES)}, a mapping, or a YAML file of one")
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in value if key not in known]:
            raise InputError(f"tuning: {unknown[0]!r}: {did_you_mean(str(unknown[0]), known)}")
        return cls(**value)

    def check(self, rows: Iterable[Row]) -> None:
        """InputError for an option that no row has."""
        rows = list(rows)
        for name in self.space:
            if not any(row.takes(name) for row in rows):
                raise InputError(f"space: none of the rows has an option {name!r}")
        for row in rows:
            for name, given in row.space.items():
                parse_space(str(name), given)
                if not row.takes(name):
                    raise InputError(f"{row.label}: space: it has no option {name!r}")

    def of(self, row: Row) -> Search:
        """The search of a row. InputError for a grid of more trainings than `trials`."""
        spaces = self.spaces(row)
        if self.search == "grid":
            rates = spaces.pop(RATE).grid() if RATE in spaces else row.learning_rates
            return GridSearch(rates, list(spaces.values()), self.extend, self.trials)
        spaces.setdefault(RATE, _around(row.learning_rates))
        return {"random": RandomSearch, "optuna": OptunaSearch}[self.search](
            list(spaces.values()), self.trials or TRIALS, self.seed
        )

    def spaces(self, row: Row) -> dict[str, Space]:
        """What is searched of a row, by name."""
        given = {**{name: space for name, space in self.space.items() if row.takes(name)}, **row.space}
        return {name: parse_space(name, space) for name, space in given.items()}

    def planned(self, row: Row) -> int:
        """How many trainings the search of a row begins with, for the progress bar."""
        if self.search != "grid":
            return self.trials or TRIALS
        count = 1
        for space in self.spaces(row).values():
            count *= len(space.grid()) if space.name != RATE else 1
        return self.trials or count * len(self.spaces(row)[RATE].grid() if RATE in self.spaces(row) else row.learning_rates)


def _around(rates: Sequence[float]) -> Space:
    return Space(RATE, (), min(rates) / WIDER, max(rates) * WIDER, log=True)
