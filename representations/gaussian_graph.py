"""Directed Gaussian graphical models of gradients: covariances of each entry with its parents, with a sparse inverse.

Letters: ``i`` an entry of a block, ``pa(i)`` its parents, ``q`` their largest number, ``P`` entries of a block, ``S`` the
strictly triangular (after sorting) matrix of regression coefficients, ``d`` the residual variances.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Joint, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.state import State
from gradmaker.representations.base import NO_LIMIT, Fold, Frame, Grain, average
from gradmaker.representations.dense import Dense
from gradmaker.representations.roles import Compact

__all__ = ["GaussianGraph", "Parents"]

Parents: TypeAlias = tuple[tuple[int, ...], ...]
"""For each entry of a block, in row-major order, the entries that it is regressed on."""

LARGEST = 2**28
"""Most numbers in the covariances of the families; more are refused."""


@dataclass(frozen=True)
class GaussianGraph(Compact):
    """A directed Gaussian graphical model of gradients: ``C^-1 = (I - S)^T diag(1 / d) (I - S)``.

    Every entry is a linear function of its parents and a residual; ``S_i = C_pa,pa^-1 C_pa,i``, ``d_i = C_ii - C_i,pa S_i``:
    of ``C`` only the families ``{i} + pa(i)`` are measured. ``structure`` is ``bias`` (the parent of a weight is the
    bias of its unit; three numbers a weight and no per-example gradients: Ollivier's quasi-diagonal metric), ``full`` (all
    entries before: the dense inverse), or the parents: a tuple for each entry, or a function from the shape of a block to them.
    All but ``bias`` and ``full`` depend on the order of units.

    Reference: Grosse & Salakhutdinov, ICML 2015, "Scaling up natural gradient by sparsely factorizing the inverse Fisher
    matrix", section 4; ``bias``: Ollivier, Information and Inference 2015, arXiv:1303.0818, section 2.2 and definition 6.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, Joint)

    structure: Literal["bias", "full"] | Parents | Callable[[tuple[int, ...]], Sequence[Sequence[int]]] = "bias"
    whole: bool = False
    """Whether all layers are one block, so that parents may lie in other layers."""

    def __post_init__(self) -> None:
        if isinstance(self.structure, str) and self.structure not in ("bias", "full"):
            raise ValueError(f"structure={self.structure!r}: expected bias, full, parents, or a function to parents")
        if self.structure == "bias" and self.whole:
            raise ValueError("structure='bias': expected whole=False, since it joins what lies in one layer")
        if isinstance(self.structure, Sequence) and not isinstance(self.structure, str):
            object.__setattr__(self, "structure", tuple(tuple(p) for p in self.structure))

    @property
    def grain(self) -> Grain:
        return "full" if self.whole else "layer"

    @property
    def _graph(self) -> _Graph:
        return _BiasGraph() if self.structure == "bias" else _ParentGraph(self.structure)

    @property
    def inapplicable(self) -> dict[str, str]:  # type: ignore[override]
        """Without a matrix where the bias is the only parent."""
        return NO_LIMIT if self.structure == "bias" else {}

    def largest_side(self, shape: tuple[int, ...]) -> int:
        return 0 if self.structure == "bias" else prod(shape)

    def init(self, frame: Frame) -> State:
        return {**self._graph.init(frame), "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        self._graph.update(state, evidence, fold)
        fold.weigh_(state["mass"])

    def to_dense(self, state: State) -> Tensor:
        S, d = self.regressions(state, 0.0)
        root: Tensor = torch.linalg.inv(torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) - S)
        return root @ torch.diag_embed(d) @ root.mT

    def matvec(self, state: State, v: Tensor) -> Tensor:
        """``(I - S)^-1 diag(d) (I - S)^-T v``; powers of ``S`` vanish from the depth of the graph on."""
        coefficients, d = _regress(*self.families(state), 0.0)
        depth = self._graph.depth(v.shape[1:])
        y = v
        for _ in range(depth):
            y = v + self.spread(coefficients, y)
        x = scaled = y * d.reshape(v.shape)
        for _ in range(depth):
            x = scaled + self.predict(coefficients, x)
        return x

    # ---------------------------------------------------------------- Graphical
    def families(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """``C_pa,pa``, ``C_pa,i``, ``C_ii``, bias-corrected; an absent parent is independent of all else.

        # (B, P, q, q), (B, P, q), (B, P)
        """
        averaged = {k: v if k == "shape" else average(v, state["mass"]) for k, v in state.items() if k != "mass"}
        return self._graph.families(averaged)

    def predict(self, coefficients: Tensor, v: Tensor) -> Tensor:
        """``S v``.  # (B, P, q), (B, *shape) -> (B, *shape)"""
        return self._graph.predict(coefficients, v)

    def spread(self, coefficients: Tensor, v: Tensor) -> Tensor:
        """``S^T v``.  # (B, P, q), (B, *shape) -> (B, *shape)"""
        return self._graph.spread(coefficients, v)

    def regressions(self, state: State, ridge: float) -> tuple[Tensor, Tensor]:
        """``S`` and ``d`` of ``C + ridge I``, formed.  # (B, P, P), (B, P)"""
        coefficients, d = _regress(*self.families(state), ridge)
        shape = self._graph.shape(state)
        basis = torch.eye(prod(shape), dtype=d.dtype, device=d.device).reshape(-1, *shape)
        members = [self.predict(c.expand(len(basis), -1, -1), basis).flatten(1).mT for c in coefficients]
        return torch.stack(members), d


def _regress(inner: Tensor, cross: Tensor, own: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Regression coefficients and residual variances; zero where a singular ``inner`` leaves a choice.  # (B, P, q), (B, P)"""
    if inner.shape[-1] == 1:
        variance = inner[..., 0] + ridge
        coefficients = torch.where(variance > 0, cross / torch.where(variance > 0, variance, 1.0), 0.0)
    else:
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        inverse: Tensor = torch.linalg.pinv(inner + ridge * eye, hermitian=True)
        coefficients = (inverse @ cross.unsqueeze(-1)).squeeze(-1)
    return coefficients, (own + ridge - (coefficients * cross).sum(-1)).clamp(min=ridge)


class _Graph(ABC):
    """The part that depends on the kind of parents. Statistics passed here are averages already."""

    @abstractmethod
    def init(self, frame: Frame) -> State: ...

    @abstractmethod
    def update(self, state: State, evidence: Evidence, fold: Fold) -> None: ...

    @abstractmethod
    def families(self, state: State) -> tuple[Tensor, Tensor, Tensor]: ...

    @abstractmethod
    def predict(self, coefficients: Tensor, v: Tensor) -> Tensor: ...

    @abstractmethod
    def spread(self, coefficients: Tensor, v: Tensor) -> Tensor: ...

    @abstractmethod
    def shape(self, state: State) -> tuple[int, ...]: ...

    @abstractmethod
    def depth(self, shape: tuple[int, ...]) -> int: ...


class _BiasGraph(_Graph):
    """The last column is the parent of its row. Without a bias the covariances are zero: a diagonal."""

    def init(self, frame: Frame) -> State:
        return {"diagonal": frame.zeros(*frame.shape), "cross": frame.zeros(*frame.shape)}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Outer)
        squares, cross = _bias_moments(evidence)
        for name, value in (("diagonal", squares), ("cross", cross)):
            state[name].mul_(fold.beta).add_(value, alpha=fold.alpha)

    def families(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        own = state["diagonal"]
        inner = own[..., -1:].expand(own.shape)
        return inner.reshape(len(own), -1, 1, 1), state["cross"].reshape(len(own), -1, 1), own.flatten(1)

    def predict(self, coefficients: Tensor, v: Tensor) -> Tensor:
        return coefficients.reshape(v.shape) * v[..., -1:]

    def spread(self, coefficients: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        out[..., -1] = (coefficients.reshape(v.shape) * v).sum(-1)
        return out

    def shape(self, state: State) -> tuple[int, ...]:
        return state["diagonal"].shape[1:]

    def depth(self, shape: tuple[int, ...]) -> int:
        return 1


def _bias_moments(evidence: Outer) -> tuple[Tensor, Tensor]:
    """``sum_N J * J`` and ``sum_N J * J_bias``, the latter zero for the bias itself.  # each (G, *shape)"""
    if not evidence.bias or isinstance(evidence.inputs, OneHot):
        squares = evidence.squares()
        return squares, torch.zeros_like(squares)
    if evidence.inputs.shape[2] == 1:
        g2 = evidence.gradients[:, :, :, 0].square().sum(0)  # (G, n, o)
        return evidence.squares(), torch.nn.functional.pad(g2.mT @ evidence.inputs[:, :, 0], (0, 1))
    parts = evidence.pieces()  # positions are summed first
    squares, cross = _row_moments(next(parts).rows())
    for part in parts:
        for total, more in zip((squares, cross), _row_moments(part.rows()), strict=True):
            total += more
    return squares, torch.nn.functional.pad(cross, (0, 1))


def _row_moments(J: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_N J * J`` and ``sum_N J * J_bias``.  # (N, G, o, i) -> (G, o, i), (G, o, i - 1)"""
    return J.square().sum(0), (J[..., :-1] * J[..., -1:]).sum(0)


@dataclass(frozen=True)
class _ParentGraph(_Graph):
    """Any sets of parents, from the statistic of a dense block."""

    structure: str | Parents | Callable[[tuple[int, ...]], Sequence[Sequence[int]]]

    def init(self, frame: Frame) -> State:
        P, q = self._index(frame.shape)[0].shape
        if frame.stack * P * q * q > LARGEST:
            raise ValueError(
                f"GaussianGraph: {P} entries with up to {q} parents hold {P * q * q} covariances: name fewer parents"
            )
        return {"matrix": frame.zeros(P, P), "shape": frame.zeros(*frame.shape, 0)}  # an empty tensor keeps the shape

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        Dense().update({"matrix": state["matrix"], "mass": torch.zeros_like(state["mass"])}, evidence, fold)

    def families(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        C = state["matrix"]
        index = self._index(self.shape(state))[0].to(C.device)
        known = index < C.shape[-1]
        at = torch.where(known, index, 0)
        inner = C[:, at.unsqueeze(2), at.unsqueeze(1)] * (known.unsqueeze(2) & known.unsqueeze(1))
        rows = torch.arange(len(at), device=C.device).unsqueeze(1)
        return inner + torch.diag_embed((~known).to(C.dtype)), C[:, rows, at] * known, C.diagonal(dim1=-2, dim2=-1)

    def predict(self, coefficients: Tensor, v: Tensor) -> Tensor:
        index = self._index(v.shape[1:])[0].to(v.device)
        known = torch.nn.functional.pad(v.flatten(1), (0, 1))[:, index]
        return (coefficients * known).sum(-1).reshape(v.shape)

    def spread(self, coefficients: Tensor, v: Tensor) -> Tensor:
        index = self._index(v.shape[1:])[0].to(v.device)
        out = v.new_zeros(len(v), len(index) + 1)
        out.index_add_(1, index.flatten(), (coefficients * v.flatten(1).unsqueeze(-1)).flatten(1))
        return out[:, :-1].reshape(v.shape)

    def shape(self, state: State) -> tuple[int, ...]:
        return state["shape"].shape[1:-1]

    def depth(self, shape: tuple[int, ...]) -> int:
        return self._index(shape)[1]

    def _index(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        return _index_parents(self.structure, tuple(shape))


@lru_cache(maxsize=256)
def _index_parents(structure: object, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Parents as a table, padded with ``P``, and the longest path. ValueError unless they are acyclic and for ``P`` entries."""
    size = prod(shape)
    if structure == "full":
        sets: Sequence[Sequence[int]] = [range(i) for i in range(size)]
    else:
        sets = structure(shape) if callable(structure) else structure  # type: ignore[assignment]
    if len(sets) != size:
        raise ValueError(f"structure: expected the parents of the {size} entries of a block {shape}, got those of {len(sets)}")
    depths = _depths(sets)
    width = max(1, *map(len, sets)) if sets else 1
    return torch.tensor([[*own, *[size] * (width - len(own))] for own in sets]), max(depths, default=0)


def _depths(sets: Sequence[Sequence[int]]) -> list[int]:
    """Length of the longest path that ends in each entry, by topological sorting. ValueError as in `_index_parents`."""
    children: list[list[int]] = [[] for _ in sets]
    for i, own in enumerate(sets):
        if len({*own}) != len(own) or not all(0 <= j < len(sets) for j in own):
            raise ValueError(
                f"structure: the parents of entry {i} are {tuple(own)}: expected different entries of 0 ... {len(sets) - 1}"
            )
        for j in own:
            children[j].append(i)
    remaining, depths = [len(own) for own in sets], [0] * len(sets)
    free = [i for i, count in enumerate(remaining) if count == 0]
    for i in free:  # the loop appends to it
        for child in children[i]:
            depths[child] = max(depths[child], depths[i] + 1)
            remaining[child] -= 1
            if remaining[child] == 0:
                free.append(child)
    if len(free) < len(sets):
        cycle = next(i for i, c in enumerate(remaining) if c)
        raise ValueError(f"structure: entry {cycle} is an ancestor of itself: expected an acyclic graph")
    return depths
