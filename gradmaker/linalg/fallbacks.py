"""Fallbacks of a failed factorisation: retries, then the previous cache of the block.

The order: the solver's own method; the same with the ridge times 10, 100, ...; the same in float64; `eigh` in float64; the
block's previous cache. ``cache["failures"]`` counts all failures, ``cache["failing"]`` the consecutive ones. Only members that
failed are tried again, and the others keep their bits. One host read in a `prepare`: which members failed. A method with a
certificate (`gradmaker.linalg.certificates`) judges its first attempt by that, and what it refuses by the full residual.

All attempts use copies in the dtype of the statistic (float32 as a rule). No global flag is set: the caller of a step on a GPU
decides about TF32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from gradmaker.linalg.eigen import largest_eigenvalue, symmetrise
from gradmaker.linalg.factors import diagonal_of, for_members, is_tiled, join, join_vector, split
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.state import State

__all__ = [
    "Factorisation",
    "Parts",
    "count_failures",
    "factorise",
    "is_empty",
    "keep_previous",
    "none_of",
    "scalars",
    "try_all",
]

Parts: TypeAlias = tuple[Tensor, ...]
"""The tensors of a factorised stack of factors, each (B, ...), as eigenvalues and eigenvectors."""

Attempt: TypeAlias = Callable[[Tensor, Tensor], tuple[Parts, Tensor]]


class Factorisation(ABC):
    """Factorisation of a stack of factors by a solver. Each method also returns the members it accepts, by a residual."""

    larger_ridges: ClassVar[int]
    """Number of retries that multiply the ridge by ten."""

    @property
    def summaries(self) -> int:
        """Number of parts, the last ones, that describe a whole matrix and not its coordinates."""
        return 0

    symmetric: ClassVar[bool] = True
    """Whether factors are symmetric up to rounding, and are symmetrised."""

    one_triangle: ClassVar[bool] = False
    """Whether `matrix` reads one triangle, so that the first attempt needs no symmetric copy; a retry in float64 does."""

    certified: ClassVar[bool] = False
    """Whether the first attempt is judged by a certificate; what that refuses, `matrix` judges before any retry."""

    def attempt(self, F: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        """The first attempt, at factors that need not be finite.  # (B, d, d) or (B, d), (B,) -> parts, (B,)"""
        A, safe, finite = _sanitise(F, ridge, self.symmetric and not self.one_triangle)
        parts, ok = (self.diagonal if A.ndim == 2 else self.matrix)(A, safe)
        return parts, ok & finite

    @abstractmethod
    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        """The solver's own method.  # (B, d, d), (B,) -> parts, (B,)"""

    @abstractmethod
    def diagonal(self, a: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        """The same for diagonal factors.  # (B, d), (B,) -> parts, (B,)"""

    @abstractmethod
    def last_resort(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        """The last fallback, by `eigh`.  # (B, d, d), (B,) -> parts, (B,)"""


def scalars(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors, with 1 x 1 matrices in diagonal form.  # (B, 1, 1) -> (B, 1)"""
    return [F.reshape(-1, 1) if F.shape[1:] == (1, 1) else F for F in factors]


def try_all(method: Factorisation, factors: Sequence[Tensor], ridges: Sequence[Tensor]) -> tuple[list[Parts], Tensor]:
    """Factorise every stack of factors, with all fallbacks: the parts, and the members that failed.  # m of parts, (B,)"""
    results, failed, _ = factorise(method, factors, ridges)
    return results, failed


def factorise(
    method: Factorisation | Sequence[Factorisation], factors: Sequence[Tensor], ridges: Sequence[Tensor]
) -> tuple[list[Parts], Tensor, Tensor]:
    """`try_all`, and the number of retries of every factor, 0 without a fallback.  # m of parts, (B,), (m, B)

    method: for all factors, or one for each
    """
    methods = [method] * len(factors) if isinstance(method, Factorisation) else list(method)
    if any(is_tiled(F) for F in factors):
        return _factorise_tiled(methods, factors, ridges)
    results: list[Parts] = []
    accepted: list[Tensor] = []
    for own, F, ridge in zip(methods, factors, ridges, strict=True):
        parts, ok = own.attempt(F, ridge)
        results.append(parts)
        accepted.append(ok)
    table = torch.stack(accepted)  # (m, B)
    retries = torch.zeros_like(table, dtype=torch.int64)
    for k, row in enumerate(table.tolist()):
        refused = [b for b, ok in enumerate(row) if not ok]
        if refused and factors[k].ndim == 3:
            rows = torch.tensor(refused, device=table.device)
            table[k, rows], retries[k, rows] = _retry(methods[k], factors[k][rows], ridges[k][rows], results[k], rows)
    return results, ~table.all(0), retries


def _factorise_tiled(
    methods: Sequence[Factorisation], factors: Sequence[Tensor], ridges: Sequence[Tensor]
) -> tuple[list[Parts], Tensor, Tensor]:
    """`factorise` of tiled factors, each block on its own; a member fails if one of its blocks does."""
    results, failed, retries = [], [], []
    for method, F, ridge in zip(methods, factors, ridges, strict=True):
        pieces = split(F) if is_tiled(F) else [F]
        B = len(F)
        tried = [factorise(method, [x], [ridge.repeat_interleave(len(x) // B)]) for x in pieces]
        failed.append(torch.stack([each.view(B, -1).any(1) for _, each, _ in tried]).any(0))
        retries.append(torch.stack([each[0].view(B, -1).amax(1) for *_, each in tried]).amax(0))
        parts = [found[0] for found, *_ in tried]
        results.append(_joined(method, parts, F) if is_tiled(F) else parts[0])
    return results, torch.stack(failed).any(0), torch.stack(retries)


def _joined(method: Factorisation, parts: list[Parts], F: Tensor) -> Parts:
    """The parts of a factor, joined from those of its blocks."""
    B, d = F.shape[:2]
    joined = []
    columns = list(zip(*parts, strict=True))
    for k, pieces in enumerate(columns):
        if k >= len(columns) - method.summaries:
            joined.append(torch.stack([x.view(B, -1, x.shape[-1]).amax(1) for x in pieces]).amax(0))
        else:
            joined.append(join(pieces, d) if pieces[0].ndim == 3 else join_vector(pieces, B))
    return tuple(joined)


def _sanitise(F: Tensor, ridge: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric copy with the identity for members that are not finite, as `eigh` raises there.  # F, ridge, finite (B,)"""
    finite = finite_members(F) & torch.isfinite(ridge)
    A = symmetrise(F) if symmetric and F.ndim == 3 else F
    if none_of(~finite):
        return A, ridge, finite
    unit = F.new_ones(()) if F.ndim == 2 else torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
    return torch.where(for_members(finite, F), A, unit), torch.where(finite, ridge, 1.0), finite


def _retry(method: Factorisation, F: Tensor, ridges: Tensor, parts: Parts, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Try the fallbacks on failed members and write successes into ``parts``; returns who succeeded, and the number of tries.

    # (b,), (b,)
    """
    A, ridge, finite = _sanitise(F, ridges, method.symmetric)
    done = torch.zeros_like(ridge, dtype=torch.bool)
    count = torch.zeros_like(ridge, dtype=torch.int64)
    for number, (attempt, A_tried, ridge_tried) in enumerate(_fallbacks(method, A, ridge)):
        if A.device.type == "cpu" and bool(done.all()):  # on the CPU a host read is cheaper than an attempt
            break
        candidates, ok = attempt(A_tried, ridge_tried)
        for part, candidate in zip(parts, candidates, strict=True):
            new = candidate.to(part.dtype)
            ok = ok & torch.isfinite(new).flatten(1).all(1)  # a float64 root may overflow in the statistic's dtype
        ok = ok & ~done
        count = count + ~done * int(number > 0 or not method.certified)
        for part, candidate in zip(parts, candidates, strict=True):
            mask = ok.view(-1, *[1] * (part.ndim - 1))
            part[rows] = torch.where(mask, candidate.to(part.dtype), part[rows])
        done = done | ok
    return done & finite, count


def _fallbacks(method: Factorisation, A: Tensor, ridge: Tensor) -> Iterator[tuple[Attempt, Tensor, Tensor]]:
    largest = largest_eigenvalue(A).abs().nan_to_num(0)
    # A ridge beyond a tenth of the largest eigenvalue would hide an indefinite matrix instead of repairing a rounded one.
    limit = torch.maximum(ridge, 0.1 * largest)
    start = torch.maximum(ridge, torch.finfo(A.dtype).eps * largest)
    if method.certified:
        yield method.matrix, A, ridge
    for k in range(1, method.larger_ridges + 1):
        yield method.matrix, A, torch.minimum(start * 10**k, limit)
    if A.dtype != torch.float64:
        yield method.matrix, A.double(), ridge.double()
    yield method.last_resort, A.double(), ridge.double()


def keep_previous(
    new: State, failed: Tensor, previous: State | None, default: State, empty: Tensor | None = None, read: bool = False
) -> State:
    """The new cache: failed members keep their previous entries (``default``, broadcast, without any) and are counted.

    Without a failure it refers to the new tensors, which are read-only. ``failures`` counts all failures, ``failing`` the
    consecutive ones, for `gradmaker.failures`.

    empty: members without a root because their statistic is zero, as for a layer without gradients; they do not count as
    consecutive failures  # (B,)
    read: whether an accelerator is waited for to know that none has failed, which saves a copy; a CPU always is
    """
    before = default if previous is None else previous
    cache = {name: x.contiguous() for name, x in new.items()}  # as a loaded one is: a product rounds by the layout
    if not none_of(failed, read):
        changed = {name: x for name, x in cache.items() if x is not before[name]}
        cache |= {name: torch.where(failed.view(-1, *[1] * (x.ndim - 1)), before[name], x) for name, x in changed.items()}
    return cache | count_failures(failed, previous, empty)


def none_of(failed: Tensor, read: bool = False) -> bool:
    """Whether no member has failed; taken for false where that is not read.  # (B,)

    read: whether an accelerator is waited for; a CPU always is
    """
    here = failed.device.type == "cpu" or (read and failed.device.type != "meta")
    return here and bool((~failed).all())


def count_failures(failed: Tensor, previous: State | None, empty: Tensor | None = None) -> State:
    """The failure counters after a refresh in which these members failed; see `keep_previous`.  # each (B,)"""
    once = failed.to(torch.int64)
    harmed = once if empty is None else (failed & ~empty).to(torch.int64)
    if previous is None:
        return {"failures": once, "failing": harmed.clone()}  # two tensors, as caches are updated in place
    return {"failures": previous["failures"] + once, "failing": (previous["failing"] + 1) * harmed}


def is_empty(factors: Sequence[Tensor]) -> Tensor:
    """Members that have a zero factor.  # any form -> (B,)"""
    found = torch.stack([(diagonal_of(F) == 0).all(1) for F in factors])  # no other factor is zero
    if none_of(found.any(0)):
        return found.any(0)
    return torch.stack([(F == 0).flatten(1).all(1) for F in factors]).any(0)
