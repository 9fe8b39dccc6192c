"""`maker.verify()`: silent where all is well, on three networks; loud where a rule or a solver is off by a little."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, KfacGradientMaker
from gradmaker.capture.batch_norms import FrozenNorms
from gradmaker.capture.rules.attention import ProjectionRule
from gradmaker.capture.rules.convolutions import ConvRule
from gradmaker.capture.rules.layers import LinearRule
from gradmaker.reports.verification import Verification
from gradmaker.solvers import Cholesky
from tests import models
from tests.docs.test_docs import ROOT, script

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for attention
NAMES = ["ResNet-18", "ViT-tiny", "GPT"]


@pytest.fixture(scope="module")
def example() -> Any:
    return script(ROOT / "examples" / "verify_models.py")


@pytest.mark.parametrize("method", ["kfac", "unit_ng", "layer_ng"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_above_tolerance(example: Any, name: str, method: str) -> None:
    """One line a block, captured gradients checked everywhere, solves wherever the dense matrix fits."""
    widths = {"ResNet-18": 1 if method == "layer_ng" else 2}
    subject = example.subjects(widths.get(name, 4))[name]()
    found = example.check(subject, method)
    sites = [site.name for block in METHODS[method](subject.model).plan.blocks for site in block.sites]  # type: ignore[attr-defined]
    assert [check.site for check in found.checks] == sites
    assert found.passed, str(found)
    assert all(check.gradients is not None for check in found.checks)
    assert sum(check.solve is not None for check in found.checks) > 0.8 * len(sites)
    text = str(found)
    assert all(any(line.startswith(f"{site} ") and line.endswith(" ok") for line in text.splitlines()) for site in sites)
    assert ("held fixed" in text) == (name == "ResNet-18")


def check(model: nn.Module, x: Tensor, t: Tensor, method: str = "kfac") -> Verification:
    maker = METHODS[method](model)
    y = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, y, t)
    return maker.verify()  # type: ignore[attr-defined, no-any-return]


def test_batch_norm_in_training_would_be_a_false_alarm(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are coupled by it: without its statistics held fixed every layer before it would be reported."""
    subject = example.subjects(2)["ResNet-18"]()
    assert len(example.check(subject, "kfac").frozen) == 20
    monkeypatch.setattr(FrozenNorms, "held", lambda self: nullcontext())
    found = example.check(subject, "kfac")
    named = {c.site for c in found.checks if c.failure is not None or (c.gradients is not None and c.gradients > 1e-3)}
    assert len(named) > 20 or len(found.notes) > 20
    monkeypatch.undo()
    subject.model.eval()
    evaluated = example.check(subject, "kfac")
    assert evaluated.passed and not evaluated.frozen


@pytest.mark.parametrize("name", NAMES)
def test_verify_leaves_no_trace(example: Any, name: str) -> None:
    subject = example.subjects(4)[name]()
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    flags = [m.training for m in subject.model.modules()]
    state = torch.get_rng_state()
    example.check(subject, "kfac")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in subject.model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


PLANTED = {"ResNet-18": ConvRule, "ViT-tiny": ProjectionRule, "GPT": LinearRule}


@pytest.mark.parametrize("side", ["inputs", "gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_is_off_is_found(example: Any, name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples in another order on one side only: a sum over the batch would have the right shape."""
    rule = PLANTED[name]
    original = getattr(rule, side)
    axis = 1 if side == "inputs" else 2
    monkeypatch.setattr(rule, side, lambda self, *args: original(self, *args).roll(1, axis))
    found = example.check(example.subjects(4)[name](), "kfac")
    bad = {c.site for c in found.checks if not c.passed}
    assert bad and not found.passed
    assert all(c.failure is not None or c.verdict == "ABOVE TOLERANCE" for c in found.checks if not c.passed)
    assert any("norm" in c.site and c.passed for c in found.checks)  # and nothing else is blamed


def test_a_solve_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.mlp()
    assert check(case.model, case.x, case.t).passed
    original = Cholesky.solve
    monkeypatch.setattr(Cholesky, "solve", lambda self, *args: original(self, *args) * (1 + 1e-6))
    found = check(case.model, case.x, case.t)
    assert all(c.solve is not None and 1e-8 < c.solve < 1e-5 for c in found.checks)
    assert not found.passed


def test_a_batch_must_be_declared() -> None:
    with pytest.raises(RuntimeError, match="declare a batch first"):
        KfacGradientMaker(models.mlp().model).verify()


def test_a_block_that_is_too_large_is_checked_by_products() -> None:
    case = models.build(lambda: nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, models.CLASSES)), 6, 4)
    first, second = check(case.model, case.x, case.t).checks
    assert (first.how, second.how) == ("probes", "dense")
    for found in (first, second):
        assert found.passed and found.complete and found.verdict == "ok"
        assert found.gradients is not None and found.gradients < 1e-12
        assert found.solve is not None and found.approximation is not None and 0.01 < found.approximation < 2


def test_the_example_runs(example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("examples/verify_models.py").name
    monkeypatch.setattr(sys, "argv", [path, "--width", "2", "--methods", "diag_ng"])
    example.main()
    text = capsys.readouterr().out
    assert text.count("all blocks ok") == 3 and "ABOVE" not in text
