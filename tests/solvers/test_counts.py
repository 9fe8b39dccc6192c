"""Failures of a refresh: in all, and in a row, which a success or an empty statistic ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.linalg import fallbacks
from gradmaker.linalg.fallbacks import count_failures, keep_previous
from gradmaker.representations import Eigenbasis, RotatedDims
from gradmaker.solvers import Rotate, RotatedDivision

T, F = True, False
LOST = [[T, F, T], [T, T, F], [F, T, T], [T, T, T]]  # by refresh, of three members
IN_ALL = [[1, 0, 1], [2, 1, 1], [2, 2, 2], [3, 3, 3]]
IN_A_ROW = [[1, 0, 1], [2, 1, 0], [0, 2, 1], [1, 3, 2]]


def test_a_success_ends_a_row() -> None:
    state = None
    for lost, in_all, in_a_row in zip(LOST, IN_ALL, IN_A_ROW, strict=True):
        state = count_failures(torch.tensor(lost), state)
        assert state["failures"].tolist() == in_all and state["failing"].tolist() == in_a_row


def test_an_empty_statistic_ends_a_row_and_counts() -> None:
    lost, empty = torch.tensor([T, T, F]), torch.tensor([T, F, F])
    state = count_failures(lost, count_failures(torch.tensor([T, T, T]), None), empty)
    assert state["failures"].tolist() == [2, 2, 1] and state["failing"].tolist() == [0, 2, 0]


def test_lost_members_keep_what_they_had() -> None:
    """The default where they had nothing; nothing of the others, which are as new."""
    new = {"root_0": torch.full((3, 2), 7.0)}
    cache = keep_previous(new, torch.tensor([T, F, T]), None, {"root_0": torch.tensor(1.0)})
    assert cache["root_0"][:, 0].tolist() == [1, 7, 1] and cache["failing"].tolist() == [1, 0, 1]
    again = keep_previous({"root_0": torch.full((3, 2), 9.0)}, torch.tensor([T, T, F]), cache, {"root_0": torch.tensor(1.0)})
    assert again["root_0"][:, 0].tolist() == [1, 7, 9] and again["failing"].tolist() == [2, 1, 0]


# --- without a copy ---------------------------------------------------------------------------------------------------------
def test_what_has_not_failed_is_held_as_it_is() -> None:
    new = {"root_0": torch.rand(3, 2), "root_1": torch.rand(3, 2)}
    cache = keep_previous(new, torch.tensor([F, F, F]), None, dict.fromkeys(new, torch.tensor(1.0)))
    assert all(cache[k] is x for k, x in new.items())
    turned = torch.rand(3, 4, 2).mT
    assert keep_previous({"root_0": turned}, torch.tensor([F, F, F]), None, {})["root_0"].is_contiguous()  # as a loaded one is
    other = {"root_0": cache["root_0"], "root_1": torch.rand(3, 2)}
    again = keep_previous(other, torch.tensor([F, T, F]), cache, {})
    assert again["root_0"] is cache["root_0"] and again["root_1"] is not other["root_1"]
    assert torch.equal(again["root_1"], torch.stack([other["root_1"][0], new["root_1"][1], other["root_1"][2]]))


def rotated(seed: int, names: tuple[str, str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bases = {
        name: torch.linalg.qr(torch.randn(3, d, d, generator=generator))[0].contiguous()
        for name, d in zip(names, (4, 5), strict=True)
    }
    return {"moments": torch.rand(3, 4, 5, generator=generator), "mass": torch.ones(3), **bases}


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize(
    ("representation", "solver", "names"),
    [
        (RotatedDims(), RotatedDivision(), ("basis_0", "basis_1")),
        (Eigenbasis(), Rotate(damping=0.1), ("basis_left", "basis_right")),
    ],
)
def test_a_lost_spectrum_keeps_the_basis_of_its_past(
    representation: Any, solver: Any, names: tuple[str, str], unread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are of one refresh, whether the host looks who has failed or, on an accelerator, does not."""
    if unread:
        monkeypatch.setattr(fallbacks, "none_of", lambda *_: False)
    old, new, g = rotated(0, names), rotated(1, names), torch.randn(3, 4, 5)
    past = solver.prepare(representation, old, None)
    new["moments"][1] = torch.nan
    given = {k: v.clone() for k, v in new.items()}
    cache = solver.prepare(representation, new, past)
    assert cache["failures"].tolist() == cache["failing"].tolist() == [0, 1, 0]
    found, fresh = (
        solver.solve(representation, cache, g),
        solver.solve(representation, solver.prepare(representation, new, None), g),
    )
    assert torch.equal(found[1], solver.solve(representation, past, g)[1])
    assert torch.equal(found[::2], fresh[::2])
    assert all(torch.equal(x, given[k]) or k == "moments" for k, x in new.items())
    for _ in range(2):  # the bases are those of the cache no longer, and lost where the spectrum is
        cache = solver.prepare(representation, new, cache)
        assert torch.equal(solver.solve(representation, cache, g), found)
    well = rotated(2, names)
    cache = solver.prepare(representation, well, cache)
    assert cache["failing"].tolist() == [0, 0, 0] and cache["failures"].tolist() == [0, 3, 0]
    assert unread or all(cache[f"basis_{k}"] is well[name] for k, name in enumerate(names))
    expected = solver.solve(representation, solver.prepare(representation, well, None), g)
    assert torch.equal(solver.solve(representation, cache, g), expected)
