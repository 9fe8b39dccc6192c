"""Second moments of rows, folded into symmetric matrices in place."""

from __future__ import annotations

from torch import Tensor

from gradmaker.linalg.writes import Writer, at_once

__all__ = ["add_moment_"]

STRIPES = 4
"""torch has no ``syrk``: four stripes of rows, up to the diagonal, take 5/8 of the product, and a copy gives the rest."""
SIDE, ENTRIES = 256, 1 << 16
"""The least side, and entries of the rows, from which that is faster: 1.14 ms for 1.53 at a side of 785 and 128 rows, 7.1 for
10.2 at 512 and 2048 rows, and no gain at 256 and 128 rows (float32, one CPU core)."""


def add_moment_(out: Tensor, weighed: Tensor, rows: Tensor, beta: float, alpha: float, write: Writer = at_once) -> None:
    """``out <- beta out + alpha weighed^T rows``, where that is symmetric.  # (B, d, d), (B, R, d), (B, R, d)"""
    R, d = rows.shape[1:]
    if out.device.type != "cpu" or d < SIDE or R * d < ENTRIES:
        write(out.baddbmm_, weighed.mT, rows, beta=beta, alpha=alpha)
        return
    width = -(-d // STRIPES)
    turned = weighed.mT
    for start in range(0, d, width):
        end = min(start + width, d)
        stripe = out.narrow(1, start, end - start)
        left, right = turned.narrow(1, start, end - start), rows.narrow(2, 0, end)
        write(stripe.narrow(2, 0, end).baddbmm_, left, right, beta=beta, alpha=alpha)
        if start:
            write(out.narrow(2, start, end - start).narrow(1, 0, start).copy_, stripe.narrow(2, 0, start).mT)
