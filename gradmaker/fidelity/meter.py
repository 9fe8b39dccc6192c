"""Progress of a comparison, with the time that is left, where `rich` is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol

__all__ = ["Meter", "meter"]


class Meter(Protocol):
    """Counts units of work."""

    def expect(self, units: float) -> None:
        """Add units to the total."""

    def advance(self, text: str, units: float = 1.0) -> None:
        """Complete units; ``text`` says what comes next."""


class Silent:
    """Shows nothing."""

    def expect(self, units: float) -> None:
        """Nothing."""

    def advance(self, text: str, units: float = 1.0) -> None:
        """Nothing."""


@contextmanager
def meter(shown: bool, text: str) -> Iterator[Meter]:
    """Context with a bar on the terminal, with elapsed and remaining time; silent where it is not shown."""
    if not shown or find_spec("rich") is None:
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(text, total=0.0)

        class Shown:
            """A bar of `rich`."""

            def expect(self, units: float) -> None:
                """Add units to the total."""
                progress.update(task, total=(progress.tasks[0].total or 0.0) + units)

            def advance(self, text: str, units: float = 1.0) -> None:
                """Complete units."""
                progress.update(task, advance=units, description=text)

        yield Shown()
