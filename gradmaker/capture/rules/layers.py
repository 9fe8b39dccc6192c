"""Layer rules: how one call of a layer becomes inputs ``a`` and output gradients ``g`` with ``dL/dW = sum g a^T``.

This is the only place that knows layer types. A rule writes a layer's weight as ``G`` matrices ``(o, i)``; a bias is one more
column. Norm layers are ``C`` groups of one output with the normalised input as their one feature. To add a layer, write a
rule and `register` it (one of a library that is not imported: in `gradmaker.capture.rules.named`);
`tests/capture/test_layers.py` checks every rule against single-example loops.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.rules.attention import ProjectionRule
from gradmaker.capture.rules.calls import Call, LayerRule, Layout, check_lookup, to_examples
from gradmaker.capture.rules.convolutions import ConvRule, ConvTransposeRule
from gradmaker.capture.rules.named import NAMED_RULES
from gradmaker.capture.rules.normalisations import BatchNormRule, GroupNormRule, LayerNormRule, RMSNormRule
from gradmaker.options.registry import Registry, register

__all__ = ["OPAQUE", "RULES", "attends", "rule_for"]

OPAQUE = (nn.MultiheadAttention,)
"""Modules that use their children's parameters without calling the children: hooks on the children would never fire."""


class LinearRule(LayerRule):
    types = (nn.Linear,)

    def shape(self, module: nn.Linear) -> tuple[int, int, int]:
        return 1, module.out_features, module.in_features

    def inputs(self, module: nn.Linear, call: Call, layout: Layout) -> Tensor:
        return to_examples(call.input, layout, axes=1).unsqueeze(0)

    def gradients(self, module: nn.Linear, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return to_examples(g, layout, axes=1, lead=1).unsqueeze(1)


class EmbeddingRule(LayerRule):
    """Lookup tables as linear maps of one-hot inputs that are never formed.

    With ``max_norm`` the call itself shortens the rows that it looks up, before it reads them: the curvature is that at the
    shortened rows, as the gradient is.
    """

    types = (nn.Embedding,)
    kind = "embedding"
    transposed = True

    def shape(self, module: nn.Embedding) -> tuple[int, int, int]:
        return 1, module.num_embeddings, module.embedding_dim

    def inputs(self, module: nn.Embedding, call: Call, layout: Layout) -> OneHot:
        index = call.input
        check_lookup(module)
        return OneHot(to_examples(index, layout, axes=0), module.num_embeddings, module.padding_idx)

    def gradients(self, module: nn.Embedding, call: Call, g: Tensor, layout: Layout) -> Tensor:
        if module.padding_idx is not None:  # the padding row has no gradient
            g = g * (call.input != module.padding_idx).unsqueeze(-1)
        return to_examples(g, layout, axes=1, lead=1).unsqueeze(1)


RULES: Registry[LayerRule] = Registry("layer rule", LayerRule, instances=True)
_OWN: tuple[type[LayerRule], ...] = (
    LinearRule,
    ConvRule,
    ConvTransposeRule,
    ProjectionRule,
    EmbeddingRule,
    BatchNormRule,
    GroupNormRule,
    LayerNormRule,
    RMSNormRule,
    *NAMED_RULES,
)
for _rule in _OWN:
    register(_rule)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, the latest that fits; None for a subclass with a ``forward`` of its own, which is another layer."""
    return next((rule for rule in reversed([*RULES.values()]) if rule.knows(module) and rule.accepts(module)), None)


def attends(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is torch's attention, whose linear maps are blocks; one with a ``forward`` of its own is not."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
