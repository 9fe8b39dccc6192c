"""Check of the loss: do the recognised terms make up its whole gradient, and its curvature at the outputs?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.capture.tape import OutputGradients
from gradmaker.errors import SelfCheckError
from gradmaker.loss.autograd_terms import centred, hessian_products, of_logits
from gradmaker.loss.head import Head
from gradmaker.loss.recorder import class_axis

__all__ = ["ADVICE", "check_curvature", "check_gradient", "ends", "gradient_error", "half"]

ADVICE = (
    "use fisher=FisherEmp(), which takes the gradients of examples whatever the loss is; or declare likelihood= and "
    "setup_logits_repr; or accept the curvature of the recognised terms alone by self_check='off'"
)

LINEAR = (F.nll_loss, F.kl_div)
"""Losses that take log-probabilities: all of their curvature is that of the log-softmax before them."""


def half(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors is in half precision."""
    return any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)


@torch.no_grad()
def check_gradient(head: Head, vjps: OutputGradients, output_gradients: OutputGradients) -> None:
    """SelfCheckError unless the vector-Jacobian products of the terms are the output gradients of the whole loss."""
    error, limit = gradient_error(vjps, output_gradients)
    if error > limit:
        raise SelfCheckError(
            f"the recognised terms of the loss ({_names(head)}) give another gradient than the whole loss, in the layers by "
            f"{error:.1e} of its size: a part of the loss is not among them, and its curvature would be missing: {ADVICE}"
        )


@torch.no_grad()
def gradient_error(vjps: OutputGradients, output_gradients: OutputGradients) -> tuple[float, float]:
    """The relative difference of these products from the output gradients of the whole loss, and the limit from rounding."""
    difference = size = 0.0
    for module, calls in output_gradients.items():
        for own, all_of in zip(vjps[module], calls, strict=True):
            for a, b in zip(own, all_of, strict=True):
                difference += float((a - b).double().square().sum())
                size += float(b.double().square().sum())
    limit = 2e-2 if half([g for calls in output_gradients.values() for call in calls for g in call]) else 1e-4
    return difference**0.5 / max(size**0.5, 1e-150), limit


def _names(head: Head) -> str:
    calls = [] if head.recorder is None else head.recorder.calls
    return ", ".join(dict.fromkeys(call.function.__name__ for call in calls)) or "none"


def check_curvature(head: Head, generator: torch.Generator) -> str | None:
    """Compare a product with the Hessian of the loss at the outputs: SelfCheckError if it differs; why it was not compared."""
    loss, outputs = head.loss, list({id(z): z for z in head.outputs}.values())
    if loss is None or not head.terms or not loss.requires_grad:
        return "the loss was not recorded"
    _check_normalised(head)
    v = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in outputs]
    classes = _log_probabilities(head)
    try:
        if len(outputs) > 1 and len(ends(outputs)) < len(outputs):
            return "one output of the loss is computed from another"
        loss_gradients = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
        moved = [centred(z, classes[id(z)], w) if id(z) in classes else w for z, w in zip(outputs, v, strict=True)]
        found = hessian_products(loss_gradients, outputs, moved)
    except (RuntimeError, NotImplementedError):
        return "the loss has no second derivative"
    found = [
        of_logits(z, classes[id(z)], s, w, h) if id(z) in classes else h
        for z, s, w, h in zip(outputs, loss_gradients, v, found, strict=True)
    ]
    expected = [
        sum((t.multiply(w) for t in head.terms if t.z is z), torch.zeros_like(z)) for z, w in zip(outputs, v, strict=True)
    ]
    difference = sum(float((a - b).detach().double().square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5
    size = max(sum(float(x.detach().double().square().sum()) for x in values) ** 0.5 for values in (found, expected))
    if difference > (5e-2 if half(outputs) else 1e-3) * size:
        raise SelfCheckError(
            f"the curvature of the loss at the outputs is not that of its recognised terms ({_names(head)}): a product with "
            f"its Hessian differs by {difference / size:.1e} of its size, as where a loss is a function of a recognised one: "
            f"{ADVICE}"
        )
    return None


def ends(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs from which no other one is computed."""
    inner: set[int] = set()
    for z in outputs:
        others = [w for w in outputs if w is not z]
        if others:
            found = torch.autograd.grad(z, others, torch.ones_like(z), retain_graph=True, allow_unused=True)
            inner.update(id(w) for w, g in zip(others, found, strict=True) if g is not None)
    return [z for z in outputs if id(z) not in inner]


def _log_probabilities(head: Head) -> dict[int, int]:
    """Outputs that a loss takes as log-probabilities, and is linear in: the axis of the classes, by identity."""
    calls = [] if head.recorder is None else head.recorder.calls
    named = [call for call in calls if call.function in LINEAR and call.output.requires_grad]
    return {id(call.arguments["input"]): class_axis(call) for call in named}


@torch.no_grad()
def _check_normalised(head: Head) -> None:
    """SelfCheckError for `F.nll_loss` or `F.kl_div` of other numbers than log-probabilities: they have no curvature there."""
    for call in head.recorder.calls if head.recorder else ():
        if call.function not in LINEAR or not call.arguments["input"].requires_grad:
            continue
        total = call.arguments["input"].float().logsumexp(class_axis(call))
        worst = float(total.abs().max()) if total.numel() else 0.0
        if worst > (5e-2 if half([call.arguments["input"]]) else 1e-3):
            raise SelfCheckError(
                f"F.{call.function.__name__} was given numbers that are not log-probabilities (log sum exp is off by "
                f"{worst:.1e}), for which it has another curvature: apply log_softmax, or use F.cross_entropy on logits"
            )
