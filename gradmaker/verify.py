"""Checks of every block on the user's own model and batch, against plain autograd and dense float64 matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from gradmaker.blocks import Block
from gradmaker.borrowing import borrowing
from gradmaker.capture import Tape
from gradmaker.curvature.evidence import Evidence, Gradient, Outer, Pair
from gradmaker.curvature.likelihood import read_terms
from gradmaker.curvature.recorder import LossRecorder
from gradmaker.pulls import Pulled
from gradmaker.real_pairs import real_dtype
from gradmaker.representations.base import Fold
from gradmaker.sites import Site

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["Check", "Verification", "verify"]

DENSE_LIMIT = 2048
"""Blocks with more parameters are not compared with a dense matrix."""


TOLERANCES = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-3, 1e-1), torch.bfloat16: (1e-3, 1e-1)}
"""For captured gradients and for solves. An inverse root in float32 with the customary ridge of 1e-6 lambda_max is only good to
a few percent: the unit roundoff times a condition number of 1e6."""


@dataclass(frozen=True)
class Check:
    """Relative errors of one site; None where a check does not apply.

    Batch norm in training mode couples the examples of a batch: a layer before it has no gradients of single examples. The
    check then holds the batch's mean and variance fixed, as the batch norm's own block does, and `Verification` says so.

    gradients: per-example gradients as captured, against a backward pass for one example alone.
    solve: ``P g`` as solved, against the method's formula with dense float64 matrices.
    approximation: the represented curvature against the dense one; not an error, but the price of the representation.
    """

    site: str
    dtype: torch.dtype
    gradients: float | None
    solve: float | None
    approximation: float | None

    @property
    def passed(self) -> bool:
        """Whether both errors are within the tolerance of the dtype."""
        pairs = zip((self.gradients, self.solve), TOLERANCES[self.dtype], strict=True)
        return all(error is None or error <= most for error, most in pairs)


@dataclass(frozen=True)
class Verification:
    """One check for each site; prints as a table."""

    checks: list[Check]
    frozen: list[str] = field(default_factory=list)  # batch norms whose statistics were held fixed

    @property
    def passed(self) -> bool:
        """Whether every check is within tolerance."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        width = max((len(c.site) for c in self.checks), default=4)
        lines = [f"{'site'.ljust(width)}  gradients      solve  approximation"]
        for c in self.checks:
            cells = f"{_cell(c.gradients):>9}  {_cell(c.solve):>9}  {_cell(c.approximation):>13}"
            lines.append(f"{c.site.ljust(width)}  {cells}  {'ok' if c.passed else 'ABOVE TOLERANCE'}")
        if self.frozen:
            names = ", ".join(self.frozen)
            lines.append(f"checked with the statistics of this batch held fixed, so that examples do not mix: {names}")
        return "\n".join(lines)


def _cell(error: float | None) -> str:
    return "-" if error is None else format(error, ".1e")


def verify(maker: PreconditionedGradientMaker) -> Verification:
    """Repeat the declared forward pass and check every block; weights, gradients, buffers, RNG and statistics stay."""
    model = maker.model
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    devices = [v.device.index for v in model.parameters() if v.device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=sorted({d for d in devices if d is not None})), torch.enable_grad():
            frozen = [k for k, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
            with _frozen_statistics([model.get_submodule(k) for k in frozen]), borrowing():
                return Verification(_checks(maker), frozen)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextmanager
def _frozen_statistics(norms: list[nn.Module]) -> Iterator[None]:
    """Batch norms in training mode give what they would, with the mean and variance of the batch as constants."""
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(_normalised).remove)
        yield


def _normalised(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A batch norm's output, through constants."""
    rows = args[0].detach().movedim(1, -1).flatten(0, -2)
    mean, variance = rows.mean(0), rows.var(0, correction=0)
    return F.batch_norm(args[0], mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)


def _checks(maker: PreconditionedGradientMaker) -> list[Check]:
    if maker._call is None or maker._loss is None:
        raise RuntimeError("verify: declare a batch first, by setup_model_call and setup_loss_call")
    tape = maker.new_tape(everything=True)
    with tape.recording(), LossRecorder() as recorder:
        output, loss = maker._forward({})
        tape.end_forward([loss])
        terms = read_terms(recorder, loss)
        z = terms[0].z if terms else _first_tensor(output)
        generator = torch.Generator(z.device).manual_seed(0)
        cotangent = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        blocks = [b for b in maker.plan.blocks if b.triple.curvature.layerwise]
        layered = [s for b in blocks for s in b.sites if s.fired(tape)]
        pulled = Pulled(tape.pull([z], [cotangent.unsqueeze(0)])) if layered else Pulled({})
        evidence: dict[str, Evidence] = {s.name: s.outer(tape, pulled, None, _dtype(s)) for s in layered}
        errors = _gradient_errors(tape, z, cotangent, layered, evidence) if layered else {}
        evidence = {name: _scaled(e) for name, e in evidence.items()}
    return [check for block in maker.plan.blocks for check in _check_block(block, evidence, errors)]


def _scaled(evidence: Evidence) -> Evidence:
    """With a curvature of mean diagonal one: what the damping adds is then neither lost in rounding nor all that there is."""
    assert isinstance(evidence, Outer)
    mean = evidence.rows().square().sum(0).mean()
    return replace(evidence, gradients=evidence.gradients / torch.where(mean > 0, mean, 1.0).sqrt())


def _first_tensor(output: Any) -> Tensor:
    return next(v for v in tree_leaves(output) if isinstance(v, Tensor) and v.requires_grad)


def _dtype(site: Site) -> torch.dtype:
    return real_dtype(next(iter(site.parameters.values())))


# ------------------------------------------------------------------ captured gradients
def _gradient_errors(
    tape: Tape, z: Tensor, cotangent: Tensor, sites: list[Site], evidence: Mapping[str, Evidence]
) -> dict[str, float]:
    """Error of the captured gradients of up to three examples."""
    n = tape.examples
    parameters = list({p: None for s in sites for p in s.parameters.values()})
    worst = {s.name: 0.0 for s in sites}
    for j in sorted({0, n // 2, n - 1}):
        alone = torch.zeros_like(cotangent).reshape(n, -1)
        alone[j] = cotangent.reshape(n, -1)[j]
        truth = dict(zip(parameters, tape.pull_parameters([z], [alone.reshape(z.shape)], parameters), strict=True))
        for site in sites:
            expected = site.lay_out(truth)
            worst[site.name] = max(worst[site.name], _relative(evidence[site.name].rows()[j], expected))
    return worst


def _relative(found: Tensor, expected: Tensor) -> float:
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size) if size > 0 else float(difference)


# ------------------------------------------------------------------ representation and solver
def _check_block(block: Block, evidence: Mapping[str, Evidence], errors: dict[str, float]) -> list[Check]:
    if block.triple.representation.fleeting:  # nothing is held that could be compared
        return [Check(s.name, block.frame.dtype, None, None, None) for s in block.sites]
    scratch = copy.copy(block)
    scratch.state, scratch.cache, scratch.ready = block.triple.representation.init(block.frame), {}, set()
    portion = evidence if block.triple.curvature.layerwise else _random_evidence(block)
    scratch.update(portion, Fold(0.0, 1.0, 1.0), set())
    layerwise = block.triple.curvature.layerwise
    solve = approximation = None
    if prod(block.frame.shape) <= DENSE_LIMIT:
        solve = _solve_error(scratch)
        approximation = _approximation(scratch, portion) if layerwise else None
    dtype = block.precision.coarsest(block.frame.dtype)
    return [Check(s.name, dtype, errors.get(s.name), solve, approximation) for s in block.sites]


def _random_evidence(block: Block) -> dict[str, Evidence]:
    """Gradients, or pairs of positive curvature where only these are understood."""
    generator = torch.Generator(block.frame.device).manual_seed(1)
    options: Any = {"dtype": block.frame.dtype, "device": block.frame.device, "generator": generator}
    drawn = {s.name: torch.randn(s.shape, **options) for s in block.sites}
    if Pair not in block.triple.representation.takes:
        return {name: Gradient(x) for name, x in drawn.items()}
    return {name: Pair(x, x * (0.5 + torch.rand(x.shape, **options))) for name, x in drawn.items()}


def _solve_error(block: Block) -> float:
    frame, solver, representation = block.frame, block.triple.solver, block.triple.representation
    block.prepare({s.name for s in block.sites})
    generator = torch.Generator(frame.device).manual_seed(2)
    g = torch.randn(frame.stack, *frame.shape, dtype=frame.dtype, device=frame.device, generator=generator)
    if not solver.linear:  # P is that of the very gradient
        representation.update(block.state, Gradient(g), Fold(0.0, 1.0, 1.0))
    found = block.applied(block.cache, g)
    P = solver.operator(representation, {k: v.double() for k, v in block.state.items()})
    return _relative(found, (P @ g.double().reshape(frame.stack, -1, 1)).reshape(g.shape))


def _approximation(block: Block, portion: Mapping[str, Evidence]) -> float:
    """``|C_represented - C| / |C|`` in the Frobenius norm, over the stack."""
    pieces = []
    for slot, evidence, _ in block._evidence(portion):
        J = evidence.rows().double()
        pieces.append(J.reshape(J.shape[0], slot.stop - slot.start, -1))
    rows = torch.cat(pieces, 1)
    dense = torch.einsum("nbp,nbq->bpq", rows, rows)
    return _relative(block.triple.representation.to_dense(block.state), dense)
