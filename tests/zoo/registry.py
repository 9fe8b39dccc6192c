"""All models of the zoo, in the order of the table."""

from __future__ import annotations

from tests.zoo import losses, structures, text, vision
from tests.zoo.case import ENTRIES, Entry

__all__ = ["ZOO"]

_FILES = [vision.__name__, text.__name__, structures.__name__, losses.__name__]  # importing them adds their models
ZOO: dict[str, Entry] = {e.name: e for e in sorted(ENTRIES, key=lambda e: _FILES.index(e.build.__module__))}
