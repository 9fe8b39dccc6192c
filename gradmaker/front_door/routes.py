"""What was asked of `optimizer`: the config of the method, and a route for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmaker.config import GradientConfig, build
from gradmaker.front_door.left_to_adam import left_to_adam
from gradmaker.groups import Group, claims, method_name, read_groups
from gradmaker.plan import FALLBACK
from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["BASE_OPTIONS", "Request", "Route"]

BASE_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay")
"""Options of the base optimizer; each group may have its own. No option of a method has such a name."""


@dataclass(frozen=True)
class Route:
    """Parameters with one method, for one param group."""

    name: str  # registered name of the method
    config: GradientConfig | None  # None: the plain gradient
    options: Mapping[str, Any]  # of the base, given for these parameters
    parameters: frozenset[nn.Parameter]
    own: bool  # whether the method is that of the optimizer
    left: bool  # whether the parameters are left to Adam by default


class Request:
    """What was asked for: the config of the method, and options of the base for each group."""

    def __init__(
        self, model: nn.Module, kind: type[GradientConfig], options: dict[str, Any], groups: Any, adam: dict[str, Any]
    ) -> None:
        what = f"method {method_name(kind)!r}"
        self.asked = bool(adam)
        self.adam = {k: adam.pop(k) for k in BASE_OPTIONS if k in adam}
        self.given: list[dict[str, Any]] = []  # options of the base, for each group
        self.by_default = False
        own: GradientConfig = build(kind, options, what)
        default = {"method": "adam", **adam}
        if groups is not None:
            groups, self.given = _without_base(groups)
        elif own.usage.hidden and not own.groups and (left := left_to_adam(model)):
            groups, self.given, self.by_default = {left: default, "*": method_name(own)}, [self.adam, {}], True
        if groups is not None:
            options = {**options, "groups": groups}
        if "fallback" not in options and ("fallback" not in kind.inapplicable or groups is not None):
            options["fallback"] = default
        self.config: GradientConfig = build(kind, options, what)

    def routes(self, maker: PreconditionedGradientMaker) -> list[Route]:
        """A route for each group of parameters, in the order of the groups."""
        plan, model = maker.plan, maker.model
        method_of = {p: b.options.method for b in plan.blocks for s in b.sites for p in s.parameters.values()}
        free = {p for k, p in model.named_parameters() if p.requires_grad}
        left_out = {p for k, p in model.named_parameters() if plan.plain.get(k) in ("ignored", "empty")}
        rest = {p for p in free if method_of.get(p) == FALLBACK}
        found = []
        for j, (group, parameters) in enumerate(claims(model, self._groups(), left_out)):
            options = self.given[j] if j < len(self.given) else {}
            config = self.config if group.own else group.config
            left = self.by_default and not group.own
            found.append(Route(group.method, config, options, frozenset(parameters - rest), group.own, left))
        if rest:
            found.append(
                Route(method_name(plan.methods[FALLBACK]), plan.methods[FALLBACK], self.adam, frozenset(rest), False, True)
            )
        if self.asked and not any(route.left and route.parameters for route in found):
            raise ValueError("optimizer: adam= would have no effect: nothing is left to Adam by default; groups= may name it")
        found.append(Route("gradient", None, {}, frozenset(left_out), False, False))
        return found

    def _groups(self) -> tuple[Group, ...]:
        whole = Group(("*",), method_name(self.config), None, own=True)
        return read_groups(self.config.groups, self.config, build) or (whole,)


def _without_base(groups: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The groups without options of the base, and these."""
    cleaned, found = {}, []
    for rule, value in groups.items():
        own = dict(value) if isinstance(value, Mapping) else {}
        found.append({k: own.pop(k) for k in BASE_OPTIONS if k in own})
        cleaned[rule] = own if isinstance(value, Mapping) else value
    return cleaned, found
