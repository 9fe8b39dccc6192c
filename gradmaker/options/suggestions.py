"""Text of an error for an unknown name: the legal names, and a close one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(given: object, legal: Iterable[str], hint: str = "") -> str:
    """``expected a, b, c; did you mean 'b'?``, without the question if no name is close.

    hint: further legal values, with a comma, as in ``', or None'``
    """
    names = list(legal)
    by_lower_case = {name.lower(): name for name in names}
    close = get_close_matches(str(given).lower(), by_lower_case, n=1)
    question = f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""
    return f"expected {', '.join(names)}{hint}{question}"
