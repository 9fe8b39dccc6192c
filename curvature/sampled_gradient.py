"""The mini-batch gradient at sampled targets: the Fisher matrix from one gradient, without per-example gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradmaker.capture.sites import Site
from gradmaker.curvature.base import NO_REDUCTION, Curvature
from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.step import Step
from gradmaker.loss.likelihood import LIKELIHOODS
from gradmaker.options.checks import check_count

__all__ = ["SampledGradient"]


@dataclass(frozen=True, kw_only=True)
class SampledGradient(Curvature):
    """The Fisher matrix by one gradient: ``C = G G^T``, ``G = sum_m sqrt(w_m) J_m^T grad l_m(y_m)``, with ``E C`` the Fisher.

    The targets ``y_m`` are drawn from the model. For a mean over ``M`` terms ``G`` is ``sqrt(M)`` times the gradient of the
    sampled loss: the terms are independent and have mean zero, so that only the sum of their covariances remains. One extra
    backward pass a sample; ``.grad`` is not written.

    Reference: Ren, Goldfarb, NeurIPS 2021, arXiv:2106.02925, algorithm 2, which leaves out the factor ``M``.
    """

    gives: ClassVar[frozenset[Kind]] = kinds(Gradient)
    by_parts: ClassVar[bool] = True
    inapplicable = NO_REDUCTION

    samples: int = 1

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        if not step.terms:
            raise ValueError(
                "SampledGradient needs the likelihood behind the loss, and no recognised loss was called: use "
                "F.cross_entropy, F.nll_loss, F.mse_loss or F.binary_cross_entropy_with_logits (as functions or modules), "
                f"or set likelihood= to one of {', '.join(LIKELIHOODS)}"
            )
        sites = step.active()
        for index, terms in enumerate(step.terms):
            generator = step.generator(f"loss {index}", terms.z.device)
            for cotangent in terms.sample(self.samples, generator, step.place(terms, index)):
                yield _gradients(step, sites, terms.z, cotangent)


def _gradients(step: Step, sites: list[Site], z: Tensor, cotangent: Tensor) -> dict[str, Evidence]:
    """``J^T u`` for all parameters of the sites, in the layout of their blocks."""
    parameters = list(dict.fromkeys(p for site in sites for p in site.parameters.values()))
    vjps = dict(zip(parameters, step.tape.vjp_parameters([z], [cotangent], parameters), strict=True))
    return {site.name: Gradient(site.lay_out(vjps).to(step.statistics_dtype(site))) for site in sites}
