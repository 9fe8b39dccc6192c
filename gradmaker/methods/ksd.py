"""Krylov subspace descent: the loss minimised in a Krylov space of the Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.methods.matrix_free import MatrixFreeConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Implicit
from gradmaker.solvers import (
    Krylov,
)
from gradmaker.triple import Triple

__all__ = ["KsdGradientConfig", "KsdGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KsdGradientConfig(MatrixFreeConfig):
    """Krylov subspace descent: the least loss in the span of ``g, G g, ..., G^(K-1) g`` and the last step; see `Krylov`.

    The space is preconditioned by the diagonal ``D`` of squared gradients, ``D^-1 g, D^-1 G D^-1 g, ...``, and searched by BFGS
    on the batch of the step or on a separate one (``setup_search_call``). The learning rate should be 1.

    Reference: Vinyals & Povey, AISTATS 2012, arXiv:1111.4259, sections 3-4.
    """

    only_with: ClassVar[dict[str, dict[str, Any]]] = {"squares": {"precondition": bool}}

    damping: float = 1e-2
    """Added to the loss as ``damping |step|^2 / 2``; the paper has none."""
    dimension: int = 20
    search: Literal["bfgs", "model"] = "bfgs"
    """bfgs: minimise the loss, at most 2 K iterations; model: minimise the quadratic model, without evaluating the loss."""
    precondition: bool = True
    squares: Literal["examples", "batch"] = "examples"
    """The entries of ``D``: squared per-example gradients, or the squared batch gradient, which is free."""
    floor: float = 1e-4
    """Lower bound of eigenvalues in the space, relative to the largest."""

    def __post_init__(self) -> None:
        check_choice("squares", self.squares, ["examples", "batch"])
        super().__post_init__()

    def _triple(self) -> Triple:
        solver = Krylov(
            damping=self.damping,
            dimension=self.dimension,
            precondition=self.precondition,
            floor=self.floor,
            search=self.search,
        )
        wanted = {"squares": True} if self.precondition and self.squares == "examples" else {}
        return Triple(self.measured(**wanted), Implicit(), solver)


@register("ksd")
class KsdGradientMaker(Preconditioned[KsdGradientConfig]):
    """Krylov subspace descent as a gradient maker; see `KsdGradientConfig`."""

    Config = KsdGradientConfig
