"""Curvature matrices: what is measured."""

from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Gradient, Joint, OneHot, Outer
from gradmaker.curvature.fisher import FisherEmp, FisherExact, FisherMC
from gradmaker.curvature.gradient import BatchGradient
from gradmaker.curvature.likelihood import LIKELIHOODS, Bernoulli, Categorical, Gaussian, Likelihood

CURVATURES: dict[str, type[Curvature]] = {c.__name__: c for c in (FisherExact, FisherMC, FisherEmp, BatchGradient)}

__all__ = [
    "CURVATURES",
    "LIKELIHOODS",
    "BatchGradient",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "Evidence",
    "FisherEmp",
    "FisherExact",
    "FisherMC",
    "Gaussian",
    "Gradient",
    "Joint",
    "Likelihood",
    "OneHot",
    "Outer",
]
