"""Damping that follows the loss: where it shows, what is saved of it, where it is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.passes.replay import Replay
from gradmaker.solvers import AdaptiveDamping
from tests import models, oracles
from tests.models import CLASSES
from tests.trust_region.test_kfac_damping import EVERY_STEP, maker_of, move, network, passes

FAMILY = ["kfac", "kflr", "kfra", "ekfac", "skfac"]


# --- where it shows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", FAMILY)
def test_every_block_of_the_method_takes_it(method: str) -> None:
    """Norm layers included; blocks of the fallback keep the damping of their own."""
    chain = method == "kfra"  # where every parameter is in a layer
    case = network() if chain else models.build(WithScale, 8, 4)
    maker = maker_of(case, method, damping=0.5, **({} if chain else {"fallback": "adam"}))
    for _ in range(4):
        passes(maker, case)
        move(case, 0.1)
    dampings = {s.name: b.triple.solver.damping for b in maker.plan.blocks for s in b.sites}
    own = {k: v for k, v in dampings.items() if k != "scale"}
    assert set(own.values()) == {maker.damping} and maker.damping != 0.5
    assert dampings.get("scale") in (None, 1e-8)
    text = str(maker.summary())
    assert text.count(f"damping={maker.damping}") == len(own) and "damping=0.5" not in text
    passes(maker, case)
    assert maker.verify().passed


class WithScale(nn.Module):
    """A linear map, a norm, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.scale = nn.Linear(4, 5), nn.LayerNorm(5), nn.Parameter(torch.rand(5) + 0.5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.norm(self.first(x))) * self.scale)
        return y


def test_a_block_takes_it_when_it_is_refreshed() -> None:
    case, twin = network(), network()
    adapted = maker_of(case, "kflr", damping=0.5, preconditioner_interval=3)
    fixed: Any = METHODS["kflr"](
        twin.model, METHODS["kflr"].Config(damping=0.5, **{**EVERY_STEP, "preconditioner_interval": 3})
    )
    same = []
    for _ in range(4):
        for maker, c in ((adapted, case), (fixed, twin)):
            passes(maker, c)
        twin.model.load_state_dict(case.model.state_dict())
        same.append(oracles.relative_error(oracles.gradient_vector(case.model), oracles.gradient_vector(twin.model)) < 1e-12)
        move(case, 0.5)
        twin.model.load_state_dict(case.model.state_dict())
    assert same == [True, True, True, False] and adapted.damping < 0.5


def test_steps_that_are_not_judged_read_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(read: Any) -> Any:
        def wrapped(self: Tensor, *args: Any) -> Any:
            nonlocal count
            count += 1
            return read(self, *args)

        return wrapped

    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name)))
    counts: list[list[int]] = []
    for adaptive in (None, AdaptiveDamping(interval=3)):
        case = network()
        maker: Any = METHODS["kfac"](case.model, METHODS["kfac"].Config(adaptive_damping=adaptive, **EVERY_STEP))
        counts.append([])
        for _ in range(7):
            before = count
            passes(maker, case)
            counts[-1].append(count - before)
            move(case, 0.1)
    assert [b - a for a, b in zip(*counts, strict=True)] == [0, 0, 0, 1, 0, 0, 1]


# --- state ----------------------------------------------------------------------------------------------------------------
def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("rescale", ["none", "momentum"])
def test_resume_is_bitwise(at: int, rescale: str) -> None:
    """Also where a step waits to be judged; an evaluation in between changes nothing."""
    case, twin = (network(lambda: nn.Dropout(0.2)) for _ in range(2))
    options: dict[str, Any] = {"interval": 3, "damping": 0.05, "rescale": rescale}
    maker, second = (maker_of(c, **options) for c in (case, twin))
    lr = 1.0 if rescale == "momentum" else 0.5
    torch.manual_seed(1)
    for _ in range(at):
        passes(maker, case)
        move(case, lr)
    case.model.eval()
    state = reloaded(maker.state_dict())
    case.model.train()
    twin.model.load_state_dict(case.model.state_dict())
    second.load_state_dict(state)
    random = torch.get_rng_state()
    for m, c in ((maker, case), (second, twin)):
        torch.set_rng_state(random)
        for _ in range(6):
            passes(m, c)
            move(c, lr)
    assert maker.damping == second.damping != 0.05
    for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_pass_is_repeated_in_the_mode_that_it_had() -> None:
    case = network(lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6))
    for training in (True, False):
        case.model.train(training)
        case.model.get_submodule("0").train(not training)
        replay = Replay(case.model, lambda: (None, case.run()))
        expected = replay.run()[1]
        modes = [m.training for m in case.model.train(not training).modules()]
        assert torch.equal(replay.run()[1], expected) and [m.training for m in case.model.modules()] == modes


def test_a_state_before_the_weights_have_moved_leaves_that_step_out() -> None:
    case = network()
    maker = maker_of(case, damping=0.1)
    passes(maker, case)
    assert maker.state_dict()["damping"] == 0.1
    move(case, 0.1)
    assert maker.state_dict()["damping"] == 0.1 * 0.95 and maker.damping == 0.1


def test_other_states_are_refused() -> None:
    case = network()
    plain: Any = METHODS["kfac"](case.model)
    adapted = maker_of(case, damping=0.1)
    with pytest.raises(ValueError, match=r"missing \['damping'\].*without adaptive_damping"):
        adapted.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"unknown \['damping'\]"):
        plain.load_state_dict(adapted.state_dict())
    with pytest.raises(ValueError, match="expected what state_dict"):
        adapted.load_state_dict([])


# --- where it is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", FAMILY)
def test_attach_cannot_repeat_the_loss(method: str) -> None:
    case = network()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"attach: adaptive_damping .* repeat the loss, which attach\(\) does not see"):
        maker_of(case, method, damping=0.1).attach(optimizer, "categorical")


def test_passes_of_ones_own_cannot_be_judged() -> None:
    case = network()
    maker = maker_of(case, damping=0.1, interval=2, curvature_interval=10)
    for k in range(2):
        case.model.zero_grad()
        if k == 0:
            passes(maker, case)
        else:
            case.run().backward()
            with pytest.raises(RuntimeError, match="precondition: adaptive_damping or rescale needs this step"):
                maker.precondition()
    passes(maker, case)  # the step can be taken all the same


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adaptive_damping": AdaptiveDamping(), "damping": 0.0}, "damping=0.0: adaptive_damping multiplies it"),
        ({"adaptive_damping": True}, r"adaptive_damping=True: expected one name .* adaptive_damping: {AdaptiveDamping: "),
        ({"adaptive_damping": "LevenbergMarquardt"}, "adaptive_damping: 'LevenbergMarquardt' is unknown.*AdaptiveDamping"),
        ({"adaptive_damping": {"AdaptiveDamping": {"omga": 0.9}}}, "no option 'omga': expected .*; did you mean 'omega'"),
    ],
)
@pytest.mark.parametrize("method", FAMILY)
def test_illegal_options(method: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        METHODS[method].Config(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"interval": 0}, "interval=0"),
        ({"interval": 2.5}, "interval=2.5"),
        ({"omega": 1.0}, "omega=1.0"),
        ({"omega": 0.0}, "omega=0.0"),
        ({"low": 0.9}, "high"),
        ({"least": 2.0, "most": 1.0}, "most"),
        ({"penalised": 1}, "penalised=1"),
    ],
)
def test_illegal_rules(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AdaptiveDamping(**options)


def test_spellings_are_one_config(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "kfac.yaml"
    path.write_text("method: ekfac\nadaptive_damping: {AdaptiveDamping: {interval: 7}}\n")
    expected = METHODS["ekfac"].Config(adaptive_damping=AdaptiveDamping(interval=7))
    assert from_config(nn.Linear(2, 2), path).config == expected
    assert METHODS["ekfac"].Config(adaptive_damping="AdaptiveDamping") == METHODS["ekfac"].Config(
        adaptive_damping=AdaptiveDamping()
    )
