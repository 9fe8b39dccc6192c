"""Several processes, of which each sees its own part of the batch."""

from __future__ import annotations

import torch.distributed

__all__ = ["ranks", "refuse_ranks"]


def ranks() -> int:
    """Processes of the default process group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def refuse_ranks(what: str) -> None:
    """RuntimeError where there are several.  what: why they would come apart"""
    if (n := ranks()) > 1:
        raise RuntimeError(
            f"torch.distributed runs {n} processes, and {what}, so that the ranks would go different ways: use one process, or "
            "a method that measures nothing but the reduced gradient (adam, shampoo, soap, muon)"
        )
