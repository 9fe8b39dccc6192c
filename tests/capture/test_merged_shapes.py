"""Merging of axes at the borders of its rules: products that meet the limit, near ties, square matrices; by brute force."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from gradmaker.capture.shapes import GREEDY_LIMIT, ShapePolicy

SHAPES = [shape for order in (3, 4) for shape in itertools.product((1, 2, 3, 5, 9), repeat=order)]


def merged(policy: ShapePolicy, shape: tuple[int, ...], parts: int = 1) -> tuple[int, ...]:
    views = policy.views(shape, parts)
    assert len(views) == 1
    return views[0].merged


def test_balanced_groups_have_the_least_ratio() -> None:
    """Of all cuts between neighbours: (2, 2, 9) is 4 x 9, not 2 x 18."""
    for shape in SHAPES:
        sizes = [d for d in shape if d > 1]
        found = merged(ShapePolicy(merge="balanced"), shape)
        if len(sizes) < 3:
            assert found == (tuple(sizes) or (1,))
            continue
        cuts = [(prod(sizes[:c]), prod(sizes[c:])) for c in range(1, len(sizes))]
        least = min(max(a, b) / min(a, b) for a, b in cuts)
        assert found in cuts and max(found) / min(found) == pytest.approx(least, rel=1e-12), shape


@pytest.mark.parametrize("limit", [1, 4, 6, 12, 24, None])
def test_greedy_reaches_its_limit_and_no_further(limit: int | None) -> None:
    """Neighbours stay apart only where their product is over the limit; an axis over it stands alone."""
    most = limit or GREEDY_LIMIT
    for shape in SHAPES:
        sizes = tuple(d for d in shape if d > 1) or (1,)
        expected = [sizes[0]]
        for d in sizes[1:]:
            expected = [*expected[:-1], expected[-1] * d] if expected[-1] * d <= most else [*expected, d]
        views = ShapePolicy(merge="greedy", block_size=limit).views(shape)
        assert views[0].merged == tuple(expected)
        assert len(views) == prod(-(-d // limit) for d in expected) if limit else 1


def test_greedy_without_a_block_size_stops_at_1024() -> None:
    assert merged(ShapePolicy(merge="greedy"), (32, 32)) == (1024,)
    assert merged(ShapePolicy(merge="greedy"), (32, 32, 2)) == (1024, 2)
    assert merged(ShapePolicy(merge="greedy"), (25, 41)) == (25, 41)


@pytest.mark.parametrize(
    "rows, shape, turned",
    [
        ("short", (3, 5), False), ("short", (5, 3), True), ("short", (4, 4), False), ("short", (4,), False),
        ("left", (5, 3), False), ("right", (3, 5), True), ("right", (4, 4), True), ("short", (5, 3, 2), False),
    ],
)  # fmt: skip
def test_which_matrices_are_turned(rows: str, shape: tuple[int, ...], turned: bool) -> None:
    (view,) = ShapePolicy(rows=rows).views(shape)  # type: ignore[arg-type]
    assert view.transposed == turned and view.shape == (1, *(shape[::-1] if turned else shape))


def test_one_output_of_a_convolution() -> None:
    """Alone it stays a vector's worth of columns; as a part of a grouped one its weights are a vector."""
    policy = ShapePolicy(merge="to_2d")
    assert merged(policy, (1, 2, 3, 5)) == (2, 15)
    assert merged(policy, (4, 2, 3, 5), parts=4) == (30,)
    assert merged(policy, (4, 2, 3, 5), parts=2) == (2, 30)
    assert merged(policy, (1, 1, 3, 5)) == (3, 5)
    assert merged(policy, (2, 1, 3, 5), parts=2) == (15,)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_chunks_cover_a_tensor_once(size: int) -> None:
    """Also where the last is shorter, or all fit into one."""
    for shape in ((7, 4), (3,), (6, 2, 5)):
        seen = [0] * prod(shape)
        for view in ShapePolicy(block_size=size).views(shape):
            for index in itertools.product(*(range(s.start, s.stop) for s in view.chunk)):
                seen[sum(i * prod(shape[k + 1 :]) for k, i in enumerate(index))] += 1
            assert max(view.shape[1:]) <= size
        assert seen == [1] * prod(shape)
