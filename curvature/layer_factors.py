"""Kronecker factors of the Fisher matrix from one pass, which are measured beside matrix-vector products."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Outer
from gradmaker.curvature.fisher import FisherMC
from gradmaker.curvature.products import Factors, Layers
from gradmaker.curvature.step import Step

__all__ = ["LONGEST", "layer_factors"]

LONGEST = 2048
"""Longer sides get a diagonal factor: factors are inverted at every step, which takes longer than the products above this."""


@torch.no_grad()
def layer_factors(step: Step) -> Layers:
    """``A = mean_nr a a^T`` and ``B = sum_nr g g^T`` of every layer, as `FisherMC` with one sample measures them.

    Layers are processed one at a time; neither the graph of the pass nor its inputs are kept.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 3.1.
    """
    found: dict[str, Factors] = {}
    for chunk in FisherMC().measure(step):
        for name in chunk:
            outer = chunk[name]
            assert isinstance(outer, Outer)
            factors = found.setdefault(name, _empty(outer))
            outer.add_gradient_moment_(factors.B, 1.0, 1.0)
            if outer.fresh:
                outer.add_input_moment_(factors.A, 1.0, 1.0)
                found[name] = replace(factors, A=factors.A / outer.counted, counted=outer.counted)
    return Layers(tuple(prod(s.shape) for s in step.sites), tuple(found.get(s.name) for s in step.sites))


def _empty(outer: Outer) -> Factors:
    """Factors of zeros, in the size of a layer's."""
    g, a = outer.gradients, outer.inputs
    inputs, outputs = (a.size if isinstance(a, OneHot) else a.shape[-1]) + outer.bias, g.shape[-1]

    def zeros(d: int, diagonal: bool) -> Tensor:
        return g.new_zeros(g.shape[1], d) if diagonal or d > LONGEST else g.new_zeros(g.shape[1], d, d)

    return Factors(zeros(inputs, isinstance(a, OneHot)), zeros(outputs, False), outer.transposed)
