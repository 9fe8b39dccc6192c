"""What methods on the axes of a tensor share: how tensors are merged and cut into blocks."""

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
    """Every parameter tensor, or block of it, by itself, with a factor for each of its axes."""

    inapplicable = BatchGradient.inapplicable | COVERS_ALL

    merge: Merge = "none"
    """Axes that become one: none, squeeze (those of size one go), to_2d (all but the first), balanced (to a matrix as square as
    can be), greedy (as many as fit into ``block_size``)."""
    block_size: int | None = None
    """Longest side of a block; every block has factors, roots and a grafted length of its own. None does not cut."""
    split: Split = ()
    """Into how many equal parts the first axis of a tensor falls, each a block of its own: ``{"*.qkv": 3}``, by rules as those
    of ``ignore``; ``"layers"`` knows gates, projections and groups of torch's layers."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "split", as_split(self.split))
        check_choice("merge", self.merge, list(get_args(Merge)))
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)

    @property
    def shapes(self) -> ShapePolicy:  # type: ignore[override]
        """The blocks of a tensor."""
        return ShapePolicy(self.merge, self.block_size, split=self.split)


@dataclass(frozen=True, kw_only=True)
class HeldRootsGradientConfig(AxesGradientConfig):
    """Roots that a refresh takes of every axis' statistic and that are held until the next: at precisions of their own."""

    root_dtype: str | torch.dtype | None = None
    """At which roots are taken: float32 or float64, which loses no digit of a float32 statistic; None: the statistic's."""
    apply_dtype: str | torch.dtype | None = None
    """At which roots are held and multiplied with gradients: bfloat16, float32 or float64; None: the statistic's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.precision()

    def precision(self) -> Precision:
        taken = as_dtype("root_dtype", self.root_dtype, DTYPES)
        return Precision(taken, as_dtype("apply_dtype", self.apply_dtype, APPLIED))


@dataclass(frozen=True, kw_only=True)
class RootedGradientConfig(HeldRootsGradientConfig):
    """Inverse roots of running statistics of the gradient's axes: Shampoo, one-sided Shampoo, CASPR."""

    damping: float = 1e-6
    root: Root = "eigh"
    """How factors are rooted, see docs/roots.md. ``svd`` holds statistics by their square roots, for float32."""
    mode: Mode = "largest"
    """What ``damping`` is measured in, see docs/conventions.md: iterations have absolute, largest, trace alone."""
    averaging: Averaging = "corrected"  # type: ignore[misc]
    """Of a ``decay`` d: ``S <- d S + (1 - d) E`` over ``1 - d^t``, plain without that, or raw, ``S <- d S + E``. Only the scale
    of ``S`` differs, which relative damping and a grafted length take away."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("averaging", self.averaging, list(get_args(Averaging)))
        self.rooter()

    def inapplicable_options(self) -> dict[str, str]:
        """A sum has no average."""
        summed = {"averaging": "the statistic is a sum; set decay"} if self.decay is None else {}
        return super().inapplicable_options() | summed

    def rooter(self) -> Rooter:
        """What roots the factors. ValueError for a mode that the root does not have."""
        return rooting(self.root, self.damping, mode=self.mode)

    def check_root(self, order: float) -> None:
        """ValueError where the iteration has no such root: not every order has every one."""
        solver = self.rooter()
        if isinstance(solver, MatrixRoot):
            solver.root_and_power(order)
