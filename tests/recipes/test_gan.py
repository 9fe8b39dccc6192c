"""Two networks against each other, each with its own optimizer: two losses a step, of which each treats its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from tests.recipes.protocol import Declared, close, same, through_file, weights

N = 8
DISCRIMINATOR: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.02, "damping": 0.1, "max_norm": 1.0, "curvature_interval": 2, "warmup_steps": 0},
    "soap": {"lr": 0.01, "preconditioner_interval": 2},
}
ONE, ZERO = torch.ones(N, 1, dtype=torch.float64), torch.zeros(N, 1, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore::gradmaker.CoverageWarning")  # of the small networks


class Pair:
    """A generator, a discriminator, and their optimizers."""

    def __init__(self, method: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.g = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)).double()
            self.d = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.of_g = gm.optimizer(self.g, "soap", lr=0.01)
        self.of_d = gm.optimizer(self.d, method, **DISCRIMINATOR[method])

    def parts(self) -> list[Any]:
        return [self.g, self.d, self.of_g, self.of_d]


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(N, k, generator=generator, dtype=torch.float64) for k in (4, 2))  # type: ignore[return-value]


def loss(z: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, t)


def of_the_discriminator(how: str, d: nn.Module, real: Tensor, fake: Tensor) -> None:
    if how == "two backward passes":
        loss(d(real), ONE).backward()
        loss(d(fake), ZERO).backward()
    else:
        loss(d(torch.cat([real, fake])), torch.cat([ONE, ZERO])).backward()


def step(pair: Pair, how: str, j: int, frozen: bool = False) -> None:
    real, noise = data(j)
    fake = pair.g(noise)
    pair.of_d.zero_grad()
    of_the_discriminator(how, pair.d, real, fake.detach())
    pair.of_d.step()
    pair.of_g.zero_grad()
    if frozen:
        pair.d.requires_grad_(False)
    loss(pair.d(fake), ONE).backward()
    pair.of_g.step()
    if frozen:
        pair.d.requires_grad_(True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["two backward passes", "one call"])
@pytest.mark.parametrize("method", DISCRIMINATOR)
def test_each_treats_its_own_losses(method: str, how: str, frozen: bool) -> None:
    """The discriminator is that of the declared protocol on its own batches; the generator's pass through it is none of its."""
    pair = Pair(method)
    declared_d, declared_g = Declared(pair.of_d), Declared(pair.of_g)
    for j in range(5):
        real, noise = data(j)
        fake = declared_g.model(noise).detach()
        if how == "one call":
            declared_d.accumulate(loss, torch.cat([real, fake]), torch.cat([ONE, ZERO]))
        else:
            declared_d.accumulate(loss, real, ONE)
            declared_d.accumulate(loss, fake, ZERO)
        declared_d.step()
        through = copy.deepcopy(declared_d.model)
        declared_g.step(lambda y, t, d=through: loss(d(y), t), noise, ONE)
        step(pair, how, j, frozen)
        close(pair.d, declared_d.model)
        close(pair.g, declared_g.model)
    assert pair.of_d.maker.step == pair.of_g.maker.step == 5


def test_two_calls_before_one_backward_pass_are_refused() -> None:
    pair, (real, noise) = Pair("kfac"), data(0)
    fake = pair.g(noise).detach()
    with pytest.raises(RuntimeError, match=r"called again before .*torch.cat"):
        (loss(pair.d(real), ONE) + loss(pair.d(fake), ZERO)).backward()


def test_two_calls_before_one_backward_pass_of_a_method_of_the_gradient() -> None:
    pairs = [Pair("soap"), Pair("soap")]
    for j in range(3):
        real, noise = data(j)
        for pair, apart in zip(pairs, (True, False), strict=True):
            pair.of_d.zero_grad()
            fake = pair.g(noise).detach()
            if apart:
                of_the_discriminator("two backward passes", pair.d, real, fake)
            else:
                (loss(pair.d(real), ONE) + loss(pair.d(fake), ZERO)).backward()
            pair.of_d.step()
    close(pairs[0].d, pairs[1].d)


def test_a_generator_has_no_likelihood() -> None:
    """The curvature of the discriminator is in its loss."""
    pair = Pair("kfac")
    pair.of_g.maker.remove()
    pair.of_g = gm.optimizer(pair.g, "kfac", lr=0.01)
    with pytest.raises(RuntimeError, match="likelihood="):
        step(pair, "one call", 0)


@pytest.mark.parametrize("method", DISCRIMINATOR)
def test_both_go_on_bitwise(method: str, tmp_path: Path) -> None:
    pairs = [Pair(method), Pair(method)]
    for j in range(3):
        step(pairs[0], "one call", j)
    for part, fresh in zip(pairs[0].parts(), pairs[1].parts(), strict=True):
        fresh.load_state_dict(through_file(part.state_dict(), tmp_path))
    for pair in pairs:
        for j in range(3, 6):
            step(pair, "one call", j)
    assert same(weights(pairs[0].d), weights(pairs[1].d)) and same(weights(pairs[0].g), weights(pairs[1].g))
