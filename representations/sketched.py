"""SENG: rows of layers with a sketched Gram matrix and sketched projections."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_count
from gradmaker.representations.base import Fold
from gradmaker.representations.low_rank import form_rows
from gradmaker.representations.row_parts import OuterPart, Part
from gradmaker.representations.rows import Rows, chunks

__all__ = ["Sketched"]


@dataclass(frozen=True)
class Sketched(Rows):
    """`Rows` with two sketches, both off by default.

    - ``positions = r``: each example's output gradients over more than ``r`` positions, ``g_n = U s V^T``, are cut to their
      best rank: ``g_n <- s V^T``, ``[a_n 1] <- U^T [a_n 1]``;
    - ``coordinates = s``: in layers with more than ``above`` weights the products ``a . a'``, ``g . g'`` and ``<J_n, v>`` take
      ``s`` coordinates a side, drawn anew in every step without replacement, times ``d / s``: unbiased. The bias is always
      included. With ``official`` times ``(d / s)^2``, as in the authors' code: biased.

    With sampled coordinates ``J^T`` itself is not sampled, so that ``C`` is represented by ``J^T J S``, not symmetric, with
    ``E[S] = I``. The authors' code also merges all rows of a step into one outer product, which is exact for a single row only;
    that is left out.

    Reference: Yang et al. 2021, "Sketch-based empirical natural gradient methods for deep learning", arXiv:2006.05924,
    section 3.
    """

    granularity: Literal["full", "layer"] = "layer"
    positions: int | None = None
    coordinates: int | None = None
    above: int = 1_000_000
    official: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("positions", 1), ("coordinates", 1), ("above", 0)):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, least)

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        kept = {key: value for key, value in state.items() if key.startswith("sample.")}
        super().update(state, evidence, fold)
        if self.coordinates is None:
            return
        state.update(self._draw(state, kept) if fold.mass else kept)

    def _draw(self, state: State, last: State) -> State:
        """Draw new coordinates. A tensor without elements counts the draws by its shape, which is read without a host sync."""
        mass = state["mass"]
        count = last["sample.count"].shape[1] + 1 if last else 0
        drawn = {"sample.count": mass.new_empty(len(mass), count, 0)}
        for j, part in enumerate(chunks(state)[0]):
            if isinstance(part, OuterPart) and prod(part.shape[2:]) > self.above:
                a = part.outer.inputs
                inputs = 0 if isinstance(a, OneHot) else a.shape[-1]
                for side, d in (("outputs", part.outer.gradients.shape[-1]), ("inputs", inputs)):
                    if d > (self.coordinates or d):
                        key = f"{self.seed}/{side}/{j}/{count}".encode()
                        chosen = self._choose(d, key, mass.device)
                        drawn[f"sample.{j}.{side}"] = chosen.expand(len(mass), -1).contiguous()
        return drawn

    def _choose(self, d: int, key: bytes, device: torch.device) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        order = torch.randperm(d, generator=torch.Generator(device).manual_seed(seed), device=device)
        return order[: self.coordinates].sort().values

    def merges(self, parts: Sequence[Evidence]) -> bool:
        """Not with a sketch of positions, which gives every cotangent its own inputs."""
        return self.positions is None and super().merges(parts)

    def shares(self, parts: Sequence[Evidence], fold: Fold) -> Tensor | None:
        """None with a sketch of positions, which changes the rows."""
        return None if self.positions is not None else super().shares(parts, fold)

    def apart(self, part: Outer) -> bool:
        """Where coordinates are sampled, too: the bias always is one of them."""
        return self.coordinates is not None or super().apart(part)

    def forms(self, part: Outer) -> bool:
        """Not where coordinates of inputs and of output gradients are sampled."""
        sampled = self.coordinates is not None and part.gradients.shape[-1] * (part.width + part.bias) > self.above
        return not sampled and super().forms(part)

    def lay(self, part: Outer, alpha: float, name: str) -> State:
        r = part.gradients.shape[3]
        if self.positions is None or r <= self.positions or isinstance(part.inputs, OneHot):
            return super().lay(part, alpha, name)
        g = part.gradients.transpose(0, 1)  # (G, k, n, r, o)
        a = part.inputs
        if part.bias:
            a = torch.cat([a, torch.ones_like(a[..., :1]) if a.shape[-1] else a.new_ones(*a.shape[:-1], 1)], -1)
        U, s, Vh = torch.linalg.svd(g, full_matrices=False)
        best = slice(0, self.positions)
        cut = s[..., best].unsqueeze(-1) * Vh[..., best, :]
        mixed = U[..., best].mT @ a.unsqueeze(1)  # (G, k, n, r', i)
        flat = replace(part, inputs=mixed.flatten(1, 2), gradients=cut.flatten(1, 2).unsqueeze(0), bias=False, weights=None)
        return super().lay(flat, alpha, name)

    # ---------------------------------------------------------------- sampled coordinates
    def sketched(self, state: State) -> list[list[Part]]:
        held = chunks(state)
        return (
            held if self.coordinates is None else [[self._sample(state, j, x) for j, x in enumerate(parts)] for parts in held]
        )

    def _sample(self, state: State, j: int, part: Part) -> Part:
        if not isinstance(part, OuterPart):
            return part
        g, a = part.outer.gradients, part.outer.inputs
        if (outputs := state.get(f"sample.{j}.outputs")) is not None:
            g = g[..., outputs[0].long()] * self._scale(g.shape[-1]) ** 0.5
        if (inputs := state.get(f"sample.{j}.inputs")) is not None:
            assert isinstance(a, Tensor)
            a = a[..., inputs[0].long()] * self._scale(a.shape[-1]) ** 0.5
        return replace(part, outer=replace(part.outer, inputs=a, gradients=g))

    def _scale(self, d: int) -> float:
        assert self.coordinates is not None
        return (d / self.coordinates) ** (2 if self.official else 1)

    def pick(self, state: State, parts: Sequence[Part], pieces: list[Tensor]) -> list[Tensor]:
        if self.coordinates is None:
            return pieces
        return [self._pick(state, j, part, v) for j, (part, v) in enumerate(zip(parts, pieces, strict=True))]

    def _pick(self, state: State, j: int, part: Part, v: Tensor) -> Tensor:
        """The sampled entries of a vector; their scale is split between rows and vector."""
        if not isinstance(part, OuterPart):
            return v
        own = part.outer
        v = v.mT if own.transposed else v
        if (outputs := state.get(f"sample.{j}.outputs")) is not None:
            v = v[..., outputs[0].long(), :] * self._scale(own.gradients.shape[-1]) ** 0.5
        if (inputs := state.get(f"sample.{j}.inputs")) is not None:
            assert isinstance(own.inputs, Tensor)
            d = own.inputs.shape[-1]
            v = torch.cat([v[..., inputs[0].long()] * self._scale(d) ** 0.5, v[..., d:]], -1)
        return v.mT if own.transposed else v

    def to_dense(self, state: State) -> Tensor:
        """``J^T J S``.  # (B, P, P)"""
        if self.coordinates is None:
            return super().to_dense(state)
        J = form_rows(self, state)  # (B, N, P)
        shape = self.combine(state, torch.zeros_like(J[..., 0])).shape
        eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
        sampled = torch.stack([self.project(state, e.expand(len(J), -1).reshape(shape)) for e in eye], -1)  # (B, N, P)
        return J.mT @ sampled
