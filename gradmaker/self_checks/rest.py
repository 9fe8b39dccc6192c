"""Check of the rest: do the recorded calls give the share of each example in the gradient of the whole loss?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.errors import SelfCheckError
from gradmaker.loss.head import Head
from gradmaker.reentrant import nodes
from gradmaker.self_checks.findings import Findings
from gradmaker.self_checks.loss import check_gradient
from gradmaker.self_checks.uses import check_uses

__all__ = ["check_rest"]

AGAIN = "BackwardBackward"
"""In the names of autograd nodes that differentiate a derivative, as for a gradient penalty."""


def check_rest(
    tape: Tape, sites: Sequence[Site], head: Head, vjps: OutputGradients, output_gradients: OutputGradients, found: Findings
) -> None:
    """SelfCheckError if per-example gradients would miss a part of the loss that is not among its terms.

    vjps: output gradients of the terms; output_gradients: of the whole loss; found: findings of the other checks
    """
    if not head.terms or not _differ(head, vjps, output_gradients):
        return
    lost = {*found.unseen, *found.direct}
    lost |= {type(key[0]).__name__ for key, order in found.orders.items() if order is None}
    if head.loss is not None and any(AGAIN in node.name() for node in nodes([head.loss])):
        lost |= set(_beside(tape, sites, head.loss, output_gradients))
    if lost:
        raise SelfCheckError(
            f"a part of the loss is not among its recognised terms, and its share for each example cannot be told apart for "
            f"{', '.join(sorted(lost))}, whose calls do not show all uses, as where a derivative is differentiated, or mix "
            "examples: return outputs from the model of which the whole loss is a function and compute it from these alone, "
            "leave the layers out with ignore=, or choose a method of the gradient alone"
        )


def _differ(head: Head, vjps: OutputGradients, output_gradients: OutputGradients) -> bool:
    try:
        check_gradient(head, vjps, output_gradients)
    except SelfCheckError:
        return True
    return False


def _beside(tape: Tape, sites: Sequence[Site], loss: torch.Tensor, output_gradients: OutputGradients) -> dict[str, str]:
    """Parameters whose recorded calls do not add up to the gradient of the loss."""
    own = [s for s in sites if s.rule is not None]
    parameters: list[nn.Parameter] = list(dict.fromkeys(p for s in own for p in s.parameters.values()))
    if not parameters:
        return {}
    truth = tape.vjp_parameters([loss], [torch.ones_like(loss)], parameters)
    seen = Findings()
    check_uses(tape, own, output_gradients, dict(zip(parameters, truth, strict=True)), seen)
    return seen.unseen
