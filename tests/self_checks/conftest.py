"""A count of what the checks do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gradmaker.capture.tape import Tape
from gradmaker.self_checks import SelfChecks
from tests.self_checks.planted import Count


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    """Runs of the checks, of `Tape.vjp`, and calls of autograd."""
    found = Count()

    def counted(owner: Any, name: str, attribute: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(found, attribute, getattr(found, attribute) + 1)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(SelfChecks, "run", "checks")
    counted(Tape, "vjp", "vjps")
    counted(torch.autograd, "grad", "passes")
    counted(torch.autograd, "backward", "passes")
    yield found
