"""Curvature matrices: what is measured."""

from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Factors, Gradient, Joint, OneHot, Outer
from gradmaker.curvature.fisher import FisherEmp, FisherExact, FisherMC
from gradmaker.curvature.gradient import BatchGradient
from gradmaker.curvature.likelihood import LIKELIHOODS, Bernoulli, Categorical, Gaussian, Likelihood
from gradmaker.curvature.recursive import FisherRecursive
from gradmaker.curvature.sampled_gradient import SampledGradient

CURVATURES: dict[str, type[Curvature]] = {
    c.__name__: c for c in (FisherExact, FisherMC, FisherEmp, BatchGradient, SampledGradient, FisherRecursive)
}

__all__ = [
    "CURVATURES",
    "LIKELIHOODS",
    "BatchGradient",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "Evidence",
    "Factors",
    "FisherEmp",
    "FisherExact",
    "FisherMC",
    "FisherRecursive",
    "Gaussian",
    "Gradient",
    "Joint",
    "Likelihood",
    "OneHot",
    "Outer",
    "SampledGradient",
]
