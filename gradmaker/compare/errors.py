"""The error of the comparison: something the user gave cannot be used."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec

EXTRA = ("typer", "rich", "matplotlib", "jinja2", "pandas", "yaml")
MISSING = "the comparison needs {}: pip install 'gradmaker[compare]'"


class InputError(ValueError):
    """Raised before any training, with one sentence that says what to change."""


def require_extra(names: Iterable[str] = EXTRA) -> None:
    """Raise when the extra `compare` is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise InputError(MISSING.format(", ".join(missing)))


def suggest(word: str, known: Iterable[str]) -> str:
    """A did-you-mean sentence."""
    known = sorted(known)
    close = get_close_matches(word.lower(), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"
