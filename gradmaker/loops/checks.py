"""What an attachment cannot serve, refused when it is made or at the step that would be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.loss.likelihood import LIKELIHOODS, Categorical, Likelihood, find_likelihood
from gradmaker.step.protocol import RecordingMaker

__all__ = [
    "BARE_STEP",
    "CHANGED",
    "FOCAL",
    "NO_LOGITS",
    "OPEN",
    "OTHER_OUTPUTS",
    "OTHER_STEP",
    "SCALED",
    "TWICE",
    "TWO_LOSSES",
    "UNDIFFERENTIATED",
    "check",
    "check_parts",
    "held_by",
    "inner_optimizer",
    "logits_of",
    "missing",
    "read_likelihood",
    "refuse_scale",
    "scale_of",
    "unread",
    "wrong_axis",
]

UNDIFFERENTIATED = (
    "attach: the model was called again before this pass was differentiated, so its curvature is lost: call it once for each "
    "backward(), as on inputs that torch.cat joins, or declare all of its calls as one with setup_model_call"
)
TWICE = (
    "attach: one forward pass was differentiated twice, and its curvature was measured with the first loss alone: add the "
    "losses and call backward() once, or call the model again for the second"
)
NO_LOGITS = (
    "attach: no logits in the model's output, {}: expected a tensor, a part named 'logits', or a tuple or mapping that holds a "
    "tensor; the setup_... calls can name any part"
)
TWO_LOSSES = (
    "attach: several losses that were called inside of the model, or one of them and the logits in its output, enter the "
    "loop's loss, so that none shows all of it: use one of them, or declare the calls with setup_model_call and setup_loss_call"
)
OTHER_OUTPUTS = (
    "attach: a part of the loss came by other outputs of the model, of shape {}, and not by {}, where its curvature is "
    "measured ({}): give fisher='FisherEmp' with likelihood=, which takes the gradients of examples of the whole loss, or a "
    "method of the gradient, as soap; or make a model and an optimizer for each output; or declare the calls with "
    "setup_model_call and setup_loss_call"
)
CHANGED = (
    "attach: .grad was changed between the end of the backward pass and optimizer.step(), as by clipping: this acts on the raw "
    "gradient, before the preconditioner, so that methods whose step does not depend on the scale of the gradient undo it; "
    "limit the step instead, by max_norm= of a PreconditionedOptimizer, its learning rate or the options of the method"
)
BARE_STEP = (
    "step: this optimizer is the base of a PreconditionedOptimizer, and its own step() would use the raw gradient: call step() "
    "of the PreconditionedOptimizer, and give that one to schedulers, scalers and trainers"
)
OTHER_STEP = (
    "attach: {} is attached to this optimizer already, and its step is ended at another moment than that of this maker: attach "
    "one of them to the PreconditionedOptimizer, not to its base, or put both methods into one maker with fallback="
)
DECLARE = (
    "give attach likelihood= one of {}, which is taken as that of a mean loss, with accumulation= for the backward passes of a "
    "step; or declare the calls with setup_model_call and setup_loss_call, which shows the loss itself"
).format(", ".join(LIKELIHOODS))
FOCAL = (
    "attach: the weights of the loss terms are a function of the probabilities of their labels, as in a focal loss or with a "
    f"margin, whose curvature is not that of a weighted cross entropy: {DECLARE}"
)
OPEN = (
    "attach: in {} passes the gradient of the loss in the logits of shape {} did not show whether the loss is a cross entropy "
    "or a binary cross entropy with hard labels: equal logits, or one example of each of two classes, agree with other "
    f"losses, too, and where the gradient has rounded away nothing is seen: {DECLARE}"
)
SCALED = (
    "attach: the loss enters the backward pass with the factor {:g}, as from a GradScaler: give attach scaler=, or one with "
    "enabled=False if the factor is meant"
)
SCALE = 2.0**12
"""A power of two from here on is taken to be the scale of a `torch.amp.GradScaler` that was not given."""
_WRAPPED = ("optimizer", "base_optimizer", "base", "_optimizer")


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` calls hooks: the given one, or one that it wraps. TypeError if there is none."""
    found, seen = optimizer, list[str]()
    while not isinstance(found, Optimizer) or "_optimizer_step_pre_hooks" not in vars(found):
        name = next((k for k in _WRAPPED if isinstance(getattr(found, k, None), Optimizer)), None)
        if name is None or len(seen) > len(_WRAPPED):
            raise TypeError(
                f"attach: {type(optimizer).__name__} calls no hooks at its step() (it never ran Optimizer.__init__) and holds "
                f"no optimizer that does, under {', '.join(_WRAPPED)}: attach to the torch.optim optimizer that it wraps"
            )
        seen.append(name)
        found = getattr(found, name)
    return found


def held_by(optimizer: Optimizer) -> frozenset[nn.Parameter]:
    """The present parameters of all groups."""
    return frozenset(p for group in optimizer.param_groups for p in group["params"])


def read_likelihood(likelihood: str | Likelihood | None) -> Likelihood | None:
    """A likelihood from its name, with classes on the last axis, as models of tokens have them, or from itself."""
    if likelihood is None:
        return None
    return Categorical(axis=-1) if likelihood == "categorical" else find_likelihood(likelihood)


def check(maker: RecordingMaker, optimizer: Optimizer, accumulation: Any) -> None:
    """ValueError for a maker, optimizer or option that cannot be attached."""
    if accumulation is not None and (not isinstance(accumulation, int) or isinstance(accumulation, bool) or accumulation < 1):
        raise ValueError(f"accumulation={accumulation!r}: expected an integer of at least 1")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("attach: LBFGS models the curvature from plain gradients itself: use SGD, with or without momentum")
    passes = maker.plan.curvatures(of_passes=True)
    repeating = [type(c).__name__ for c in passes if c.needs & {"graph", "replay", "previous"}]
    if repeating:
        raise ValueError(
            f"attach: {', '.join(repeating)} has to differentiate or repeat the loss, which attach() does not see: declare it "
            "with setup_model_call and setup_loss_call"
        )


def check_parts(maker: RecordingMaker, served: frozenset[nn.Parameter]) -> None:
    """ValueError for an optimizer that holds no parameter of the maker, or only some parameters of a block."""
    sites = [s for block in maker.plan.blocks for s in block.sites]
    if not any(served.intersection(s.parameters.values()) for s in sites):
        raise ValueError(
            "attach: this optimizer holds no parameter of the maker's model: make it from model.parameters() of the very "
            "model, after the model was moved, wrapped or sharded, and the maker after that"
        )
    for site in sites:
        outside = [k for k, p in site.parameters.items() if p not in served]
        if outside and len(outside) < len(site.parameters):
            inside = [k for k in site.parameters if k not in outside]
            raise ValueError(
                f"attach: {', '.join(inside)} and {', '.join(outside)} are preconditioned as one block, and the optimizer "
                f"holds {', '.join(inside)} alone: give it all of them, freeze the others before the maker is made, or name "
                "them in ignore="
            )


def logits_of(output: Any) -> Tensor | None:
    """The model's logits: its output, the part of that named ``logits``, or its first tensor; None without a tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits", next((v for v in output.values() if isinstance(v, Tensor) and v.ndim > 0), None))
    elif isinstance(output, (tuple, list)):
        found = next((v for v in output if isinstance(v, Tensor) and v.ndim > 0), None)
    else:
        found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def missing(called: bool, watched: Iterable[str]) -> str:
    """Why a due measurement has not been made.  watched: outputs of the last pass whose gradients were expected"""
    if not called:
        return (
            "attach: a measurement of the curvature is due, and no forward pass of the model was seen in this step: hooks do "
            "not fire in a model that was compiled and called before attach() (then call torch._dynamo.reset() once), nor "
            "where parts of the model are called instead of the model itself (declare such a function with setup_model_call)"
        )
    return (
        "attach: a measurement of the curvature is due, and the loss brought no gradient to "
        f"{' and '.join(watched) or 'any output of the model'} that is still in .grad: return the very tensor that the loss is "
        "computed from, as the output or its part 'logits' (not a copy, a cast or a detached one), call backward() after the "
        "last zero_grad(), do not replace .grad by other tensors, or declare the calls with setup_model_call and "
        "setup_loss_call"
    )


def unread(shape: Sequence[int], residuals: Mapping[str, float], before: bool = False) -> str:
    """Why the terms of a loss could not be read.  residuals: of the fits, relative. before: whether the one fit was proven"""
    fits = " and ".join(f"{name} misses it by {error:.1e} of its size" for name, error in residuals.items())
    changed = " It was one in an earlier pass." if before else ""
    return (
        f"attach: the gradient of the loss in the logits of shape {tuple(shape)} is not that of a cross entropy or a binary "
        f"cross entropy with hard labels ({fits}), from which the weights of its terms could be read: label smoothing, soft or "
        f"mixed labels, a temperature, squared errors and further terms have to be declared.{changed} For these {DECLARE}"
    )


def wrong_axis(shape: Sequence[int], given: int, zero: Sequence[int]) -> str:
    """Why classes cannot be on the declared axis.  zero: axes over which the gradient sums to zero"""
    return (
        f"attach: the classes were declared on axis {given} of logits of shape {tuple(shape)}, and the gradient of a softmax "
        f"sums to zero over its classes, as it does here over axis {' and '.join(map(str, zero))} alone: give "
        f"likelihood=Categorical(axis={zero[-1]})"
    )


def refuse_scale(gradient: Tensor, weight: float) -> None:
    """RuntimeError where the factor of a loss in the backward pass looks like the scale of a GradScaler."""
    largest = float(gradient.abs().max()) / weight if gradient.numel() else 0.0
    if SCALE <= largest < math.inf and math.frexp(largest)[0] == 0.5:
        raise RuntimeError(SCALED.format(largest))


def scale_of(weights: Tensor, accumulation: int, tolerance: float) -> float | None:
    """What looks like such a scale in weights that were read: one of them, or their sum, which a mean has; None without."""
    largest, total = float(weights.max()), float(weights.sum()) * accumulation
    if abs(largest - 1) <= tolerance:  # of a sum
        return None
    for factor in (total, largest, largest * accumulation):
        if SCALE * (1 - tolerance) <= factor < math.inf and abs(2 ** round(math.log2(factor)) / factor - 1) <= tolerance / 30:
            return factor
    return None
