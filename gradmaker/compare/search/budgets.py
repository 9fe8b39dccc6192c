"""`Budget`: the length of a training, and the clock that keeps it."""

import math
from dataclasses import dataclass

from gradmaker.compare.errors import InputError

UNITS = ("epochs", "steps", "seconds")
MARKS = 20  # evaluations of a training whose budget counts no epochs


@dataclass(frozen=True)
class Budget:
    """The length of every training: `Budget(500, "steps")`, or as text "20 epochs", "500 steps", "60 seconds"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, value: "Budget | str | int") -> "Budget":
        """A budget from text; a number counts epochs. InputError for any other."""
        if isinstance(value, Budget):
            value = str(value)
        amount, _, unit = f"{value} epochs".partition(" ") if isinstance(value, int) else str(value).strip().partition(" ")
        unit = unit.strip() if unit.strip().endswith("s") else f"{unit.strip()}s"
        try:
            number = float(amount)
        except ValueError:
            number = math.nan
        whole = math.isfinite(number) and (unit == "seconds" or number == int(number))
        if unit not in UNITS or not whole or number <= 0:
            raise InputError(f"budget={value!r}: expected a positive number of {', '.join(UNITS)}, as in '20 epochs'")
        return cls(number, unit)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit if self.amount != 1 else self.unit[:-1]}"

    def steps(self, per_epoch: int) -> int | None:
        """The steps of a training; None for a budget in seconds."""
        return {"epochs": int(self.amount) * per_epoch, "steps": int(self.amount)}.get(self.unit)


class Clock:
    """Says when a training is evaluated and when it is over."""

    def __init__(self, budget: Budget, per_epoch: int) -> None:
        self.budget = budget
        self.total = budget.steps(per_epoch)
        marks = MARKS if self.total is None else math.ceil(self.total / per_epoch)
        if budget.unit == "steps":
            marks = min(MARKS, int(budget.amount))
        self.leg = per_epoch if budget.unit == "epochs" else math.ceil((self.total or 0) / marks)
        self.leg_seconds = budget.amount / MARKS
        self.steps = 0
        self.seconds = self.since_mark = 0.0

    @property
    def by_time(self) -> bool:
        """Whether the budget is in seconds."""
        return self.total is None

    @property
    def over(self) -> bool:
        """Whether the training has ended."""
        return self.seconds >= self.budget.amount if self.total is None else self.steps >= self.total

    def goes_on(self, steps: int, seconds: float) -> bool:
        """Whether one more step comes before the next mark, after so many steps and seconds since the last."""
        self.since_mark = seconds
        if self.total is None:
            # at least a step between marks, and no mark that the budget does not leave time for
            return steps == 0 or (seconds < self.leg_seconds and self.seconds + seconds < self.budget.amount)
        return steps < min(self.leg, self.total - self.steps)

    def end_leg(self, steps: int, seconds: float) -> None:
        """Count what was trained since the last mark."""
        self.steps += steps
        self.seconds += seconds
        self.since_mark = 0.0

    def done(self, step: int) -> float:
        """The fraction of the training after so many steps."""
        if self.total is None:
            return (self.seconds + self.since_mark) / self.budget.amount
        return step / self.total
