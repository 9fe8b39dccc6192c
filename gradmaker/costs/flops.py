"""FLOPs of operators: those of `torch.utils.flop_counter`, and textbook formulas of decompositions, which it omits."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["DECOMPOSITIONS", "FLOPS", "OWN"]

aten = torch.ops.aten


def _cubic(factor: float) -> Callable[..., int]:
    """FLOPs of a decomposition of (..., d, d): ``factor d^3``."""

    def count(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return int(factor * prod(shape[:-1]) * shape[-1] ** 2)

    return count


def _qr(shape: torch.Size, mode: str = "reduced", *args: Any, **kwargs: Any) -> int:
    """FLOPs of the QR decomposition of (..., n, d): ``2 d^2 (n - d / 3)`` for ``R``, and as many for ``Q``."""
    *batch, n, d = shape
    return int((1 if mode == "r" else 2) * prod(batch) * 2 * min(n, d) ** 2 * (max(n, d) - min(n, d) / 3))


def _svd(shape: torch.Size, full: bool = False, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the singular value decomposition of (..., n, d), ``n >= d``: ``14 n d^2 + 8 d^3`` of the thin one.

    ``4 n^2 d + 8 n d^2 + 9 d^3`` with a full basis of the long side.
    """
    d, n = sorted(shape[-2:])
    one = 4 * n**2 * d + 8 * n * d**2 + 9 * d**3 if full else 14 * n * d**2 + 8 * d**3
    return prod(shape[:-2]) * one


def _triangular(shape: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """FLOPs of a triangular solve: ``d^2`` for each vector.  # (..., d, d), (..., d, m), from the right (..., m, d)"""
    return int(prod(torch.broadcast_shapes(shape[:-2], b[:-2])) * prod(b[-2:]) * shape[-1])


def _triangular_in_order(a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """The same, of an operator whose first argument is the right-hand side.  # (..., d, m), (..., d, d)"""
    return _triangular(b, a)


def _solve_with_factor(b: torch.Size, a: torch.Size, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the two triangular solves of a Cholesky or LU decomposition.  # (..., d, m), (..., d, d)"""
    return 2 * _triangular(a, b)


def _vector(a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """FLOPs of a product of a matrix and a vector, or of two vectors."""
    return 2 * prod(a)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(g: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return int(2.5 * sdpa_flop_count(query, key, value))


DECOMPOSITIONS: dict[Any, Callable[..., int]] = {
    aten._linalg_eigh: _cubic(9),
    aten._linalg_svd: _svd,
    aten.linalg_qr: _qr,
    aten.geqrf: _qr,
    aten.linalg_householder_product: _qr,
    aten.linalg_cholesky_ex: _cubic(1 / 3),
    aten.cholesky_inverse: _cubic(2 / 3),
    aten.linalg_inv_ex: _cubic(2),
    aten.linalg_lu_factor_ex: _cubic(2 / 3),
    aten._linalg_solve_ex: _cubic(2 / 3),
    aten.linalg_solve_triangular: _triangular,
    aten.triangular_solve: _triangular_in_order,
    aten.cholesky_solve: _solve_with_factor,
    aten.linalg_lu_solve: _solve_with_factor,
}
"""Formulas of Golub & Van Loan, Matrix Computations, sections 3.1, 3.2, 4.2, 5.2, 8.3 and 8.6."""

_SHAPED: dict[Any, Callable[..., int]] = {
    **DECOMPOSITIONS,
    aten.mv: _vector,
    aten.dot: _vector,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _of_shapes(count: Callable[..., int]) -> Callable[..., int]:
    """The same formula, of tensors."""

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return count(*[a.shape if isinstance(a, torch.Tensor) else a for a in args])

    counted._get_raw = True  # type: ignore[attr-defined]  # for FlopCounterMode: not to be called with shapes
    return counted


def _baddbmm(c: Any, a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """FLOPs of in-place matrix products.  # (..., n, d), (..., d, m)"""
    return 2 * a.numel() * b.shape[-1]


_baddbmm._get_raw = True  # type: ignore[attr-defined]


OWN: dict[Any, Callable[..., int]] = {
    **{operator: _of_shapes(count) for operator, count in _SHAPED.items()},
    aten.baddbmm_: _baddbmm,
    aten.addmm_: _baddbmm,
}
"""Of operators that `torch.utils.flop_counter` omits."""
FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, **OWN}
"""By operator; called with its arguments and its result as ``out_val``."""
