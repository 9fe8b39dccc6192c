"""The error of the comparison for input that cannot be used."""

from collections.abc import Iterable
from importlib.util import find_spec

EXTRA = ("typer", "rich", "matplotlib", "jinja2", "pandas", "yaml")
MISSING = "the comparison needs {}: pip install 'gradmaker[{}]'"


class InputError(ValueError):
    """The user's input cannot be used. Raised before any training, with one sentence that says what to change."""


def require_extra(names: Iterable[str] = EXTRA, extra: str = "compare") -> None:
    """InputError where packages of an extra are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise InputError(MISSING.format(", ".join(missing), extra))
