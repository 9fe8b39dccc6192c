"""Probes: random vectors with their Hessian-vector products, or with the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gradmaker.capture.sites import Site
from gradmaker.curvature.base import NO_CALLS, NO_OUTPUTS, NO_REDUCTION, Curvature, Need
from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.hessian import Mode, check_mode, multiply_hessian
from gradmaker.curvature.roles import Pooled
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.curvature.step import Step
from gradmaker.linalg.factored_gradient import FactoredGradient, ProbedRows
from gradmaker.linalg.real_pairs import real_shape, write_real
from gradmaker.options.checks import check_choice, check_count, check_interval

__all__ = ["GradientProbe", "HessianProbe"]


@dataclass(frozen=True, kw_only=True)
class HessianProbe(Pooled):
    """Pairs ``(v, H v)`` with random ``v``: one Hessian-vector product of the loss for all parameters at once.

    What is fitted to them is ``|H|``, which is positive semidefinite: ``E[(H v)^2] = diag(H^2)``, and PSGD's criterion depends
    on ``H`` only by ``H^2``. ``v`` is drawn for each parameter by its name, independently of the grouping and the dtype. All
    micro-batches of a step use one ``v``, and their products add up to the ``H v`` of the step's loss, since ``H^2`` is no sum
    over micro-batches. ``lift`` adds ``(lift + eps |H v|) * N(0, I)`` to ``H v``, unless that is zero throughout, which bounds
    a fitted inverse by ``1 / lift``. ``mode`` as in `Hessian`.

    Reference: Pearlmutter, Neural Computation 1994 (products); Hutchinson 1990 (signs); Li, IEEE TNNLS 2018,
    arXiv:1512.04202, section 3 (pairs, noise).
    """

    gives: ClassVar[frozenset[Kind]] = kinds(Pair)
    by_parts: ClassVar[bool] = True
    layerwise: ClassVar[bool] = False
    inapplicable = NO_CALLS | NO_OUTPUTS | NO_REDUCTION

    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    samples: int = 1
    lift: float = 0.0
    mode: Mode = "reverse"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"graph", "replay"})

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, ("rademacher", "gaussian"))
        check_count("samples", self.samples, 1)
        check_interval("lift", self.lift, 0, inf, closed=True)
        check_mode(self.mode)

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        assert step.graph is not None and step.batches is not None
        replay = step.batches.curvature.replay
        reached = {p for p, g in step.graph.gradients.items() if g is not None}
        sites = [s for s in step.sites if reached.intersection(s.parameters.values())]
        named = {k: p for s in sites for k, p in s.parameters.items()}
        for sample in range(self.samples):
            v = {p: self._draw(step, f"probe {sample} {k}", p) for k, p in named.items()}
            image = multiply_hessian(step.graph, replay, self.mode, v)
            found: dict[str, Evidence] = {}
            for site in sites:
                dtype = step.statistics_dtype(site)
                found[site.name] = Pair(site.lay_out(dict(v)).to(dtype), site.lay_out(dict(image)).to(dtype))
            yield found

    def complete(self, step: Step, chunks: Sequence[Mapping[str, Pair]]) -> Iterator[Mapping[str, Evidence]]:
        for sample, chunk in enumerate(chunks):
            names = {name: f"lift {sample} {name}" for name in chunk}
            yield {k: replace(pair, cv=_lifted(step, names[k], pair.cv, self.lift)) for k, pair in chunk.items()}

    def _draw(self, step: Step, name: str, p: nn.Parameter) -> Tensor:
        """The random vector ``v`` of one parameter."""
        generator = _generator(step, name, p.device)
        shape, v = real_shape(p), torch.empty_like(p)
        if self.distribution == "gaussian":
            write_real(v, torch.randn(shape, generator=generator, device=p.device))
        else:
            write_real(v, torch.randint(0, 2, shape, generator=generator, device=p.device).mul_(2).sub_(1))
        return v


@dataclass(frozen=True, kw_only=True)
class GradientProbe(Curvature):
    """Pairs ``(v, g)`` of independent normal noise and the mini-batch gradient, from which PSGD fits a whitening.

    The criterion ``E[g^T P g + v^T P^-1 v]`` is least at ``P = E[g g^T]^(-1/2)``, so that the curvature is ``E[g g^T]^(1/2)``;
    no pass beyond the ordinary backward. ``lift`` as in `HessianProbe`: a gradient that is zero throughout gets none. To one
    that is held by rows one row is added, ``(lift + eps rms(g)) x y^T`` of normal ``x, y``: noise of the same second moments.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202; Pooladzandi, Li, 2024, arXiv:2402.04553, section 3 (whitening).
    """

    gives: ClassVar[frozenset[Kind]] = kinds((Pair, "noise_and_gradient"))
    layerwise: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True
    inapplicable = NO_CALLS | NO_OUTPUTS | NO_REDUCTION

    lift: float = 0.0

    def __post_init__(self) -> None:
        check_interval("lift", self.lift, 0, inf, closed=True)

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        found: dict[str, Evidence] = {}
        for site in step.sites:
            if site.name in step.rows:
                rows = _lifted_rows(step, f"lift {site.name}", step.rows[site.name], self.lift)
                v = self._draw(step, site, rows.shape, rows.g)
                found[site.name] = RowGradient(ProbedRows(rows.g, rows.a, v))
            elif (g := site.read()) is not None:
                g = g.to(step.statistics_dtype(site))
                lifted = _lifted(step, f"lift {site.name}", g, self.lift)
                found[site.name] = Pair(self._draw(step, site, g.shape, g), lifted, "noise_and_gradient")
        yield found

    def _draw(self, step: Step, site: Site, shape: Sequence[int], like: Tensor) -> Tensor:
        """The noise of a site, in the dtype of ``like``."""
        return _normal(_generator(step, f"probe {site.name}", like.device), shape).to(like.dtype)


def _generator(step: Step, name: str, device: torch.device) -> torch.Generator:
    """A generator that is the same for all micro-batches of a step."""
    return replace(step, part=0).generator(name, device)


def _normal(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Normal noise, the same for every dtype."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


def _lifted(step: Step, name: str, h: Tensor, lift: float) -> Tensor:
    """``h + (lift + eps |h|) * N(0, I)`` of the members that are not zero throughout."""
    if not lift:
        return h
    noise = _normal(_generator(step, name, h.device), h.shape).to(h.dtype)
    size = h.abs()
    given = (size.flatten(1).amax(1) != 0).to(h.dtype).view(-1, *[1] * (h.ndim - 1))  # also where it is NaN
    return noise.mul_(size.mul_(torch.finfo(h.dtype).eps).add_(lift).mul_(given)).add_(h)


def _lifted_rows(step: Step, name: str, rows: FactoredGradient, lift: float) -> FactoredGradient:
    """`_lifted` by rows, with one row of noise of the same second moments."""
    if not lift:
        return rows
    B, o, i = rows.shape
    noise = _normal(_generator(step, name, rows.g.device), (B, 1, o + i)).to(rows.g.dtype)
    length = rows.length()
    size = torch.where(length != 0, lift + torch.finfo(length.dtype).eps * length / (o * i) ** 0.5, 0.0)
    left, right = noise.split([o, i], -1)
    return replace(rows, g=torch.cat([rows.g, size[:, None, None] * left], 1), a=torch.cat([rows.a, right], 1))
