"""One-sided Shampoo (ASGO): Shampoo with a factor on one axis of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gradmaker.capture.shapes import Merge, ShapePolicy
from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.linalg.factor_roots import FactorRoot
from gradmaker.methods.tensor_axes import RootedGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import OneSided
from gradmaker.schedule import Schedule
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["OneSidedGradientConfig", "OneSidedGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class OneSidedGradientConfig(RootedGradientConfig):
    """One-sided Shampoo, ASGO: ``P G = (sum_t G_t G_t^T + damping lambda_max I)^(-1/2) G``, or from the right.

    Reference: Xie et al., 2025, arXiv:2502.10273; An et al., 2025, arXiv:2503.20762, algorithm 1.
    """

    usage = Usage(hidden=True)
    damping: float = 1e-6
    decay: float | None = 0.95
    grafting: str = "keep"
    preconditioner_interval: int | Schedule = 10
    warmup_steps: int = 5
    merge: Merge = "to_2d"
    side: Literal["short", "left", "right"] = "short"
    """The axis with a factor: the shorter one, the rows (outputs), or the columns (inputs)."""
    root: FactorRoot = "eigh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("side", self.side, ["short", "left", "right"])
        check_choice("root", self.root, list(get_args(FactorRoot)))

    @property
    def shapes(self) -> ShapePolicy:  # type: ignore[override]
        """The rule that cuts tensors into blocks whose first axis has the factor."""
        return ShapePolicy(self.merge, self.block_size, self.side, self.split)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), OneSided(), self.rooter())


@register("one_sided")
class OneSidedGradientMaker(Preconditioned[OneSidedGradientConfig]):
    """One-sided Shampoo as a gradient maker; see `OneSidedGradientConfig`."""

    Config = OneSidedGradientConfig
