"""The loss recorder: records calls of torch's losses, and reads their arguments as weights of loss terms.

A function, a module, a lambda, a partial, or a call inside of the model: all end in the same `torch.nn.functional` call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["LossCall", "LossRecorder", "Weighting", "class_axis", "compute", "log_axis"]


@dataclass(frozen=True, eq=False)
class Weighting:
    """Weights of loss terms: ``L = sum_m weight_m l_m(z_m) + const``, divided by ``total`` if the reduction is a mean."""

    likelihood: str
    z: Tensor  # in the graph
    weight: Tensor  # one per term: z without its class axis; one per element where coordinates are independent: like z
    total: Tensor  # (), divisor of a mean
    reduction: str
    axis: int | None = None  # of the classes, where it is not that of torch's losses


@dataclass(frozen=True, eq=False)
class LossCall:
    """One call of a recognised loss, with its arguments by name and the defaults filled in."""

    function: Callable[..., Tensor]
    arguments: Mapping[str, Any]
    output: Tensor
    given: Tensor  # the copy that the caller gets, which ``loss *= 2`` may change

    def is_all_of(self, loss: Tensor) -> bool:
        """Whether a loss is the unchanged output of this call."""
        return self.given is loss and loss._version == 0

    @property
    def reduction(self) -> str:
        """The effective reduction: the deprecated ``size_average`` and ``reduce`` override ``reduction``, as in torch."""
        size_average, reduce = self.arguments["size_average"], self.arguments["reduce"]
        if size_average is None and reduce is None:
            return str(self.arguments["reduction"])
        if reduce is False:
            return "none"
        return "sum" if size_average is False else "mean"

    def weigh(self, factor: Tensor) -> Weighting:
        """The weights of this call's terms in the user's loss.  factor: dL/d(output), like the output"""
        with torch.no_grad():
            return _READERS[self.function](self, factor)


class LossRecorder(TorchFunctionMode):
    """Context that records the calls of recognised losses on the current thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __enter__(self) -> LossRecorder:
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SIGNATURES:
            return func(*args, **kwargs)
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: Mapping[str, Any] = bound.arguments
        output: Tensor | None = None
        if func is F.mse_loss and arguments["input"].requires_grad and arguments["target"].requires_grad:
            arguments, output = _of_difference(arguments)
        output = func(*args, **kwargs) if output is None else output
        given = output.clone() if output.requires_grad else output
        self.calls.append(LossCall(func, arguments, output, given))
        return given


def _of_difference(arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], Tensor]:
    """``F.mse_loss(a, b)`` as the loss of ``z = a - b`` and zeros, bitwise equal: a function of one tensor in the graph.

    ValueError where the two are broadcast and weighted.
    """
    a, b, weight = arguments["input"], arguments["target"], arguments.get("weight")
    if torch.is_autocast_enabled(a.device.type):
        a, b = compute(a), compute(b)  # as torch casts before the difference
    z = torch.sub(*torch.broadcast_tensors(a, b))  # in this order, for the roundings of the gradients
    if weight is not None and a.shape != z.shape:
        raise ValueError(
            f"F.mse_loss(input {tuple(a.shape)}, target {tuple(b.shape)}, weight=...) with both sides in the graph: expand the "
            "input and the weight to the shape of the target, so that the curvature of their difference can be read"
        )
    if a.shape != b.shape:
        F.mse_loss(a.detach(), b.detach())  # for its warning
    arguments = {**arguments, "input": z, "target": torch.zeros_like(z)}
    return arguments, F.mse_loss(**arguments)


# -------------------------------------------------------------------- the meaning of the arguments, loss by loss
def _cross_entropy(call: LossCall, factor: Tensor) -> Weighting:
    """The weight of a term is ``sum_k q_k w_k`` with the smoothed target ``q``; ``diag p - p p^T`` does not depend on targets.

    Soft targets that are in the graph are held fixed: the Gauss-Newton matrix is that of the logits alone. `F.nll_loss` takes
    log-probabilities, which are logits of the same distribution, with the same GGN.
    """
    arguments = call.arguments
    z, target, smoothing = arguments["input"], arguments["target"], arguments.get("label_smoothing", 0.0)
    axis = min(1, z.ndim - 1)
    given = arguments["weight"]
    if target.shape == z.shape:  # probabilities: torch's mean divides by the number of rows, not by their weights
        w = _given(given, z.new_ones(z.shape[axis]))
        q = (1 - smoothing) * target + smoothing / z.shape[axis]
        weight = (q * w.reshape(-1, *[1] * (z.ndim - axis - 1))).sum(axis)
        total = weight.new_full((), weight.numel())
    elif given is None:  # the weight of every class is 1
        observed = (target != arguments["ignore_index"]).to(torch.promote_types(z.dtype, torch.float32))
        weight = (1 - smoothing) * observed + smoothing * observed if smoothing else observed
        total = observed.sum()
    else:
        w, valid = compute(given), target != arguments["ignore_index"]
        observed = w[target.masked_fill(~valid, 0).long()] * valid
        weight = (1 - smoothing) * observed + smoothing * w.mean() * valid
        total = observed.sum()
    return Weighting("categorical", z, compute(factor) * weight, total, call.reduction)


def _kl_div(call: LossCall, factor: Tensor) -> Weighting:
    """``sum_k q_k (log q_k - x_k)`` of log-probabilities ``x`` is a cross entropy with the target ``q``, up to a constant."""
    arguments = call.arguments
    x, axis = arguments["input"], class_axis(call)
    q = compute(arguments["target"].exp() if arguments["log_target"] else arguments["target"])
    q = q.broadcast_to(torch.broadcast_shapes(q.shape, x.shape))
    weight = (q * compute(factor)).sum_to_size(x.shape).sum(axis)
    divisor = {"mean": q.numel(), "batchmean": x.shape[0] if x.ndim else 1}.get(call.reduction)
    total = weight.new_full((), divisor or 1)
    return Weighting("categorical", x, weight, total, "mean" if divisor else "sum", axis)


def class_axis(call: LossCall) -> int:
    """The class axis of a categorical loss: that of torch's losses, or the one on which probabilities add up to one."""
    x: Tensor = call.arguments["input"]
    return min(1, x.ndim - 1) if call.function is not F.kl_div else log_axis(x, [x.ndim - 1, min(1, x.ndim - 1)]) or x.ndim - 1


def log_axis(x: Tensor, axes: Iterable[int]) -> int | None:
    """The axis along which a tensor holds normalised log-probabilities; None if there is none."""
    limit = 5e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-4
    for axis in dict.fromkeys(axes):
        if x.ndim and x.numel() and x.shape[axis] > 1 and bool((compute(x.detach()).logsumexp(axis).abs() <= limit).all()):
            return axis
    return None


def _mse(call: LossCall, factor: Tensor) -> Weighting:
    """Weights of squared errors. z is the argument in the graph, as the loss is symmetric; if both are, their difference."""
    z, target, w = call.arguments["input"], call.arguments["target"], call.arguments.get("weight")
    z = z if z.requires_grad else target
    shape = torch.broadcast_shapes(call.arguments["input"].shape, target.shape)
    weight = _given(w, factor.new_ones(())).expand(shape)
    total = weight.new_full((), weight.numel()) if w is None else compute(w).sum()
    return _elements("gaussian", call, z, compute(factor) * weight, total)


def _bce(call: LossCall, factor: Tensor) -> Weighting:
    """A positive label has the weight ``pos_weight``, a soft one in proportion: ``1 - y + pos_weight y``."""
    arguments = call.arguments
    z, y = arguments["input"], arguments["target"]
    one = factor.new_ones(()).expand(z.shape)  # with a shape, so that half-precision labels do not set the dtype
    weight = _given(arguments["weight"], one) * (1 + (_given(arguments["pos_weight"], one) - 1) * y)
    return _elements("bernoulli", call, z, compute(factor) * weight, weight.new_full((), z.numel()))


def _elements(likelihood: str, call: LossCall, z: Tensor, weight: Tensor, total: Tensor) -> Weighting:
    """Weights of elements. Where z was broadcast against the target, the weights of its copies add."""
    return Weighting(likelihood, z, weight.sum_to_size(z.shape), total, call.reduction)


def _given(weight: Tensor | None, default: Tensor) -> Tensor:
    return compute(default if weight is None else weight)


def compute(x: Tensor) -> Tensor:
    """The tensor in float32 or better.  # like x"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_READERS: Mapping[Callable[..., Tensor], Callable[[LossCall, Tensor], Weighting]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _cross_entropy,
    F.kl_div: _kl_div,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _bce,
}
_SIGNATURES = {function: inspect.signature(function) for function in _READERS}
