"""Name rules, which select layers: a module, a class of modules, or a name pattern; each also selects the layers inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Path", "Rule", "check_rule", "names", "paths"]

Rule: TypeAlias = nn.Module | type[nn.Module] | str

Path: TypeAlias = Mapping[str, nn.Module]
"""The modules that contain a parameter, by name, from the model (``''``) to its owner; for a shared one, all paths."""


def check_rule(option: str, rule: Any) -> None:
    """ValueError for anything but a rule."""
    if not isinstance(rule, (str, nn.Module)) and not (isinstance(rule, type) and issubclass(rule, nn.Module)):
        raise ValueError(f"{option}={rule!r}: expected a module, a class of modules or a name pattern")


def paths(model: nn.Module) -> dict[nn.Parameter, dict[str, nn.Module]]:
    """The modules that contain each parameter."""
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for name, module in known.items():
        parts = name.split(".")
        above = {prefix: known[prefix] for prefix in (".".join(parts[:j]) for j in range(len(parts) + 1)) if prefix in known}
        for p in module.parameters(recurse=False):
            found.setdefault(p, {}).update(above)
    return found


def names(rule: Rule, path: Path, own: Iterable[str]) -> bool:
    """Whether a rule selects the site at the end of a path.  own: names of the site and its parameters"""
    if isinstance(rule, str):
        return any(fnmatch(name, rule) for name in (*path, *own) if name)
    return any(module is rule or (isinstance(rule, type) and isinstance(module, rule)) for module in path.values())
