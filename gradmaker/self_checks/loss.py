"""Check of the loss: do the recognised terms make up all of its gradient and its curvature at the outputs?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.capture import OutputGradients
from gradmaker.errors import SelfCheckError
from gradmaker.head import Head

__all__ = ["check_curvature", "check_gradient"]

ADVICE = (
    "use fisher=FisherEmp(), which takes the gradients of examples whatever the loss is; or declare likelihood= and "
    "setup_logits_repr; or accept the curvature of the recognised terms alone by self_check='off'"
)


def _half(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)


@torch.no_grad()
def check_gradient(head: Head, pulled: OutputGradients, ridden: OutputGradients) -> None:
    """SelfCheckError unless the slopes of the terms, pulled back, are the gradients of the whole loss in every layer."""
    difference = size = 0.0
    for module, calls in ridden.items():
        for own, all_of in zip(pulled[module], calls, strict=True):
            for a, b in zip(own, all_of, strict=True):
                difference += float((a - b).double().square().sum())
                size += float(b.double().square().sum())
    limit = 2e-2 if _half([g for calls in ridden.values() for call in calls for g in call]) else 1e-4
    if difference**0.5 > limit * size**0.5:
        raise SelfCheckError(
            f"the recognised terms of the loss ({_names(head)}) give another gradient than the whole loss, in the layers by "
            f"{(difference / max(size, 1e-300)) ** 0.5:.1e} of its size: a part of the loss is not among them, and its "
            f"curvature would be missing: {ADVICE}"
        )


def _names(head: Head) -> str:
    calls = [] if head.recorder is None else head.recorder.calls
    return ", ".join(dict.fromkeys(call.function.__name__ for call in calls)) or "none"


def check_curvature(head: Head, generator: torch.Generator) -> str | None:
    """Compare one product with the Hessian of the loss at the outputs; why that could not be done, if so. SelfCheckError."""
    loss, outputs = head.loss, list({id(z): z for z in head.outputs}.values())
    if loss is None or not head.terms or not loss.requires_grad:
        return "the loss is out of sight"
    _check_normalised(head)
    if any(call.function is F.nll_loss for call in (head.recorder.calls if head.recorder else ())):
        return None  # linear in log-probabilities, which were seen to be normalised
    v = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in outputs]
    try:
        if len(outputs) > 1 and _linked(outputs):
            return "one output of the loss is made of another"
        slopes = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        pairs = [(s, w) for s, w in zip(slopes, v, strict=True) if s is not None and s.requires_grad]
        found = _products(pairs, outputs)
    except (RuntimeError, NotImplementedError):
        return "the loss has no second derivative"
    expected = [
        sum((t.multiply(w) for t in head.terms if t.z is z), torch.zeros_like(z)) for z, w in zip(outputs, v, strict=True)
    ]
    difference = sum(float((a - b).detach().double().square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5
    size = max(sum(float(x.detach().double().square().sum()) for x in values) ** 0.5 for values in (found, expected))
    if difference > (5e-2 if _half(outputs) else 1e-3) * size:
        raise SelfCheckError(
            f"the curvature of the loss at the outputs is not that of its recognised terms ({_names(head)}): a product with "
            f"its Hessian differs by {difference / size:.1e} of its size, as where a loss is a function of a recognised one: "
            f"{ADVICE}"
        )
    return None


def _products(pairs: Sequence[tuple[Tensor, Tensor]], outputs: Sequence[Tensor]) -> list[Tensor]:
    """``H v`` by the gradient of ``<slope, v>``."""
    if not pairs:
        return [torch.zeros_like(z) for z in outputs]
    inner = torch.stack([(s * w).sum() for s, w in pairs]).sum()
    found = torch.autograd.grad(inner, list(outputs), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(z) if h is None else h for z, h in zip(outputs, found, strict=True)]


def _linked(outputs: Sequence[Tensor]) -> bool:
    """Whether an output is made of another one."""
    for j, z in enumerate(outputs):
        others = [w for i, w in enumerate(outputs) if i != j]
        found = torch.autograd.grad(z, others, torch.ones_like(z), retain_graph=True, allow_unused=True)
        if any(g is not None for g in found):
            return True
    return False


@torch.no_grad()
def _check_normalised(head: Head) -> None:
    """`F.nll_loss` takes log-probabilities: of other numbers the loss is linear, without curvature."""
    for call in head.recorder.calls if head.recorder else ():
        if call.function is not F.nll_loss or not call.output.requires_grad:
            continue
        x = call.arguments["input"].float()
        total = x.logsumexp(min(1, x.ndim - 1))
        worst = float(total.abs().max()) if total.numel() else 0.0
        if worst > (5e-2 if _half([call.arguments["input"]]) else 1e-3):
            raise SelfCheckError(
                f"F.nll_loss was given numbers that are not log-probabilities (log sum exp is off by {worst:.1e}), for which "
                "it has another curvature: apply log_softmax first, or use F.cross_entropy on the logits"
            )
