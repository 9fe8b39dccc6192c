"""The protocol of makers: declare the forward pass and the loss, then run both passes in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradmaker.blocks import Block
from gradmaker.linalg.writes import make
from gradmaker.on_ranks import OnRanks, scaled_loss
from gradmaker.options.registry import register
from gradmaker.passes.batches import Declared
from gradmaker.passes.deferred import Deferred, declared_call, depends_on, describe, resolve
from gradmaker.state_format import FORMAT, check_format
from gradmaker.step.state import End, Facts, Phase, StepState

__all__ = ["GradientMaker", "PlainGradientConfig"]


@dataclass(frozen=True, kw_only=True)
class PlainGradientConfig:
    """The plain gradient has no options."""


@register("gradient")
class GradientMaker(OnRanks):
    """A maker of the plain gradient, with the protocol of all makers.

    Calls are declared, not made, so that a maker can record the forward pass, run further passes, or repeat the step:

        y = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, y, t)
        y, loss = maker.forward_and_backward()
    """

    Config: ClassVar[Any] = PlainGradientConfig

    def __init__(self, model: nn.Module, config: Any = None) -> None:
        super().__init__()
        model = model.module if isinstance(model, DistributedDataParallel) else model
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
        self.step_state = StepState()
        self._declared: dict[str, Declared] = {}  # by purpose; "" is the forward pass of the step

    @property
    def step(self) -> int:
        """The index of the step: the number of steps that have ended."""
        return self.step_state.now.index

    @classmethod
    def refuse(cls, model: nn.Module) -> str | None:
        """Why this method cannot serve a model with any batch; None if it can. A maker of a refused model is a ValueError."""
        return None

    # ---------------------------------------------------------------- setup
    def setup_model_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare the forward pass. Returns a stand-in for its result, and forgets an earlier loss.

        function: usually the model, or any callable that uses it.
        """
        call = declared_call("setup_model_call", function, args, kwargs)
        self._declared = {"": Declared(call)}
        return call

    def setup_curvature_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare a second batch for products with the curvature; the gradient stays that of `setup_model_call`.

        Call it after that; the next `setup_model_call` forgets it. A loss declared on its result is the loss of the products.
        """
        return self._declare("curvature", function, args, kwargs)

    def setup_search_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare a second batch for a search among displaced weights, in the same way as `setup_curvature_call`."""
        return self._declare("search", function, args, kwargs)

    def _declare(self, purpose: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred:
        verb = f"setup_{purpose}_call"
        if self._call is None:
            raise RuntimeError(f"{verb}: call setup_model_call(model, ...) first")
        if purpose not in self.purposes():
            raise ValueError(f"{verb}: {type(self).__name__} with this config has no use for a second batch")
        self._declared[purpose] = Declared(declared_call(verb, function, args, kwargs))
        return self._declared[purpose].call

    def purposes(self) -> frozenset[str]:
        """Purposes for which a second batch can be declared: ``curvature``, ``search``."""
        return frozenset()

    def setup_loss_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred:
        """Declare the loss as a call on parts of the model's result. Returns a stand-in; TypeError for what is not callable."""
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
        """The declared call that computes a part. RuntimeError before any call, ValueError for a part of an earlier one."""
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

    @property
    def declared(self) -> bool:
        """Whether a forward pass and its loss are declared."""
        return self._call is not None and self._loss is not None

    def evaluate(self) -> tuple[Any, Tensor, Tensor | None]:
        """Run the declared calls. Returns the model's result, the loss, and the logits if they are declared."""
        known: dict[int, Any] = {}
        output, loss = self._forward(known)
        return output, loss, None if self._logits is None else resolve(self._logits, known)

    # ---------------------------------------------------------------- passes
    def forward_and_backward(self, weight: float = 1.0) -> tuple[Any, Tensor]:
        """Run both passes; ``.grad`` gains the (preconditioned) gradient. Returns the model's result and the loss.

        weight: share of this batch after the micro-batches of `accumulate`: the step's loss is ``sum_j weight_j L_j``.
        RuntimeError where no model call or no loss is declared; after any exception the step is as it was.
        """
        self._begin_again()
        undo, fresh = self._mark(), self.step_state.now.gradients is None
        before = [] if fresh else [(p, p.grad) for p in self._trained]
        try:
            result = self._accumulate(weight, in_place=False, alone=fresh)
            self.precondition()
        except BaseException:
            kept = self.step_state.now.gradients or () if fresh else before
            for p, g in kept:
                p.grad = g
            undo()
            raise
        return result

    def accumulate(self, weight: float = 1.0) -> tuple[Any, Tensor]:
        """Run both passes of a micro-batch: its gradient and statistics are accumulated, and nothing is preconditioned yet.

        weight: its share of the step's loss ``sum_j weight_j L_j``: ``n_j / n`` for means over examples, 1 for sums.
        """
        self._begin_again()
        return self._accumulate(weight, in_place=True)

    def _accumulate(self, weight: float, in_place: bool, alone: bool = False) -> tuple[Any, Tensor]:
        """in_place: whether to add to the gradients of earlier micro-batches in place; otherwise they can be restored

        alone: whether this is all of the step, which ends at once
        """
        if self._call is None or self._loss is None:
            missing = "setup_model_call" if self._call is None else "setup_loss_call (or setup_loss_repr)"
            raise RuntimeError(f"nothing to run: {missing} has not been called")
        for purpose, declared in self._declared.items():
            if declared.loss is None:
                raise RuntimeError(f"setup_{purpose}_call: no loss was declared on its result, by setup_loss_call")
        parameters = self._trained
        before = [(p, p.grad) for p in parameters]
        undo = self._mark()
        try:
            for p in parameters:
                p.grad = None
            with self._together():
                output, loss = self._run(weight, alone)
            self._reduce(parameters)
            if parameters and not self.step_state.now.rows and all(p.grad is None for p in parameters):
                raise RuntimeError(f"the loss {self._loss!r} depends on no trainable parameter of the maker's model")
            self._merge(before, in_place)
        except BaseException:
            for p, g in before:
                p.grad = g
            undo()
            raise
        return output, loss.detach()

    def _merge(self, before: list[tuple[nn.Parameter, Tensor | None]], in_place: bool) -> None:
        """Separate what was in ``.grad`` before the step from the step's gradient, and sum that over the micro-batches."""
        if self.step_state.now.gradients is None:
            self.step_state.keep_apart(tuple(before))
            return
        _add_into((p, g if in_place or g is None else g.clone()) for p, g in before)

    def precondition(self) -> None:
        """End the step: ``.grad <- P .grad`` for the gradient of this step, plus what was in ``.grad`` before it.

        An exception changes nothing: it may be called again, or a first pass begins the step again.
        """
        self._check_parameters()
        before = self.step_state.now
        self.step_state.end()
        try:
            with self._whole_gradients(before.gradients or ()) as earlier:
                end = self._end()
                write = end.write or partial(_write, end.gradients, earlier, end.folds)
                self.step_state.finish(end, self._blocks(), write)
        except BaseException:
            self.step_state.fail(before)
            self._restore()
            raise

    def _begin_again(self) -> None:
        """After an exception in `precondition`: restore ``.grad`` from before the step, unless it was changed since."""
        if self.step_state.now.phase is Phase.FAILED:
            for p, before in self.step_state.begin_again():
                p.grad = before

    def _mark(self) -> Callable[[], None]:
        """Returns a function that restores the present step and torch's global generators, for a call that fails."""
        now = self.step_state.now
        there = self.model.parameters() if torch.cuda.is_initialized() else ()
        indices = {p.device.index for p in there if p.device.type == "cuda"}
        devices = {i: torch.cuda.get_rng_state(i) for i in indices}
        host = torch.get_rng_state()

        def undo() -> None:
            self._undo(now)
            torch.set_rng_state(host)
            for index, state in devices.items():
                torch.cuda.set_rng_state(state, index)

        return undo

    # ---------------------------------------------------------------- for subclasses
    def _check_parameters(self) -> None:
        """Raise if the model's parameters have changed since the maker was made."""

    def _undo(self, before: Facts) -> None:
        """Restore an earlier state of the step."""
        self.step_state.undo(before)

    def _restore(self) -> None:
        """After an exception at the end of a step: restore what was released."""

    def _blocks(self) -> list[Block]:
        """The blocks, which hold the statistics."""
        return []

    def _run(self, weight: float, alone: bool = False) -> tuple[Any, Tensor]:
        """The passes of a micro-batch.  alone: as in `_accumulate`"""
        with self._noting_losses() as recorder:
            output, own = self._forward({})
        share = self._share(recorder, own, self._declared[""].counted(0), weight, "mean")
        if share is None or not share.empty:
            loss = scaled_loss(own, share)
            (loss * weight if weight != 1.0 else loss).backward()
        else:
            self._meet_in_backward(output)
        self.step_state.accumulate(weight, 0)
        return output, own

    def _forward(self, known: dict[int, Any]) -> tuple[Any, Tensor]:
        """Run the declared calls. ValueError unless the loss has one element.  known: gets the values of all deferred parts"""
        output = resolve(self._call, known)
        loss = resolve(self._loss, known)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss {self._loss!r} must be a tensor with one element, got {got}")
        return output, loss

    def _end(self) -> End:
        """What the end of the step writes and keeps; the plain maker leaves its gradient unchanged."""
        return End()

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: tensors, numbers and names only. RuntimeError while micro-batches are in ``.grad``."""
        if self.step_state.now.gradients is not None:
            raise RuntimeError("state_dict: micro-batches of this step are in .grad, which is not saved: save between steps")
        return {"format": FORMAT, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. ValueError for one of another kind of maker."""
        check_format(state, "a plain GradientMaker")
        if set(state) != {"format", "step"}:
            raise ValueError("load_state_dict: expected what state_dict() of a plain GradientMaker returned")
        self.step_state.load(Facts(index=int(state["step"])))

    def remove(self) -> None:
        """Remove all hooks from the model and the optimizer."""


@torch.no_grad()
def _write(
    gradients: Mapping[nn.Parameter, Tensor],
    before: Iterable[tuple[nn.Parameter, Tensor | None]],
    folds: Sequence[partial[object]],
) -> None:
    """``.grad <- gradient + .grad from before the step``, in the storage that it had before.

    gradients: preconditioned ones, of some parameters; folds: writes into statistics.  Until the one call that writes, an
    exception leaves all as it was.
    """
    for p in gradients:
        if p.grad is not None and (p.grad.is_conj() or p.grad.is_neg()):  # views that no one call writes to
            p.grad = p.grad.resolve_conj().resolve_neg()
    earlier = {p: g.resolve_conj().resolve_neg() for p, g in before if g is not None}
    alone = [(p.grad, value) for p, value in gradients.items() if p.grad is not None and p not in earlier]
    formed = [(p, value.to(p.dtype)) for p, value in gradients.items() if p.grad is None and p not in earlier]  # from rows
    own = [(g, gradients.get(p, p.grad), p.dtype) for p, g in earlier.items()]
    both = [(g, value.to(dtype)) for g, value, dtype in own if value is not None]  # as it would be in .grad
    targets, values = [target for target, _ in alone], [value for _, value in alone]
    if both:
        values += torch._foreach_add([g for g, _ in both], [value for _, value in both])
        targets += [g for g, _ in both]
    if targets:
        torch._foreach_copy_(targets, values)
    make(folds)
    for p, g in (*earlier.items(), *formed):
        p.grad = g


@torch.no_grad()
def _add_into(before: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    """``.grad <- earlier + .grad``, in the storage of ``earlier``."""
    found = [(p, earlier, p.grad) for p, earlier in before if earlier is not None]
    pairs = [(earlier, g) for _, earlier, g in found if g is not None]
    if pairs:
        torch._foreach_add_([earlier for earlier, _ in pairs], [g for _, g in pairs])
    for p, earlier, _ in found:
        p.grad = earlier
