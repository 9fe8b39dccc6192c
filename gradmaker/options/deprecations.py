"""Options under their earlier names, which are read for one version more."""

from __future__ import annotations

import inspect
import warnings
from abc import ABCMeta
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

__all__ = ["RENAMED_OPTIONS", "RenamedOptions", "current_name", "warn_of"]

RENAMED_OPTIONS = {"norm": "grafting", "norm_decay": "grafting_decay", "spread": "stagger"}
"""Today's name of an option by its earlier one. It holds for what has the one as a field and not the other."""


class RenamedOptions(ABCMeta):
    """Metaclass of configs: they are made with earlier names too, with a DeprecationWarning for each."""

    if not TYPE_CHECKING:  # a checker sees the dataclass's own signature

        def __call__(cls, *args: Any, **given: Any) -> Any:
            return super().__call__(*args, **_renamed(cls, given))

        @property
        def __signature__(cls) -> inspect.Signature:
            own = inspect.signature(cls.__init__)
            return own.replace(parameters=list(own.parameters.values())[1:])


def current_name(made: Any, name: str) -> str:
    """The name that an option of a dataclass has today: the given one where it is no earlier name."""
    names = {f.name for f in fields(made)} if is_dataclass(made) else set()
    new = RENAMED_OPTIONS.get(name, name)
    return new if new in names and name not in names else name


def warn_of(old: str, new: str) -> None:
    """A DeprecationWarning for the caller of the library that used an earlier name."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("gradmaker", "dataclasses"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(
        f"the option {old!r} is {new!r} now; the earlier name goes with the next version",
        DeprecationWarning,
        stacklevel=depth,
    )


def _renamed(made: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their names of today. ValueError for one that is given by both."""
    values = dict(given)
    for old in given:
        if (new := current_name(made, old)) == old:
            continue
        # `dataclasses.replace` adds every field that is not changed; what is changed is what was given by its earlier name.
        whole = all(f.name in given for f in fields(made) if f.init)
        if new in given and not whole:
            raise ValueError(
                f"{old}={given[old]!r} and {new}={given[new]!r}: {old!r} is the earlier name of {new!r}; give {new} alone"
            )
        warn_of(old, new)
        values[new] = values.pop(old)
    return values
