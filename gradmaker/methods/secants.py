"""Methods on secants of consistent batches: L-BFGS, K-BFGS and K-BFGS(L)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig, check_choice, check_count
from gradmaker.curvature import LayerSecant, Secant
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import KronPairs, Pairs
from gradmaker.solvers import Apply
from gradmaker.triple import Triple

__all__ = [
    "KbfgsGradientConfig",
    "KbfgsGradientMaker",
    "KbfgsLGradientConfig",
    "KbfgsLGradientMaker",
    "LbfgsGradientConfig",
    "LbfgsGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class LbfgsGradientConfig(GradientConfig):
    """L-BFGS: ``P g`` by the two loops over the last ``memory`` pairs, each of one batch before and after its step.

    One more forward and backward pass a step; no line search. Averages do not apply (``decay``); ``damping`` is added to the
    curvature of every pair. The first step has the length of torch's.

    Reference: Liu, Nocedal, Math. Programming 1989; consistent batches: Schraudolph, Yu, Guenter, AISTATS 2007.
    """

    inapplicable = Secant.inapplicable | Pairs.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 0.0
    memory: int = 10
    indefinite: Literal["skip", "damp"] = "skip"
    """Pairs of negative curvature: left out, or damped as by Powell."""
    acceptance: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("memory", self.memory, 0)
        check_choice("indefinite", self.indefinite, ["skip", "damp"])
        self._representation()

    def _representation(self) -> Pairs:
        return Pairs(self.memory, self.indefinite, self.acceptance, self.damping)

    def triple(self, site: Site) -> Triple | None:
        return Triple(Secant(), self._representation(), Apply())


class LbfgsGradientMaker(PreconditionedGradientMaker):
    """L-BFGS as a gradient maker; see `LbfgsGradientConfig`."""

    Config = LbfgsGradientConfig


@dataclass(frozen=True, kw_only=True)
class KbfgsGradientConfig(GradientConfig):
    """K-BFGS: ``P G = H_g G H_a`` for each layer, both by BFGS: ``H_a`` on the input moment, ``H_g`` on the layer's secants.

    ``decay`` is that of the inputs' moment, ``momentum`` that of gradients, ``secant_decay`` that of the secants;
    ``output_damping`` the second part of the double damping. What is not a linear map or a convolution gets ``fallback``.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877; defaults of the authors' code.
    """

    inapplicable = LayerSecant.inapplicable

    damping: float = 0.3
    decay: float | None = 0.9
    momentum: float = 0.9
    secant_decay: float = 0.9
    """Weight of the OLD secants, at a measurement: ``curvature_interval=k`` makes their average span ``k`` times the steps."""
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


class KbfgsGradientMaker(PreconditionedGradientMaker):
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
    """What is held as pairs: ``H_g``, or ``H_a`` as well, which then starts from the identity too."""

    def __post_init__(self) -> None:
        check_choice("limited", self.limited, ["outputs", "both"])
        super().__post_init__()

    def _representation(self) -> KronPairs:
        return KronPairs(self.damping, self.pairs, self.limited, self.secant_decay, form=self.output_damping)


class KbfgsLGradientMaker(PreconditionedGradientMaker):
    """K-BFGS(L) as a gradient maker; see `KbfgsLGradientConfig`."""

    Config = KbfgsLGradientConfig
