"""Module hooks that do nothing in a copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["ModuleHook"]


class ModuleHook:
    """A hook that calls a function; a copied or pickled one does nothing and holds no reference."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple[type[ModuleHook], tuple[()]]:
        return ModuleHook, ()
