"""Secant pairs of past steps: L-BFGS.

``S, Y`` (B, m, P) hold ``m`` pairs, the newest last, with ``r = 1 / s^T y``; a place that is still empty has ``r = 0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient, Opening, Pair, SecantPair
from gradmaker.representations.base import Fold, Frame, Grain, Representation, State

__all__ = ["Pairs", "dot", "push", "two_loop"]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products.  # (B, P), (B, P) -> (B, 1)"""
    return (x * y).sum(-1, keepdim=True)


def two_loop(S: Tensor, Y: Tensor, r: Tensor, gamma: Tensor, G: Tensor) -> Tensor:
    """``H G`` for several vectors, with ``H`` the inverse BFGS matrix of the pairs from ``gamma I``.

    Reference: Nocedal, Math. Comp. 1980, algorithm 2.  # (B, m, P), (B, m, P), (B, m), (B,), (B, P, c) -> (B, P, c)
    """
    q, alphas = G, []
    for j in range(S.shape[1] - 1, -1, -1):
        alpha = r[:, j, None, None] * (S[:, j : j + 1] @ q)
        q = q - Y[:, j].unsqueeze(-1) * alpha
        alphas.append(alpha)
    q = gamma[:, None, None] * q
    for j, alpha in enumerate(reversed(alphas)):
        beta = r[:, j, None, None] * (Y[:, j : j + 1] @ q)
        q = q + S[:, j].unsqueeze(-1) * (alpha - beta)
    return q


def push(held: Tensor, new: Tensor, accepted: Tensor) -> None:
    """The oldest leaves, the newest is appended, for the members that accept it.  # (B, m, ...), (B, ...), (B,)"""
    rolled = torch.cat([held[:, 1:], new.unsqueeze(1)], 1)
    held.copy_(torch.where(accepted.view(-1, *[1] * (held.ndim - 1)), rolled, held))


@dataclass(frozen=True)
class Pairs(Representation):
    """``P``, the inverse BFGS matrix of the last ``memory`` pairs, from ``gamma I``, ``gamma = s^T y / y^T y`` of the newest.

    A pair is taken if ``s^T y > acceptance |s|^2``. ``indefinite='damp'`` first moves ``y`` to ``tau y + (1 - tau) s / gamma``
    where ``s^T y < 0.2 s^T s / gamma``, so that every pair of nonzero ``s`` is taken (Powell). ``damping`` is added to the
    curvature, ``y + damping s``. Before the first pair ``gamma = min(1, 1 / |g|_1)`` of a gradient, as torch's L-BFGS has it.

    Reference: Liu, Nocedal, Math. Programming 1989; Powell 1978; Nocedal, Wright 2006, procedure 18.2.
    """

    takes: ClassVar[tuple[type[Evidence], ...]] = (SecantPair, Opening)

    memory: int = 10
    indefinite: Literal["skip", "damp"] = "skip"
    acceptance: float = 1e-8
    damping: float = 0.0
    granularity: Literal["full", "layer"] = "full"

    def __post_init__(self) -> None:
        if self.memory < 0:
            raise ValueError(f"memory = {self.memory!r}: legal are non-negative integers")
        if self.indefinite not in ("skip", "damp"):
            raise ValueError(f"indefinite = {self.indefinite!r}: legal are 'skip', 'damp'")
        if self.granularity not in ("full", "layer"):
            raise ValueError(f"granularity = {self.granularity!r}: legal are 'full', 'layer'")
        for name in ("acceptance", "damping"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} = {getattr(self, name)!r}: legal are non-negative numbers")

    @property
    def grain(self) -> Grain:
        return self.granularity

    def wide(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        """None: no matrix of the block's size is held."""
        return frozenset()

    def init(self, frame: Frame) -> State:
        P = torch.Size(frame.shape).numel()
        count = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
        pairs = {"s": frame.zeros(self.memory, P), "y": frame.zeros(self.memory, P), "inverse": frame.zeros(self.memory)}
        return {**pairs, "gamma": frame.zeros() + 1, "taken": count, "refused": count.clone()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if isinstance(evidence, Gradient):
            self._start(state, evidence.gradient.flatten(1))
            return
        assert isinstance(evidence, Pair)
        s = evidence.v.flatten(1)
        y = evidence.cv.flatten(1) + self.damping * s
        if self.indefinite == "damp":
            y = damped_change(s, y, state["gamma"].unsqueeze(1))
        sy, yy = dot(s, y).squeeze(1), dot(y, y).squeeze(1)
        accepted = (sy > self.acceptance * dot(s, s).squeeze(1)) & torch.isfinite(sy / yy) & torch.isfinite(1 / sy)
        push(state["s"], s, accepted)
        push(state["y"], y, accepted)
        push(state["inverse"], 1 / sy, accepted)
        state["gamma"].copy_(torch.where(accepted, sy / yy, state["gamma"]))
        state["taken"].add_(accepted)
        state["refused"].add_(~accepted)

    def _start(self, state: State, g: Tensor) -> None:
        """The length of a first step, before there is any pair."""
        first = (1 / g.abs().sum(1)).clamp(max=1.0)
        state["gamma"].copy_(torch.where((state["taken"] == 0) & torch.isfinite(first), first, state["gamma"]))

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``P g`` by the two loops.  # (B, *shape)"""
        vector = g.reshape(len(g), -1, 1)
        return two_loop(state["s"], state["y"], state["inverse"], state["gamma"], vector).reshape(g.shape)

    def to_dense(self, state: State) -> Tensor:
        """``B <- B - B s s^T B / s^T B s + y y^T / y^T s``, pair by pair: the recursion for ``C`` itself."""
        gamma = state["gamma"]
        B = torch.eye(state["s"].shape[-1], dtype=gamma.dtype, device=gamma.device) / gamma[:, None, None]
        for j in range(self.memory):
            s, y, r = state["s"][:, j].unsqueeze(-1), state["y"][:, j].unsqueeze(-1), state["inverse"][:, j, None, None]
            Bs = B @ s
            new = B - Bs @ Bs.mT / (s.mT @ Bs) + r * y @ y.mT
            B = torch.where(r > 0, new, B)
        return B


def damped_change(s: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    """Powell's ``y``: at least a fifth of the curvature of ``I / gamma`` along ``s``.  # (B, P), (B, P), (B, 1) -> (B, P)"""
    sBs, sy = dot(s, s) / gamma, dot(s, y)
    tau = torch.where(sy < 0.2 * sBs, 0.8 * sBs / (sBs - sy), 1.0)
    return tau * y + (1 - tau) * s / gamma
