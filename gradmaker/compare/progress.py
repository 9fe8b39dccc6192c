"""Progress bars and the summary table of the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from gradmaker.compare.result import Comparison, RowResult, count


class Board:
    """Two bars: all trials, and the running one with its loss."""

    def __init__(self, progress: Progress, trials: int) -> None:
        self.progress = progress
        self.total = progress.add_task("trials", total=trials, loss="")
        self.running = progress.add_task("", total=None, visible=False, loss="")

    def start(self, name: str, steps: int) -> None:
        """A trial, or the measuring of the costs, begins."""
        self.progress.reset(self.running, description=name, total=steps, visible=True, loss="")

    def step(self) -> None:
        """One step of it is done."""
        self.progress.advance(self.running)

    def note(self, text: str) -> None:
        """Show a text, the loss, at the end of its bar."""
        self.progress.update(self.running, loss=text)

    def finish(self) -> None:
        """It is done."""
        self.progress.advance(self.total)


@contextmanager
def board(trials: int, shown: bool) -> Iterator[Board]:
    """A board that lives as long as the context; silent when not `shown`."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown, transient=True) as progress:
        yield Board(progress, trials)


def print_selection(console: Console, result: RowResult) -> None:
    """One line a row, when its rate is chosen."""
    rates = ", ".join(f"{r.learning_rate:g}: {_outcome(result, r.learning_rate)}" for r in result.search)
    console.print(f"[bold]{result.row.label}[/]  lr [bold]{result.learning_rate:g}[/]  [dim]({rates})[/]", highlight=False)


def _outcome(result: RowResult, rate: float) -> str:
    record = next(r for r in result.search if r.learning_rate == rate)
    if record.status != "finished":
        return record.status
    accuracy = record.end("validation_accuracy")
    return f"{100 * accuracy:.2f} %" if accuracy == accuracy else f"loss {record.end('validation_loss'):.4g}"


def print_summary(console: Console, comparison: Comparison) -> None:
    """The table, its notes, and where the report is."""
    sizes = count(len(comparison.seeds), "seed"), count(comparison.setting.epochs, "epoch")
    table = Table(title=", ".join((comparison.data["name"], *sizes, *([] if comparison.complete else ["interrupted"]))))
    for column, heading in enumerate(comparison.headings[:-1]):
        table.add_column(heading, justify="right" if column else "left", no_wrap=column < 3, overflow="fold")
    for result in comparison.measured:
        table.add_row(*result.cells()[:-1])
    console.print(table)
    for result in comparison.measured:
        if note := result.cells()[-1]:
            console.print(f"  {result.row.label}: {note}", highlight=False)
    console.print(f"  report: {_shown(comparison.files['html'])}", highlight=False, soft_wrap=True)
    others = ", ".join(path.name for name, path in comparison.files.items() if name != "html")
    console.print(f"  beside it: {others}", style="dim", highlight=False)


def print_resume(console: Console, out: Path, command: str) -> None:
    """What an interrupted run left, and how to go on."""
    again = f"run the same again: {command}" if command else "call compare(...) again with the same arguments"
    console.print(f"Stopped. Every finished trial is kept in {_shown(out)}; to go on, {again}", highlight=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """Relative to the working folder where it lies inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
