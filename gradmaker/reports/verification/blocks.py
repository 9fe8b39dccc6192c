"""Checks of a block's representation and of its solve, with a statistic of one piece of evidence.

By float64 matrices where a block is small enough, otherwise by products with a few random vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import Evidence, Gradient, Joint, Outer, Pair
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.curvature.products import Product
from gradmaker.curvature.tied import Tied
from gradmaker.gathering import Piece
from gradmaker.linalg.state import State
from gradmaker.reports.verification.passes import Measured, relative
from gradmaker.reports.verification.result import Check
from gradmaker.reports.verification.scratch import ONCE, Scratch, fill
from gradmaker.representations.base import Representation
from gradmaker.representations.roles import PerStep, Unstacked
from gradmaker.solvers.definition import Defined

__all__ = ["check_block"]

DENSE_LIMIT = 2048
"""Blocks with more parameters are checked by products with vectors."""
ENTRIES = 1 << 25
"""Entries of float64 tensors formed at once: of a longer stack only some members are checked."""
PROBES = 3
"""Members of a stack, or vectors of a single block, for which products are compared."""


def check_block(block: Block, found: Measured) -> list[Check]:
    """One check for each site of a block, whose statistics do not change."""
    own = copy.copy(block)
    own.held = block.writable(block.empty())
    scratch = Scratch(own, found)
    solve = approximation = None
    try:
        fill(scratch)
    except (RuntimeError, ValueError) as error:
        scratch.unchecked |= dict.fromkeys(("solve", "approximation"), f"the statistic cannot accumulate this batch: {error}")
    else:
        if scratch.evidence:
            solve, approximation = _solve_error(scratch), _approximation(scratch)
        else:
            scratch.unchecked |= dict.fromkeys(("solve", "approximation"), "this pass does not reach the block")
    return [_check(scratch, site, solve, approximation) for site in block.sites]


def _check(scratch: Scratch, site: Site, solve: float | None, approximation: float | None) -> Check:
    block, found = scratch.block, scratch.found
    unchecked = dict(scratch.unchecked)
    if site.name in found.uncalled:
        unchecked["gradients"] = "the layer was not called in this pass"
        if not block.full:
            unchecked |= dict.fromkeys(("solve", "approximation"), "the layer was not called in this pass")
            solve = approximation = None
    elif block.triple.curvature.layerwise and site.name not in found.errors:
        unchecked["gradients"] = "no tensor was recorded that the loss is a function of"
    dtype = block.options.precision.coarsest(block.frame.dtype)
    how, failure = " ".join(sorted(scratch.how)), found.failures.get(site.name)
    error = found.errors.get(site.name) if block.triple.curvature.layerwise else None
    solver = block.triple.solver
    accuracy = solver.accuracy if isinstance(solver, Defined) else 0.0
    return Check(site.name, dtype, error, solve, approximation, how, unchecked, failure, accuracy, found.half, found.rounding)


# ------------------------------------------------------------------ the solve
def _solve_error(scratch: Scratch) -> float | None:
    """Relative error of ``P g`` as solved, against its definition."""
    block, solver, representation = scratch.block, scratch.triple.solver, scratch.triple.representation
    g = scratch.draw(block.frame.stack, *block.frame.shape)
    defined = solver if isinstance(solver, Defined) else None
    if defined and not defined.linear and kinds(Gradient) <= representation.takes:  # P is computed from this gradient
        representation.update(block.state, Gradient(g), ONCE)
    found = _solved(scratch, g)
    members = _members(scratch)
    state = _doubled(representation, block.state, members)
    g, found = (x.double() if members is None else x[members].double() for x in (g, found))
    if scratch.size <= DENSE_LIMIT and len(g) * scratch.size**2 <= 2 * ENTRIES and not isinstance(representation, PerStep):
        scratch.how.add("dense")
        P = solver.operator(representation, state)
        return relative(found, (P @ g.reshape(len(g), -1, 1)).reshape(g.shape))
    if defined is None:
        scratch.unchecked["solve"] = f"{type(solver).__name__} has no equation for blocks of {scratch.size} parameters"
        return None
    exact, rounding = found, 0.0
    if defined.implicit and scratch.block.frame.dtype != torch.float64:
        exact = solver.solve(representation, solver.prepare(representation, state, None), g)
        rounding = relative(found, exact)
    scratch.how.add("probes")
    return max(rounding, relative(*defined.equation(representation, state, g, exact)))


def _solved(scratch: Scratch, g: Tensor) -> Tensor:
    """``P g`` by the solver.  # (B, *shape)"""
    block, representation = scratch.block, scratch.triple.representation
    if not isinstance(representation, PerStep):
        block.held, _ = block.prepare(block.held, {s.name for s in block.sites if s.name in scratch.evidence})
        return block.applied(block.cache, g)
    solver, rounds = scratch.triple.solver, 1
    if isinstance(solver, Defined):
        solver, rounds = solver.limit(), solver.rounds_to_limit
    cache = solver.prepare(representation, block.state, None)
    found = g
    for _ in range(rounds):
        found = solver.solve(representation, cache, g)
    return found


def _members(scratch: Scratch) -> Tensor | None:
    """Members of the stack to check: all with a statistic, if memory allows; None: the whole stack."""
    block = scratch.block
    if block.full or isinstance(block.triple.representation, Unstacked):
        return None
    slots = [slot for site, slot in zip(block.sites, block.slots, strict=True) if site.name in scratch.evidence]
    known = [b for slot in slots for b in range(slot.start, slot.stop)]
    held = sum(v[0].numel() for v in block.state.values())
    each = max(held, scratch.size**2 if scratch.size <= DENSE_LIMIT else scratch.size)
    return torch.tensor(_evenly_spaced(known, max(PROBES, ENTRIES // max(1, each))), device=block.frame.device)


def _evenly_spaced(known: list[int], most: int) -> list[int]:
    """At most so many members, evenly spaced, with the first and the last."""
    if len(known) <= most:
        return known
    return [known[j * (len(known) - 1) // (most - 1)] for j in range(most)]


def _doubled(representation: Representation, state: State, members: Tensor | None) -> State:
    """The statistic of some members, in float64."""
    if isinstance(representation, PerStep):  # a product has the dtype of its vector
        return state
    picked = state if members is None else {k: v[members] for k, v in state.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in picked.items()}


# ------------------------------------------------------------------ the representation
def _approximation(scratch: Scratch) -> float | None:
    """``|C_represented - C| / |C|``, in the Frobenius norm, or of products with random vectors."""
    block, representation = scratch.block, scratch.triple.representation
    if (
        isinstance(representation, PerStep) or kinds((Pair, "output_secant")) <= scratch.triple.curvature.gives
    ):  # the statistic is the evidence itself, no matrix
        return None
    pieces = list(block.layout.evidence(scratch.evidence))
    if all(not isinstance(e, (Pair, Product)) for e in [piece.evidence for piece in pieces]) and _small(scratch, pieces):
        scratch.how.add("dense")
        return _dense_error(scratch, pieces)
    if type(representation).matvec is Representation.matvec and scratch.size > DENSE_LIMIT:
        name = type(representation).__name__
        scratch.unchecked["approximation"] = f"{name} has no products for blocks of {scratch.size} parameters"
        return None
    scratch.how.add("probes")
    return _probe_error(scratch, pieces)


def _small(scratch: Scratch, pieces: list[Piece]) -> bool:
    """Whether the rows and the matrices fit into memory."""
    evidence = [piece.evidence for piece in pieces]
    counts = [e.count if isinstance(e, (Outer, Tied)) else e.parts[0].count if isinstance(e, Joint) else 1 for e in evidence]
    stack = scratch.block.frame.stack
    return scratch.size <= DENSE_LIMIT and stack * scratch.size * max(*counts, scratch.size) <= ENTRIES


def _dense_error(scratch: Scratch, pieces: list[Piece]) -> float:
    representation = scratch.triple.representation
    C = representation.to_dense(_doubled(representation, scratch.block.state, None))
    differences, sizes = [], []
    for piece in pieces:
        J, (slot,) = piece.evidence.rows().double(), piece.slots
        J = J.reshape(J.shape[0], slot.stop - slot.start, -1)
        dense = torch.einsum("nbp,nbq->bpq", J, J)
        differences.append((C[slot] - dense).flatten())
        sizes.append(dense.flatten())
    size = torch.cat(sizes)
    return relative(size + torch.cat(differences), size)


def _probe_error(scratch: Scratch, pieces: list[Piece]) -> float:
    found, expected = [], []
    for piece in pieces:
        for member, held, measured in _products(scratch, piece):
            found.append(held[member].flatten())
            expected.append(measured[member].flatten())
    return relative(torch.cat(found), torch.cat(expected))


def _products(scratch: Scratch, piece: Piece) -> Iterator[tuple[int | slice, Tensor, Tensor]]:
    """For a few vectors: their member of the stack, and ``C v`` as represented and as measured.  # , (b, *shape) twice"""
    block, representation, evidence, (slot,) = scratch.block, scratch.triple.representation, piece.evidence, piece.slots
    whole = block.full or isinstance(representation, Unstacked)
    rows = None if whole else torch.arange(slot.start, slot.stop, device=block.frame.device)
    state = _doubled(representation, block.state, rows)
    count = block.frame.stack if whole else slot.stop - slot.start
    if isinstance(evidence, Pair):
        v, cv = (x.double().reshape(count, *block.frame.shape) for x in (evidence.v, evidence.cv))
        yield slice(None), representation.matvec(state, v), cv
        return
    own = _as_double(evidence)
    sites = [s for s in block.sites if s.name in piece.names] if not block.full else block.sites
    members = _evenly_spaced(list(range(count)), PROBES)
    for member in (members * PROBES)[:PROBES]:
        v = torch.zeros(count, *block.frame.shape, dtype=torch.float64, device=block.frame.device)
        v[member] = scratch.draw(*block.frame.shape, dtype=torch.float64)
        yield member, representation.matvec(state, v), _product(own, v, sites)


def _as_double(evidence: Evidence) -> Evidence:
    if isinstance(evidence, (Joint, Tied)):
        return type(evidence)(tuple(part for part in map(_as_double, evidence.parts) if isinstance(part, Outer)))
    if isinstance(evidence, Outer):
        inputs = evidence.inputs.double() if isinstance(evidence.inputs, Tensor) else evidence.inputs
        return replace(evidence, inputs=inputs, gradients=evidence.gradients.double())
    return Gradient(evidence.gradient.double()) if isinstance(evidence, Gradient) else evidence


def _product(evidence: Evidence, v: Tensor, sites: list[Site]) -> Tensor:
    """``C v`` by the products of the evidence.  # (b, *shape)"""
    if isinstance(evidence, Outer) and evidence.kind == "inputs":
        return _input_product(evidence, v)
    if isinstance(evidence, (Outer, Tied)):
        z = evidence.project(v.reshape(sites[0].shape)).sum(0, keepdim=True)
        return evidence.combine(z).reshape(v.shape)
    if isinstance(evidence, Joint):
        parts = v.split([prod(s.shape) for s in sites], -1)
        pairs = [(e, x.reshape(s.shape)) for e, x, s in zip(evidence.parts, parts, sites, strict=True)]
        z = torch.stack([e.project(x).sum(0, keepdim=True) for e, x in pairs]).sum(0)
        return torch.cat([e.combine(z).flatten() for e, _ in pairs]).reshape(v.shape)
    if isinstance(evidence, Product):
        return evidence.matvec(v)
    assert isinstance(evidence, Gradient)
    g = evidence.gradient.reshape(v.shape)
    return g * (g * v).sum()


def _input_product(evidence: Outer, v: Tensor) -> Tensor:
    """``v A``, with ``A`` the mean of ``a a^T``.  # (G, o, i)"""
    a = evidence.inputs if isinstance(evidence.inputs, Tensor) else evidence.inputs.dense(v.dtype)
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if evidence.bias else a
    share = a.new_ones(a.shape[1:3]) if evidence.weights is None else evidence.weights.to(a.dtype)
    share = share / share.sum().clamp(min=1)
    x = v.mT if evidence.transposed else v
    out = torch.einsum("gnro,gnri->goi", torch.einsum("gnri,goi->gnro", a, x) * share[..., None], a)
    return out.mT if evidence.transposed else out
