"""Secant pairs of past steps: L-BFGS.

``S, Y`` (B, m, P) hold ``m`` pairs, the newest last, ``R = triu(S Y^T)`` (B, m, m) their products. A place that is still empty
has zero rows in ``S`` and ``Y``, and a row and column of the identity in ``R``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient, Opening, Pair, SecantPair
from gradmaker.representations.base import NO_LIMIT, Fold, Frame, Grain, Representation, State

__all__ = ["Pairs", "dot", "multiply", "push", "unfilled"]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products.  # (B, P), (B, P) -> (B, 1)"""
    return (x * y).sum(-1, keepdim=True)


def unfilled(frame: Frame, memory: int, size: int) -> State:
    """``s``, ``y`` and ``products`` of no pair at all."""
    return {"s": frame.zeros(memory, size), "y": frame.zeros(memory, size), "products": frame.unit(memory)}


def multiply(pairs: State, gamma: Tensor, G: Tensor) -> Tensor:
    """``H G`` for several vectors, with ``H`` the inverse BFGS matrix of the pairs from ``gamma I``.

    ``a = R^-1 S G``, ``Q = G - Y^T a``, ``c = R^-T (diag(R) a - gamma Y Q)``, ``H G = gamma Q + S^T c``: the two loops of
    Nocedal as substitutions, and the compact form multiplied out.

    Reference: Nocedal, Math. Comp. 1980, algorithm 2; Byrd, Nocedal, Schnabel, Math. Programming 1994, theorem 2.2.
    # G: (B, P, c)
    """
    S, Y, R = pairs["s"], pairs["y"], pairs["products"]
    gamma = gamma[:, None, None]
    if not S.shape[1]:
        return gamma * G
    a = torch.linalg.solve_triangular(R, S @ G, upper=True)
    Q = torch.baddbmm(G, Y.mT, a, alpha=-1)
    right = R.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * a - gamma * (Y @ Q)
    c = torch.linalg.solve_triangular(R.mT, right, upper=False)
    return torch.baddbmm(gamma * Q, S.mT, c)


def push(pairs: State, s: Tensor, y: Tensor, accepted: Tensor) -> None:
    """The oldest pair leaves, the newest is appended, for the members that accept it.  # (B, P), (B, P), (B,)"""
    R = torch.zeros_like(pairs["products"])
    R[:, :-1, :-1] = pairs["products"][:, 1:, 1:]
    rolled = {name: torch.cat([pairs[name][:, 1:], new.unsqueeze(1)], 1) for name, new in (("s", s), ("y", y))}
    R[:, :, -1:] = rolled["s"] @ y.unsqueeze(-1)
    for name, new in {**rolled, "products": R}.items():
        pairs[name].copy_(torch.where(accepted[:, None, None], new, pairs[name]))


@dataclass(frozen=True)
class Pairs(Representation):
    """``P``, the inverse BFGS matrix of the last ``memory`` pairs, from ``gamma I``, ``gamma = s^T y / y^T y`` of the newest.

    A pair is taken if ``s^T y > acceptance |s|^2``. ``indefinite='damp'`` first moves ``y`` to ``tau y + (1 - tau) s / gamma``
    where ``s^T y < 0.2 s^T s / gamma``, so that every pair of nonzero ``s`` is taken (Powell). ``damping`` is added to the
    curvature, ``y + damping s``. Before the first pair ``gamma = min(1, 1 / |g|_1)`` of a gradient, as torch's L-BFGS has it.
    A gradient with ``g^T P g <= 0`` empties the memory.

    Reference: Liu, Nocedal, Math. Programming 1989; Powell 1978; Nocedal, Wright 2006, procedure 18.2.
    """

    takes: ClassVar[tuple[type[Evidence], ...]] = (SecantPair, Opening)
    idle = {"decay": "the last pairs count alike, whatever their age; set memory"} | NO_LIMIT

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
        counts = {"taken": count, "refused": count.clone(), "resets": count.clone()}
        return {**unfilled(frame, self.memory, P), "gamma": frame.zeros() + 1, **counts}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if isinstance(evidence, Gradient):
            g = evidence.gradient.flatten(1)
            self._reset(state, g)
            self._start(state, g)
            return
        assert isinstance(evidence, Pair)
        s = evidence.v.flatten(1)
        y = evidence.cv.flatten(1) + self.damping * s
        if self.indefinite == "damp":
            y = damped_change(s, y, state["gamma"].unsqueeze(1))
        sy, yy = dot(s, y).squeeze(1), dot(y, y).squeeze(1)
        accepted = (sy > self.acceptance * dot(s, s).squeeze(1)) & torch.isfinite(sy / yy) & torch.isfinite(1 / sy)
        if self.memory:
            push(state, s, y, accepted)
        state["gamma"].copy_(torch.where(accepted, sy / yy, state["gamma"]))
        state["taken"].add_(accepted)
        state["refused"].add_(~accepted)

    def _reset(self, state: State, g: Tensor) -> None:
        """Forget everything where ``g^T P g > 0`` no longer holds, which in exact arithmetic it does."""
        turned = ~(dot(g, self.apply(state, g)) > 0).squeeze(1) & torch.isfinite(g).all(1) & g.any(1) & (state["taken"] > 0)
        eye = torch.eye(self.memory, dtype=g.dtype, device=g.device)
        for name, empty in (("s", 0.0), ("y", 0.0), ("products", eye), ("taken", 0)):
            held = state[name]
            held.copy_(torch.where(turned.view(-1, *[1] * (held.ndim - 1)), torch.as_tensor(empty).to(held), held))
        state["resets"].add_(turned)

    def _start(self, state: State, g: Tensor) -> None:
        """The length of a first step, before there is any pair."""
        first = (1 / g.abs().sum(1)).clamp(max=1.0)
        state["gamma"].copy_(torch.where((state["taken"] == 0) & torch.isfinite(first), first, state["gamma"]))

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
        return multiply(state, state["gamma"], g.reshape(len(g), -1, 1)).reshape(g.shape)

    def to_dense(self, state: State) -> Tensor:
        """``B <- B - B s s^T B / s^T B s + y y^T / y^T s``, pair by pair: the recursion for ``C`` itself."""
        gamma = state["gamma"]
        B = torch.eye(state["s"].shape[-1], dtype=gamma.dtype, device=gamma.device) / gamma[:, None, None]
        for j in range(self.memory):
            s, y = state["s"][:, j].unsqueeze(-1), state["y"][:, j].unsqueeze(-1)
            Bs = B @ s
            new = B - Bs @ Bs.mT / (s.mT @ Bs) + y @ y.mT / (y.mT @ s)
            B = torch.where(s.mT @ y > 0, new, B)
        return B


def damped_change(s: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    """Powell's ``y``: at least a fifth of the curvature of ``I / gamma`` along ``s``.  # (B, P), (B, P), (B, 1) -> (B, P)"""
    sBs, sy = dot(s, s) / gamma, dot(s, y)
    tau = torch.where(sy < 0.2 * sBs, 0.8 * sBs / (sBs - sy), 1.0)
    return tau * y + (1 - tau) * s / gamma
