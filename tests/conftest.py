"""What every test starts from: one thread, a fixed seed, torch's own defaults."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from gradmaker.options.registry import temporary_registrations

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # pytest-xdist already uses the cores


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 for everything a test creates."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def registrations() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with temporary_registrations():
        yield
