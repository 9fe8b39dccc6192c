"""Several processes, each with its own part of the batch: their group, and the meetings at which they agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "Ranks", "RefusedError", "ranks", "refuse_ranks"]

NUMBERS = 24
"""Numbers that a rank brings to a meeting: one size for all meetings, so that a rank that failed meets the others anywhere."""


class RefusedError(RuntimeError):
    """What all ranks have found together: each raises it by itself."""


def ranks() -> int:
    """The number of processes of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_ranks(what: str) -> None:
    """RuntimeError if there are several processes.  what: why they would diverge"""
    if (n := ranks()) > 1:
        raise RefusedError(
            f"torch.distributed runs {n} processes, and {what}, so that the ranks would diverge: use one process, or "
            "a method whose curvature adds up over examples (kfac, ekfac, unit_ng) or is that of the reduced gradient (adam, "
            "shampoo, soap, muon)"
        )


class Ranks:
    """The processes of a group, as one of them sees them. All collectives of a maker are on a group of its own."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    # ---------------------------------------------------------------- agreement
    def meet(self, numbers: Sequence[float] = ()) -> list[list[float]]:
        """The numbers of all ranks, by rank. RefusedError on every rank where one of them has failed since the last meeting."""
        table = self._table(0.0, numbers)
        self._refuse_failed(table, "")
        return [row[1 : 1 + len(numbers)] for row in table]

    def fail(self, reason: str) -> None:
        """Let the other ranks know at their next meeting that this one has failed."""
        try:
            self._refuse_failed(self._table(1.0, ()), reason)
        except RuntimeError:
            return  # the caller raises its own error, also where the others are gone

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context between two meetings: where an exception leaves it on one rank, all others raise at the next meeting."""
        try:
            yield
        except RefusedError:
            raise
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise

    def _table(self, failed: float, numbers: Sequence[float]) -> list[list[float]]:
        if len(numbers) >= NUMBERS:
            raise ValueError(f"a meeting has room for {NUMBERS - 1} numbers, got {len(numbers)}")
        table = torch.zeros(self.size, NUMBERS, dtype=torch.float64)
        table[self.rank, : 1 + len(numbers)] = torch.tensor([failed, *numbers], dtype=torch.float64)
        table = table.to(self.device)
        dist.all_reduce(table, group=self.group)
        found: list[list[float]] = table.tolist()
        return found

    def _refuse_failed(self, table: list[list[float]], reason: str) -> None:
        failed = [r for r, row in enumerate(table) if row[0]]
        if failed:
            told = self.objects(reason)
            named = "; ".join(f"rank {r}: {told[r]}" for r in failed)
            raise RefusedError(f"step not made, as a rank of {self.size} has failed: {named}")

    def objects(self, own: Any) -> list[Any]:
        """What each rank gives, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found

    # ---------------------------------------------------------------- tensors
    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor], to: int | None = None) -> None:
        """Replace tensors by their sums over the ranks, in one collective for each dtype.

        to: the rank that needs them, while those of the others are of no use then; None: all
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            real = torch.view_as_real(t) if t.is_complex() else t
            by_dtype.setdefault(real.dtype, []).append(real)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            if to is None:
                dist.all_reduce(flat, group=self.group)
            else:
                dist.reduce(flat, self.members[to], group=self.group)
            pieces = flat.split([t.numel() for t in group])
            torch._foreach_copy_(group, [piece.view(t.shape) for t, piece in zip(group, pieces, strict=True)])

    @property
    def members(self) -> list[int]:
        """The ranks in the default group, by rank."""
        return dist.get_process_group_ranks(self.group if self.group is not None else dist.GroupMember.WORLD)

    def exchange(self, send: Mapping[int, Tensor], sizes: Mapping[int, int], dtype: torch.dtype) -> dict[int, Tensor]:
        """Flat tensors from other ranks, by rank.  send: for each rank; sizes: of what each rank sends to this one"""
        empty = torch.empty(0, dtype=dtype, device=self.device)
        given = [send.get(r, empty) for r in range(self.size)]
        splits = [sizes.get(r, 0) for r in range(self.size)]
        found = torch.empty(sum(splits), dtype=dtype, device=self.device)
        dist.all_to_all_single(found, torch.cat(given), splits, [t.numel() for t in given], group=self.group)
        return dict(enumerate(found.split(splits)))

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The flat tensors of all ranks, by rank.  sizes: of these; collectives are of the largest"""
        largest = max(sizes)
        padded = own.new_zeros(largest)
        padded[: own.numel()] = own
        found = [torch.empty_like(padded) for _ in sizes]
        if largest:
            dist.all_gather(found, padded, group=self.group)
        return [t[:n] for t, n in zip(found, sizes, strict=True)]

    def present(self, own: Sequence[bool]) -> list[list[int]]:
        """For each of several things the ranks that have it."""
        table = torch.zeros(self.size, len(own), dtype=torch.int32, device=self.device)
        table[self.rank] = torch.tensor(own, dtype=torch.int32)
        if len(own):
            dist.all_reduce(table, group=self.group)
        return [[r for r, has in enumerate(column) if has] for column in table.T.tolist()]


class Processes:
    """Finds the group of a maker at its first step: a new one over all processes, or one that was given."""

    def __init__(self) -> None:
        self.given: Any = None
        self._world: Any = None  # the default group that the maker's own was made in
        self._ranks: Ranks | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a group of its own."""
        return {"given": None, "_world": None, "_ranks": None}

    def __deepcopy__(self, memo: Any) -> Processes:
        return Processes()

    def give(self, group: Any) -> None:
        """Use a group that was made elsewhere, on which nothing else may run at the same time."""
        self.given, self._ranks = group, None

    def ranks(self, device: torch.device) -> Ranks | None:
        """The ranks of the group; None for a single process. To be called first on all ranks of the default group together."""
        if ranks() == 1:
            return None
        world = dist.GroupMember.WORLD
        if self._ranks is None or self._world is not world:
            self._world = world
            self._ranks = Ranks(self.given if self.given is not None else _new_group(device), device)
        return self._ranks if self._ranks.size > 1 else None


def _new_group(device: torch.device) -> Any:
    """A group of all processes, with the time limit of the default one, which torch does not hand on."""
    world: Any = dist.GroupMember.WORLD
    try:
        limit = world._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # a backend without options
        return dist.new_group()
    return dist.new_group(timeout=limit)
