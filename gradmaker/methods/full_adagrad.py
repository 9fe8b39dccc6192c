"""Full-matrix AdaGrad: the inverse square root of the summed outer products of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.checks import check_choice, check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Dense, Window
from gradmaker.solvers import Eigh, Gram
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["FullAdagradGradientConfig", "FullAdagradGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class FullAdagradGradientConfig(AxesGradientConfig):
    """Full-matrix AdaGrad: ``P g = (sum_t g_t g_t^T + damping lambda_max I)^(-1/2) g`` for each tensor.

    ``window`` sums over this many last gradients, with their Gram matrix in place of a matrix of the tensor's size (GGT); with
    a ``decay`` it is a mean over the gradients in the window. ``placement="after"`` damps the root, ``(A^(1/2) + damping
    lambda_max(A^(1/2)) I)^-1``; ``mode="absolute"`` takes the damping as it is. ``block_size`` cuts tensors whose matrix would
    be too large.

    Reference: Duchi, Hazan & Singer, JMLR 2011, section 1.1; windows: Agarwal et al., ICML 2019, arXiv:1806.02958, section 2.
    """

    only_with: ClassVar[dict[str, dict[str, Any]]] = {"merge": {"block_size": bool}}

    usage = Usage(momentum=0.0)
    damping: float = 1e-8
    decay: float | None = None
    max_dim: int = 4096
    window: int | None = None
    placement: Literal["before", "after"] = "before"
    """Whether the damping is added before or after the root."""
    mode: Literal["absolute", "largest"] = "largest"
    """The unit of the damping: absolute, or the largest eigenvalue of the matrix that it is added to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            check_count("window", self.window, 1)
        check_choice("placement", self.placement, ["before", "after"])
        check_choice("mode", self.mode, ["absolute", "largest"])
        self._triple()

    def inapplicable_options(self) -> dict[str, str]:
        """Also the options without effect with a window, which holds no matrix of the tensor's size."""
        return super().inapplicable_options() | ({} if self.window is None else Window.inapplicable)

    def _triple(self) -> Triple:
        if self.window is None:
            dense = Eigh(power=-0.5, damping=self.damping, split="exact", mode=self.mode, placement=self.placement)
            return Triple(BatchGradient(), Dense(granularity="layer"), dense)
        held = Window(size=self.window, granularity="layer", scale="sum" if self.decay is None else "mean")
        return Triple(BatchGradient(), held, Gram(power=-0.5, damping=self.damping, mode=self.mode, placement=self.placement))

    def triple(self, site: Site) -> Triple | None:
        return self._triple()


@register("full_adagrad")
class FullAdagradGradientMaker(Preconditioned[FullAdagradGradientConfig]):
    """Full-matrix AdaGrad as a gradient maker; see `FullAdagradGradientConfig`."""

    Config = FullAdagradGradientConfig
