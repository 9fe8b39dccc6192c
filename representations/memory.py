"""L-BFGS: secant pairs of past steps.

``S, Y`` (B, m, P) hold ``m`` pairs in a ring buffer, ``newest`` (B,) is the index of the last one; the indices after it are
ever older. ``R = triu(S Y^T)`` (B, m, m) has their products, the oldest first. An empty place has zero rows in ``S`` and ``Y``
and a row and column of the identity in ``R``. A step reads ``S`` and ``Y`` a few times and copies neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.inner_products import member_dots
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_count, check_interval
from gradmaker.representations.base import NO_LIMIT, NO_REFRESH, Fold, Frame, Grain
from gradmaker.representations.roles import Compact, Renewal, Renewed, WholeLayers

__all__ = ["Pairs", "multiply", "ordered", "push", "unfilled"]


def unfilled(frame: Frame, memory: int, size: int) -> State:
    """``s``, ``y``, ``products`` and ``newest`` of an empty memory."""
    newest = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
    return {"s": frame.zeros(memory, size), "y": frame.zeros(memory, size), "products": frame.unit(memory), "newest": newest}


def _places(pairs: State) -> Tensor:
    """Indices of the pairs, the oldest first; the same permutation applied again restores the order.  # (B, m)"""
    newest, m = pairs["newest"], pairs["s"].shape[1]
    return (newest.unsqueeze(1) + m - 1 - torch.arange(m, device=newest.device)) % m


def _reorder(x: Tensor, places: Tensor) -> Tensor:
    """Rows by index to rows by age, and back.  # (B, m, c), (B, m) -> (B, m, c)"""
    return x.gather(1, places.unsqueeze(-1).expand_as(x))


def ordered(pairs: State) -> tuple[Tensor, Tensor]:
    """Copies of ``S`` and ``Y``, the oldest first.  # (B, m, P), (B, m, P)"""
    places = _places(pairs)
    return _reorder(pairs["s"], places), _reorder(pairs["y"], places)


def multiply(pairs: State, gamma: Tensor, G: Tensor) -> Tensor:
    """``H G`` for several vectors, with ``H`` the inverse BFGS matrix of the pairs from ``gamma I``.

    ``a = R^-1 S G``, ``Q = G - Y^T a``, ``c = R^-T (diag(R) a - gamma Y Q)``, ``H G = gamma Q + S^T c``: Nocedal's two-loop
    recursion as triangular solves, which is the compact representation.

    Reference: Nocedal, Math. Comp. 1980, algorithm 2; Byrd, Nocedal, Schnabel, Math. Programming 1994, theorem 2.2.
    # G: (B, P, c)
    """
    S, Y, R = pairs["s"], pairs["y"], pairs["products"]
    gamma = gamma[:, None, None]
    if not S.shape[1]:
        return gamma * G
    places = _places(pairs)
    a = torch.linalg.solve_triangular(R, _reorder(S @ G, places), upper=True)
    Q = torch.baddbmm(G, Y.mT, _reorder(a, places), alpha=-1)
    right = R.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * a - gamma * _reorder(Y @ Q, places)
    c = torch.linalg.solve_triangular(R.mT, right, upper=False)
    return Q.mul_(gamma).baddbmm_(S.mT, _reorder(c, places))


def push(pairs: State, s: Tensor, y: Tensor, accepted: Tensor) -> None:
    """Write the newest pair over the oldest, for the ``accepted`` members.  # (B, P), (B, P), (B,)"""
    if not _any(accepted):
        return
    m, newest = pairs["s"].shape[1], pairs["newest"]
    newest.copy_(torch.where(accepted, (newest - 1) % m, newest))
    here = (torch.arange(m, device=newest.device) == newest.unsqueeze(1)) & accepted.unsqueeze(1)  # (B, m)
    for name, new in (("s", s), ("y", y)):
        _replace(pairs[name], new, newest, here)
    R = torch.zeros_like(pairs["products"])
    R[:, :-1, :-1] = pairs["products"][:, 1:, 1:]
    R[:, :, -1:] = _reorder(pairs["s"] @ y.unsqueeze(-1), _places(pairs))
    pairs["products"].copy_(torch.where(accepted[:, None, None], R, pairs["products"]))


def _replace(rows: Tensor, new: Tensor, place: Tensor, here: Tensor) -> None:
    """Write a row of each member that is marked in ``here``.  # (B, m, P), (B, P), (B,), (B, m)"""
    if rows.device.type == "cpu":
        for member in here.any(1).nonzero().flatten().tolist():
            rows[member, int(place[member])] = new[member]
    else:
        rows.copy_(torch.where(here.unsqueeze(-1), new.unsqueeze(1), rows))


def _any(members: Tensor) -> bool:
    """Whether some member is marked; True on devices where reading it would synchronise.  # (B,) bool"""
    return members.device.type != "cpu" or bool(members.any())


@dataclass(frozen=True)
class Pairs(Compact, Renewed, WholeLayers):
    """``P``, the inverse BFGS matrix of the last ``memory`` pairs, from ``gamma I``, ``gamma = s^T y / y^T y`` of the newest.

    A pair is accepted if ``s^T y > acceptance |s|^2``. ``indefinite='damp'`` first moves ``y`` to ``tau y + (1 - tau) s/gamma``
    where ``s^T y < 0.2 s^T s / gamma``, so that every pair with nonzero ``s`` is accepted (Powell). ``damping`` is added to
    the curvature, ``y + damping s``. Before the first pair ``gamma = min(1, 1 / |g|_1)`` of a gradient, as in torch's LBFGS. A
    gradient with ``g^T P g <= 0`` clears the memory.

    Reference: Liu, Nocedal, Math. Programming 1989; Powell 1978; Nocedal, Wright 2006, procedure 18.2.
    """

    takes: ClassVar[frozenset[Kind]] = kinds((Pair, "secant"), (Gradient, "initial_scaling"))
    inapplicable = {"decay": "the last pairs count alike, whatever their age; set memory"} | NO_LIMIT | NO_REFRESH

    memory: int = 10
    indefinite: Literal["skip", "damp"] = "skip"
    acceptance: float = 1e-8
    damping: float = 0.0
    granularity: Literal["full", "layer"] = "full"

    def __post_init__(self) -> None:
        check_count("memory", self.memory, 0)
        check_choice("indefinite", self.indefinite, ("skip", "damp"))
        check_choice("granularity", self.granularity, ("full", "layer"))
        for name in ("acceptance", "damping"):
            check_interval(name, getattr(self, name), 0, inf, closed=True)

    @property
    def grain(self) -> Grain:
        return self.granularity

    @property
    def renewal(self) -> Renewal:
        """At every step: ``P`` itself is held."""
        return "step"

    def init(self, frame: Frame) -> State:
        P = torch.Size(frame.shape).numel()
        count = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
        counts = {name: count.clone() for name in ("taken", "refused", "resets", "solved")}
        solved = {"gradient": frame.zeros(P), "direction": frame.zeros(P)}
        return {**unfilled(frame, self.memory, P), "gamma": frame.zeros() + 1, **solved, **counts}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if isinstance(evidence, Gradient):
            self._solve(state, evidence.gradient.flatten(1))
            return
        assert isinstance(evidence, Pair)
        state["solved"].zero_()
        s, y = evidence.v.flatten(1), evidence.cv.flatten(1)
        y = y + self.damping * s if self.damping else y
        if self.indefinite == "damp":
            y = damped_change(s, y, state["gamma"].unsqueeze(1))
        sy, yy = member_dots(s, y).squeeze(1), member_dots(y, y).squeeze(1)
        accepted = (sy > self.acceptance * member_dots(s, s).squeeze(1)) & torch.isfinite(sy / yy) & torch.isfinite(1 / sy)
        if self.memory:
            push(state, s, y, accepted)
        state["gamma"].copy_(torch.where(accepted, sy / yy, state["gamma"]))
        state["taken"].add_(accepted)
        state["refused"].add_(~accepted)

    def _solve(self, state: State, g: Tensor) -> None:
        """Keep ``P g`` for the solve that follows, and clear the memory where it does not descend.  # (B, P)"""
        direction = multiply(state, state["gamma"], g.unsqueeze(-1)).squeeze(-1)
        size = torch.linalg.vector_norm(g, 1, dim=1)
        turned = ~(member_dots(g, direction) > 0).squeeze(1) & torch.isfinite(size) & (size > 0) & (state["taken"] > 0)
        if _any(turned):
            self._reset(state, turned)
        first = (1 / size).clamp(max=1.0)
        empty = state["taken"] == 0
        state["gamma"].copy_(torch.where(empty & torch.isfinite(first), first, state["gamma"]))
        if _any(empty):
            direction = torch.where(empty.unsqueeze(1), state["gamma"].unsqueeze(1) * g, direction)
        for name, new in (("gradient", g), ("direction", direction)):
            state[name].copy_(new)
        state["solved"].fill_(1)

    def _reset(self, state: State, turned: Tensor) -> None:
        """Clear the memory of members without ``g^T P g > 0``, which rounding may violate.  # (B,)"""
        eye = torch.eye(self.memory, dtype=state["products"].dtype, device=turned.device)
        for name, start in (("s", 0.0), ("y", 0.0), ("products", eye), ("newest", 0), ("taken", 0)):
            held = state[name]
            held.copy_(torch.where(turned.view(-1, *[1] * (held.ndim - 1)), torch.as_tensor(start).to(held), held))
        state["resets"].add_(turned)

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``P g``; the one that `_solve` has kept, if the gradient is the same.  # (B, *shape)"""
        flat = g.flatten(1)
        same = g.device.type == "cpu" and bool(state["solved"].all()) and torch.equal(flat, state["gradient"])
        found = state["direction"].clone() if same else multiply(state, state["gamma"], flat.unsqueeze(-1)).squeeze(-1)
        return found.reshape(g.shape)

    def to_dense(self, state: State) -> Tensor:
        """``B <- B - B s s^T B / s^T B s + y y^T / y^T s``, pair by pair: the BFGS recursion of ``C``.  # (B, P, P)"""
        gamma = state["gamma"]
        B = torch.eye(state["s"].shape[-1], dtype=gamma.dtype, device=gamma.device) / gamma[:, None, None]
        for s, y in zip(*(X.unsqueeze(-1).unbind(1) for X in ordered(state)), strict=True):
            Bs = B @ s
            new = B - Bs @ Bs.mT / (s.mT @ Bs) + y @ y.mT / (y.mT @ s)
            B = torch.where(s.mT @ y > 0, new, B)
        return B

    def matvec(self, state: State, v: Tensor) -> Tensor:
        """``C v`` by the same recursion.  # (B, *shape)"""
        gamma, known = state["gamma"].unsqueeze(1), list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]()

        def multiply(x: Tensor) -> Tensor:
            image = x / gamma
            for Bs, sBs, y, sy, taken in known:
                image = torch.where(taken, image - Bs * (member_dots(Bs, x) / sBs) + y * (member_dots(y, x) / sy), image)
            return image

        for s, y in zip(*(X.unbind(1) for X in ordered(state)), strict=True):
            Bs, sy = multiply(s), member_dots(s, y)
            known.append((Bs, member_dots(s, Bs), y, sy, sy > 0))
        return multiply(v.flatten(1)).reshape(v.shape)


def damped_change(s: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    """Powell's ``y``: at least a fifth of the curvature of ``I / gamma`` along ``s``.  # (B, P), (B, P), (B, 1) -> (B, P)"""
    sBs, sy = member_dots(s, s) / gamma, member_dots(s, y)
    tau = torch.where(sy < 0.2 * sBs, 0.8 * sBs / (sBs - sy), 1.0)
    return tau * y + (1 - tau) * s / gamma
