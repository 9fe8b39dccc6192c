"""Steps of a maker on tensors without data: what they would compute, before the first one is made."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from gradmaker.capture.arrangement import APART, Arrangement
from gradmaker.capture.rules.calls import Call, Layout
from gradmaker.config import GradientConfig
from gradmaker.costs.counting import Key, Recorder, Work
from gradmaker.groups import Group
from gradmaker.representations.roles import PerStep
from gradmaker.step.state import StepState

__all__ = ["Loop", "Loss", "Optimizing", "Steps", "build_like", "default_loss", "fake_tensor", "quiet", "run", "trying"]

Loss = Callable[[Any], Tensor]
Optimizing = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OF_STEP, OF_BLOCK, OF_RECORDING, OF_SITE = 100, 25, 150, 60
"""Work of the host beside its operators, in calls of an operator: of a maker's step, and of a pass that is recorded."""


class PredictedMaker(Protocol):
    """A maker whose steps can be tried."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def config(self) -> Any: ...
    @property
    def step_state(self) -> StepState: ...


@dataclass(frozen=True)
class Steps:
    """The work of each kind of step, and bytes.

    idle: neither measures nor refreshes, if there are such steps; measured, refreshed: those in which a method does.
    """

    idle: Work
    measured: Mapping[str, Work]
    refreshed: Mapping[str, Work]
    held: int
    peak: int


def fake_tensor(t: Tensor, mode: FakeTensorMode) -> Tensor:
    """The same shape and dtype without data; what is on the meta device becomes a tensor of the host, as if it had data."""
    if not t.is_meta:
        return mode.from_tensor(t.detach())
    with mode:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")


def fake_model(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model whose tensors have no data, without hooks."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        fake = fake_tensor(t, mode)
        memo[id(t)] = nn.Parameter(fake, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else fake
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.startswith(("_forward", "_backward")) and isinstance(hooks, dict):
                memo[id(hooks)] = type(hooks)()
    made: nn.Module = copy.deepcopy(model, memo)
    return made


def first_output(out: Any) -> Tensor:
    """The outputs of a model: its ``logits``, or its first floating tensor. ValueError if there is none."""
    found = getattr(out, "logits", None)
    if isinstance(found, Tensor):
        return found
    tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise ValueError(f"cost: the model returns no floating tensor, but {type(out).__name__}: give a loss of its output")
    return tensors[0]


def default_loss(out: Any) -> Tensor:
    """The mean cross-entropy of the outputs, whose last axis is that of classes."""
    z = first_output(out)
    z = z.reshape(-1, z.shape[-1]) if z.ndim else z.reshape(1, 1)
    return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long, device=z.device))


def build_like(maker: PredictedMaker) -> Callable[[nn.Module], Any]:
    """A function that makes the maker of a copy of the model, without self-checks, which are for its first passes alone."""

    def build(model: nn.Module) -> Any:
        config = maker.config
        if isinstance(config, GradientConfig):
            copies: dict[Any, Any] = dict(zip(maker.model.modules(), model.modules(), strict=True))
            groups = tuple(replace(g, rules=tuple(copies.get(rule, rule) for rule in g.rules)) for g in _groups(config))
            config = replace(config, ignore=tuple(copies.get(rule, rule) for rule in config.ignore), groups=groups)
            with suppress(ValueError):  # where it would have no effect
                config = replace(config, self_check="off")
        kind: Any = type(maker)
        made = kind(model, config)
        if isinstance(config, GradientConfig):
            made.checks.arrangement = _BySize()
        return made

    return build


def _groups(config: GradientConfig) -> tuple[Group, ...]:
    return config.groups if isinstance(config.groups, tuple) else ()


class _BySize(Arrangement):
    """Where the examples are, by sizes alone: a call into which they do not fit has none, as the self-checks would find."""

    @property
    def plain(self) -> bool:
        return False

    def layout(self, call: Call, n: int) -> Layout:
        shape = tuple(call.input.shape) if isinstance(call.input, Tensor) else ()
        fits = bool(shape) and (shape[0] % n == 0 or n in shape[1:2])
        return super().layout(call, n) if fits else APART


@dataclass
class Loop:
    """A loop of one batch over a fake model."""

    model: nn.Module
    maker: Any
    batch: Any
    loss: Loss
    optimizer: torch.optim.Optimizer | None

    def step(self) -> None:
        """One step; without a maker that of the plain gradient."""
        self.model.zero_grad()
        args, kwargs = arguments(self.batch)
        if self.maker is None:
            self.loss(self.model(*args, **kwargs)).backward()
        else:
            self.maker.setup_loss_call(self.loss, self.maker.setup_model_call(self.model, *args, **kwargs))
            self.maker.forward_and_backward()
        if self.optimizer is not None:
            self.optimizer.step()


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model: those of a tuple, by name those of a mapping, or the batch itself."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


@contextmanager
def trying(
    model: nn.Module,
    build: Callable[[nn.Module], Any] | None,
    batch: Any,
    loss: Loss | None = None,
    optimizer: Optimizing | None = None,
    deadline: float = inf,
) -> Iterator[tuple[Loop, Recorder]]:
    """A loop on a copy of a model without data, and the recorder of its operations, after a first step.

    build: makes the maker of a copy; None: the plain gradient.  deadline: seconds after which the trial fails
    """
    mode, recorder = FakeTensorMode(allow_non_fake_inputs=True), Recorder(deadline)
    copied = fake_model(model, mode)
    fake = tree_map(lambda t: fake_tensor(t, mode) if isinstance(t, Tensor) else t, batch)
    with warnings.catch_warnings(), _host_random(), quiet(), mode, recorder, torch.enable_grad():
        warnings.simplefilter("ignore")
        made = None if build is None else build(copied)
        chosen = None if optimizer is None else optimizer(copied.parameters())
        loop = Loop(copied, made, fake, loss or default_loss, chosen)
        loop.step()  # what is made once: bases, caches, the state of the optimizer
        yield loop, recorder


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging exceptions that are caught here, as where a layer rule does not fit a layer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _host_random() -> Iterator[None]:
    """Keeps torch's generator of the host, from which no number is drawn here that counts."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


def run(loop: Loop, recorder: Recorder) -> Steps:
    """The work of each kind of step."""
    if loop.maker is None or not loop.maker.step_state.now.clocks.of:
        work, peak = _work(loop, recorder)
        return Steps(work, {}, {}, 0, peak)
    return _of_clocks(loop, recorder)


def _work(loop: Loop, recorder: Recorder) -> tuple[Work, int]:
    """The work of one step, and the bytes that it takes beside those of before."""
    loop.model.zero_grad()
    recorder.start()
    before = recorder.live
    loop.step()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in loop.model.parameters() if p.grad is not None)
    recorder.work.add(Key("fresh", torch.float32, 0), 1, 0, max(0, recorder.kept - gradients))
    return recorder.work, recorder.peak - before


def _of_clocks(loop: Loop, recorder: Recorder) -> Steps:
    """Steps of each kind of a maker with clocks; one that the intervals leave out is not tried."""
    maker, peaks = loop.maker, list[int]()
    state, blocks = maker.step_state, maker.plan.blocks

    def made(measures: Collection[str], refreshes: Collection[str]) -> Work:
        now = state.now
        state.load(replace(now, clocks=now.clocks.forced(now.index, measures, refreshes)))
        work, peak = _work(loop, recorder)
        peaks.append(peak)
        sites = sum(len(b.sites) for b in blocks if b.triple.curvature.of_passes and b.options.method in measures)
        calls = OF_STEP + OF_BLOCK * len(blocks) + (OF_RECORDING + OF_SITE * sites if sites else 0)
        work.add(Key("python", torch.float32, 0), calls, 0, 0)
        return work

    names, methods = list(state.now.clocks.of), maker.plan.methods
    per_step = all(isinstance(b.triple.representation, PerStep) for b in blocks)  # all steps are alike
    refreshed = {} if per_step else {name: made([name], [name]) for name in names}
    held = sum(block.bytes for block in blocks)
    measured = {name: made([name], ()) for name in names}
    if any(method.preconditioner_interval != 1 for method in methods.values()):  # a cache may be the state of its refresh
        held = sum(block.bytes for block in blocks)
    always = per_step or (len(names) == 1 and methods[names[0]].curvature_interval == 1)
    idle = measured[names[0]] if always else made((), ())
    return Steps(idle, measured, refreshed or measured, held, max(peaks))
