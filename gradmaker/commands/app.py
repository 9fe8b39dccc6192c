"""The command with all its subcommands, and its exit statuses."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gradmaker.commands.compare import compare
from gradmaker.commands.cost import cost
from gradmaker.commands.fidelity import fidelity
from gradmaker.commands.methods import methods
from gradmaker.commands.settings import HELP_ASKED
from gradmaker.commands.show import show
from gradmaker.commands.train import train
from gradmaker.compare.errors import InputError
from gradmaker.version import __version__

__all__ = ["app"]

NOT_USABLE, INTERRUPTED = 2, 130
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of the command line: unknown options, values of a wrong type."""
HELP = """Gradient preconditioning: which curvature, which representation, which solver, at what cost.

Start with `gradmaker compare`, which needs no arguments. Every subcommand reads its options from a YAML file, too
(`--config`), prints them all (`--print-config`), and says more with `--help`.

Exit status: 0 something was done; 1 nothing was: every training failed or diverged, every row was refused; 2 the input cannot
be used, with one sentence that says what to change; 130 interrupted, what was finished is kept.
"""


class Command(TyperCommand):
    """A subcommand whose help does not depend on the file of options that stands beside it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[HELP_ASKED] = "--help" in args
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """Subcommands whose errors are one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            _say(str(error))
        except UsageError as error:
            _say(_sentence(error))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        raise typer.Exit(NOT_USABLE)


def _say(message: str) -> None:
    typer.echo(f"error: {message}", err=True)


def _sentence(error: Any) -> str:
    text = " ".join(error.format_message().split()).rstrip(".")
    path = getattr(error.ctx, "command_path", "gradmaker")
    return f"{text}; see {path} --help"


app = typer.Typer(
    cls=Group, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradmaker {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


for subcommand in (compare, fidelity, cost, train, methods, show):
    app.command(cls=Command)(subcommand)
