"""Rules that name layers: a module, a class of modules, or a name pattern; a layer inside of a named module is named too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Path", "Rule", "check_rule", "names", "paths"]

Rule: TypeAlias = nn.Module | type[nn.Module] | str

Path: TypeAlias = Mapping[str, nn.Module]
"""Every module that holds a parameter, by name, from the model (``''``) down to its owner; of a shared one, all of them."""


def check_rule(option: str, rule: Any) -> None:
    """ValueError for what is no rule."""
    if not isinstance(rule, (str, nn.Module)) and not (isinstance(rule, type) and issubclass(rule, nn.Module)):
        raise ValueError(f"{option}: {rule!r} is neither a module, a class of modules nor a name pattern")


def paths(model: nn.Module) -> dict[nn.Parameter, dict[str, nn.Module]]:
    """The modules that hold each parameter."""
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for name, module in known.items():
        parts = name.split(".")
        above = {prefix: known[prefix] for prefix in (".".join(parts[:j]) for j in range(len(parts) + 1)) if prefix in known}
        for p in module.parameters(recurse=False):
            found.setdefault(p, {}).update(above)
    return found


def names(rule: Rule, path: Path, own: Iterable[str]) -> bool:
    """Whether a rule names what lies at the end of a path.  own: its own names, besides those of the modules"""
    if isinstance(rule, str):
        return any(fnmatch(name, rule) for name in (*path, *own) if name)
    return any(module is rule or (isinstance(rule, type) and isinstance(module, rule)) for module in path.values())
