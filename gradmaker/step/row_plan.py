"""Which gradients of a plan are held by rows in a step."""

from __future__ import annotations

from collections.abc import Collection

from gradmaker import by_rows
from gradmaker.blocks import Block
from gradmaker.capture.row_calls import RowLayer

__all__ = ["row_layers"]

OF_CALLS = frozenset({"calls", "main_backward", "examples"})
"""Needs of curvatures that read neither ``.grad`` nor the graph of its computation."""


def row_layers(blocks: Collection[Block], due: Collection[str]) -> list[RowLayer]:
    """The layers whose gradients are to be held by rows, where the calls of a pass prove that they can be.

    due: methods that measure in this step; none are held where such a measurement differentiates the pass itself
    """
    if any(not b.triple.curvature.needs <= OF_CALLS for b in blocks if b.options.method in due):
        return []
    return [b.row_layer for b in blocks if b.row_layer is not None and _takes_rows(b, b.options.method in due)]


def _takes_rows(block: Block, measured: bool) -> bool:
    of_gradient = measured and not block.triple.curvature.of_passes
    if of_gradient and not by_rows.folds(block.triple):
        return False
    return of_gradient or by_rows.applies(block.triple, block.options)
