"""The forward-only curvature of a layer: the second moment of its inputs (FOOF)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradmaker.capture.vjps import VJPs
from gradmaker.curvature.base import NO_DRAWS, NO_REDUCTION, Curvature, Need
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.fisher import LazyEvidence
from gradmaker.curvature.step import Step

__all__ = ["FisherForward"]


class _Forward(LazyEvidence):
    """Evidence of the inputs alone."""

    def __getitem__(self, name: str) -> Evidence:
        site = self.sites[name]
        if site.rule is None or site.direct(self.step.tape):  # no input is known: C is the identity
            like = next(iter(site.parameters.values()))
            dtype = self.step.statistics_dtype(site)
            empty = torch.zeros(1, self.step.examples, 1, 0, dtype=dtype, device=like.device)
            return Outer(empty, empty.new_zeros(0, 1, self.step.examples, 1, like.numel()), bias=True, kind="inputs")
        outer = super().__getitem__(name)
        assert isinstance(outer, Outer)
        return outer.inputs_alone()


@dataclass(frozen=True, kw_only=True)
class FisherForward(Curvature):
    """The forward-only curvature (FOOF), K-FAC without output gradients: ``C = I (x) A``, ``A = mean a a^T``.

    With exact damping (`Eigh`) ``P G = G (A + damping I)^-1``: the step whose change of the layer's outputs is nearest to the
    negative gradient at these outputs. It needs no targets, no likelihood and no extra pass. ``C`` has the scale of the inputs
    alone: ``P g`` grows with the loss, and the damping is in units of squared inputs. With weight sharing ``A`` is the mean
    over positions, as in K-FAC, not their sum; further micro-batches and steps enter as a mean too, also with ``decay=None``.
    In quantisation ``A`` is, up to a factor, the Hessian of the layer's reconstruction error.

    Reference: Benzing, ICML 2022, arXiv:2201.12250, section 4 (FOOF); Frantar et al., ICLR 2023, arXiv:2210.17323 (GPTQ).
    """

    gives: ClassVar[frozenset[Kind]] = kinds((Outer, "inputs"))
    by_parts: ClassVar[bool] = True
    inapplicable = NO_DRAWS | NO_REDUCTION

    @property
    def needs(self) -> frozenset[Need]:
        """The recorded forward pass and the ordinary backward pass; no vector-Jacobian product."""
        return frozenset({"calls", "main_backward"})

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        assert step.output_gradients is not None
        yield _Forward(step, VJPs(step.output_gradients), step.mask(step.terms[0]) if step.terms else None, True)
