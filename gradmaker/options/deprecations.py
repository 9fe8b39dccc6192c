"""Deprecated names of options and modules, which are accepted for one more version."""

from __future__ import annotations

import inspect
import sys
import warnings
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "BASIS_INTERVAL",
    "MOVED_MODULES",
    "RENAMED_OPTIONS",
    "RenamedOptions",
    "current_name",
    "moved_module",
    "moved_names",
    "warn_of",
]

RENAMED_OPTIONS = {
    "momentum": "beta1",
    "nesterov": "nesterov_average",
    "norm": "grafting",
    "norm_decay": "grafting_decay",
    "spread": "stagger",
}
"""Current names of options by their earlier names, for classes that have the current one as a field and not the earlier one."""

BASIS_INTERVAL = {"basis_interval": "preconditioner_interval"}
"""The same, for the methods that had this option, by `GradientConfig.renamed_options`."""

MOVED_MODULES = {
    "gradmaker.layers": "gradmaker.capture.rules.layers",
    "gradmaker.sites": "gradmaker.capture.sites",
    "gradmaker.spectrum": "gradmaker.reports.spectrum",
    "gradmaker.step": "gradmaker.curvature.step",
    "gradmaker.verification": "gradmaker.reports.verification",
}
"""Current modules by their earlier paths, for those in the docs of the previous version."""

LIBRARY = ("gradmaker", "dataclasses", "importlib")
"""Packages whose frames stand between the user of an earlier name and the warning."""


class RenamedOptions(ABCMeta):
    """Metaclass of configs that also accept earlier names of options, with a DeprecationWarning for each."""

    if not TYPE_CHECKING:  # type checkers use the dataclass's own signature

        def __call__(cls, *args: Any, **given: Any) -> Any:
            return super().__call__(*args, **_renamed(cls, given))

        @property
        def __signature__(cls) -> inspect.Signature:
            own = inspect.signature(cls.__init__)
            return own.replace(parameters=list(own.parameters.values())[1:])


def current_name(made: Any, name: str) -> str:
    """The current name of an option of a dataclass: the given one unless it is an earlier name."""
    names = {f.name for f in fields(made)} if is_dataclass(made) else set()
    new = (RENAMED_OPTIONS | getattr(made, "renamed_options", {})).get(name, name)
    return new if new in names and name not in names else name


def warn_of(old: str, new: str) -> None:
    """A DeprecationWarning for the caller of the library that used an earlier name of an option."""
    _warn(f"the option {old!r} is {new!r} now; the earlier name is removed in the next version")


def _warn(message: str) -> None:
    """A DeprecationWarning that points to the user's line."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and (name := frame.f_globals.get("__name__", "")).split(".")[0] in LIBRARY:
        depth += not name.startswith("importlib._bootstrap")  # frames that `warnings.warn` itself leaves out
        frame = frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=depth)


def _renamed(made: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their current names. ValueError for an option that is given by both names."""
    values = dict(given)
    for old in given:
        if (new := current_name(made, old)) == old:
            continue
        # `dataclasses.replace` adds every unchanged field by its current name; the earlier name is the change.
        whole = all(f.name in given for f in fields(made) if f.init)
        if new in given and not whole:
            raise ValueError(
                f"{old}={given[old]!r} and {new}={given[new]!r}: {old!r} is the earlier name of {new!r}; give {new} alone"
            )
        warn_of(old, new)
        value = values.pop(old)
        values[new] = CONVERTED[old](made, value, given) if old in CONVERTED else value
    return values


def _in_steps(made: Any, value: Any, given: Mapping[str, Any]) -> Any:
    """``basis_interval``, which counted measurements, in steps. ValueError where measurements have no fixed interval."""
    between = given.get("curvature_interval", getattr(made, "curvature_interval", 1))
    if not isinstance(between, int):
        raise ValueError(
            f"basis_interval={value!r}: it counted measurements, whose interval {between!r} changes here: give "
            "preconditioner_interval, which counts steps, alone"
        )
    return value * between if isinstance(value, int) and not isinstance(value, bool) else value


CONVERTED: dict[str, Callable[[Any, Any, Mapping[str, Any]], Any]] = {"basis_interval": _in_steps}
"""Conversions of values by the earlier name of the option, where the value has another meaning now."""


# ------------------------------------------------------------------ modules
class _Alias(Loader):
    """Loader that imports a module under its earlier name: one module with two names."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED_MODULES[module.__name__]
        _warn(f"the module {module.__name__} is {new} now; the earlier name is removed in the next version")
        sys.modules[module.__name__] = import_module(new)


def moved_module(name: str) -> ModuleSpec | None:
    """The spec of a module that is imported by its earlier name; None for any other name."""
    return ModuleSpec(name, _Alias()) if name in MOVED_MODULES else None


def moved_names(old: str) -> Callable[[str], Any]:
    """``__getattr__`` for a module with the earlier name of another one: finds the attributes of that one."""

    def find(name: str) -> Any:
        new = MOVED_MODULES[old]
        if name.startswith("_") or not hasattr(found := import_module(new), name):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        _warn(f"{old}.{name} is {new}.{name} now; the earlier name is removed in the next version")
        value = vars(sys.modules[old])[name] = getattr(found, name)  # a ``from`` import asks twice, and gets one warning
        return value

    return find
