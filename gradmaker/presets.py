"""Presets: named options of a method, for models on which its published defaults are too slow or too large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from gradmaker.options.suggestions import did_you_mean

__all__ = ["Presets", "expanded", "spelled"]

Presets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Options by the name of their preset."""


def expanded(make: Any, given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The options with those of their ``preset``, if one is named; options that are given override it.

    make: the class of a config. ValueError for an unknown preset, with all that the method has.
    """
    own = dict(given)
    if "preset" not in own or not hasattr(make, "presets"):
        return own
    name, known = own.pop("preset"), make.presets
    if not known:
        raise ValueError(f"{what} has no presets: leave preset={name!r} out")
    if name not in known:
        raise ValueError(f"{what}: preset={name!r}: {did_you_mean(name, known)}")
    return {**known[name], **own}


def spelled(options: Mapping[str, Any]) -> str:
    """Options as they are written in a call."""
    return ", ".join(f"{k}={v!r}" for k, v in options.items())
