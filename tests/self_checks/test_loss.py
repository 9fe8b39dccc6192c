"""The recognised terms are all of the loss, in gradient and curvature, or it is measured otherwise or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import FisherMC
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from tests.models import Case
from tests.self_checks.planted import BLOCKS, Planted, build, is_an_error, is_right, is_right_in_silence, labels, maker_of, step

N = 6
PART = "give another gradient than the whole loss"
CURVED = "the curvature of the loss at the outputs is not that of its recognised terms"
Loss = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def net(loss: Loss, t: Tensor | None = None) -> Case:
    return build(Net, N, 3, loss=loss, t=labels(N) if t is None else t)


def floats(seed: int = 3) -> Tensor:
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- losses of which a part is out of sight -------------------------------------------------------------------------------
def with_part(part: Callable[[Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t) + part(z)


def hidden(scale: float, z: Tensor) -> Tensor:
    """Something that is no recognised loss."""
    return scale * (z.exp() - z).mean()


def entropy(z: Tensor) -> Tensor:
    return 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def distillation(z: Tensor, t: Tensor) -> Tensor:
    """Soft targets of a teacher by hand, beside the labels."""
    teacher = floats().softmax(-1)
    return 0.5 * F.cross_entropy(z, t) - 0.5 * (teacher * (z / 2).log_softmax(-1)).sum(-1).mean()


def recorded_and_dropped(z: Tensor, t: Tensor) -> Tensor:
    """The recognised loss is not what is differentiated, but a mean of it with another of the same gradients' size."""
    return F.cross_entropy(z, t) * 0.7 + 0.3 * (z.logsumexp(-1) - z[range(N), t]).mean()


def margin(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t) + F.multi_margin_loss(z, t)


def focal(z: Tensor, t: Tensor) -> Tensor:
    terms = F.cross_entropy(z, t, reduction="none")
    return ((1 - (-terms).exp()).square() * terms).mean()


def exponential(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t).exp()


def squared(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="none").square().mean()


def root(z: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(z, t).sqrt()


def logarithm(z: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(z, t).log()


def weighted_by_itself(z: Tensor, t: Tensor) -> Tensor:
    """Two tasks with a learnt balance of their own outputs."""
    return F.mse_loss(z, t) * z.mean().sigmoid()


def unnormalised(z: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss(z, t)


def nearly_normalised(z: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss((z.softmax(-1) + 1e-2).log(), t)


PLANTED = {
    "small term": Planted(lambda: net(partial(with_part, partial(hidden, 1e-3))), PART),
    "term": Planted(lambda: net(partial(with_part, partial(hidden, 1.0))), PART),
    "entropy bonus": Planted(lambda: net(partial(with_part, entropy)), PART),
    "distillation": Planted(lambda: net(distillation), PART),
    "a share by hand": Planted(lambda: net(recorded_and_dropped), PART),
    "margin": Planted(lambda: net(margin), PART, ()),  # has no second derivative
    "focal": Planted(lambda: net(focal), CURVED),
    "exponential": Planted(lambda: net(exponential), CURVED),
    "squared": Planted(lambda: net(squared), CURVED),
    "root of squares": Planted(lambda: net(root, floats()), CURVED),
    "logarithm": Planted(lambda: net(logarithm, floats()), CURVED),
    "balanced by outputs": Planted(lambda: net(weighted_by_itself, floats()), f"{PART}|{CURVED}"),
    "unnormalised": Planted(lambda: net(unnormalised), "numbers that are not log-probabilities", ()),  # has the matrix zero
    "smoothed by hand": Planted(lambda: net(nearly_normalised), "numbers that are not log-probabilities"),
}


REFUSED = ("margin", "logarithm", "unnormalised")  # without a second derivative, not convex, without a curvature


@pytest.mark.parametrize("name", PLANTED)
def test_a_loss_that_is_not_all_in_sight_is_refused(name: str) -> None:
    is_an_error(PLANTED[name], "error")


@pytest.mark.filterwarnings("ignore:self-check. the outputs that enter the loss do not fall:gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize("name", PLANTED)
def test_or_the_whole_of_it_is_measured_and_said(name: str) -> None:
    planted = PLANTED[name]
    if name in REFUSED:
        is_an_error(planted, "fallback")
        return
    for blocks in ("layer", "full"):
        case = planted.make()
        maker = maker_of(case, blocks)
        with pytest.warns(SelfCheckWarning, match=rf"({planted.says}).*the Hessian of the whole loss"):
            step(maker, case)
        assert is_right(maker, case), blocks


@pytest.mark.parametrize("name", [name for name, planted in PLANTED.items() if planted.blocks])
def test_without_the_check_it_is_wrong(name: str) -> None:
    case = PLANTED[name].make()
    maker = maker_of(case, "full", self_check="off")
    step(maker, case)
    assert not is_right(maker, case)


class Penalised(nn.Module):
    """Activations enter the loss beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.head(h), h


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_penalty_on_activations_is_a_part_of_the_loss(scale: float) -> None:
    planted = Planted(
        lambda: build(Penalised, N, 3, loss=lambda y, t: F.cross_entropy(y[0], t) + scale * y[1].abs().sum(), t=labels(N)), PART
    )
    is_an_error(planted, "fallback")


def test_sampled_targets_are_checked_too() -> None:
    case = net(focal)
    maker = maker_of(case, "layer", FisherMC(), self_check="error")
    with pytest.raises(SelfCheckError, match=CURVED):
        step(maker, case)


# --- right losses ---------------------------------------------------------------------------------------------------------
def smooth(z: Tensor, t: Tensor) -> Tensor:
    return 3 * F.cross_entropy(z, t, label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))


def tempered(z: Tensor, t: Tensor) -> Tensor:
    return 4 * F.cross_entropy(z / 2, t)


def two_terms(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t) + 0.3 * F.mse_loss(z, floats())


def counted_twice(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t) + F.cross_entropy(z, t)


def by_terms(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="none").mean()


def normalised(z: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss(z.log_softmax(-1), t)


def held_factor(z: Tensor, t: Tensor) -> Tensor:
    loss = F.cross_entropy(z, t)
    return loss / loss.detach()


def watched(z: Tensor, t: Tensor) -> Tensor:
    """Another recognised loss is looked at only."""
    F.mse_loss(z, floats())
    return F.cross_entropy(z, t)


def ignoring(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.where(t == 1, -100, t))


RIGHT: dict[str, Loss] = {
    f.__name__: f for f in (smooth, tempered, two_terms, counted_twice, by_terms, held_factor, watched, ignoring)
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_losses_raise_no_alarm(name: str, blocks: str) -> None:
    is_right_in_silence(net(RIGHT[name]), blocks)


def test_log_probabilities_raise_no_alarm() -> None:
    case, same = net(normalised), net(F.cross_entropy)
    for each in (case, same):
        maker = maker_of(each, "full", self_check="error")
        step(maker, each)
        assert is_right(maker, same)
