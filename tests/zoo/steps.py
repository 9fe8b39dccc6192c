"""Methods of the gradient alone, by their published formulas, over a sequence of gradients of one parameter.

Adam: Kingma & Ba 2015, algorithm 1. Shampoo: Gupta, Koren & Singer 2018 with a running mean, a ridge relative to the largest
eigenvalue, and the length of the gradient. SOAP: Vyas et al. 2025, algorithm 3, with a first second moment that is the same
number everywhere, of which little stays; matrices have a basis, which is kept for ten steps, and vectors have none. Nothing
here comes from gradmaker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests import oracles


def adam(gradients: Sequence[Tensor]) -> list[Tensor]:
    """`m / (sqrt(v) + 1e-8)`, decays 0.9 and 0.999."""
    state: oracles.State = {}
    zero = torch.zeros_like(gradients[0])
    return [-oracles.adam_step(zero, g, state, lr=1.0) for g in gradients]


def shampoo(gradients: Sequence[Tensor]) -> list[Tensor]:
    """`G x_k H_k^(-1/2m)` with the length of `G`, decay 0.95, ridge 1e-6."""
    state: oracles.State = {}
    return [_grafted(g, state) for g in gradients]


def _grafted(g: Tensor, state: oracles.State) -> Tensor:
    one = g.reshape(g.shape or (1,))
    size = torch.linalg.norm(one)
    if not size:
        assert not state, "a gradient that vanishes at a later step has a statistic: not needed so far"
        return torch.zeros_like(g)
    found = oracles.shampoo_direction(one, state, decay=0.95, eps=1e-6)
    return (found * size / torch.linalg.norm(found)).reshape(g.shape)


def soap(gradients: Sequence[Tensor], bases: Sequence[Tensor]) -> list[Tensor]:
    """Adam in the eigenbasis of the first `G G^T` and `G^T G`, decays 0.95, damping 1e-8 before the bias correction of `v`.

    A gradient of low rank has many eigenbases: ``bases`` is the one that was taken, which must be one of them.
    """
    b, first = 0.95, gradients[0]
    _check(first, bases)
    v, m, mass, found = torch.zeros_like(first), torch.zeros_like(first), 0.0, []
    for t, g in enumerate(gradients, 1):
        squares, kept = _turn(g, bases).square(), b * (1e-4 if t == 2 and bases else 1)
        if t == 1 and bases:
            squares = squares.mean().expand_as(g)
        v, m, mass = kept * v + (1 - b) * squares, b * m + (1 - b) * g, kept * mass + (1 - b)
        turned = _turn(m / (1 - b**t), bases) * mass**0.5 / (v.sqrt() + 1e-8)
        found.append(_turn(turned, [Q.mT for Q in bases]))
    return found


def _turn(g: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """`Q_k^T` on every axis k."""
    for axis, Q in enumerate(bases):
        g = torch.tensordot(Q, g, dims=([0], [axis])).movedim(0, axis)
    return g


def _check(g: Tensor, bases: Sequence[Tensor]) -> None:
    """Each basis is orthogonal, and diagonalises its axis' statistic, the largest eigenvalue first."""
    assert len(bases) == (g.ndim if g.ndim > 1 else 0)
    for axis, Q in enumerate(bases):
        unfolding = g.movedim(axis, 0).flatten(1)
        H = Q.mT @ unfolding @ unfolding.mT @ Q
        size = max(float(torch.linalg.norm(H)), 1e-300)
        assert torch.allclose(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype), atol=1e-12)
        assert float(torch.linalg.norm(H - H.diagonal().diag())) <= 1e-12 * size
        assert bool((H.diagonal().diff() <= 1e-12 * size).all())
