"""FANG on a binary restricted Boltzmann machine, against the plain gradient, on digits of scikit-learn.

    python examples/fang_rbm.py            8 hidden units, 100 steps on the whole data: seconds

``p(v, h) = exp(b v + c h + v W h) / Z``. With few hidden units all their states can be listed: the likelihood is exact, and
model samples need no Markov chain. The Fisher matrix is the covariance of the statistics ``v_i, h_j, v_i h_j`` under the model;
its inverse is modelled by a graph in which ``v_i h_j`` has the parents ``v_i`` and ``h_j`` (Grosse & Salakhutdinov, ICML 2015).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import CustomGradientConfig, CustomGradientMaker, GradientMaker
from gradmaker.curvature import Curvature, Evidence, Outer
from gradmaker.curvature.evidence import WHOLE
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.step import Step
from gradmaker.representations import GaussianGraph
from gradmaker.representations.gaussian_graph import Parents
from gradmaker.solvers import LocalRegression


class RBM(nn.Module):
    """Called with visible vectors it gives their negative log-likelihoods, exactly."""

    states: Tensor

    def __init__(self, visible: int, hidden: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(visible))
        self.c = nn.Parameter(torch.zeros(hidden))
        self.W = nn.Parameter(0.01 * torch.randn(visible, hidden))
        self.register_buffer("states", torch.tensor(list(product([0.0, 1.0], repeat=hidden))))  # (2^H, H)

    def forward(self, v: Tensor) -> Tensor:
        """``-log p(v)``.  # (n, V) -> (n,)"""
        return torch.logsumexp(self.marginal(), 0) - v @ self.b - F.softplus(v @ self.W + self.c).sum(-1)

    def marginal(self) -> Tensor:
        """``log p(h)`` of every hidden state, up to a constant.  # (2^H,)"""
        return self.states @ self.c + F.softplus(self.states @ self.W.mT + self.b).sum(-1)

    @torch.no_grad()
    def sample(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Independent draws from the model.  # (n, V), (n, H)"""
        picked = torch.multinomial(self.marginal().softmax(0), samples, replacement=True, generator=generator)
        h = self.states[picked]
        return torch.bernoulli(torch.sigmoid(h @ self.W.mT + self.b), generator=generator), h


@dataclass(frozen=True, kw_only=True)
class ModelFisher(Curvature):
    """The Fisher matrix of an `RBM`: covariances of its statistics under samples of its own, less their means."""

    gives: ClassVar[frozenset[Kind]] = kinds(Outer)
    layerwise: ClassVar[bool] = False

    samples: int = 2000

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        rbm = step.tape.root
        assert isinstance(rbm, RBM)
        v, h = rbm.sample(self.samples, step.generator("model", rbm.b.device))
        statistics = {"b": v, "c": h, "W": torch.einsum("nv,nh->nvh", v, h).flatten(1)}
        rows = torch.cat([statistics[site.name] for site in step.sites], 1)
        rows = (rows - rows.mean(0)) / self.samples**0.5
        yield {WHOLE: Outer(rows.new_zeros(1, len(rows), 1, 0), rows[None, None, :, None], bias=True)}


def parents(visible: int, hidden: int) -> Parents:
    """Of ``b, c, W`` as one vector: hidden units on those before, visible ones on all hidden, products on their two units."""
    units = range(visible, visible + hidden)
    chain = [tuple(range(visible, j)) for j in units]
    return (*[tuple(units)] * visible, *chain, *((i, j) for i in range(visible) for j in units))


def fang(rbm: RBM, damping: float = 3e-3, samples: int = 2000) -> CustomGradientMaker:
    """The method as a free triple."""
    config = CustomGradientConfig(
        curvature=ModelFisher(samples=samples),
        representation=GaussianGraph(parents(*rbm.W.shape), whole=True),
        solver=LocalRegression(damping=damping),
        decay=0.9,
    )
    return CustomGradientMaker(rbm, config)


def train(rbm: RBM, maker: GradientMaker, data: Tensor, rate: float, steps: int) -> list[float]:
    """Full-batch steps; the mean negative log-likelihood before each."""
    optimizer = torch.optim.SGD(rbm.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = maker.setup_model_call(rbm, data)
        maker.setup_loss_repr(y.mean())
        losses.append(float(maker.forward_and_backward()[1]))
        optimizer.step()
    return losses


def main() -> None:
    """Print both curves."""
    from sklearn.datasets import load_digits

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hidden", type=int, default=8)
    options.add_argument("--steps", type=int, default=100)
    given = options.parse_args()
    data = torch.tensor(load_digits().data > 7.5, dtype=torch.float32)
    curves = []
    for natural, rate in ((False, 0.3), (True, 0.1)):
        torch.manual_seed(0)
        rbm = RBM(data.shape[1], given.hidden)
        curves.append(train(rbm, fang(rbm) if natural else GradientMaker(rbm), data, rate, given.steps))
    print("step   gradient      FANG   (nats an image)")
    for step in range(0, given.steps, max(1, given.steps // 10)):
        print(f"{step:4d}   {curves[0][step]:8.3f}  {curves[1][step]:8.3f}")


if __name__ == "__main__":
    main()
