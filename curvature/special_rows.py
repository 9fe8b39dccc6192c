"""Rows of a block whose output gradients are all alike, and sums over rows of lookups."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot

__all__ = ["input_rows", "one_hot_squares"]


def one_hot_squares(inputs: OneHot, g: Tensor, transposed: bool) -> Tensor:
    """``sum_N J * J`` for one-hot inputs: gradients of positions with the same token are summed before the square.

    # (n, r), (k, n, r, o) -> (1, o, i), or (1, i, o) when transposed
    """
    index = inputs.index
    same = (index.unsqueeze(2) == index.unsqueeze(1)).to(g.dtype)  # (n, r, r)
    contribution = (g * torch.einsum("nrs,knso->knro", same, g)).sum(0)
    out = g.new_zeros(inputs.size, g.shape[-1])
    out.index_add_(0, index.reshape(-1), contribution.flatten(0, 1))
    return out.unsqueeze(0) if transposed else out.mT.unsqueeze(0)


def input_rows(a: Tensor, weights: Tensor | None, bias: bool, outputs: int, transposed: bool) -> Tensor:
    """The rows of ``I (x) mean_nr a a^T``.  # (G, n, r, i), (n, r) -> (o n r, G, *shape)"""
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias and a.shape[-1] else a
    a = a if a.shape[-1] else a.new_ones(*a.shape[:-1], 1)
    w = a.new_ones(a.shape[1:3]) if weights is None else weights
    a = a * (w / w.sum().clamp(min=1)).sqrt().unsqueeze(-1)
    eye = torch.eye(outputs, dtype=a.dtype, device=a.device)
    J = torch.einsum("op,gnri->pnrgoi", eye, a).flatten(0, 2)
    return J.mT if transposed else J
