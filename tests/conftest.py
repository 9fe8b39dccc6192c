"""What every test starts from: one thread, a fixed seed, torch's own defaults."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator

import pytest
import torch

from gradmaker.options.registry import temporary_registrations

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # pytest-xdist already uses the cores


OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
"""Operators that torchvision names when it is imported, and lacks where it was built for another torch."""


def import_torchvision() -> None:
    """Import torchvision, if it is there: transformers and others import it, and backpack requires it.

    Its C library does not load beside another build of torch, and then its Python part asks for operators by name: they are
    declared, and never called.
    """
    while importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            OPERATORS.define(f"{missing[1]}(Tensor _) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


import_torchvision()


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
def accelerate_anew() -> Iterator[None]:
    """What accelerate keeps for a process, as its precision, is forgotten before and after a test."""
    forget_accelerate()
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    """Nothing is imported: a process without accelerate has nothing to forget."""
    state = sys.modules.get("accelerate.state")
    for name in ("AcceleratorState", "GradientState", "PartialState") if state is not None else ():
        getattr(state, name)._reset_state()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take seconds: for a test that is about something else."""
    from gradmaker.compare import page
    from gradmaker.reporting import files

    monkeypatch.setattr(files, "write_figures", lambda document, folder: {})
    monkeypatch.setattr(page, "write_picture", lambda document, names, path: path.touch())


@pytest.fixture
def registrations() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with temporary_registrations():
        yield
