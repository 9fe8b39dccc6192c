"""Owners of refreshes: every piece once, balanced, and the same whoever asks."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest
from hypothesis import given, settings, strategies as st

from gradmaker.scale.assignment import FINE, Assignment, BlockWork, Matrix, Piece, assign

# costs that a float cannot tell apart are part of what must agree between ranks
COSTS = st.one_of(st.integers(0, 20), st.integers(2**60, 2**60 + 3))


@st.composite
def works(draw: st.DrawFn, most: int = 5) -> list[BlockWork]:
    found = []
    for k in range(draw(st.integers(0, most))):
        sides = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3))
        matrices = tuple(Matrix(f"factor_{j}", d, min(d, w)) for j, (d, w) in enumerate(sides))
        members = tuple(f"layer{k}[{j}]" for j in range(draw(st.integers(1, 4))))
        found.append(BlockWork(f"layer{k}", members, draw(COSTS), draw(st.integers(0, 99)), matrices, draw(st.booleans())))
    return found


def covered(work: BlockWork, pieces: list[Piece]) -> bool:
    """Whether pieces are all of a block, each part once."""
    runs = sorted({(p.start, p.stop) for p in pieces})
    if runs[0][0] != 0 or runs[-1][1] != len(work.members) or any(a[1] != b[0] for a, b in pairwise(runs)):
        return False
    return all(whole([p.path for p in pieces if (p.start, p.stop) == run], work, run) for run in runs)


def whole(paths: list[tuple[int, ...]], work: BlockWork, run: tuple[int, int]) -> bool:
    """Whether paths are all of the matrices of a run of members, which is one member if there are several."""
    if paths == [()]:
        return True
    tiles = {k: len(m.tiles) for k, m in enumerate(work.matrices)}
    legal = [{(k,)} for k in tiles], [{(k, j) for j in range(n)} for k, n in tiles.items()]
    cut = [{p for p in paths if p[0] == k} for k in tiles]
    return (
        run[1] - run[0] == 1 and len(paths) == len({*paths}) and all(c in parts for c, *parts in zip(cut, *legal, strict=True))
    )


@settings(max_examples=150, deadline=None)
@given(works(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_piece_has_one_owner_whatever_the_order(blocks: list[BlockWork], world: int, rng: random.Random) -> None:
    found = assign(blocks, world)
    for work in blocks:
        own = [p for p in found.owners if p.block == work.name]
        assert covered(work, own)
        assert not work.whole or own == [Piece(work.name, 0, len(work.members))]
    assert {*found.owners.values()} <= {*range(world)}
    assert sum(found.costs) == sum(w.total("cost") for w in blocks) and sum(found.bytes) == sum(
        w.total("bytes") for w in blocks
    )
    rng.shuffle(blocks)
    again = assign(iter(blocks), world)
    assert (again, list(again.owners)) == (found, list(found.owners))


@settings(max_examples=150, deadline=None)
@given(works(), st.integers(1, 9))
def test_no_rank_has_more_than_the_mean_and_the_largest_piece(blocks: list[BlockWork], world: int) -> None:
    found = assign(blocks, world)
    largest = found.largest.cost if found.largest else 0
    assert max(found.costs) * world <= sum(found.costs) + (world - 1) * largest
    assert found.balance >= found.least >= 1


def optimum(costs: list[int], world: int) -> int:
    """The least possible largest cost of a rank, by trying all assignments."""
    best = sum(costs)
    for owners in product(range(world), repeat=len(costs)):
        loads = [0] * world
        for cost, owner in zip(costs, owners, strict=True):
            loads[owner] += cost
        best = min(best, max(loads))
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_bound_of_the_longest_first(costs: list[int], world: int) -> None:
    """Graham 1969: at most 4/3 - 1/(3 W) of the optimum."""
    found = assign([BlockWork(f"{j}", (f"{j}",), c, 0, (), True) for j, c in enumerate(costs)], world)
    best = optimum(costs, world)
    assert 3 * world * max(found.costs) <= (4 * world - 1) * best
    assert found.bound <= best


def layer(name: str, rows: int, columns: int, width: int = 2**20) -> BlockWork:
    left, right = (Matrix(k, d, min(d, width)) for k, d in (("left", rows), ("right", columns)))
    return BlockWork(name, (name,), left.cubes + right.cubes, left.entries + right.entries, (left, right))


def test_wide_layers_are_cut_where_one_owner_a_layer_does_not_balance() -> None:
    """A GPT of six blocks: its wide sides weigh more than a rank's share, until they are held in diagonal blocks."""
    sizes = {"qkv": (1536, 513), "proj": (512, 513), "up": (2048, 513), "down": (512, 2049)}

    def blocks(width: int = 2**20) -> list[BlockWork]:
        return [layer(f"{k}{name}", *size, width) for k in range(6) for name, size in sizes.items()]

    few, many, tiled = assign(blocks(), 2), assign(blocks(), 64), assign(blocks(256), 64)
    assert few.balance < 1.01 and not few.why()
    whole = max(w.cost for w in blocks()) * 64 / sum(w.cost for w in blocks())  # one owner a layer
    assert many.balance == many.least < whole
    assert many.why() == "right of 0down, which cannot be cut, keeps 64 ranks at 4.3 times their mean"
    assert FINE >= 4 and tiled.balance < 1 + 1 / FINE and not tiled.why()
    assert any(len(p.path) == 2 for p in tiled.owners) and not any(len(p.path) == 2 for p in many.owners)


def test_what_balances_stays_together() -> None:
    found = assign([layer(f"{j}", 8, 8) for j in range(16)], 2)
    assert {*found.owners} == {Piece(f"{j}", 0, 1) for j in range(16)}
    assert found.costs == (16 * 512 // 2 * 2,) * 2


def test_what_costs_nothing_is_dealt_by_bytes() -> None:
    table = BlockWork("table", ("table",), 0, 100, (Matrix("left", 100, 1),))
    moments = BlockWork("norm", tuple(f"norm[{j}]" for j in range(4)), 0, 10)
    found = assign([layer("one", 2, 2), table, moments], 2)
    assert found.bytes == (4 + 100, 4 + 40) and found.costs == (8, 8)


@pytest.mark.parametrize(
    ("blocks", "world", "error"),
    [
        ([], 0, "world=0: expected an integer of at least 1"),
        ([layer("a", 2, 2), layer("b", 2, 2), layer("a", 3, 3)], 2, "blocks: 'a' is the name of two"),
    ],
)
def test_what_is_no_world_or_no_name_is_refused(blocks: list[BlockWork], world: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        assign(blocks, world)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cost=-1: expected an integer of at least 0"):
        BlockWork("a", ("a",), -1, 0)
    with pytest.raises(ValueError, match="expected at least one"):
        BlockWork("a", (), 1, 0)


def test_nothing_to_assign() -> None:
    found: Assignment = assign([], 3)
    assert found.costs == (0, 0, 0) and found.balance == 1 and not found.owners and not found.why()
