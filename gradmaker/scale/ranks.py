"""Several processes, each with its own part of the batch."""

from __future__ import annotations

import torch.distributed

__all__ = ["ranks", "refuse_ranks"]


def ranks() -> int:
    """The number of processes of the default process group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def refuse_ranks(what: str) -> None:
    """RuntimeError if there are several processes.  what: why they would diverge"""
    if (n := ranks()) > 1:
        raise RuntimeError(
            f"torch.distributed runs {n} processes, and {what}, so that the ranks would diverge: use one process, or "
            "a method that measures nothing but the reduced gradient (adam, shampoo, soap, muon)"
        )
