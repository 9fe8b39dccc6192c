"""`torch.distributed.checkpoint` fills the keys that a fresh maker shows: all are there, or the load is refused by name."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gradmaker import METHODS, from_config
from tests import models
from tests.methods.test_methods import PRECONDITIONED, passes
from tests.models import Case
from tests.registry import suited
from tests.test_state import equal_states, flat, run_parts

LATE = "skfac smw_ng smw_gn tonga tonga_unit mfac ggt seng".split()
"""Methods whose tensors have names or shapes that depend on what was measured."""
SLOW = {"curvature_interval": 2, "preconditioner_interval": 4}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac beside adam": ("kfac", {"fallback": "adam", "ignore": ["0.bias"], "beta1": 0.9, **SLOW}),
    "kfac rescaled": ("kfac", {"rescale": "momentum", "adaptive_damping": {"AdaptiveDamping": {"interval": 2}}}),
    "shampoo grafted": ("shampoo", {"grafting": "adam", "preconditioner_interval": 5}),
    "soap": ("soap", {"preconditioner_interval": 5}),
    "caspr_adaptive": ("caspr_adaptive", {}),
    "one_sided in bfloat16": ("one_sided", {"apply_dtype": "bfloat16"}),
}


def through(state: dict[str, Any], fresh: Any, folder: Path) -> dict[str, Any]:
    """What a fresh maker's own state is filled with."""
    shown = {"maker": fresh.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save({"maker": state}, checkpoint_id=folder, no_dist=True)
        dcp.load(shown, checkpoint_id=folder, no_dist=True)
    return shown["maker"]


def step(maker: Any, case: Case) -> None:
    passes(maker, case)
    with torch.no_grad():
        for p in case.model.parameters():
            p.sub_(p.grad, alpha=1e-3)  # type: ignore[arg-type]


def trained(method: str, options: dict[str, Any], count: int) -> tuple[Any, Case, Any, Case]:
    """A maker after some steps, and a fresh one for a copy of its model."""
    case = suited(method, models.mlp, models.linear)
    maker: Any = from_config(case.model, {"method": method, **options})
    for _ in range(count):
        step(maker, case)
    other = case._replace(model=copy.deepcopy(case.model))
    return maker, case, from_config(other.model, {"method": method, **options}), other


def check_exact(maker: Any, case: Case, fresh: Any, other: Case, folder: Path) -> None:
    state = maker.state_dict()
    fresh.load_state_dict(through(state, fresh, folder))
    assert equal_states(fresh.state_dict(), state)
    for _ in range(2):
        step(maker, case)
        step(fresh, other)
        assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), other.model.parameters(), strict=True))
    assert equal_states(fresh.state_dict(), maker.state_dict())


@pytest.mark.parametrize("method", [m for m in PRECONDITIONED if m not in LATE])
def test_loading_into_a_fresh_maker_is_exact(method: str, tmp_path: Path) -> None:
    check_exact(*trained(method, {}, 3), tmp_path)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", NAMED)
def test_options_with_a_state_of_their_own_are_exact(name: str, count: int, tmp_path: Path) -> None:
    method, options = NAMED[name]
    check_exact(*trained(method, options, count), tmp_path)


@pytest.mark.parametrize("method", [m for m in PRECONDITIONED if m not in LATE])
def test_a_fresh_maker_shows_every_key(method: str) -> None:
    maker, _, fresh, _ = trained(method, {}, 3)
    shown, later = (
        {k: v.shape if isinstance(v, Tensor) else None for k, v in flat(m.state_dict()).items()} for m in (fresh, maker)
    )
    assert shown == later


@pytest.mark.parametrize("method", LATE)
def test_tensors_that_are_known_late_are_missed_by_name(method: str, tmp_path: Path) -> None:
    """A fresh maker is refused what it could not be given; it goes on as it was, and a state that is whole loads."""
    maker, _, fresh, _ = trained(method, {}, 2)
    before = fresh.state_dict()
    with pytest.raises(ValueError, match=r"sites/.* was saved and is not in this state.*torch\.save"):
        fresh.load_state_dict(through(maker.state_dict(), fresh, tmp_path / "one"))
    assert equal_states(fresh.state_dict(), before)
    fresh.load_state_dict(through(before, fresh, tmp_path / "two"))
    assert equal_states(fresh.state_dict(), before)
    fresh.load_state_dict(maker.state_dict())
    assert equal_states(fresh.state_dict(), maker.state_dict())


def test_gradients_of_a_step_under_way_are_missed_by_name(tmp_path: Path) -> None:
    maker, case, fresh, _ = trained("kfac", {}, 1)
    run_parts(maker, case, 1, (slice(0, 3),))
    with pytest.raises(ValueError, match=r"gradients/before/0.bias \(5,\).*Save between steps"):
        fresh.load_state_dict(through(maker.state_dict(), fresh, tmp_path))


def test_all_late_methods_are_named() -> None:
    makers = {m: from_config(suited(m, models.mlp, models.linear).model, {"method": m}) for m in PRECONDITIONED}
    assert [m for m, made in makers.items() if any(b.late for b in made.plan.blocks)] == [m for m in METHODS if m in LATE]  # type: ignore[attr-defined]
