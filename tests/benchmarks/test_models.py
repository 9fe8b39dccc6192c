"""Models of transformers: which share K-FAC treats at the true size, and `verify()` and steps of narrow ones.

Those of timm are in the page alone, as timm is no requirement of the tests.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gradmaker import KfacGradientMaker
from gradmaker.reports.coverage import coverage
from tests.docs.test_docs import script

ROOT = Path(__file__).resolve().parents[2]
PAGE = json.loads((ROOT / "benchmarks" / "models.json").read_text(encoding="utf-8"))
NAMES = ("GPT-2", "BERT, classifier", "BERT, masked tokens", "Llama", "T5", "ViT", "Whisper")


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield script(ROOT / "benchmarks" / "models.py")
    sys.path[:] = before


@pytest.fixture(scope="module")
def subjects(module: ModuleType) -> dict[str, Any]:
    return dict(module.subjects())


@pytest.mark.parametrize("name", NAMES)
def test_share_of_the_own_triple(module: ModuleType, subjects: dict[str, Any], name: str) -> None:
    """At the true size, as the page has it."""
    found = module.shares(module.planned(subjects[name]))
    assert module.own(found) >= 0.99 > module.REQUIRED
    assert sum(found.values()) == pytest.approx(1)
    assert found == pytest.approx(PAGE["models"][name]["shares"], abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_verify_passes(module: ModuleType, subjects: dict[str, Any], name: str) -> None:
    found = module.verified(subjects[name])
    assert found["passed"] and found["complete"]
    assert found["gradients"] < 1e-5 and found["solve"] < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reaches_every_layer(module: ModuleType, subjects: dict[str, Any], name: str) -> None:
    """The narrow model has the parts of the true one, each with a measured gradient; the self-checks give up no layer."""
    model, batch = module.build(subjects[name])
    maker = KfacGradientMaker(model)
    planned = coverage(maker.plan)
    parts = [(s.method, s.parts) for s in planned.shares]
    assert set(parts) == {(s.method, s.parts) for s in module.planned(subjects[name]).shares}
    module.declare(maker, model, batch)
    _, loss = maker.forward_and_backward()
    assert math.isfinite(float(loss))
    assert coverage(maker.plan) == planned
    assert all(site.name in block.ready for block in maker.plan.blocks for site in block.sites)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_page_has_every_model(module: ModuleType) -> None:
    """Also those of timm; a page with another table is that of another run."""
    page = (ROOT / "benchmarks" / "models.md").read_text(encoding="utf-8")
    assert set(PAGE["models"]) == {*NAMES, "ConvNeXt", "ResNet"}
    assert module.render(PAGE["models"], PAGE["machine"]) == page
    assert all(found["verify"]["passed"] and found["verify"]["complete"] for found in PAGE["models"].values())
