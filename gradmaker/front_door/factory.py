"""`optimizer`: a method, its base optimizer and the groups of parameters, from one line."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from gradmaker.config import GradientConfig
from gradmaker.costs.prediction import warn_if_costly
from gradmaker.front_door.optimizer import PreconditionedOptimizer
from gradmaker.front_door.param_groups import param_groups
from gradmaker.front_door.routes import BASE_OPTIONS, Request
from gradmaker.groups import method_name
from gradmaker.loops.checks import read_likelihood
from gradmaker.options.checks import check_interval
from gradmaker.options.deprecations import current_name
from gradmaker.options.registry import METHODS
from gradmaker.options.rules import Rule
from gradmaker.options.suggestions import did_you_mean
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.presets import expanded, spelled
from gradmaker.reports.coverage import coverage

__all__ = ["CoverageWarning", "optimizer"]

LARGE = 100_000
"""Parameters from which a step is long enough for its cost to be predicted before the first one."""
WITHIN, PER_PARAMETER, MOST = 1.0, 1e-7, 5.0
"""Seconds that each of its two trials may take: at least, for each parameter beside that, and at most."""
log = logging.getLogger("gradmaker")


class CoverageWarning(UserWarning):
    """The method of an optimizer treats less than half of the parameters."""


def optimizer(
    model: nn.Module,
    method: str | Mapping[str, Any] | GradientConfig,
    params: Iterable[Any] | None = None,
    *,
    lr: float | torch.Tensor,
    momentum: float | None = None,
    nesterov: bool | None = None,
    weight_decay: float | None = None,
    max_norm: float | None = None,
    base: Callable[..., Optimizer] = SGD,
    groups: Mapping[Rule | tuple[Rule, ...], Any] | None = None,
    adam: Mapping[str, Any] | None = None,
    accumulation: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> PreconditionedOptimizer:
    """An optimizer that preconditions the gradients of a model by a method, for any training loop.

        optimizer = gradmaker.optimizer(model, "kfac", lr=0.03, momentum=0.9, weight_decay=1e-4, damping=1e-3, max_norm=1.0)
        F.cross_entropy(model(x), t).backward(); optimizer.step(); optimizer.zero_grad()

    A step is ``p <- (1 - lr weight_decay) p - lr base(clip(P g))``, where ``clip(u) = u min(1, max_norm / |u|)`` takes the norm
    over all parameters of the optimizer.

    Args:
        model: the module that the loop calls, or the one inside of its wrappers.
        method: name of the method, a mapping with its name and options, or its config.
        params: parameters or param groups, as for any optimizer; None: all that require gradients.
        lr: learning rate of the base optimizer.
        momentum: of the base; None: that of the method's paper, none where the method averages gradients itself (``beta1``).
        nesterov: whether the momentum of the base is Nesterov's; None: not, unless ``base`` says so.
        weight_decay: decoupled weight decay, in units of ``lr``; None: none, unless ``base`` says so.
        max_norm: bound of the norm of ``P g``; None: no clipping.
        base: the optimizer of ``P g``: a class of `torch.optim`, or a partial of one.
        groups: methods by name pattern, as ``{"*.embed*": "adam", "*": "soap"}``; values are names, or mappings with
            ``method``, options of it, and ``lr, momentum, nesterov, weight_decay``. The first match decides; a parameter
            without one is an error. None: methods for hidden weights (Muon, SOAP, Shampoo and theirs) leave embeddings, the
            last layer, norms and biases to Adam, all others treat what they cover, and leave the rest to Adam.
        adam: options for what is left to Adam by these defaults, with its ``lr``: by default that of the method where their
            steps have one scale, else 1e-3.
        accumulation: backward passes for each step; needed only where the scale of the loss cannot be read from gradients.
        scaler: the loop's gradient scaler, if any.
        options: of the method's config, and ``preset``, the name of one of its presets; what it stands for is logged.

    Raises:
        ValueError: for an unknown method or option, a parameter without a method, or an average that is taken twice.
    """
    kind, known = _method(method)
    options = _as_in_a_loop({**known, **options})
    if (preset := options.get("preset")) is not None:
        options = expanded(kind, options, f"method {method_name(kind)!r}")
        log.info("gradmaker: preset %r of %s: %s", preset, method_name(kind), spelled(kind.presets[preset]))
    if unknown := [k for k in options if current_name(kind, k) not in {f.name for f in fields(kind)}]:
        legal = [*(f.name for f in fields(kind)), *BASE_OPTIONS, "max_norm", "base", "adam", "accumulation", "scaler"]
        raise ValueError(f"optimizer: {unknown[0]!r} is no option of {kind.__name__}: {did_you_mean(unknown[0], legal)}")
    flat = _flat(base, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})
    asked = Request(model, kind, options, groups, dict(adam or {}))
    maker: Any = METHODS[method_name(asked.config)](model, asked.config)
    made = base(param_groups(model, params, asked.routes(maker), flat, base), lr=lr)
    found = PreconditionedOptimizer(maker, made, max_norm=max_norm, accumulation=accumulation, scaler=scaler)
    _tell(maker)
    size = sum(p.numel() for p in model.parameters())
    if size >= LARGE:
        found.before_first_pass(partial(_tell_cost, weakref.ref(maker), min(WITHIN + size * PER_PARAMETER, MOST)))
    return found


def _method(method: Any) -> tuple[type[GradientConfig], dict[str, Any]]:
    """The class of a method's config, and the options that were given with it. ValueError for what preconditions nothing."""
    if isinstance(method, GradientConfig):
        given = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
        return type(method), {f.name: given[f.name] for f in fields(method) if f.init and given[f.name] != f.default}
    options = dict(method) if isinstance(method, Mapping) else {"method": method}
    kind: Any = METHODS.find("method", options.pop("method", None)).Config
    if not issubclass(kind, GradientConfig):
        raise ValueError(f"optimizer: {method!r} preconditions nothing: use torch.optim itself")
    return kind, options


def _as_in_a_loop(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the likelihood of a name as `attach` takes it: classes are on the last axis of the logits."""
    named = isinstance(options.get("likelihood"), str)
    return {**options, "likelihood": read_likelihood(options["likelihood"])} if named else options


def _flat(base: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the base that were given flat, or bound in a partial. ValueError for those that it does not take."""
    bound = {k: v for k, v in base.keywords.items() if k in BASE_OPTIONS} if isinstance(base, partial) else {}
    found = {**bound, **{k: v for k, v in given.items() if v is not None}}
    for name, most in (("lr", math.inf), ("momentum", 1), ("weight_decay", math.inf)):
        if name in found and not isinstance(found[name], torch.Tensor):
            check_interval(name, found[name], 0, most, closed=True)
    for name in ("momentum", "nesterov"):
        if found.get(name) and name not in inspect.signature(base).parameters:
            raise ValueError(
                f"optimizer: {name}={found[name]!r}: {_name(base)} has no such option: leave it out, or give base="
            )
    return found


def _name(base: Any) -> str:
    return str(getattr(getattr(base, "func", base), "__name__", base))


def _tell(maker: PreconditionedGradientMaker) -> None:
    """Log the share of each method, and warn where that of the maker itself is below one half."""
    found = coverage(maker.plan)
    log.info("gradmaker: %s", found)
    name = method_name(maker.config)
    if found.methods.get(name, 0.0) < 0.5:
        warnings.warn(
            f"{found}: see summary() of the maker for what it leaves out and why, and groups= to choose",
            CoverageWarning,
            stacklevel=3,
        )


def _tell_cost(reference: weakref.ref[Any], within: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn of a default that takes several times as long as a step of Adam, at the arguments of the first pass."""
    maker = reference()
    if maker is not None and not (args and kwargs):
        warn_if_costly(maker, args or kwargs, within=within)
