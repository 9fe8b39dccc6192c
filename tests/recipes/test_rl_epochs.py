"""Several epochs over one batch of a policy and its values, as proximal policy optimization takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

import gradmaker as gm
from gradmaker.curvature import Categorical as Policy, Gaussian
from tests.recipes.protocol import Declared, close, same, through_file, weights

pytestmark = pytest.mark.filterwarnings("ignore::gradmaker.CoverageWarning")  # of the small networks
ACTIONS, EPOCHS = 3, 3


class Batch(NamedTuple):
    """A rollout: states, actions, and what is known of them."""

    x: Tensor
    actions: Tensor
    old: Tensor  # log-probabilities of the actions, when they were taken
    advantages: Tensor
    returns: Tensor

    def minibatches(self, epoch: int) -> Iterator[Batch]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        return (Batch(*(v[part] for v in self)) for part in order.chunk(2))


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))


class ActorCritic(nn.Module):
    """Two heads on one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = network(8), nn.Linear(8, ACTIONS), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.policy(h), self.value(h).squeeze(-1)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().double()


def rollout(policy: Any, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=g, dtype=torch.float64)
    with torch.no_grad():
        z = policy(x)
        z = z[0] if isinstance(z, tuple) else z
    actions = torch.multinomial(z.softmax(-1), 1, generator=g).squeeze(-1)
    advantages, returns = torch.randn(2, 16, generator=g, dtype=torch.float64)
    return Batch(x, actions, Categorical(logits=z).log_prob(actions), advantages, returns)


def clipped(z: Tensor, b: Batch) -> Tensor:
    """Schulman et al. 2017, arXiv:1707.06347, equation 7, with a bonus for the entropy."""
    policy = Categorical(logits=z)
    ratio = (policy.log_prob(b.actions) - b.old).exp()
    gain = torch.min(ratio * b.advantages, ratio.clamp(0.8, 1.2) * b.advantages)
    return -gain.mean() - 0.01 * policy.entropy().mean()


def both(y: tuple[Tensor, Tensor], b: Batch) -> Tensor:
    return clipped(y[0], b) + 0.5 * (y[1] - b.returns).square().mean()  # to declared calls, `F.mse_loss` would be all of it


def train(model: Any, optimizer: Any, loss: Any, rounds: int, start: int = 0) -> None:
    for j in range(start, start + rounds):
        batch = rollout(model, j)
        for epoch in range(EPOCHS):
            for b in batch.minibatches(epoch):
                optimizer.zero_grad()
                loss(model(b.x), b).backward()
                optimizer.step()


ONE_MODEL: dict[str, dict[str, Any]] = {
    "soap": {"preconditioner_interval": 2},
    "kfac": {"fisher": "FisherEmp", "likelihood": Policy(), "damping": 0.1, "curvature_interval": 2},
}


@pytest.mark.parametrize("method", ONE_MODEL)
def test_two_heads_with_one_optimizer(method: str) -> None:
    """The gradients of examples are those of the whole loss, of which `likelihood` says that it is a mean."""
    model = seeded(ActorCritic)
    optimizer = gm.optimizer(model, method, lr=0.01, max_norm=0.5, **ONE_MODEL[method])
    declared = Declared(optimizer)
    for j in range(2):
        batch = rollout(declared.model, j)
        for epoch in range(EPOCHS):
            for b in batch.minibatches(epoch):
                y = declared.maker.setup_model_call(declared.model, b.x)
                if method == "kfac":
                    declared.maker.setup_logits_repr(y[0])
                declared.maker.setup_loss_call(both, y, b)
                declared.maker.accumulate()
                declared.step()
    train(model, optimizer, both, 2)
    close(model, declared.model)
    assert optimizer.maker.step == 2 * EPOCHS * 2


def test_what_is_measured_in_the_policy_alone_is_refused() -> None:
    model = seeded(ActorCritic)
    optimizer = gm.optimizer(model, "kfac", lr=0.01, likelihood=Policy())
    with pytest.raises(RuntimeError, match=r"other outputs of the model, of shape \(8,\).*an optimizer for each output"):
        train(model, optimizer, both, 1)


def test_the_loss_of_a_policy_has_to_be_declared() -> None:
    """An entropy bonus is no part of a cross entropy."""
    model = seeded(lambda: network(ACTIONS))
    optimizer = gm.optimizer(model, "kfac", lr=0.01)
    with pytest.raises(RuntimeError, match="likelihood="):
        train(model, optimizer, clipped, 1)


class Squared:
    """The loss of the values."""

    def __call__(self, y: Tensor, b: Batch) -> Tensor:
        return F.mse_loss(y.squeeze(-1), b.returns)


@pytest.mark.parametrize("part", ["policy", "value"])
def test_an_optimizer_for_each_of_two_networks(part: str) -> None:
    """The policy with its own Fisher matrix, each state with the same weight; the values as a regression."""
    made, loss, likelihood = {
        "policy": (lambda: network(ACTIONS), clipped, Policy()),
        "value": (lambda: network(1), Squared(), Gaussian()),
    }[part]
    model: Any = seeded(made)
    optimizer = gm.optimizer(model, "kfac", lr=0.01, damping=0.1, max_norm=0.5, likelihood=likelihood)
    declared = Declared(optimizer)
    policy = seeded(lambda: network(ACTIONS))
    batch = rollout(policy, 0)
    for epoch in range(EPOCHS):
        for b in batch.minibatches(epoch):
            optimizer.zero_grad()
            loss(model(b.x), b).backward()
            optimizer.step()
            y = declared.maker.setup_model_call(declared.model, b.x)
            declared.maker.setup_logits_repr(y)
            declared.maker.setup_loss_call(loss, y, b)
            declared.maker.accumulate()
            declared.step()
    close(model, declared.model)


@pytest.mark.parametrize("method", ONE_MODEL)
def test_rounds_go_on_bitwise(method: str, tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        model = seeded(ActorCritic)
        made.append((model, gm.optimizer(model, method, lr=0.01, **ONE_MODEL[method])))
    train(*made[0], both, 1)
    for part, fresh in zip(*made, strict=True):
        fresh.load_state_dict(through_file(part.state_dict(), tmp_path))
    for one in made:
        train(*one, both, 1, start=1)
    assert same(weights(made[0][0]), weights(made[1][0]))
