"""Which gradients of a plan are held by rows in a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import inf

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
    return [layer for b in blocks for layer in _held(b, b.options.method in due)]


def _held(block: Block, measured: bool) -> list[RowLayer]:
    if measured and by_rows.owns(
        block.triple, block.options
    ):  # the rows are evidence, and `form` is all that is done with them
        return [replace(layer, most=inf) for layer in block.row_layers]
    of_gradient = measured and not block.triple.curvature.of_passes
    if of_gradient and not by_rows.folds(block.triple):
        return []
    takes = of_gradient or (not block.full and by_rows.applies(block.triple, block.options))
    return block.row_layers if takes else []
