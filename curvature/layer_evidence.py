"""A layer's inputs and output gradients as evidence, from the record of a pass, with positions and masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradmaker.capture.arrangement import APART
from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.patches import Patches
from gradmaker.capture.rules.calls import Call
from gradmaker.capture.rules.generic import per_example_rows
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.capture.vjps import VJPs
from gradmaker.curvature.evidence import Outer
from gradmaker.curvature.tied import Tied

__all__ = ["LayerEvidence", "layer_evidence", "outer"]

LayerEvidence: TypeAlias = Outer | Tied
"""The evidence of a site with a rule: pairs of inputs and output gradients, of one use or of both."""


def layer_evidence(
    site: Site, tape: Tape, found: VJPs, mask: Tensor | None, dtype: torch.dtype, fresh: bool = True
) -> LayerEvidence:
    """The evidence of a layer in a pass, or of a tied table in the uses that the pass makes of it; arguments as in `outer`."""
    if not site.uses or site.direct(tape):
        return outer(site, tape, found, mask, dtype, fresh)
    one, fired = tape.apart(site.modules), [use for use in site.uses if any(tape.calls[m] for m in use.modules)]
    return Tied(tuple(outer(use, tape, found, mask, dtype, fresh, one) for use in fired))


def outer(
    site: Site,
    tape: Tape,
    found: VJPs,
    mask: Tensor | None,
    dtype: torch.dtype,
    fresh: bool = True,
    apart: bool | None = None,
) -> Outer:
    """The evidence of a layer in a pass. Each further call of the layer adds weight-sharing positions.

    mask: (n, R) loss terms that count, R positions per example. apart: whether examples cannot be separated, where other
    layers decide it too
    """
    if site.rule is None or site.direct(tape):
        return _formed(site, tape, found, dtype, fresh)
    one = tape.apart(site.modules) if apart is None else apart  # all positions are those of one example, or of passes
    gradients = found.apart if one and site.modules[0] in found.apart else found.together
    calls = [(m, c, g, APART if one else tape.layout(c)) for m in site.modules for c, g in _calls(tape, gradients, m)]
    a = [_own(site.rule.inputs(m, c, layout), c) for m, c, _, layout in calls] if site.weighted else []
    each = [site.rule.of_outputs(m, c, gs, layout) for m, c, gs, layout in calls]
    g = (each[0] if len(each) == 1 else torch.cat(each, 3)).to(dtype)
    inputs = _join(a, dtype) if a else g.new_zeros(*g.shape[1:4], 0)
    positions = inputs.index.shape[1] if isinstance(inputs, OneHot) else inputs.shape[2]
    mask = mask.reshape(1, -1) if mask is not None and one else mask
    weights = None if mask is None else _position_weights(mask, positions, len(calls)).to(dtype)
    return Outer(inputs, g, site.bias, site.rule.transposed, weights, fresh)


def _formed(site: Site, tape: Tape, found: VJPs, dtype: torch.dtype, fresh: bool) -> Outer:
    """Evidence from rows that are formed already: per-example gradients of a repeated call, or gradients of the parameter."""
    if site.direct(tape):
        ((_, p),) = site.parameters.items()
        rows = found.direct[p].reshape(len(found.direct[p]), 1, -1)  # (k n, 1, P)
    else:
        rows = per_example_rows(site, tape, found.together)  # (k, n, P)
    rows = rows.to(dtype)
    empty = rows.new_zeros(1, rows.shape[1], 1, 0)
    return Outer(empty, rows[:, None, :, None, :], bias=True, fresh=fresh)


def _calls(tape: Tape, gradients: OutputGradients, module: nn.Module) -> Iterator[tuple[Call, list[Tensor]]]:
    return zip(tape.calls[module], gradients[module], strict=True)


def _own(inputs: Tensor | OneHot, call: Call) -> Tensor | OneHot:
    """Inputs that do not change with those of the call, into which a loop may write the next batch."""
    if not isinstance(inputs, Tensor) or isinstance(inputs, Patches):  # what holds patches forms them, see `Outer.settled`
        return inputs
    plain = type(inputs) is type(call.input) is Tensor
    return inputs if plain and inputs.untyped_storage()._cdata != call.input.untyped_storage()._cdata else inputs.clone()


def _join(inputs: list[Tensor | OneHot], dtype: torch.dtype) -> Tensor | OneHot:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if len(tensors) == 1 and isinstance(tensors[0], Patches) and tensors[0].dtype == dtype:
        return tensors[0]  # not formed yet
    if tensors:
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, 2)).detach().to(dtype)
    lookups = [x for x in inputs if isinstance(x, OneHot)]
    return OneHot(torch.cat([x.index for x in lookups], 1), lookups[0].size, lookups[0].padding)


def _position_weights(mask: Tensor, positions: int, calls: int) -> Tensor:
    """Weights of the positions: those of the loss terms where the layouts agree, else one for a whole example."""
    if mask.shape[1] * calls == positions:
        return mask.repeat(1, calls)
    return mask.any(1, keepdim=True).expand(-1, positions)
