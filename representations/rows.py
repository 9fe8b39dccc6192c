"""Rows ``J`` of the last batch, held as inputs and output gradients, or multiplied out where that takes less memory.

Axes as in `gradmaker.curvature.evidence`; ``G = B H``: groups in a block's stack. State of layer ``j`` in chunk ``p`` of a
step's evidence, each tensor with ``B`` first:

- ``p.j.gradients``: (B, H, k, n, r, o);
- ``p.j.inputs``: (B, H, n, r, i), or the indices (B, 1, n, r) that stand for one-hot inputs;
- ``p.j.layout``: no elements; its shape is (B, H, rows, columns, bias, transposed, 0) with ``bias``, ``transposed`` 0 or 1;
- ``p.j.formed``: (B, N, H, rows, columns), in place of these three: of layers with many positions, as convolutions have;
- ``p.own``: (B, N), coefficients of the rows in the gradient of the step, where these are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Joint, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.factored_gradient import FactoredGradient, joined_rows
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_count
from gradmaker.representations.base import NEWEST_ALONE, NO_LIMIT, Fold, Frame, Grain
from gradmaker.representations.low_rank import Spanned
from gradmaker.representations.roles import SpansGradient, WholeLayers
from gradmaker.representations.row_parts import FormedPart, OuterPart, Part

__all__ = ["Rows", "chunks"]


@dataclass(frozen=True)
class Rows(Spanned, WholeLayers, SpansGradient):
    """All rows of the latest step, held as evidence: ``C = sum_N vec(J_N) vec(J_N)^T`` exactly.

    A running average would add rows without bound, so that ``decay`` does not apply: earlier rows are dropped. ``full`` couples
    all layers, ``layer`` takes each by itself, with all groups of a convolution and all channels of a norm layer.

    Reference: Ren & Goldfarb 2019, arXiv:1906.02353, section 3.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, Joint)
    inapplicable = NEWEST_ALONE | NO_LIMIT

    granularity: Literal["full", "layer"] = "full"
    max_rows: int = 8192
    """More rows are refused: a linear system of this size is solved, in double precision."""

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, ("full", "layer"))
        check_count("max_rows", self.max_rows, 1)

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        G, o, i = frame.shape if len(frame.shape) == 3 else (1, *frame.shape, 1)[:3]
        empty = Outer(frame.zeros(G, 0, 1, i - 1)[0], frame.zeros(G, 0, 1, o), bias=True)
        return {"mass": frame.zeros(), **self.lay(empty, 1.0, "0.0")}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        parts = evidence.parts if isinstance(evidence, Joint) else (evidence,)
        mass = state["mass"].clone()
        if fold.mass:  # the first evidence of a step
            state.clear()
            mass.zero_()
        fold.weigh_(mass)
        state["mass"] = mass
        chunk = _count(state)
        more = self.merges(parts)
        for j, part in enumerate(parts):
            assert isinstance(part, Outer)
            new = self.lay(part, fold.alpha / _mass(fold), f"{chunk}.{j}")
            for form, axis in (("gradients", 2), ("formed", 1)) if more else ():
                last, name = f"{chunk - 1}.{j}.{form}", f"{chunk}.{j}.{form}"
                if last in state and name in new:
                    state[last], new = torch.cat([state[last], new[name]], axis), {}
            state.update(new)
        if more:
            state.pop(f"{chunk - 1}.own", None)
        elif (own := self.shares(parts, fold)) is not None:
            state[f"{chunk}.own"] = own
        self._check_count(state)

    def merges(self, parts: Sequence[Evidence]) -> bool:
        """Whether these are further cotangents for the inputs of the previous chunk."""
        return any(isinstance(part, Outer) and not part.fresh for part in parts)

    def shares(self, parts: Sequence[Evidence], fold: Fold) -> Tensor | None:
        """The coefficients of these rows, as they are held, in the gradient of the step; None if not known.  # (1, N)"""
        known = [part.own for part in parts if isinstance(part, Outer) and part.own is not None]
        return None if len(known) < len(parts) else (known[0] * ((fold.alpha * _mass(fold)) ** 0.5 / fold.share)).unsqueeze(0)

    def _check_count(self, state: State) -> None:
        count = sum(parts[0].count for parts in chunks(state))
        if count > self.max_rows:
            raise ValueError(
                f"{type(self).__name__} would hold {count} rows (examples x cotangents), over max_rows={self.max_rows}: "
                "raise it, use a smaller batch, or a curvature with fewer rows an example, as FisherMC(samples=1) or FisherEmp"
            )

    def lay(self, part: Outer, alpha: float, name: str) -> State:
        """The state of a layer in a chunk of evidence with the weight ``alpha``."""
        if self.forms(part):
            J = part.rows() if alpha == 1.0 else part.rows() * alpha**0.5
            return {f"{name}.formed": J.contiguous().unsqueeze(0)}
        g = part.gradients.movedim(1, 0)
        g = g if alpha == 1.0 else g * alpha**0.5
        a = part.inputs.index.unsqueeze(0) if isinstance(part.inputs, OneHot) else part.inputs
        bias = part.bias and self.apart(part)
        if part.bias and not bias and isinstance(part.inputs, Tensor):
            a = torch.cat([part.inputs, part.inputs.new_ones(*part.inputs.shape[:-1], 1)], -1)
        i = part.width + part.bias
        G, o = len(g), g.shape[-1]
        shape = (i, o) if part.transposed else (o, i)
        return {
            f"{name}.gradients": g.contiguous().unsqueeze(0),
            f"{name}.inputs": a.contiguous().unsqueeze(0),
            f"{name}.layout": g.new_empty(1, G, *shape, int(bias), int(part.transposed), 0),
        }

    def apart(self, part: Outer) -> bool:
        """Whether the bias is no column of the inputs that are held."""
        return isinstance(part.inputs, OneHot)

    def forms(self, part: Outer) -> bool:
        """Whether a layer's rows are multiplied out: which takes less memory and less work in all products."""
        r, o = part.gradients.shape[3:]
        if isinstance(part.inputs, OneHot) or r == 1:
            return False
        return o * (part.width + part.bias) <= r * (part.width + o)  # whatever their number: chunks are joined

    # ---------------------------------------------------------------- LowRank
    def gram(self, state: State) -> Tensor:
        held = self.sketched(state)
        blocks = [[_gram(one, other) for other in held[: p + 1]] for p, one in enumerate(held)]
        if len(held) == 1:
            return blocks[0][0]
        whole = [[blocks[p][q] if q <= p else blocks[q][p].mT for q in range(len(held))] for p in range(len(held))]
        return torch.cat([torch.cat(row, 2) for row in whole], 1)

    def project(self, state: State, v: Tensor) -> Tensor:
        out = []
        for parts, whole in zip(self.sketched(state), chunks(state), strict=True):
            pieces = self.pick(state, whole, self._split(whole, v.to(whole[0].dtype)))
            out.append(torch.stack([x.project(u) for x, u in zip(parts, pieces, strict=True)]).sum(0))
        return torch.cat(out, 1)

    def combine(self, state: State, z: Tensor) -> Tensor:
        held = chunks(state)
        pieces = z.to(held[0][0].dtype).split([parts[0].count for parts in held], 1)
        sums = [torch.cat([x.combine(y).flatten(1) for x in parts], 1) for parts, y in zip(held, pieces, strict=True)]
        out = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
        shape = held[0][0].shape
        return out if self.granularity == "full" else out.unflatten(1, shape[1 if shape[1] > 1 else 2 :])

    def own(self, state: State) -> Tensor | None:
        shares = [state.get(f"{p}.own") for p in range(_count(state))]
        known = [x for x in shares if x is not None]
        return None if len(known) < len(shares) else torch.cat(known, 1)

    def weighted(self, state: State, z: Tensor) -> list[FactoredGradient | Tensor] | None:
        held = chunks(state)
        pieces = z.to(held[0][0].dtype).split([parts[0].count for parts in held], 1)
        found = [[part.weighted(y) for part in parts] for parts, y in zip(held, pieces, strict=True)]
        layers = [[rows for rows in layer if rows is not None] for layer in zip(*found, strict=True)]
        return None if any(len(layer) < len(held) for layer in layers) else [_sum(layer) for layer in layers]

    def project_rows(self, state: State, rows: FactoredGradient) -> Tensor | None:
        found = [part.project_rows(rows) for (part,) in chunks(state)]
        known = [x for x in found if x is not None]
        return None if len(known) < len(found) else torch.cat(known, 1)

    def _split(self, parts: Sequence[Part], v: Tensor) -> list[Tensor]:
        """A block's vector, cut into layers.  # (B, *shape) -> each (B, H, rows, columns)"""
        pieces = v.flatten(1).split([part.size for part in parts], 1)
        return [u.reshape(part.shape) for part, u in zip(parts, pieces, strict=True)]

    # ---------------------------------------------------------------- what a sketch changes
    def sketched(self, state: State) -> list[list[Part]]:
        """The rows that the Gram matrix and projections use."""
        return chunks(state)

    def pick(self, state: State, parts: Sequence[Part], pieces: list[Tensor]) -> list[Tensor]:
        """The coordinates of vectors that these rows use."""
        return pieces


def _gram(one: Sequence[Part], other: Sequence[Part]) -> Tensor:
    """``J J'^T`` of two chunks: the Gram matrices of the layers add.  # (B, N, N')"""
    total, *rest = (x.gram(y) for x, y in zip(one, other, strict=True))
    for K in rest:
        total = total + K
    return total


def _sum(layer: Sequence[FactoredGradient | Tensor]) -> FactoredGradient | Tensor:
    rows = [x for x in layer if isinstance(x, FactoredGradient)]
    if len(rows) == len(layer):
        return joined_rows(rows)
    formed = [x.form() if isinstance(x, FactoredGradient) else x for x in layer]
    return torch.stack(formed).sum(0) if len(formed) > 1 else formed[0]


def _mass(fold: Fold) -> float:
    """The mass of the newest step, which all of its evidence is divided by."""
    return 1.0 if fold.summed else fold.share


def _count(state: State) -> int:
    """The number of chunks."""
    p = 0
    while f"{p}.0.formed" in state or f"{p}.0.layout" in state:
        p += 1
    return p


def chunks(state: State) -> list[list[Part]]:
    """The parts of every chunk, by layer."""
    found: list[list[Part]] = []
    while parts := _parts(state, len(found)):
        found.append(parts)
    return found


def _parts(state: State, p: int) -> list[Part]:
    """The parts of a chunk, by layer; none if there is no such chunk."""
    parts = list[Part]()
    while True:
        name = f"{p}.{len(parts)}."
        if name + "formed" in state:
            parts.append(FormedPart(state[name + "formed"]))
        elif name + "layout" in state:
            parts.append(_part(*(state[name + key] for key in ("gradients", "inputs", "layout"))))
        else:
            return parts


def _part(gradients: Tensor, inputs: Tensor, layout: Tensor) -> OuterPart:
    """A layer's share from its tensors in the state.  # (B, H, k, n, r, o), (B, H, n, r, i) or (B, 1, n, r)"""
    B, _, rows, columns, bias, transposed, _ = layout.shape
    a = OneHot(inputs[0, 0], rows if transposed else columns) if inputs.ndim == 4 else inputs.flatten(0, 1)
    return OuterPart(Outer(a, gradients.flatten(0, 1).transpose(0, 1), bool(bias), bool(transposed)), B)
