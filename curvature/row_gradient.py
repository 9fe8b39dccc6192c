"""The mini-batch gradient of a matrix by its rows, as evidence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradmaker.curvature.evidence import Evidence
from gradmaker.linalg.factored_gradient import FactoredGradient

__all__ = ["RowGradient"]


@dataclass(frozen=True)
class RowGradient(Evidence):
    """`Gradient` of a block that is not formed, for a representation that folds rows: see `FoldsRows`."""

    factored: FactoredGradient

    def rows(self) -> Tensor:
        return self.factored.form().unsqueeze(0)
