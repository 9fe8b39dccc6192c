"""L-BFGS with secant pairs of consistent batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import Secant
from gradmaker.options.checks import check_choice, check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Pairs
from gradmaker.solvers import Apply
from gradmaker.triple import Triple

__all__ = ["LbfgsGradientConfig", "LbfgsGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class LbfgsGradientConfig(GradientConfig):
    """L-BFGS: ``P g`` by the two-loop recursion on the last ``memory`` pairs, each of one batch before and after its step.

    One more forward and backward pass per step; no line search. ``decay`` does not apply; ``damping`` is added to the curvature
    of every pair. The first step has the length of that of `torch.optim.LBFGS`.

    Reference: Liu, Nocedal, Math. Programming 1989; consistent batches: Schraudolph, Yu, Guenter, AISTATS 2007.
    """

    inapplicable = Secant.inapplicable | Pairs.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 0.0
    memory: int = 10
    indefinite: Literal["skip", "damp"] = "skip"
    """Treatment of pairs of negative curvature: skipped, or damped as by Powell."""
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


@register("lbfgs")
class LbfgsGradientMaker(Preconditioned[LbfgsGradientConfig]):
    """L-BFGS as a gradient maker; see `LbfgsGradientConfig`."""

    Config = LbfgsGradientConfig
