"""Check of uses: do the recorded calls add up to the gradient of each parameter?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradmaker.capture.rules.calls import Call
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.capture.vjps import VJPs
from gradmaker.curvature.evidence import Outer
from gradmaker.curvature.layer_evidence import outer
from gradmaker.self_checks.findings import Findings

__all__ = ["check_uses"]

HALF = 0.06
"""Tolerance in half precision: correct models differ by up to 1.5e-2."""
FACTOR = 10.0
"""Tolerance in units of ``eps sqrt(rows)``: correct models differ by at most 0.9."""
REPEATED = 100.0, 1e-10
"""The same for repeated calls, and the least tolerance: the norm of small numbers magnifies rounding."""


@torch.no_grad()
def check_uses(
    tape: Tape, sites: Sequence[Site], gradients: OutputGradients, truth: dict[nn.Parameter, Tensor], found: Findings
) -> None:
    """Compare the sum over the calls of every site with ``J^T u`` by autograd.

    gradients: output gradients for a cotangent ``u``; truth: ``J^T u`` of every parameter, removed once it was compared
    """
    last = {p: site for site in sites for p in site.parameters.values()}
    for site in sites:
        if site.direct(tape):
            continue
        if not any(tape.fired(m) for m in site.modules):
            if any(float(truth[p].norm()) > 0 for p in site.parameters.values()):
                _note(found, site, "the loss depends on it, and no call of its module was recorded")
            continue
        if reason := _refusal(tape, site):
            _note(found, site, reason)
            continue
        expected = site.lay_out({p: truth.pop(p) if last[p] is site else truth[p] for p in site.parameters.values()})
        error, size = _difference(tape, site, gradients, expected)
        if size == 0:
            found.without_gradient.update(site.parameters)
        elif not error <= 1.0 and site.rule is None:
            _note(found, site, "its module, called again for one example at a time, does not give its gradient")
        elif not error <= 1.0:
            _note(found, site, "the recorded calls of its layer do not add up to its gradient, so that it has other uses")


def _note(found: Findings, site: Site, text: str) -> None:
    (found.direct if site.rule is None else found.unseen).update(dict.fromkeys(site.parameters, text))


def _refusal(tape: Tape, site: Site) -> str | None:
    """Why its rule cannot read a recorded call."""
    calls = [] if site.rule is None else [c for m in site.modules for c in tape.calls[m]]
    return next((reason for c in calls if site.rule and (reason := site.rule.refuses(c))), None)


def _difference(tape: Tape, site: Site, gradients: OutputGradients, expected: Tensor) -> tuple[float, float]:
    """The error in units of the tolerance, and the size of the compared gradient."""
    dtype = torch.promote_types(expected.dtype, torch.float32)
    try:
        total, scale, rows = _total(tape, site, gradients, dtype)
    except (ValueError, RuntimeError) as error:
        if site.rule is not None or not _repeats(error):
            raise
        return float("inf"), 1.0
    size = max(float(expected.norm()), scale)
    eps = max(torch.finfo(dtype).eps, site.rule.rounding if site.rule else 0.0)
    half = any(_half(c) for m in site.modules for c in tape.calls[m])
    factor, floor = (
        (FACTOR, 0.0) if site.rule is not None and not site.rule.repeats else REPEATED
    )  # repeated calls are rounded differently
    tolerance = HALF if half else max(factor * eps * max(rows, 1) ** 0.5, floor)
    return float(total.reshape(expected.shape).sub_(expected).norm()) / (tolerance * size) if size else 0.0, size


def _repeats(error: Exception) -> bool:
    """Whether an error comes from a repeated call, which the parameter's own derivative does not need."""
    return "scale_grad_by_freq" not in str(error)


def _total(tape: Tape, site: Site, gradients: OutputGradients, dtype: torch.dtype) -> tuple[Tensor, float, int]:
    """The sum over the calls of a site, the size to which rounding is relative, and the number of rows.  # (G, o, i)"""
    if site.rule is None:
        own = outer(site, tape, VJPs(gradients), None, dtype).gradients[0, 0, :, 0]  # (n, P)
        return own.sum(0), float(own.norm()), len(own)
    if site.uses:
        parts = [_total(tape, use, gradients, dtype) for use in site.uses if any(tape.calls[m] for m in use.modules)]
        totals, sizes, rows_of = zip(*parts, strict=True)
        return torch.stack(totals).sum(0), sum(sizes), sum(rows_of)
    by_kernel = _by_kernel(tape, site, gradients)
    if by_kernel is not None:
        return by_kernel
    evidence = outer(site, tape, VJPs(gradients), None, dtype)
    rows = evidence.gradients.shape[2] * evidence.gradients.shape[3]
    return evidence.combine(evidence.gradients.new_ones(1, evidence.count)), _size(evidence), rows


def _size(evidence: Outer) -> float:
    """Root of the sum of squares of all row products, as if all inputs had the same length."""
    g = float(evidence.gradients.norm())
    if not isinstance(evidence.inputs, Tensor):
        return g
    positions = max(1, evidence.inputs.shape[1] * evidence.inputs.shape[2])
    return float(g * (float(evidence.inputs.square().sum()) / positions + evidence.bias) ** 0.5)


def _by_kernel(tape: Tape, site: Site, gradients: OutputGradients) -> tuple[Tensor, float, int] | None:
    """`_total` by the layer's own kernels, for layers that have them."""
    if not site.weighted:
        return None
    rule = site.rule
    assert rule is not None
    weight, *further = site.parameters.values()
    total: dict[nn.Parameter, Tensor | None] = {}
    size, rows = 0.0, 0
    for module in site.modules:
        for call, (g, *_) in zip(tape.calls[module], gradients[module], strict=True):
            own = rule.weight_gradient(module, call, g[0])
            if own is None:
                return None
            channels = g[0].movedim(g[0].ndim - _rank(module) - 1, 0).flatten(1)
            for p, value in zip((weight, *further), (own, channels.sum(1)), strict=False):
                before = total.get(p)
                total[p] = value if before is None else before + value
            size += float(g.norm()) * (1 + float(call.input.float().square().mean()) * weight[0].numel()) ** 0.5
            rows += channels.shape[1]
    return site.lay_out(total), size, rows


def _rank(module: nn.Module) -> int:
    """The number of spatial axes of a convolution."""
    return len(getattr(module, "kernel_size", ()))


def _half(call: Call) -> bool:
    """Whether a call computes in half precision, by its dtype or by autocast."""
    return call.autocast is not None or call.dtype in (torch.float16, torch.bfloat16)
