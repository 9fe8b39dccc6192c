"""The state of a part: tensors by name, every one with the stack axis ``B`` first."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

__all__ = ["State"]

State: TypeAlias = dict[str, Tensor]
"""Tensors only."""
