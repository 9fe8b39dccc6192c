"""Capabilities: protocols of what a solver may ask of a representation. A triple whose representation lacks one is refused."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from gradmaker.linalg.state import State

__all__ = [
    "Elementwise",
    "Factored",
    "Graphical",
    "Inverse",
    "LowRank",
    "Momentary",
    "Multiplies",
    "Preconditions",
    "RootFactored",
    "Rooted",
    "Rotated",
    "RowFactored",
    "Summed",
    "Unfolds",
]


@runtime_checkable
class Multiplies(Protocol):
    """Products ``C v``. Every representation has them, and every other capability includes them."""

    def matvec(self, state: State, v: Tensor) -> Tensor:
        """``C v``.  # (B, *shape)"""

    def to_dense(self, state: State) -> Tensor:
        """``C`` as a matrix: for definitions, and for solvers of small blocks.  # (B, P, P)"""


@runtime_checkable
class Unfolds(Multiplies, Protocol):
    """Gradients laid out with one axis for each matrix that is held."""

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient of a block in that layout.  # (B, *shape) -> (B, d_1, ..., d_m)"""


@runtime_checkable
class Elementwise(Multiplies, Protocol):
    """A diagonal ``C``."""

    def diagonal(self, state: State) -> Tensor:
        """The diagonal.  # (B, *shape)"""


@runtime_checkable
class Factored(Unfolds, Protocol):
    """``C = (F_1 (x) F_2 (x) ... (x) F_m)^(1 / order)`` with small PSD factors; a dense matrix is one factor."""

    def factors(self, state: State) -> list[Tensor]:
        """The factors, bias-corrected, in any form of `gradmaker.linalg.factors`.  # each (B, d, d), (B, d) or (B, d, b)"""

    def order(self, factors: int) -> float:
        """The ``order`` of the formula: 1 for a Kronecker product, ``m`` for Shampoo.  factors: ``m``"""


@runtime_checkable
class Rotated(Unfolds, Protocol):
    """``C = Q diag(s) Q^T`` with an orthogonal ``Q = Q_1 (x) Q_2 (x) ... (x) Q_m``."""

    def bases(self, state: State) -> list[Tensor | None]:
        """``Q_k``; None for an axis that keeps the unit basis.  # each (B, d_k, d_k), or tiled"""

    def spectrum(self, state: State) -> Tensor:
        """``s``, bias-corrected.  # (B, d_1, ..., d_m)"""


@runtime_checkable
class RowFactored(Unfolds, Protocol):
    """`Factored` of order one, where ``F = X^T X / m`` may be held as rows ``X``, if these are fewer than its columns."""

    def rows(self, state: State) -> list[tuple[Tensor, Tensor] | None]:
        """``X`` and ``m > 0``; None for a factor that is held itself.  # each (B, n, d), (B,)"""

    def factor(self, state: State, axis: int) -> Tensor:
        """``F``, formed.  # (B, d, d), or (B, d) when diagonal"""


@runtime_checkable
class RootFactored(Factored, Protocol):
    """`Factored` where the factors ``F_k = R_k^T R_k`` are held by their square roots ``R_k``."""

    def factor_roots(self, state: State) -> list[Tensor]:
        """``R_k``, bias-corrected.  # each (B, d, d), or (B, d) when diagonal"""


@runtime_checkable
class Rooted(Unfolds, Protocol):
    """``C^(-1/2) = X_1 (x) ... (x) X_m`` with roots ``X_k`` that the representation holds, since it measures through them."""

    def rooted(self, state: State) -> State:
        """``root_k`` and the diagnosis of their refresh, as in the cache of an inverse root.  # root_k: (B, d, d) or (B, d)"""


@runtime_checkable
class LowRank(Multiplies, Protocol):
    """``C = J^T J`` with few rows ``J`` (N, P), given by three products; the rows carry every scale of the loss."""

    def gram(self, state: State) -> Tensor:
        """``J J^T``.  # (B, N, N)"""

    def project(self, state: State, v: Tensor) -> Tensor:
        """``J v``.  # (B, *shape) -> (B, N)"""

    def combine(self, state: State, z: Tensor) -> Tensor:
        """``J^T z``.  # (B, N) -> (B, *shape)"""


@runtime_checkable
class Summed(Unfolds, Protocol):
    """``C^(-1/2) = ((1/m) sum_k F_k^(-1/(2 p)))^p`` with small PSD factors ``F_k``, each acting on its own axis."""

    def summands(self, state: State) -> list[Tensor]:
        """The factors, bias-corrected, in one scale.  # each (B, d, d), or (B, d) when diagonal"""

    @property
    def square_roots(self) -> bool:
        """Whether square roots ``R_k`` of the factors ``F_k = R_k^T R_k`` are held."""

    def summand_roots(self, state: State) -> list[Tensor]:
        """``R_k``, bias-corrected, where they are held.  # each (B, d, d), or (B, d) when diagonal"""

    def passes(self, factors: int) -> int:
        """The ``p`` of the formula.  factors: ``m``"""


@runtime_checkable
class Graphical(Multiplies, Protocol):
    """``C`` on the families of an acyclic graph: each entry of a block with its parents, at most ``q``."""

    def families(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances among parents, between parents and child, of the child.  # (B, P, q, q), (B, P, q), (B, P)"""

    def predict(self, coefficients: Tensor, v: Tensor) -> Tensor:
        """``S v``: every entry predicted from its parents.  # (B, P, q), (B, *shape) -> (B, *shape)"""

    def spread(self, coefficients: Tensor, v: Tensor) -> Tensor:
        """``S^T v``.  # (B, P, q), (B, *shape) -> (B, *shape)"""

    def regressions(self, state: State, ridge: float) -> tuple[Tensor, Tensor]:
        """``S`` and the residual variances of ``C + ridge I``, as a matrix and a vector.  # (B, P, P), (B, P)"""


@runtime_checkable
class Momentary(Unfolds, Protocol):
    """``C = (G G^T) (x) I`` with the newest gradient ``G`` alone, which is also the one that is preconditioned."""

    def newest(self, state: State) -> Tensor:
        """``G G^T`` of the newest gradient.  # (B, d, d)"""


@runtime_checkable
class Inverse(Unfolds, Protocol):
    """``C^-1 = (L_1 (x) ... (x) L_m)^(1 / order)`` with PSD matrices ``L_k``, one for each axis, that the state holds."""

    def spectra(self, state: State) -> list[tuple[Tensor, Tensor | None]]:
        """Eigenvalues and eigenvectors of ``L_k``; None for the unit basis.  # each (B, d), (B, d, d)"""

    def report(self, state: State, spectra: list[tuple[Tensor, Tensor | None]], damping: float) -> Tensor:
        """The residuals of `spectra`, as rows of `gradmaker.linalg.diagnosis.COLUMNS`.  # (B, m, 5)"""

    def order(self, factors: int) -> float:
        """The ``order`` of the formula.  factors: ``m``"""


@runtime_checkable
class Preconditions(Multiplies, Protocol):
    """An approximate inverse ``P`` of ``C`` that the state holds itself: it is fitted or updated directly."""

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
