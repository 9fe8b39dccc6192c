"""The format number of saved states."""

from __future__ import annotations

from typing import Any

__all__ = ["FORMAT", "check_format"]

FORMAT = 3
"""Incremented with every change of keys or of their meaning. The first format had no number."""


def check_format(saved: Any, kind: str) -> None:
    """ValueError for what is not a state of this format.  kind: of maker"""
    if not isinstance(saved, dict) or "step" not in saved:
        raise ValueError(f"load_state_dict: expected what state_dict() of {kind} returned")
    if saved.get("format") != FORMAT:
        was = f"of format {saved['format']}" if "format" in saved else "saved by an earlier version, which gave no format"
        raise ValueError(
            f"load_state_dict: this state is {was}, and format {FORMAT} is read here: measure anew, or load it with the "
            "version that saved it"
        )
