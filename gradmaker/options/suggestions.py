"""What an error says of a name that is none of the legal ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(given: object, legal: Iterable[str], hint: str = "") -> str:
    """``expected a, b, c; did you mean 'b'?``, without the question where nothing is close.

    hint: what is legal beside the names, with its comma, as in ``', or None'``
    """
    names = list(legal)
    by_lower_case = {name.lower(): name for name in names}
    close = get_close_matches(str(given).lower(), by_lower_case, n=1)
    question = f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""
    return f"expected {', '.join(names)}{hint}{question}"
