"""What tests share that run over all of `METHODS`: models that a method takes, and options without random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from gradmaker import METHODS
from gradmaker.config import GradientConfig
from gradmaker.curvature import FisherExact
from tests.models import Case


def suited(method: str, *factories: Callable[[], Case]) -> Case:
    """The first of these cases whose model the method takes; a skipped test, with the method's sentence, if there is none."""
    reasons = []
    for make in factories:
        case = make()
        reasons.append(METHODS[method].refuse(case.model))
        if reasons[-1] is None:
            return case
    pytest.skip(f"{method}: {reasons[-1]}")


def taken(method: str, cases: Mapping[str, Callable[[], Case]]) -> Iterator[tuple[str, Case]]:
    """The cases whose models the method takes, by name: one at least."""
    found = [
        (name, case) for name, case in ((n, make()) for n, make in cases.items()) if not METHODS[method].refuse(case.model)
    ]
    assert found, f"{method} takes no model of the zoo"
    yield from found


def legal_options(method: str, **wanted: Any) -> dict[str, Any]:
    """Those of the wanted options that the method has and that say something to it."""
    config: Any = METHODS[method].Config()
    inapplicable = config.inapplicable_options() if isinstance(config, GradientConfig) else {}
    return {k: v for k, v in wanted.items() if hasattr(config, k) and (k not in inapplicable or v == getattr(config, k))}


def without_draws(method: str) -> dict[str, Any]:
    """The exact Fisher, where the method lets one choose."""
    try:
        METHODS[method].Config(fisher=FisherExact())
    except (TypeError, ValueError):
        return {}
    return {"fisher": FisherExact()}


def from_the_first(method: str) -> dict[str, Any]:
    """Without a first step that is left out, after which the second is made of signs in a basis: those of noise among them."""
    return legal_options(method, skip_first=False)


def without_search(method: str) -> dict[str, Any]:
    """The step of the model in the plain Krylov space, where a method would search the loss itself: that magnifies rounding."""
    return legal_options(method, search="model", precondition=False)
