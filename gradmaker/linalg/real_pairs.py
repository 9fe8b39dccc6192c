"""Complex tensors as real pairs ``(Re, Im)`` in a last axis of two: curvatures and solvers use real numbers.

Torch's gradient of a real loss, ``dL/dRe + i dL/dIm``, is the gradient in the pairs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["as_real", "real_as", "real_dtype", "real_shape", "write_real"]


def as_real(value: Tensor) -> Tensor:
    """A complex tensor as its real pairs; a real one unchanged."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def real_shape(value: Tensor) -> tuple[int, ...]:
    """The shape of `as_real`."""
    return (*value.shape, 2) if value.is_complex() else tuple(value.shape)


def real_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which curvature is held: that of the pairs, at least float32."""
    return _at_least_single(value.dtype)


@cache
def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype.to_real(), torch.float32)


def real_as(target: Tensor, value: Tensor) -> Tensor:
    """Real values, or real pairs, in the shape and dtype of ``target``.  value: in any shape with as many elements"""
    if target.is_complex():
        value = torch.view_as_complex(value.reshape(*target.shape, 2).to(target.dtype.to_real()).contiguous())
    return value.reshape(target.shape).to(target.dtype)


def write_real(target: Tensor, value: Tensor) -> None:
    """Write real values, or real pairs, into the storage of ``target``.  value: in any shape with as many elements"""
    target.copy_(real_as(target, value))
