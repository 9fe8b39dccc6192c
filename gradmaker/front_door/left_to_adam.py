"""Which parameters methods for hidden weights leave to Adam by default."""

from __future__ import annotations

from fnmatch import fnmatch
from glob import escape

from torch import nn

from gradmaker.capture.finding import layer_sites
from gradmaker.capture.rules.layers import rule_for

__all__ = ["left_to_adam"]

TABLES = ("*embed*", "*pos_*", "*position*", "*_token", "*_tokens")
"""Names of parameters without a layer that are tables of embeddings, as in vision transformers."""


def left_to_adam(model: nn.Module) -> tuple[str, ...]:
    """Names, as patterns, of embeddings, the last layer's weight, and all that is no matrix: norms, biases, scales.

    The last layer is the last one of the model that multiplies by a matrix; it counts as hidden where no other does. So it is
    for Muon (Jordan et al. 2024) and in the reference code of SOAP and Shampoo for language models. Where it is frozen, as
    under adapters, no trained layer is the last one.
    """
    tables = {p for s in layer_sites(model) if s.kind in ("embedding", "scale") for p in s.parameters.values()}
    last, hidden = _last_matrix(model), set[nn.Parameter]()
    for name, p in model.named_parameters():
        named = any(fnmatch(name, pattern) for pattern in TABLES)
        if p.requires_grad and p not in tables and not named and sum(n > 1 for n in p.shape) > 1:
            hidden.add(p)
    if len(hidden) > 1:
        hidden -= {last}
    return tuple(escape(name) for name, p in model.named_parameters() if p.requires_grad and p not in hidden)


def _last_matrix(model: nn.Module) -> nn.Parameter | None:
    """The weight of the last layer that multiplies by a matrix; it may be a table of embeddings, too."""
    found = None
    for module in model.modules():
        rule = rule_for(module)
        if rule is not None and rule.kind == "matrix":
            weight = dict(module.named_parameters(recurse=False)).get(rule.weight_name)
            found = weight if weight is not None else found
    return found
