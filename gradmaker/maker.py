"""The protocol: declare the forward pass and the loss, then ask for both passes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmaker.options.registry import register
from gradmaker.passes.batches import Declared
from gradmaker.passes.deferred import Deferred, depends_on, describe, resolve
from gradmaker.scale.ranks import ranks
from gradmaker.state_format import FORMAT, check_format

__all__ = ["GradientMaker", "PlainGradientConfig"]


@dataclass(frozen=True, kw_only=True)
class PlainGradientConfig:
    """The plain gradient has no options."""


@register("gradient")
class GradientMaker:
    """The plain gradient, by the same protocol as every preconditioned one.

    Declaring the calls instead of making them lets a maker record the forward pass, run further passes, or repeat the step:

        y = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, y, t)
        y, loss = maker.forward_and_backward()
    """

    Config: ClassVar[Any] = PlainGradientConfig

    def __init__(self, model: nn.Module, config: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        config = self.Config() if config is None else config
        if not isinstance(config, self.Config):
            raise TypeError(
                f"{type(self).__name__} takes a {self.Config.__name__}, got {type(config).__name__}; "
                "from_config(model, mapping) accepts mappings"
            )
        if reason := self.refuse(model):
            raise ValueError(reason)
        self.model, self.config = model, config
        self.step = 0
        self._declared: dict[str, Declared] = {}  # by purpose; that of the pass itself is ""
        self._kept: list[tuple[nn.Parameter, Tensor | None]] = []  # gradients from before the step that is under way
        self._open = False
        self._ended = False  # whether `precondition` was called for the step under way: after an exception it may be again
        self._left: list[tuple[nn.Parameter, Tensor | None, int]] = []  # gradients, and their versions, that it then left

    @classmethod
    def refuse(cls, model: nn.Module) -> str | None:
        """Why this method cannot serve a model, whatever the batch; None if it can. A maker of such a model is a ValueError."""
        return None

    # ---------------------------------------------------------------- setup
    def setup_model_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare the forward pass; returns a stand-in for its result. Forgets an earlier loss.

        function: usually the model; anything callable that uses it.
        """
        call = _deferred("setup_model_call", function, args, kwargs)
        self._declared = {"": Declared(call)}
        return call

    def setup_curvature_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare a further batch for products with the curvature; the gradient stays that of `setup_model_call`.

        It comes after that, and goes with the next one. A loss that is declared on its result is the loss of the products.
        """
        return self._declare("curvature", function, args, kwargs)

    def setup_search_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare a further batch for a search among displaced weights, in the same way as `setup_curvature_call`."""
        return self._declare("search", function, args, kwargs)

    def _declare(self, purpose: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred:
        verb = f"setup_{purpose}_call"
        if self._call is None:
            raise RuntimeError(f"{verb}: call setup_model_call(model, ...) first")
        if purpose not in self.purposes():
            raise ValueError(f"{verb}: {type(self).__name__} with this config does not use a batch of its own for this")
        self._declared[purpose] = Declared(_deferred(verb, function, args, kwargs))
        return self._declared[purpose].call

    def purposes(self) -> frozenset[str]:
        """What a batch of its own can be declared for: ``curvature``, ``search``."""
        return frozenset()

    def setup_loss_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare the loss as a call on parts of the model's result; returns a stand-in for it."""
        if not callable(function):
            raise TypeError(f"setup_loss_call: expected a callable first, got {type(function).__name__}")
        if isinstance(function, Deferred):  # a part of the model's result
            loss = function(*args, **kwargs)
        else:
            name = getattr(function, "__name__", type(function).__name__)
            loss = Deferred(function, args, kwargs, f"{name}({describe(args, kwargs)})")
        self.setup_loss_repr(loss)
        return loss

    def setup_loss_repr(self, loss: Deferred) -> None:
        """Declare which part of the model's result is the loss, as in ``maker.setup_loss_repr(y.loss)``."""
        self._owner("setup_loss_repr", loss).loss = loss

    def setup_logits_repr(self, logits: Deferred) -> None:
        """Declare which part of the model's result is the logits; needed only for losses that are not recognised."""
        self._owner("setup_logits_repr", logits).logits = logits

    def _owner(self, verb: str, part: Any) -> Declared:
        """The call that a part is computed from."""
        if self._call is None:
            raise RuntimeError(f"{verb}: call setup_model_call(model, ...) first")
        for declared in self._declared.values():
            if isinstance(part, Deferred) and depends_on(part, declared.call):
                return declared
        raise ValueError(f"{verb}: {part!r} is not computed from the latest setup_model_call, {self._call!r}")

    @property
    def _call(self) -> Deferred | None:
        return self._declared[""].call if self._declared else None

    @property
    def _loss(self) -> Deferred | None:
        return self._declared[""].loss if self._declared else None

    @property
    def _logits(self) -> Deferred | None:
        return self._declared[""].logits if self._declared else None

    # ---------------------------------------------------------------- passes
    def forward_and_backward(self, weight: float = 1.0) -> tuple[Any, Tensor]:
        """Run both passes; ``.grad`` gains the (preconditioned) gradient. Returns the model's result and the loss.

        weight: share of this batch where `accumulate` took in others before: the step's loss is ``sum_j weight_j L_j``.
        """
        with self._restoring():
            result = self._accumulate(weight, in_place=False)
            self.precondition()
        return result

    def accumulate(self, weight: float = 1.0) -> tuple[Any, Tensor]:
        """Run both passes of a micro-batch: its gradient and statistics are accumulated, nothing is preconditioned yet.

        weight: its share of the step's loss ``sum_j weight_j L_j``: ``n_j / n`` for means over examples, 1 for sums.
        """
        self._begin_again()
        return self._accumulate(weight, in_place=True)

    def _accumulate(self, weight: float, in_place: bool) -> tuple[Any, Tensor]:
        """in_place: whether gradients of earlier micro-batches may be added to; else they can be put back"""
        if self._call is None or self._loss is None:
            missing = "setup_model_call" if self._call is None else "setup_loss_call (or setup_loss_repr)"
            raise RuntimeError(f"nothing to run: {missing} has not been called")
        for purpose, declared in self._declared.items():
            if declared.loss is None:
                raise RuntimeError(f"setup_{purpose}_call: no loss was declared on its result, by setup_loss_call")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        several = ranks() > 1  # a reducer may hold .grad as views of its buffers, and write into them
        before = [(p, p.grad.clone() if several and p.grad is not None else p.grad) for p in parameters]
        joined = several and self._open  # what was not reduced yet, as under no_sync(), is so together with what comes
        undo = self._bookmark()
        try:
            for p in parameters if not joined else ():
                p.grad = None
            output, loss = self._run(weight)
            if parameters and all(p.grad is None for p in parameters):
                raise RuntimeError(f"the loss {self._loss!r} depends on no trainable parameter of the maker's model")
        except BaseException:
            for p, g in before:
                p.grad = g
            undo()
            raise
        if not joined:
            self._merge(before, in_place)
        return output, loss.detach()

    def _merge(self, before: list[tuple[nn.Parameter, Tensor | None]], in_place: bool) -> None:
        """Keep what was in ``.grad`` before the step apart; add up what the micro-batches of the step bring."""
        if not self._open:
            self._open, self._kept = True, before
            return
        for p, g in before:
            _add_into(p, g if in_place or g is None else g.clone())

    def precondition(self) -> None:
        """End the step: ``.grad <- P .grad`` for what this step has brought, and add it to what was there before.

        After an exception it may be called again; a further pass begins the step again instead.
        """
        self._check_parameters()
        self._ended = True
        try:
            self._precondition()
        except BaseException:
            self._left = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p, _ in self._kept]
            raise
        for p, g in self._kept:
            _add_into(p, g)
        self._open, self._ended, self._kept, self._left = False, False, [], []
        self.step += 1

    def _begin_again(self) -> None:
        """After an exception in `precondition`: put back ``.grad`` as it was before the step, unless it was changed since."""
        if not self._ended:
            return
        self._abandon()
        if all(p.grad is g and (g is None or g._version == version) for p, g, version in self._left):
            for p, before in self._kept:
                p.grad = before
        self._open, self._ended, self._kept, self._left = False, False, [], []

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """On an exception put back all as it was before."""
        self._begin_again()
        fresh, undo = not self._open, self._bookmark()
        before = [] if fresh else [(p, p.grad) for p in self.model.parameters() if p.requires_grad]
        try:
            yield
        except BaseException:
            for p, g in self._kept if fresh else before:
                p.grad = g
            if fresh:
                self._open, self._kept = False, []
                self._abandon()
            self._ended, self._left = False, []
            undo()
            raise

    # ---------------------------------------------------------------- for subclasses
    def _check_parameters(self) -> None:
        """Refuse a step on a model that is not what the maker was made for."""

    def _bookmark(self) -> Callable[[], None]:
        """What takes the maker's counters, and torch's global generators, back to where they are now: for a pass that fails."""
        indices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        devices = {i: torch.cuda.get_rng_state(i) for i in indices}
        host = torch.get_rng_state()

        def undo() -> None:
            torch.set_rng_state(host)
            for index, state in devices.items():
                torch.cuda.set_rng_state(state, index)

        return undo

    def _abandon(self) -> None:
        """Let go of what the passes of this step have brought, but for what cannot be taken back."""

    def _run(self, weight: float) -> tuple[Any, Tensor]:
        known: dict[int, Any] = {}
        output, loss = self._forward(known)
        (loss * weight if weight != 1.0 else loss).backward()
        return output, loss

    def _forward(self, known: dict[int, Any]) -> tuple[Any, Tensor]:
        """Evaluate the declared calls.  known: filled with the values of all deferred parts"""
        output = resolve(self._call, known)
        loss = resolve(self._loss, known)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss {self._loss!r} must be a tensor with one element, got {got}")
        return output, loss

    def _precondition(self) -> None:
        """Replace the step's gradient by the preconditioned one; the plain maker leaves it."""

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on: tensors, numbers and names only."""
        if self._open:
            raise RuntimeError("state_dict: micro-batches of this step are in .grad, which is not saved: save between steps")
        return {"format": FORMAT, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        check_format(state, "a plain GradientMaker")
        if set(state) != {"format", "step"}:
            raise ValueError("load_state_dict: expected what state_dict() of a plain GradientMaker returned")
        self.step = int(state["step"])
        self._open, self._ended, self._kept, self._left = False, False, [], []

    def remove(self) -> None:
        """Take every hook off the model and the optimizer."""


def _deferred(verb: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred:
    if not callable(function):
        raise TypeError(f"{verb}: expected a callable first, got {type(function).__name__}")
    name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))
    return Deferred(function, args, kwargs, f"{name}({describe(args, kwargs)})")


def _add_into(parameter: nn.Parameter, earlier: Tensor | None) -> None:
    """``.grad <- earlier + .grad``, in the storage of ``earlier``."""
    if earlier is not None:
        if parameter.grad is not None:
            with torch.no_grad():
                earlier.add_(parameter.grad)
        parameter.grad = earlier
