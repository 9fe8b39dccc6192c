"""K-BFGS and K-BFGS(L): BFGS updates of the inverses of both Kronecker factors of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig
from gradmaker.curvature import LayerSecant
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import KronPairs
from gradmaker.solvers import Apply
from gradmaker.triple import Triple

__all__ = ["KbfgsGradientConfig", "KbfgsGradientMaker", "KbfgsLGradientConfig", "KbfgsLGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KbfgsGradientConfig(GradientConfig):
    """K-BFGS: ``P G = H_g G H_a`` for each layer, both by BFGS: ``H_a`` on the input moment, ``H_g`` on the layer's secants.

    ``decay`` is for the second moment of the inputs, ``beta1`` for gradients, ``secant_decay`` for secants;
    ``output_damping`` is the second part of the double damping. Other layers than linear maps and convolutions get
    ``fallback``.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877; defaults of the authors' code.
    """

    inapplicable = LayerSecant.inapplicable

    damping: float = 0.3
    decay: float | None = 0.9
    beta1: float = 0.9
    secant_decay: float = 0.9
    """Weight of the OLD secants at a measurement: with ``curvature_interval=k`` their average spans ``k`` times the steps."""
    output_damping: Literal["powell", "shift"] = "powell"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("output_damping", self.output_damping, ["powell", "shift"])
        self._representation()

    def _representation(self) -> KronPairs:
        return KronPairs(self.damping, memory_decay=self.secant_decay, form=self.output_damping)

    def triple(self, site: Site) -> Triple | None:
        if site.kind != "matrix" or not site.weighted or site.rule is None or site.rule.transposed:
            return None
        return Triple(LayerSecant(), self._representation(), Apply())


@register("kbfgs")
class KbfgsGradientMaker(Preconditioned[KbfgsGradientConfig]):
    """K-BFGS as a gradient maker; see `KbfgsGradientConfig`."""

    Config = KbfgsGradientConfig


@dataclass(frozen=True, kw_only=True)
class KbfgsLGradientConfig(KbfgsGradientConfig):
    """K-BFGS(L): K-BFGS with ``H_g`` as the last ``pairs`` pairs, from the identity.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877, section 5; 100 pairs, and ``H_a`` as a matrix, as in the
    authors' code.
    """

    pairs: int = 100
    limited: Literal["outputs", "both"] = "outputs"
    """Which factors are held as pairs: ``H_g``, or also ``H_a``, which then starts from the identity too."""

    def __post_init__(self) -> None:
        check_choice("limited", self.limited, ["outputs", "both"])
        super().__post_init__()

    def _representation(self) -> KronPairs:
        return KronPairs(self.damping, self.pairs, self.limited, self.secant_decay, form=self.output_damping)


@register("kbfgs_l")
class KbfgsLGradientMaker(Preconditioned[KbfgsLGradientConfig]):
    """K-BFGS(L) as a gradient maker; see `KbfgsLGradientConfig`."""

    Config = KbfgsLGradientConfig
