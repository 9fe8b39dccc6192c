"""Checks of models and parameters at construction: those that no maker supports are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from gradmaker.capture.sites import Site

__all__ = ["check_model", "check_parameters", "check_watched"]

UNSCRIPTED = "use the module that it was made from"


def check_model(model: nn.Module) -> None:
    """ValueError for a model that no method supports."""
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
    for name, p in model.named_parameters():
        if p in ignored or not p.requires_grad:
            continue
        if _sharded(p):
            raise ValueError(
                f"{name} is a DTensor, which fully_shard (FSDP2) or tensor parallelism has sharded over processes: sharded "
                "parameters are not supported; use DistributedDataParallel, or leave it out with ignore="
            )


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


def _sharded(p: nn.Parameter) -> bool:
    return any(kind.__name__ == "DTensor" for kind in type(p).__mro__)  # importing DTensor takes longer than all other checks
