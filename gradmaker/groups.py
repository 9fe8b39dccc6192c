"""Groups: the parameters that rules name, each with a method of its own, all in one plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmaker.options.registry import METHODS
from gradmaker.options.rules import Rule, check_rule, names, paths
from gradmaker.options.suggestions import did_you_mean

__all__ = ["OWN", "Group", "claims", "matches", "method_name", "names_of", "read_groups", "read_method"]

OWN = "method"
"""Name in a plan of the method of the maker itself."""


@dataclass(frozen=True)
class Group:
    """Parameters that one of these rules names, and their method."""

    rules: tuple[Rule, ...]
    method: str  # registered name
    config: Any  # a `GradientConfig`; None: that of the maker where the method is its own, else the plain gradient
    own: bool = False

    def __str__(self) -> str:
        names = [str(getattr(rule, "__name__", rule)) for rule in self.rules]
        return " | ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"


def method_name(config: object) -> str:
    """The name by which the method of a config, or of a class of configs, is registered; that of the class if it is not."""
    made = config if isinstance(config, type) else type(config)
    found = (name for name, maker in METHODS.entries.items() if maker.Config is made)
    return next(found, made.__name__.removesuffix("GradientConfig"))


def read_groups(given: Any, own: object, build: Callable[[Any, Mapping[str, Any], str], Any]) -> tuple[Group, ...]:
    """The option ``groups`` as a tuple, from a mapping of rules to methods: names, mappings with a method, or configs.

    own: the config whose option it is; build: makes a config from a mapping.  ValueError for anything else
    """
    if isinstance(given, tuple) and all(isinstance(g, Group) for g in given):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"groups={given!r}: expected a mapping from name patterns to methods, as in {{'*.embed*': 'adam'}}")
    return tuple(_group(rule, value, own, build) for rule, value in given.items())


def _group(rule: Any, value: Any, own: object, build: Callable[[Any, Mapping[str, Any], str], Any]) -> Group:
    rules = rule if isinstance(rule, tuple) else (rule,)
    for each in rules:
        check_rule("groups", each)
    what = f"groups[{rule!r}]"
    name, options = _named(what, value)
    if options == {} and METHODS[name].Config is type(own):
        return Group(rules, name, None, own=True)
    if name == "gradient":
        return Group(rules, name, None)
    config = read_method(what, value, own, build)
    return Group(rules, method_name(config), config)


def _named(what: str, value: Any) -> tuple[str, dict[str, Any] | None]:
    """The method that a value names, with its options; an empty name for a config."""
    if not isinstance(value, (str, Mapping)):
        return "", None
    options = {"method": value} if isinstance(value, str) else dict(value)
    if "method" not in options:
        raise ValueError(f"{what}={value!r}: the key 'method' is missing: expected one of {', '.join(METHODS)}")
    name = options.pop("method")
    METHODS.find(what, name)
    return name, options


def read_method(what: str, value: Any, own: object, build: Callable[[Any, Mapping[str, Any], str], Any]) -> Any:
    """The config of a method, from its name, a mapping with a method, or itself.  what: the option, for errors

    ValueError for options that belong to the whole maker, or for what is no config of a method
    """
    name, options = _named(what, value)
    if options is None:
        return _checked(value, own, what)
    return _checked(build(METHODS[name].Config, options, f"{what}: method {name!r}"), own, what)


def _checked(config: Any, own: Any, what: str) -> Any:
    """A config for a group. ValueError for options that belong to the whole maker, or for what is no config of a method."""
    if not hasattr(config, "triple"):
        raise ValueError(f"{what}={config!r}: expected the name of a method, a mapping with a method, or a config")
    for name in config.of_the_maker:
        value = getattr(config, name)
        if value != getattr(type(config), name) and value != getattr(own, name, None):
            raise ValueError(f"{what}: {name}={value!r} is an option of the whole maker: give it beside groups")
    return config


# ------------------------------------------------------------------ in a model
def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter."""
    own: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        own.setdefault(p, []).append(name)
    return own


def matches(model: nn.Module, rule: Rule, option: str) -> set[nn.Parameter]:
    """The parameters that a rule matches, by name or by a module that holds them. ValueError if none does."""
    own = names_of(model)
    found = {p for p, path in paths(model).items() if names(rule, path, own[p])}
    if not found:
        modules = dict(model.named_modules())
        legal = {type(m).__name__ for m in modules.values()}
        if not isinstance(rule, type):
            legal = {*modules, *(name for each in own.values() for name in each)}
        hint = did_you_mean(getattr(rule, "__name__", rule), sorted(legal - {""}))
        raise ValueError(f"{option}: {rule!r} matches no parameter: {hint}")
    return found


def claims(model: nn.Module, groups: Iterable[Group], left_out: set[nn.Parameter]) -> list[tuple[Group, set[nn.Parameter]]]:
    """The parameters of each group: the first rule that matches decides. ValueError for one without a rule, or an idle group.

    left_out: parameters that need no rule
    """
    free = {p for p in model.parameters() if p.requires_grad and p not in left_out}
    found: list[tuple[Group, set[nn.Parameter]]] = []
    for group in groups:
        named = {p for rule in group.rules for p in matches(model, rule, "groups")}
        found.append((group, named & free))
        free -= named
    if free:
        lost = sorted(names[0] for p, names in names_of(model).items() if p in free)
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise ValueError(f"groups: no rule matches {shown}: add one for the rest, as in '*': 'adam'")
    return found
