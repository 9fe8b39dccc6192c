"""Solver for inverse square roots of Kronecker sums: the mean of the factors' roots, applied ``p`` times."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, inf
from typing import get_args

import torch
from torch import Tensor

from gradmaker.linalg.damping import Mode
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import dense
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.powers import along_axes, axis_power
from gradmaker.linalg.roots import held_roots
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.capabilities import Summed
from gradmaker.representations.kronecker_sum import axis_mean, dense_mean
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.roles import AppliesRows
from gradmaker.solvers.rooting import Root, Rooter, rooting

__all__ = ["AxisMean"]


@dataclass(frozen=True, kw_only=True)
class AxisMean(Defined[Summed], AppliesRows[Summed]):
    """``P G`` by ``p`` iterations of ``G <- (1/m) sum_k G x_k X_k`` with ``X_k = (F_k + damping lambda_max(F_k) I)^(-1/2p)``.

    ``root`` is the algorithm, ``svd`` for factors that are held by their square roots; ``mode`` is the unit of the damping, see
    `gradmaker.linalg.damping`. A block whose refreshes have all failed keeps its gradient; with absolute damping it gets
    ``damping^(-1/2) g``.

    Reference: Duvvuri et al., ICLR 2024, algorithm 1 (``p = 2``); the factors 1/2, which its code leaves to grafting, are kept.
    """

    damping: float = 1e-6
    root: Root = "eigh"
    mode: Mode = "largest"

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf, closed=True)
        check_choice("root", self.root, get_args(Root))
        self._rooter()

    @property
    def exponent(self) -> float:
        return -0.5

    @property
    def accuracy(self) -> float:
        return self._rooter().accuracy

    def _rooter(self) -> Rooter:
        return rooting(self.root, self.damping, mode=self.mode)

    def refuse(self, representation: Summed) -> str | None:
        if self.root == "svd" and not representation.square_roots:
            return "AxisMean with root='svd' takes factors that are held by their square roots: give KronSum square_roots=True"
        return self._rooter().refuse_order(representation.passes(1))

    def prepare(self, representation: Summed, state: State, previous: State | None) -> State:
        held = representation.summand_roots(state) if self.root == "svd" else representation.summands(state)
        return self._rooter().prepare_factors(held, representation.passes(len(held)), previous)

    def operator(self, representation: Summed, state: State) -> Tensor:
        roots, p = self._roots(representation, state)
        out: Tensor = torch.linalg.matrix_power(dense_mean([dense(X) for X in roots]), p)
        return out

    def equation(self, representation: Summed, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        roots, p = self._roots(representation, state)
        out = representation.unfold(g)
        for _ in range(p):
            terms = [along_axes([*[None] * k, X], out) for k, X in enumerate(roots)]
            out = torch.stack(terms).mean(0)
        return x, out.reshape(g.shape)

    def _roots(self, representation: Summed, state: State) -> tuple[list[Tensor], int]:
        """``X_k`` from the definition, and ``p``."""
        factors = representation.summands(state)
        p = representation.passes(len(factors))
        return [axis_power(F, self.damping, -1 / (2 * p), self.mode) for F in factors], p

    def solve(self, representation: Summed, cache: State, g: Tensor) -> Tensor:
        roots = held_roots(cache)
        out = representation.unfold(g)
        for _ in range(representation.passes(len(roots))):
            out = axis_mean(roots, out)
        return out.reshape(g.shape)

    def solve_rows(self, representation: Summed, cache: State, rows: FactoredGradient) -> FactoredGradient:
        """``2^-p sum_k C(p, k) X_1^(p - k) G X_2^k``: ``p + 1`` times the rows."""
        left, right = held_roots(cache)
        g, a, p = [rows.g], [rows.a], representation.passes(2)
        for _ in range(p):
            g.append(apply_factors([None, left], g[-1]))
            a.append(apply_factors([None, right], a[-1]))
        weighed = [x * (comb(p, k) / 2**p) for k, x in enumerate(a)]
        return FactoredGradient(torch.cat(g[::-1], 1), torch.cat(weighed, 1))
