"""Curvature matrices: the first axis, what is measured.

One part, one file: a `Curvature` reads a recorded pass, runs further passes where it needs them, and yields evidence for each
site. The package also has the closed set of evidence (`evidence`, `products`), what a curvature may know of a step (`step`),
and what several curvatures share. The evidence carries all scaling of the loss; nothing is averaged over steps here.
"""

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Gradient, Joint, Outer, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.fisher import FisherEmp, FisherExact, FisherMC
from gradmaker.curvature.fisher_forward import FisherForward
from gradmaker.curvature.gradient import BatchGradient, DisplacedGradient
from gradmaker.curvature.hessian import GaussNewton, Hessian
from gradmaker.curvature.probe import GradientProbe, HessianProbe
from gradmaker.curvature.products import Factors, Product
from gradmaker.curvature.recursive import FisherRecursive
from gradmaker.curvature.roles import OfProducts, OfSecants, Pooled, Watching
from gradmaker.curvature.sampled_gradient import SampledGradient
from gradmaker.curvature.secant import LayerSecant, Secant
from gradmaker.loss.likelihood import LIKELIHOODS, Bernoulli, Categorical, Gaussian, Likelihood
from gradmaker.options.registry import Registry, register

CURVATURES: Registry[type[Curvature]] = Registry("curvature", Curvature)
for _part in (
    FisherExact,
    FisherMC,
    FisherEmp,
    BatchGradient,
    SampledGradient,
    FisherRecursive,
    FisherForward,
    Hessian,
    GaussNewton,
    HessianProbe,
    GradientProbe,
    Secant,
    LayerSecant,
    DisplacedGradient,
):
    register(_part)

__all__ = [
    "CURVATURES",
    "LIKELIHOODS",
    "BatchGradient",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "DisplacedGradient",
    "Evidence",
    "Factors",
    "FisherEmp",
    "FisherExact",
    "FisherForward",
    "FisherMC",
    "FisherRecursive",
    "GaussNewton",
    "Gaussian",
    "Gradient",
    "GradientProbe",
    "Hessian",
    "HessianProbe",
    "Joint",
    "Kind",
    "LayerSecant",
    "Likelihood",
    "OfProducts",
    "OfSecants",
    "OneHot",
    "Outer",
    "Pair",
    "Pooled",
    "Product",
    "SampledGradient",
    "Secant",
    "Watching",
    "kinds",
]
