"""Layer rules of linear layers and embeddings, and the registry of all rules.

A rule turns a call into inputs ``a`` and output gradients ``g`` with ``dL/dW = sum g a^T``. It writes a layer's weight as ``G``
matrices ``(o, i)``; a bias is one more column. Norm layers are ``C`` groups of one output whose one input is the normalised
feature. To add a layer, write a rule and `register` it (one of a library that is not imported: as in `.named`);
`tests/capture/test_layers.py` checks every rule against single-example loops.
"""

from __future__ import annotations

from typing import ClassVar, TypeGuard

from torch import Tensor, nn

from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.rules.attention import ProjectionRule
from gradmaker.capture.rules.calls import Call, LayerRule, Layout, check_lookup, to_examples
from gradmaker.capture.rules.convolutions import ConvRule, ConvTransposeRule
from gradmaker.capture.rules.lookups import LookupRule
from gradmaker.capture.rules.named import NAMED_RULES
from gradmaker.capture.rules.normalisations import BatchNormRule, GroupNormRule, LayerNormRule, RMSNormRule
from gradmaker.options.registry import Registry, register

__all__ = ["OPAQUE", "RULES", "attends", "rule_for"]

OPAQUE = (nn.MultiheadAttention,)
"""Modules that use their children's parameters without calling the children: hooks on the children would never fire."""


class LinearRule(LayerRule):
    types = (nn.Linear,)
    multiplies = True

    def shape(self, module: nn.Linear) -> tuple[int, int, int]:
        return 1, module.out_features, module.in_features

    def inputs(self, module: nn.Linear, call: Call, layout: Layout) -> Tensor:
        return to_examples(call.input, layout, axes=1).unsqueeze(0)

    def gradients(self, module: nn.Linear, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return to_examples(g, layout, axes=1, lead=1).unsqueeze(1)


class EmbeddingRule(LayerRule):
    """Embeddings as linear maps of one-hot inputs, which are never formed.

    With ``max_norm`` the call itself rescales the rows that it looks up, before it reads them: the curvature, as the gradient,
    is that at the rescaled rows.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
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
    *NAMED_RULES,  # first, so that they serve only what has no rule by its type
    LinearRule,
    ConvRule,
    ConvTransposeRule,
    ProjectionRule,
    EmbeddingRule,
    LookupRule,
    BatchNormRule,
    GroupNormRule,
    LayerNormRule,
    RMSNormRule,
)
for _rule in _OWN:
    register(_rule)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, the last registered that fits; None without one, as for a subclass with its own ``forward``."""
    return next((rule for rule in reversed([*RULES.values()]) if rule.knows(module) and rule.accepts(module)), None)


def attends(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is torch's attention, whose linear maps are sites; a subclass with its own ``forward`` is not."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
