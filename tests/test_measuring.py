"""Statistics are those of before until all of a pass has been measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import gradmaker as gm
from gradmaker.capture.sites import Site
from gradmaker.curvature import FisherEmp, FisherExact, FisherMC
from gradmaker.curvature.layer_evidence import layer_evidence
from tests.models import Case, mlp
from tests.test_state import equal_states


@contextmanager
def failing(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evidence of one layer cannot be made."""

    def broken(site: Site, *args: Any, **kwargs: Any) -> Any:
        if site.name == name:
            raise ValueError("no evidence")
        return layer_evidence(site, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("gradmaker.curvature.fisher.layer_evidence", broken)
        yield


@pytest.mark.parametrize("fisher", [FisherExact(chunk=1), FisherEmp(), FisherMC(samples=2)], ids=["exact", "emp", "mc"])
@pytest.mark.parametrize("attached", [False, True])
def test_an_exception_in_measuring_leaves_the_statistics(attached: bool, fisher: Any, monkeypatch: Any) -> None:
    """In the second layer, when the first has given its evidence; a retry gives what a first try would have given."""
    results = []
    for broken in (False, True):
        case = mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
        maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(fisher=fisher))
        if attached:
            maker.attach(optimizer, "categorical")

        def both(maker: Any = maker, case: Case = case) -> None:
            if attached:
                case.run().backward()
                return
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
            maker.forward_and_backward()

        for k in range(3):
            optimizer.zero_grad()
            if broken and k:
                before = maker.state_dict()["sites"]
                with failing("2", monkeypatch), pytest.raises(ValueError, match="no evidence"):
                    both()
                assert equal_states(maker.state_dict()["sites"], before)
                optimizer.zero_grad()
            both()
            optimizer.step()
        results.append(maker.state_dict())
    assert equal_states(*results)


@pytest.mark.parametrize("method", ["hessian_free", "newton", "unit_ng", "smw_ng"])
def test_a_micro_batch_that_fails_counts_for_nothing(method: str) -> None:
    """The second is tried again."""
    results = []
    for broken in (False, True):
        case = mlp()
        maker: Any = gm.from_config(case.model, {"method": method, "damping": 0.1})
        for j, (x, t) in enumerate(zip(case.x.chunk(2), case.t.chunk(2), strict=True)):
            if broken and j:
                maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), t)
                with broken_updates(maker), pytest.raises(RuntimeError, match="no update"):
                    maker.accumulate(0.5)
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), t)
            maker.accumulate(0.5)
        maker.precondition()
        results.append([p.grad for p in case.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextmanager
def broken_updates(maker: Any) -> Iterator[None]:
    """Evidence enters the statistics, and then there is an exception."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(block.triple.representation) for block in maker.plan.blocks}:
            patch.setattr(kind, "update", _after(kind.update))
        yield


def _after(update: Any) -> Any:
    def updated(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        raise RuntimeError("no update")

    return updated
