"""Inner products of the members of stacks, and of whole tensors in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["double_dot", "member_dots"]


def member_dots(a: Tensor, b: Tensor) -> Tensor:
    """``<a_B, b_B>`` of every member, in a shape that broadcasts.  # (B, *shape) -> (B, 1, ...)"""
    return (a * b).reshape(a.shape[0], -1).sum(1).view(-1, *[1] * (a.ndim - 1))


def double_dot(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>`` in double precision: squares of small gradients would underflow.  # ()"""
    return torch.dot(a.double().reshape(-1), b.double().reshape(-1))
