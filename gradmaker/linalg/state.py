"""The type of a part's state: tensors by name, each with the stack axis ``B`` first."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

__all__ = ["State"]

State: TypeAlias = dict[str, Tensor]
"""State of a representation (a statistic) or of a solver (a cache): tensors only."""
