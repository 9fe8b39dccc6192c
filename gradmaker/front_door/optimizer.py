"""A maker and the optimizer that takes its steps, as one `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.curvature import Likelihood
from gradmaker.front_door.bases import refuse_second_average, warn_of_base
from gradmaker.front_door.packing import KEY, pack, unpack
from gradmaker.front_door.report import metrics
from gradmaker.front_door.updates import clip, decaying
from gradmaker.loops.checks import held_by
from gradmaker.loops.marks import any_nonzero
from gradmaker.options.checks import check_interval
from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["PreconditionedOptimizer", "SkippedStepWarning"]


class SkippedStepWarning(UserWarning):
    """The loss or the gradients of a step were not finite, so that it was not taken. Given once."""


class PreconditionedOptimizer(Optimizer):
    """An optimizer whose steps are those of another one along ``P g``.

        p <- (1 - lr weight_decay) p,   then the step of the base optimizer along P g min(1, max_norm / ||P g||)

    `param_groups`, `state` and `defaults` are those of the base optimizer. `state_dict` holds the states of both.
    """

    def __init__(
        self,
        maker: PreconditionedGradientMaker,
        base_optimizer: Optimizer,
        *,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        likelihood: str | Likelihood | None = None,
        accumulation: int | None = None,
    ) -> None:
        """max_norm: bound on the norm of ``P g`` over all parameters of the optimizer; None: no bound.

        scaler, likelihood, accumulation: as in `PreconditionedGradientMaker.attach`.
        TypeError or ValueError for a maker, an optimizer or an option that do not go together.
        """
        _check_kinds(maker, base_optimizer)
        if max_norm is not None:
            check_interval("max_norm", max_norm, 0, math.inf, hint=", or None")
        refuse_second_average(base_optimizer.param_groups, maker.plan.blocks, type(base_optimizer).__name__)
        options = {"likelihood": likelihood, "accumulation": accumulation, "scaler": scaler}
        self.__setstate__({"maker": maker, "base_optimizer": base_optimizer, "max_norm": max_norm, "_options": options})
        warn_of_base(base_optimizer, type(maker).__name__)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, which is attached to the copies of the model and of the base optimizer."""
        return {name: getattr(self, name) for name in ("maker", "base_optimizer", "max_norm", "_options")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.maker: PreconditionedGradientMaker
        self.base_optimizer: Optimizer
        self.max_norm: float | None
        self._options: dict[str, Any]
        self._factor: Tensor | None = None  # of the last clipping
        self._seconds = 0.0  # of the maker's last step, on the host
        self._warned = False
        self._bare: list[nn.Parameter] = []  # whose state is the placeholder alone
        super().__setstate__(state)
        self._attachment = self.maker.attachment(self.base_optimizer, **self._options)
        self._attachment.name_at(self)

    # ---------------------------------------------------------------- what is the base optimizer's
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the base optimizer, by parameter."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the base optimizer."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as to the base optimizer. ValueError, and no group, for a part of a block."""
        self.base_optimizer.add_param_group(param_group)
        try:
            self._refuse_second_average()
            self._attachment.follow()
        except BaseException:
            self.base_optimizer.param_groups.pop()
            raise

    def _refuse_second_average(self) -> None:
        refuse_second_average(self.param_groups, self.maker.plan.blocks, type(self.base_optimizer).__name__)

    def __repr__(self) -> str:
        limit = "" if self.max_norm is None else f", max_norm={self.max_norm:g}"
        _, _, groups = super().__repr__().partition(" (")
        return f"{type(self).__name__}: {type(self.maker).__name__}, then {type(self.base_optimizer).__name__}{limit} ({groups}"

    def before_first_pass(self, tell: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call a function once, with the arguments of the model's first pass that may be differentiated."""
        self._attachment.before_first = tell

    # ---------------------------------------------------------------- the step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition, clip, decay, and step the base optimizer. Returns the result of the closure.

        Nothing happens where the loss or the gradients were found not to be finite, or where there is nothing to step from:
        no pass, and gradients of zero. RuntimeError after `remove` of the maker, and as `attach` raises it in a loop.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._attachment.removed:
            raise RuntimeError(
                "step: the hooks of the maker were removed, so that this step would use the raw gradient: make another "
                "PreconditionedOptimizer, or step the base optimizer"
            )
        if self._is_initialised_by_torch():
            self._step_base()
            return loss
        self._refuse_second_average()
        skipped = self.maker.skipped
        begun = perf_counter()
        stepped = self._attachment.end()
        self._seconds = perf_counter() - begun
        if self.maker.skipped > skipped:
            self._warn_of_skipped()
        elif stepped or any_nonzero(self._outside()):
            self._apply()
        return loss

    def _outside(self) -> list[nn.Parameter]:
        """Parameters of the optimizer that are not of the maker's model: they keep their gradient."""
        return list(held_by(self.base_optimizer).difference(self.maker.model.parameters()))

    def _apply(self) -> None:
        if self.max_norm is not None:
            held = dict.fromkeys(p for group in self.param_groups for p in group["params"])  # in order: sums are rounded
            self._factor = clip([p.grad for p in held if p.grad is not None], self.max_norm)
        self._step_base()

    def _step_base(self) -> None:
        self._hide()
        with decaying(self.param_groups), self._attachment.stepping():
            self.base_optimizer.step()
        self._show()

    def _is_initialised_by_torch(self) -> bool:
        """Whether this is the step without an effect by which torch's distributed state dicts make the keys of the state."""
        still = not self.state and all(float(group.get("lr", 1)) == 0 for group in self.param_groups)
        return still and not any_nonzero(held_by(self.base_optimizer))

    def _warn_of_skipped(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"step {self.maker.step - 1}: the loss or the gradients are not finite: neither the weights nor the statistics "
                "have changed. Further ones are counted, in metrics()['skipped']",
                SkippedStepWarning,
                stacklevel=4,
            )

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step for a logger: see `gradmaker.front_door.report.metrics`. Waits for the device."""
        factor = 1.0 if self._factor is None else float(self._factor)
        return {"clip_factor": factor, "seconds": self._seconds, **metrics(self.maker)}

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The states of the base optimizer and of the maker, the latter under ``state[p]["gradmaker"]``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.base_optimizer.state_dict()
        names = _names(state["param_groups"], self.param_groups)
        found = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in state["state"].items()}
        for p, packed in pack(self.maker.state_dict(), self.maker, held_by(self.base_optimizer)).items():
            found.setdefault(names[p], {})[KEY] = packed
        state = {**state, "state": found}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`, that of the maker bitwise. ValueError, and nothing changed, for one that does not fit."""
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else changed
        entries = state["state"]
        saved = unpack(entry[KEY] for entry in entries.values() if isinstance(entry, dict) and KEY in entry)
        own = {key: _without(entry) for key, entry in entries.items()}
        kept = self.param_groups, self.state
        try:
            self.base_optimizer.load_state_dict({**state, "state": {k: v for k, v in own.items() if v or not entries[k]}})
            self.maker.load_state_dict(saved)
        except BaseException:
            self.param_groups, self.state = kept
            raise
        self._bare = []
        if self.state:
            self._show()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _show(self) -> None:
        """Show in the base optimizer's state that its parameters have one of the maker: torch unflattens by these keys.

        The entry is empty, and stands where the optimizer keeps a state itself, or for all parameters if it keeps none.
        """
        state, own = self.state, held_by(self.base_optimizer)
        held = [p for p in self.maker.model.parameters() if p in own]
        if not any(state.get(p) for p in held):
            self._bare = held if any(p.grad is not None for p in held) else []
        for p in held if self._bare else [p for p in held if state.get(p)]:
            state[p].setdefault(KEY, {})

    def _hide(self) -> None:
        """Take the entries away that an optimizer would take for a state of its own."""
        for p in self._bare:
            if self.state[p].keys() == {KEY}:
                del self.state[p]
        self._bare = []


def _check_kinds(maker: object, base: object) -> None:
    """TypeError for what is no preconditioned maker, or no optimizer that steps by itself."""
    if not isinstance(maker, PreconditionedGradientMaker):
        raise TypeError(f"maker: expected a maker of preconditioned gradients, got {type(maker).__name__}")
    wrapped = not isinstance(base, Optimizer) or "_optimizer_step_pre_hooks" not in vars(base)
    if wrapped or isinstance(base, PreconditionedOptimizer):
        raise TypeError(
            f"base_optimizer: expected an optimizer that steps by itself, as torch.optim.SGD, got {type(base).__name__}: give "
            "the one that it wraps, and wrap the PreconditionedOptimizer"
        )


def _names(packed: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[nn.Parameter, Any]:
    """The keys of parameters in a saved state."""
    pairs = (
        (p, key)
        for saved, own in zip(packed, groups, strict=True)
        for p, key in zip(own["params"], saved["params"], strict=True)
    )
    return dict(pairs)


def _without(entry: Any) -> Any:
    return {key: value for key, value in entry.items() if key != KEY} if isinstance(entry, dict) else entry
