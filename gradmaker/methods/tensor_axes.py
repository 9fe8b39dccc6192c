"""Options of methods with a factor for each axis of a tensor: merged axes, blocks, roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch

from gradmaker.capture.shapes import Merge, ShapePolicy, Split, as_split
from gradmaker.config import COVERS_ALL, DTYPES, GradientConfig, as_dtype
from gradmaker.curvature import BatchGradient
from gradmaker.linalg.damping import Mode
from gradmaker.options.checks import check_choice, check_count
from gradmaker.precision import Precision
from gradmaker.solvers.matrix_root import MatrixRoot
from gradmaker.solvers.rooting import Root, Rooter, rooting

__all__ = ["Averaging", "AxesGradientConfig", "HeldRootsGradientConfig", "RootedGradientConfig"]


Averaging: TypeAlias = Literal["corrected", "plain", "raw"]


APPLIED = {"bfloat16": torch.bfloat16, **DTYPES}


@dataclass(frozen=True, kw_only=True)
class AxesGradientConfig(GradientConfig):
    """Options of methods with a factor for each axis of every parameter tensor, or of every block of it."""

    inapplicable = BatchGradient.inapplicable | COVERS_ALL

    merge: Merge = "none"
    """Which axes are merged: none, squeeze (drops those of size one), to_2d (all but the first), balanced (to the most square
    matrix), greedy (as many as fit into ``block_size``)."""
    block_size: int | None = None
    """Longest side of a block; every block has its own factors, roots and grafted length. None: tensors are not cut."""
    split: Split = ()
    """Number of equal parts of the first axis of a tensor, each a block of its own: ``{"*.qkv": 3}``, with rules as in
    ``ignore``; ``"layers"``: the gates, projections and groups of torch's layers."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "split", as_split(self.split))
        check_choice("merge", self.merge, list(get_args(Merge)))
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)

    @property
    def shapes(self) -> ShapePolicy:  # type: ignore[override]
        """The rule that merges axes and cuts tensors into blocks."""
        return ShapePolicy(self.merge, self.block_size, split=self.split)


@dataclass(frozen=True, kw_only=True)
class HeldRootsGradientConfig(AxesGradientConfig):
    """Options of methods that hold a root for each axis between refreshes: the precisions of the roots."""

    root_dtype: str | torch.dtype | None = None
    """Precision in which roots are computed: float32 or float64 (no rounding of float32 statistics); None: the statistic's."""
    apply_dtype: str | torch.dtype | None = None
    """Precision in which roots are held and applied: bfloat16, float32 or float64; None: the statistic's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.precision()

    def precision(self) -> Precision:
        taken = as_dtype("root_dtype", self.root_dtype, DTYPES)
        return Precision(taken, as_dtype("apply_dtype", self.apply_dtype, APPLIED))


@dataclass(frozen=True, kw_only=True)
class RootedGradientConfig(HeldRootsGradientConfig):
    """Options of methods by inverse roots of the statistics of each axis: Shampoo, one-sided Shampoo, CASPR."""

    damping: float = 1e-6
    root: Root = "eigh"
    """The algorithm for inverse roots, see docs/roots.md. ``svd`` holds statistics by their square roots, for float32."""
    mode: Mode = "largest"
    """The unit of ``damping``, see docs/conventions.md; iterations have only absolute, largest and trace."""
    averaging: Averaging = "corrected"  # type: ignore[misc]
    """With ``decay`` d: corrected, ``S <- d S + (1 - d) E`` over ``1 - d^t``; plain, undivided; raw, ``S <- d S + E``.
    Only the scale of ``S`` differs, which relative damping and grafting cancel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("averaging", self.averaging, list(get_args(Averaging)))
        self.rooter()

    def inapplicable_options(self) -> dict[str, str]:
        """Also ``averaging``, where the statistic is a sum."""
        summed = {"averaging": "the statistic is a sum; set decay"} if self.decay is None else {}
        return super().inapplicable_options() | summed

    def rooter(self) -> Rooter:
        """The solver for the roots of factors. ValueError for a mode that ``root`` does not have."""
        interval = None if self.apply_dtype else self.steps_of_refresh  # what is rounded is the root itself
        return rooting(self.root, self.damping, mode=self.mode, interval=interval)

    def check_root(self, order: float) -> None:
        """ValueError where the iteration ``root`` cannot compute the inverse root of a Kronecker product of this order."""
        solver = self.rooter()
        if isinstance(solver, MatrixRoot):
            solver.root_and_power(order)
