"""Param groups: one for each route of each given group, with options of the base optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradmaker.config import GradientConfig
from gradmaker.front_door.routes import BASE_OPTIONS, Route
from gradmaker.usage import Usage

__all__ = ["param_groups"]

ADAM_LR = 1e-3
"""Learning rate of Adam beside a method whose step has another scale (Kingma & Ba 2015)."""


def param_groups(
    model: nn.Module, params: Any, routes: list[Route], flat: Mapping[str, Any], base: Any
) -> list[dict[str, Any]]:
    """One param group for each route of each given group."""
    own = next((r.config for r in routes if r.own), None)
    found = []
    for given in _given(model, params):
        options = {k: v for k, v in given.items() if k != "params"}
        for route in routes:
            held = [p for p in given["params"] if p in route.parameters]
            if held:
                found.append({"params": held, **options, **_options(route, own, options, flat, base), "method": route.name})
    return found


def _given(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """The given param groups; parameters come with their names or without. ValueError for one that the model does not have."""
    listed = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
    groups = [dict(g) for g in listed] if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
    known = set(model.parameters())
    for group in groups:
        held = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        group["params"] = [p[1] if isinstance(p, tuple) else p for p in held]
        for p in group["params"]:
            if p not in known:
                raise ValueError(
                    f"optimizer: params holds a tensor of shape {tuple(p.shape)} that is no parameter of the model: give those "
                    "of the very model that the loop calls, after it was moved or wrapped"
                )
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return groups


def _options(
    route: Route, own: GradientConfig | None, group: Mapping[str, Any], flat: Mapping[str, Any], base: Any
) -> dict[str, Any]:
    """The options of the base for a param group: of the route, else of the given group, else flat, else the method's usage."""
    values = {**flat, **group, **route.options}
    if route.left and not (own is not None and own.usage.unit):
        values["lr"] = route.options.get("lr", ADAM_LR)
    if "momentum" not in inspect.signature(base).parameters:
        return {k: values[k] for k in ("lr", "weight_decay") if k in values}
    averages = getattr(route.config, "beta1", 0.0)
    if averages and values.get("momentum"):
        if route.own or "momentum" in route.options:
            raise ValueError(
                f"optimizer: momentum={values['momentum']!r}: {route.name} averages gradients itself (beta1={averages:g}), and "
                "the base would average a second time: give beta1= for its average, or beta1=0 with this momentum"
            )
        values["momentum"] = 0.0
    usage = Usage() if route.config is None else route.config.usage
    values.setdefault("momentum", 0.0 if averages else usage.momentum)
    values["nesterov"] = bool(values.get("nesterov")) and values["momentum"] > 0
    return {k: values[k] for k in BASE_OPTIONS if k in values}
