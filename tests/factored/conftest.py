"""Gradients by rows need a torch that tells which hooks tensors are saved through; elsewhere all gradients are formed."""

from __future__ import annotations

import pytest

from gradmaker.capture.row_calls import SAVED


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SAVED is None:
        pytest.skip("this torch does not tell the hooks of saved tensors: gradients are formed, as elsewhere in the tests")
