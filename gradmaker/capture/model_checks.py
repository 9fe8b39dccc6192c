"""Checks of models and parameters at construction: those that no maker supports are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from gradmaker.capture.sharded import is_sharded, managed, reshard
from gradmaker.capture.sites import Site

__all__ = ["check_model", "check_of_shards", "check_parameters", "check_watched"]

UNSCRIPTED = "use the module that it was made from"


def check_model(model: nn.Module) -> None:
    """ValueError for a model that no method supports."""
    reshard(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"the model is a {type(model).__name__}, on which torch allows no hooks: {UNSCRIPTED}, or put it inside of an "
            "nn.Module that calls it"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: set requires_grad on those to be trained")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) makes sparse gradients: use sparse=False")


def check_parameters(model: nn.Module, ignored: Set[nn.Parameter] = frozenset()) -> None:
    """ValueError for a trainable parameter that no method supports.

    ignored: parameters that keep their plain gradient and are not checked
    """
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(p, (UninitializedParameter, UninitializedBuffer)) and p not in ignored:
            raise ValueError(
                f"{name} of a lazy module has no shape before its first call: run one forward pass of the model first, then "
                "make the maker, and the optimizer"
            )
    whole_in_passes = managed(model)
    for name, p in model.named_parameters():
        if p in ignored or not p.requires_grad:
            continue
        if is_sharded(p):
            _check_sharded(name, p, whole_in_passes)


def check_watched(sites: Iterable[Site]) -> None:
    """ValueError for a site whose curvature is measured at its module's calls, where the module or a parameter forbids it."""
    for site in sites:
        if complex_ := next((k for k, p in site.parameters.items() if p.is_complex()), None):
            raise ValueError(
                f"{complex_} is complex, and this curvature is defined for real layers: hold it as a real parameter, "
                "view_as_real(w), and read it by view_as_complex in forward, or leave it out with ignore=; methods of the "
                "gradient alone, as adam or shampoo, take it as its real pairs"
            )
        for module in site.modules:
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f"{site.name} is held by a {type(module).__name__}, on which torch allows no hooks, and its curvature is "
                    f"measured where its module is called: {UNSCRIPTED}, or leave it out with ignore=; methods of the gradient "
                    "alone, as adam or shampoo, need no hooks"
                )


def _check_sharded(name: str, p: Any, whole_in_passes: Set[nn.Parameter]) -> None:
    if p not in whole_in_passes:
        raise ValueError(
            f"{name} is a DTensor that no fully_shard (FSDP2) has made, as tensor parallelism makes them: layers that compute "
            "with shards are not supported; use fully_shard, DistributedDataParallel, or leave it out with ignore="
        )
    kinds = [type(placement).__name__ for placement in p.placements]
    if p.is_complex() or not set(kinds) <= {"Shard", "Replicate"} or kinds.count("Shard") > 1:
        what = "complex" if p.is_complex() else f"placed as {p.placements}"
        raise ValueError(
            f"{name} is sharded by fully_shard and {what}: supported are real parameters, cut along one axis of the "
            "mesh and replicated along the others; leave it out with ignore="
        )


def check_of_shards(model: nn.Module, asked: Sequence[str]) -> None:
    """ValueError where parameters are sharded, for curvatures that read them.  asked: their names"""
    if asked and any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{', '.join(asked)} reads the weights, for products with Hessians or the loss at others, and fully_shard (FSDP2) "
            "has sharded them: use DistributedDataParallel, or a method whose curvature is measured at the outputs of layers "
            "(kfac, ekfac) or on the gradient (adam, shampoo, soap, muon)"
        )
