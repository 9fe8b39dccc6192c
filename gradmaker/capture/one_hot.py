"""One-hot inputs of embedding layers, stored as indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OneHot"]


@dataclass(frozen=True)
class OneHot:
    """One-hot inputs stored as indices: an embedding never forms a ``V``-wide tensor."""

    index: Tensor  # (n, r), integer
    size: int  # V
    padding: int | None = None  # index whose one-hot row is zero

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The one-hot rows as a dense tensor.  # (1, n, r, V)"""
        rows = torch.nn.functional.one_hot(self.index, self.size).to(dtype).unsqueeze(0)
        if self.padding is not None:
            rows[..., self.padding] = 0
        return rows
