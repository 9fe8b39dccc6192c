"""Every method on handwritten digits, with its shipped defaults but for `METHOD`: by the declared calls, and by `attach`.

Images are MNIST's where GRADMAKER_DATA names a folder that has them, else scikit-learn's; both at 7 or 8 pixels a side, so that
methods with one matrix for the whole model run as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, GradientMaker, PreconditionedGradientMaker, from_config
from gradmaker.compare.data import load
from gradmaker.compare.parsing import parse_rows
from gradmaker.compare.rows import Row
from tests import models

METHOD: dict[str, dict[str, Any]] = {
    "custom": {"curvature": "FisherMC", "representation": "Kron", "solver": "Eigh"},
    "esgd": {"damping": 1e-2},  # one probe of a ReLU network leaves entries of zero, and 1 / 1e-4 for their gradients
}
ROWS: dict[str, Row] = {name: parse_rows([{"method": name, **METHOD.get(name, {})}])[0] for name in METHODS}
SECOND_EVALUATION = {
    *("newton", "hessian_free", "ksd", "saddle_free", "lissa", "neumann", "curveball"),  # products, losses further on
    *("psgd", "psgd_kf", "adahessian", "esgd", "saddle_free_diagonal"),  # products with probes
    *("lbfgs", "kbfgs", "kbfgs_l"),  # the same batch once more, after the step
}
"""Methods whose mathematics wants the loss again, or its derivatives beyond the first: an optimizer's hook has neither."""
CHAINS = {"kfra"}
"""Methods for chains of linear and element-wise layers alone."""
SAMPLE = {"gradient": 20, "adam": 20, "kfac": 20, "shampoo": 20, "hessian_free": 8, "kbfgs": 30, "adahessian": 20, "smw_ng": 20}
"""With steps."""
STEPS, BATCH = 100, 128


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 10))


def convolutional() -> nn.Module:
    body = [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(10))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": network, "convolutions": convolutional}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images and classes."""
    if "GRADMAKER_DATA" in os.environ:
        data = load("mnist")
        return F.avg_pool2d(data.train_inputs[:4000], 4), data.train_targets[:4000]
    pytest.importorskip("sklearn")
    data = load("digits")
    return data.train_inputs, data.train_targets


def made(model: str, x: Tensor) -> nn.Module:
    """The same weights whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MODELS[model]()
        network(x[:2])
        return network


def train(row: Row, rate: float, network: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> GradientMaker:
    """By the declared calls, on random batches."""
    x, t = data
    maker: GradientMaker = row.build_maker(network)
    optimizer = row.build_optimizer(network, rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        y = maker.setup_model_call(network, x[rows])
        maker.setup_loss_call(F.cross_entropy, y, t[rows])
        maker.forward_and_backward()
        optimizer.step()
    return maker


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((network(data[0]).argmax(1) == data[1]).float().mean())


def reached(method: str, model: str, data: tuple[Tensor, Tensor], steps: int, wanted: float) -> list[float]:
    """Accuracies by the learning rates of the method's shipped grid, the largest first, until one suffices."""
    found: list[float] = []
    for rate in reversed(ROWS[method].learning_rates):
        network = made(model, data[0])
        train(ROWS[method], rate, network, data, steps)
        found.append(accuracy(network, data))
        if found[-1] >= wanted:
            break
    return found


# --- training -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", SAMPLE)
def test_a_sample_of_methods_learns_digits(method: str, model: str, digits: tuple[Tensor, Tensor]) -> None:
    found = reached(method, model, digits, SAMPLE[method], 0.5)
    assert max(found) >= 0.5, f"chance is 0.1; accuracies of the training set: {found}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits(method: str, model: str, digits: tuple[Tensor, Tensor]) -> None:
    if method in CHAINS and model != "mlp":
        with pytest.raises(ValueError, match=r"nn\.Sequential of nn\.Linear"):
            ROWS[method].build_maker(made(model, digits[0]))
        return
    found = reached(method, model, digits, STEPS, 0.7)
    assert max(found) >= 0.7, f"chance is 0.1; accuracies of the training set: {found}"


# --- attached -------------------------------------------------------------------------------------------------------------
PRECONDITIONED = [name for name, make in METHODS.items() if issubclass(make, PreconditionedGradientMaker)]


def case_of(method: str) -> models.Case:
    return models.mlp() if method in CHAINS else models.convolution()


def trajectory(method: str, attached: bool) -> tuple[list[Tensor], Any]:
    """Parameters after three steps on different batches, and the maker."""
    case = case_of(method)
    maker: Any = from_config(case.model, {"method": method, **METHOD.get(method, {})})
    optimizer = torch.optim.SGD(case.model.parameters(), 0.01, momentum=0.5)
    if attached:
        maker.attach(optimizer, "categorical")
    for scale in (1.0, 1.1, 0.9):
        optimizer.zero_grad()
        if attached:
            case.loss(case.model(scale * case.x), case.t).backward()
        else:
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, scale * case.x), case.t)
            maker.forward_and_backward()
        optimizer.step()
    return [p.detach().clone() for p in case.model.parameters()], maker


@pytest.mark.parametrize("method", PRECONDITIONED)
def test_attached_is_as_declared_or_refused(method: str) -> None:
    start = [p.detach().clone() for p in case_of(method).model.parameters()]
    expected, _ = trajectory(method, attached=False)
    assert not all(torch.allclose(p, q) for p, q in zip(expected, start, strict=True))
    if method in SECOND_EVALUATION:
        with pytest.raises(ValueError, match=r"differentiate or repeat the loss, which attach\(\) does not see: declare it"):
            trajectory(method, attached=True)
        return
    found, maker = trajectory(method, attached=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (maker.step, maker.skipped) == (3, 0) and not maker.silent()
