"""What methods on the axes of a tensor share: how tensors are merged and cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from gradmaker.config import GradientConfig, check_choice, check_count
from gradmaker.shapes import Merge, ShapePolicy
from gradmaker.solvers import DenmanBeavers, Eigh, HigherOrder, NewtonRoot, NewtonSchulz, Solver, SvdRoot

__all__ = ["AxesGradientConfig", "Root", "rooting"]

Root: TypeAlias = Literal["eigh", "newton", "higher_order", "newton_schulz", "denman_beavers", "svd"]
"""How factors are rooted. ``svd`` needs statistics that are held by their square roots."""


@dataclass(frozen=True, kw_only=True)
class AxesGradientConfig(GradientConfig):
    """Every parameter tensor, or block of it, by itself, with a factor for each of its axes."""

    merge: Merge = "none"
    """Axes that become one: none, to_2d (all but the first), greedy (as many as fit into ``block_size``)."""
    block_size: int | None = None
    """Longest side of a block; every block has factors, roots and a grafted length of its own. None does not cut."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merge", self.merge, list(get_args(Merge)))
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)

    @property
    def shapes(self) -> ShapePolicy:  # type: ignore[override]
        """The blocks of a tensor."""
        return ShapePolicy(self.merge, self.block_size)


ROOTS: dict[str, type[Solver]] = {
    "newton": NewtonRoot,
    "higher_order": HigherOrder,
    "newton_schulz": NewtonSchulz,
    "denman_beavers": DenmanBeavers,
    "svd": SvdRoot,
}


def rooting(root: Root, damping: float, power: float = -0.5) -> Solver:
    """The solver for ``(F_k + damping lambda_max(F_k) I)^power`` of every factor."""
    if root == "eigh":
        return Eigh(power=power, damping=damping, split="each", relative=True)
    return ROOTS[root](power=power, damping=damping)  # type: ignore[call-arg]
