"""TNT's statistic: the covariance of a tensor-normal distribution of gradients, one factor for each axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Gradient, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.contraction import contract
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.mode_products import apply_factors, kronecker_product
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice
from gradmaker.representations.base import Fold, Frame, Grain
from gradmaker.representations.kronecker import KronDims
from gradmaker.representations.roles import FactoredAxes, FoldsRows

__all__ = ["TensorNormal"]


@dataclass(frozen=True)
class TensorNormal(FactoredAxes, FoldsRows):
    """A tensor-normal covariance: ``C ~ (H_1 (x) ... (x) H_k) / z^(k-1)``, ``H_m = sum mat_m(G) mat_m(G)^T`` of trace ``z``.

    Exact where the gradient is tensor-normal; the trace is always that of ``C``. ``G`` is the gradient of the sampled loss, or
    that of each example (layers only). `factors` are balanced: all have the mean eigenvalue ``c = (z / prod n)^(1/k)``, and
    their product is ``C`` itself, whereas Shampoo's is the root of it.

    Reference: Ren, Goldfarb, NeurIPS 2021, arXiv:2106.02925.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient, Outer)

    granularity: Literal["layer", "tensor"] = "layer"

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, ("layer", "tensor"))

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        return KronDims().init(frame)

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if isinstance(evidence, Gradient):
            KronDims().update(state, evidence, fold)
            return
        assert isinstance(evidence, Outer)
        inner, outer = (0, 1) if evidence.transposed else (1, 0)
        for axis, moment in ((outer, _output_moment), (inner, _input_moment)):
            H = state[f"factor_{axis}"]
            H.mul_(fold.beta).add_(moment(evidence, diagonal=H.ndim == 2), alpha=fold.alpha)
        fold.weigh_(state["mass"])

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        KronDims().update_rows(state, rows, fold)

    def to_dense(self, state: State) -> Tensor:
        return kronecker_product(self.factors(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self.factors(state), self.unfold(v)).reshape(v.shape)

    # ---------------------------------------------------------------- Factored: one factor for each axis
    def factors(self, state: State) -> list[Tensor]:
        """``H_m / (c^(k-1) prod_(j != m) n_j)``, bias-corrected; zero without evidence.  # (B, d_m, d_m)"""
        H = KronDims().factors(state)
        trace = (H[0] if H[0].ndim == 2 else H[0].diagonal(dim1=-2, dim2=-1)).sum(-1)
        sizes, k = [F.shape[-1] for F in H], len(H)
        c = (trace / prod(sizes)) ** (1 / k)
        scale = torch.where(c > 0, c, 1.0) ** (k - 1)
        return [F * n / prod(sizes) / scale.view(-1, *[1] * (F.ndim - 1)) for F, n in zip(H, sizes, strict=True)]

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return KronDims().unfold(g)

    def order(self, factors: int) -> float:
        """One: ``C`` is the product of the factors."""
        return 1


def _output_moment(evidence: Outer, diagonal: bool) -> Tensor:
    """``sum_N J_N J_N^T = sum_kn sum_rs (a_r . a_s) g_r g_s^T``, over pairs of positions or by rows ``J``.

    # (G, o, o) or (G, o)
    """
    g, pair = evidence.gradients, "kgnro->go" if diagonal else "kgnrp->gop"
    if isinstance(evidence.inputs, OneHot) or evidence.inputs.shape[2] == 1:
        weighed = torch.einsum("gnrs,kgnso->kgnro", _input_gram(evidence), g)
        return torch.einsum(f"kgnro,{pair}", weighed, g)
    a = _with_bias(evidence)
    return contract(f"gnri,gnsi,kgnso,{pair}", a, a, g, g)


def _input_moment(evidence: Outer, diagonal: bool) -> Tensor:
    """``sum_N J_N^T J_N = sum_n sum_rs (sum_k g_r . g_s) a_r a_s^T``, the bias last.  # (G, i, i) or (G, i)"""
    if diagonal:
        return evidence.squares().sum(-1 if evidence.transposed else -2)
    a, g = _with_bias(evidence), evidence.gradients
    if a.shape[2] == 1:
        weights = g.square().sum((0, 3, 4)).unsqueeze(-1)  # (G, n, 1)
        rows = a.squeeze(2)
        return (weights * rows).mT @ rows
    return contract("gnri,gnsj,kgnro,kgnso->gij", a, a, g, g)


def _input_gram(evidence: Outer) -> Tensor:
    """``a_r . a_s`` within each example.  # (G, n, r, r)"""
    if isinstance(evidence.inputs, OneHot):
        index = evidence.inputs.index
        same = index.unsqueeze(2) == index.unsqueeze(1)
        if evidence.inputs.padding is not None:
            same = same & (index != evidence.inputs.padding).unsqueeze(2)
        gram = same.to(evidence.gradients.dtype).unsqueeze(0)
    else:
        gram = evidence.inputs @ evidence.inputs.mT
    return gram + 1 if evidence.bias else gram


def _with_bias(evidence: Outer) -> Tensor:
    """The inputs, with a one for the bias.  # (G, n, r, i)"""
    assert isinstance(evidence.inputs, Tensor)
    a = evidence.inputs
    return torch.cat([a, torch.ones_like(a[..., :1])], -1) if evidence.bias else a
