"""The mini-batch gradient as a curvature: the second moment over steps of AdaGrad, Adam and Shampoo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradmaker.curvature.base import NO_CALLS, NO_DRAWS, NO_OUTPUTS, NO_REDUCTION, Curvature
from gradmaker.curvature.evidence import WHOLE, Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.curvature.step import Step

__all__ = ["BatchGradient", "DisplacedGradient"]


@dataclass(frozen=True, kw_only=True)
class BatchGradient(Curvature):
    """The second moment of mini-batch gradients over steps, ``C = sum_t w_t g_t g_t^T``; no pass beyond the ordinary backward.

    Reference: Duchi, Hazan & Singer, JMLR 2011, section 1.1.
    """

    gives: ClassVar[frozenset[Kind]] = kinds(Gradient)
    layerwise: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True
    inapplicable = NO_CALLS | NO_DRAWS | NO_OUTPUTS | NO_REDUCTION

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        by_rows: dict[str, Evidence] = {s.name: RowGradient(step.rows[s.name]) for s in step.sites if s.name in step.rows}
        found = ((site, site.read()) for site in step.sites if site.name not in by_rows)
        yield by_rows | {site.name: Gradient(g.to(step.statistics_dtype(site))) for site, g in found if g is not None}


@dataclass(frozen=True, kw_only=True)
class DisplacedGradient(Curvature):
    """Mini-batch gradients with the weights at which they are taken: ``grad f(w + v) = grad f(w) + H v`` to first order.

    A displacement of the weights changes the gradient by the Hessian of the batch. No pass beyond the ordinary backward.

    Reference: Krishnan, Xiao & Saurous, ICLR 2018, arXiv:1712.03298, section 2.
    """

    gives: ClassVar[frozenset[Kind]] = kinds((Gradient, "located"))
    layerwise: ClassVar[bool] = False
    definite: ClassVar[bool] = False
    inapplicable = NO_CALLS | NO_DRAWS | NO_OUTPUTS | NO_REDUCTION

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        found: dict[str, Gradient] = {}
        pieces: list[tuple[Tensor, Tensor]] = []
        for site in step.sites:
            dtype, g = step.statistics_dtype(site), site.read()
            held: dict[nn.Parameter, Tensor | None] = {p: p.detach() for p in site.parameters.values()}
            w = site.lay_out(held).to(dtype)
            located = Gradient(torch.zeros_like(w) if g is None else g.to(dtype), w, "located")
            pieces.append((located.gradient.reshape(1, -1), w.reshape(1, -1)))
            if g is not None:
                found[site.name] = located
        g, w = (torch.cat(part, 1) for part in zip(*pieces, strict=True))
        yield {**found, WHOLE: Gradient(g, w, "located")} if found else {}
