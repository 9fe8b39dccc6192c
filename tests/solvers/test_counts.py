"""Failures of a refresh: in all, and in a row, which a success or an empty statistic ends."""

from __future__ import annotations

import torch

from gradmaker.linalg.fallbacks import count_failures, keep_previous

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
