"""States that torch's distributed checkpoints fill: with the names and shapes that were saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["checkpoint_targets"]


def checkpoint_targets(state: Mapping[str, Any], metadata: Any, key: str) -> dict[str, Any]:
    """A state with the names and shapes of a distributed checkpoint, which `torch.distributed.checkpoint.load` fills.

    ``load`` fills only the names that it is given, and those of some methods depend on what was measured: a fresh maker lacks
    them. ValueError if nothing was saved under the key.

    state: ``state_dict()`` of the maker that will be loaded; metadata: ``read_metadata()`` of the checkpoint's reader;
    key: under which the state was saved
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    paths: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    saved = {path[1:]: metadata.state_dict_metadata[name] for name, path in paths.items() if path[0] == key}
    if not saved:
        known = sorted({str(path[0]) for path in paths.values()})
        raise ValueError(f"checkpoint_targets: key={key!r}: nothing was saved under it; expected one of {known}")
    found = _containers(state)
    for path, entry in saved.items():
        own = _at(state, path)
        if isinstance(entry, TensorStorageMetadata) and not (isinstance(own, Tensor) and own.shape == entry.size):
            own = torch.empty(entry.size, dtype=entry.properties.dtype)
        _put(found, path, own)
    return found


def _containers(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The mappings of a state alone: empty ones are not saved."""
    return {k: _containers(v) for k, v in state.items() if isinstance(v, Mapping)}


def _at(state: Any, path: tuple[Any, ...]) -> Any:
    """What a state has at a path; None if it has nothing there."""
    for step in path:
        if not isinstance(state, Mapping) or step not in state:
            return None
        state = state[step]
    return state


def _put(state: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    *outer, last = path
    for step in outer:
        state = state.setdefault(step, {})
    state[last] = value
