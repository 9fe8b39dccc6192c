"""The empirical Fisher matrix of a loss of which a part is not recognised: of all of it, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import FisherEmp, FisherForward
from gradmaker.errors import SelfCheckError
from gradmaker.representations import Kron
from tests import measure, oracles
from tests.models import Case
from tests.self_checks.planted import BLOCKS, build, labels, left_alone, maker_of, step

N = 6
CANNOT = "its share for each example cannot be told apart"


class Net(nn.Module):
    """What is done with the activations is given."""

    def __init__(self, use: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.use, self.body, self.head = use, nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def plain(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.body(x))
    return m.head(h), h


def penalised(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by the input goes into the loss."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y, _ = plain(m, x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y, slope


def centred(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.body(x))
    return m.head(h - h.mean(0)), h


def beside(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.body(x))
    return m.head(h) + F.linear(h, m.body.weight.t()), h


def both(y: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    """A recognised term, and one that is not."""
    return F.cross_entropy(y[0], t) + 0.3 * y[1].square().sum(1).mean()


def net(use: Callable[[Net, Tensor], Any], loss: Callable[[Any, Tensor], Tensor] = both) -> Case:
    return build(lambda: Net(use), N, 3, loss=loss, t=labels(N))


@pytest.mark.parametrize("mode", ["fallback", "error"])
@pytest.mark.parametrize("use", [penalised, centred, beside], ids=lambda f: f.__name__)
def test_what_cannot_be_told_apart_is_refused(use: Callable[[Net, Tensor], Any], mode: str) -> None:
    case = net(use)
    maker = maker_of(case, "layer", FisherEmp(), self_check=mode)
    sentence = CANNOT if mode == "fallback" or use is penalised else "couples outputs|do not add up"
    with left_alone(case.model, maker), pytest.raises(SelfCheckError, match=f"{CANNOT}|{sentence}"):
        step(maker, case)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_part_that_is_not_recognised_is_taken_in(blocks: str) -> None:
    case = net(plain)
    maker = maker_of(case, blocks, FisherEmp(), self_check="error")
    step(maker, case)
    whole = oracles.empirical_fisher(case.model, case.x, lambda y, n: both(y, case.t[n : n + 1]), N)
    measure.compare(maker, whole, tolerance=1e-9)


def test_a_penalty_on_weights_is_no_part_of_examples() -> None:
    case = net(plain)
    body: Any = case.model.body
    decayed = case._replace(loss=lambda y, t: both(y, t) + body.weight.square().sum())
    maker = maker_of(decayed, "layer", FisherEmp(), self_check="error")
    step(maker, decayed)
    whole = oracles.empirical_fisher(case.model, case.x, lambda y, n: both(y, case.t[n : n + 1]), N)
    measure.compare(maker, whole, tolerance=1e-9)


def test_likelihoods_refuse_derivatives_of_derivatives() -> None:
    case = net(penalised)
    with pytest.raises(SelfCheckError, match="give another gradient than the whole loss"):
        step(maker_of(case, "layer"), case)


def test_moments_of_inputs_alone_do_not_mind() -> None:
    case = net(penalised)
    step(measure.custom(case.model, FisherForward(), Kron(), self_check="error"), case)
