"""Progress bars and the summary table of the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
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

from gradmaker.compare.result import Comparison
from gradmaker.compare.row_result import RowResult, count
from gradmaker.compare.trial import Record


class Board:
    """Two progress bars: one for all trials, one for the running trial with its loss."""

    def __init__(self, progress: Progress, trials: int) -> None:
        self.progress = progress
        self.total = progress.add_task("trials", total=trials, loss="")
        self.running = progress.add_task("", total=None, visible=False, loss="")

    def start(self, name: str, steps: int | None) -> None:
        """Start the bar of a trial, or of the measurement of costs."""
        self.progress.reset(self.running, description=name, total=steps, visible=True, loss="")

    def step(self) -> None:
        """Advance the bar of the running trial by one step."""
        self.progress.advance(self.running)

    def note(self, text: str) -> None:
        """Show a text, as the loss, at the end of the bar of the running trial."""
        self.progress.update(self.running, loss=text)

    def finish(self) -> None:
        """Complete the running trial and advance the bar of all trials."""
        self.progress.advance(self.total)


@contextmanager
def board(trials: int, shown: bool) -> Iterator[Board]:
    """Context with a board of progress bars; without output when not `shown`."""
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


def print_selection(console: Console, result: RowResult, metric: str) -> None:
    """Print the selected options of a row and the results of its search."""
    tried = ", ".join(f"{_options(r)}: {_outcome(r, metric)}" for r in result.search)
    console.print(f"[bold]{result.row.label}[/]  lr [bold]{result.learning_rate:g}[/]  [dim]({tried})[/]", highlight=False)


def print_refusal(console: Console, result: RowResult) -> None:
    """Print why a row is not trained."""
    console.print(f"[bold]{result.row.label}[/]  refused: {escape(result.refusal)}", highlight=False, soft_wrap=True)


def _options(record: Record) -> str:
    return ", ".join([f"{record.learning_rate:g}", *(f"{name} {value}" for name, value in record.parameters.items())])


def _outcome(record: Record, metric: str) -> str:
    if record.status != "finished":
        return record.status
    value = record.end("validation", metric)
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{metric} {value:.4g}"


def print_summary(console: Console, comparison: Comparison) -> None:
    """Print the summary table, its notes and the path of the report."""
    sizes = count(len(comparison.seeds), "seed"), comparison.setting.budget
    table = Table(title=", ".join((comparison.data["name"], *sizes, *([] if comparison.complete else ["interrupted"]))))
    for column, heading in enumerate(comparison.headings[:-1]):
        table.add_column(heading, justify="right" if column else "left", no_wrap=column < 3, overflow="fold")
    for result in comparison.measured:
        table.add_row(*result.cells()[:-1])
    console.print(table)
    for result in comparison.measured:
        if note := result.cells()[-1]:
            console.print(f"  {result.row.label}: {escape(note)}", highlight=False)
    for sentence in comparison.verdict():
        console.print(f"  {escape(sentence)}", highlight=False)
    console.print(f"  report: {_relative(comparison.files['html'])}", highlight=False, soft_wrap=True)
    others = ", ".join(path.name for name, path in comparison.files.items() if name != "html" and path.parent == comparison.out)
    console.print(f"  beside it: {others}, figures as SVG and PDF", style="dim", highlight=False)


def print_resume(console: Console, out: Path, command: str) -> None:
    """Print where an interrupted run is stored and how to resume it."""
    again = f"run the same again: {command}" if command else "call compare(...) again with the same arguments"
    text = f"Stopped. Every finished trial is kept in {_relative(out)}; to go on, {again}"
    console.print(text, highlight=False, soft_wrap=True)


def _relative(path: Path) -> str:
    """The path, relative to the working folder if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
