"""curvlinops and BackPACK as outside judges, where their conventions are known and right.

curvlinops: parameters in the order of the model, bias joint on request; scaled like the loss' own reduction (a mean over all
terms, MSE with torch's factor 2 / (N C)), as here; so is the empirical Fisher, whose 1 / (N C) stands outside of the square.
BackPACK: the same scale; per-example gradients carry the 1 / N of a mean; Kronecker factors are listed (output, input) for the
weight, the bias has its own. Of convolutions its factors sum both inputs' moments and gradients over the positions, which is
neither expand nor reduce: not a judge there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature import Curvature, FisherEmp, FisherExact
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.representations import Dense, Diagonal, Kron, Representation
from gradmaker.solvers import CG
from tests import models, oracles
from tests.models import CLASSES, Case


def measured(case: Case, loss: nn.Module, curvature: Curvature, representation: Representation) -> Any:
    """A maker of any solver after one step."""
    config = CustomGradientConfig(curvature=curvature, representation=representation, solver=CG(), decay=0.0)
    maker = METHODS["custom"](case.model, config)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(loss, y, case.t)
    maker.forward_and_backward()
    return maker


def blocks_of(maker: Any) -> dict[str, Tensor]:
    """Site -> (B, P, P), or the diagonal."""
    found = {}
    for block in maker.plan.blocks:
        dense = block.triple.representation.to_dense(block.state)
        names = [s.name for s in block.sites]
        found |= {"full": dense} if block.full else {n: dense[slot] for n, slot in zip(names, block.slots, strict=True)}
    return found


class Images(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, (2, 3), padding=1, stride=2, bias=bias)
        self.second = nn.Conv2d(3, 2, 2, dilation=(1, 2))
        self.head = nn.Linear(2, CLASSES, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(2).sum(2))
        return y


class Tokens(nn.Module):
    """Linear layers over positions, mean-pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))).mean(1)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "mlp_no_bias": partial(models.mlp, bias=False),
    "images": lambda: models.build(Images, 4, 2, 5, 6),
    "images_no_bias": lambda: models.build(partial(Images, False), 4, 2, 5, 6),
    "tokens": lambda: models.build(Tokens, 5, 3, 4),
}
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "ce": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
}


def posed(name: str, loss: str) -> Case:
    """The case with the kind of target that the loss takes."""
    case = CASES[name]()
    one_hot = torch.nn.functional.one_hot(case.t, CLASSES).double()
    return case if loss == "ce" else case._replace(t=one_hot if loss == "bce" else one_hot - 0.3)


def peer(operator: str) -> Any:
    curvlinops = pytest.importorskip("curvlinops")
    return getattr(curvlinops, operator)


def matrix(operator: Any) -> Tensor:
    found: Tensor = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    return found


def joint_blocks(C: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The block of [W b] of every layer."""
    slices, blocks = oracles.parameter_slices(model), {}
    for name, module in model.named_modules():
        own = [slices[f"{name}.{k}"] for k, _ in module.named_parameters(recurse=False)]
        if own:
            block = oracles.layer_block(C, own)
            o = len(module.get_parameter("weight"))
            order = oracles.joint_order(o, module.get_parameter("weight")[0].numel())
            blocks[name if len(own) == 2 else f"{name}.weight"] = oracles.reorder(block, order) if len(own) == 2 else block
    return blocks


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, dense in expected.items():
        matches = [v for k, v in found.items() if k == name or k == name.removesuffix(".weight")]
        assert len(matches) == 1 and oracles.relative_error(matches[0][0], dense) < 1e-9, name


# --- curvlinops -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_is_that_of_curvlinops(name: str, loss: str, sharing: str, fisher: str, reduction: str) -> None:
    case, loss_fn = posed(name, loss), LOSSES[loss](reduction=reduction)
    twin = copy.deepcopy(case.model)
    K = peer("KFACLinearOperator")(
        twin, loss_fn, list(twin.parameters()), [(case.x, case.t)],
        fisher_type=fisher, kfac_approx=sharing, separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    curvature = FisherExact() if fisher == "type-2" else FisherEmp()
    maker = measured(case, loss_fn, curvature, Kron(sharing=sharing))  # type: ignore[arg-type]
    same(blocks_of(maker), joint_blocks(matrix(K), twin))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("operator, fisher", [("GGNLinearOperator", "type-2"), ("EFLinearOperator", "empirical")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_full_matrices_are_those_of_curvlinops(name: str, loss: str, operator: str, fisher: str, reduction: str) -> None:
    case, loss_fn = posed(name, loss), LOSSES[loss](reduction=reduction)
    twin = copy.deepcopy(case.model)
    C = matrix(peer(operator)(twin, loss_fn, list(twin.parameters()), [(case.x, case.t)], check_deterministic=False))
    curvature = FisherExact() if fisher == "type-2" else FisherEmp()
    found = blocks_of(measured(case, loss_fn, curvature, Dense(granularity="full")))["full"][0]
    order = torch.cat([p for p in _site_order(case.model)])
    assert oracles.relative_error(found, oracles.reorder(C, order)) < 1e-9


def _site_order(model: nn.Module) -> list[Tensor]:
    """Indices of the parameter vector in the order in which a full block holds them: [W b] of layer after layer."""
    slices, order = oracles.parameter_slices(model), []
    for name, module in model.named_modules():
        own = [slices[f"{name}.{k}"] for k, _ in module.named_parameters(recurse=False)]
        if own:
            flat = torch.cat([torch.arange(s.start, s.stop) for s in own])
            weight = module.get_parameter("weight")
            order.append(flat[oracles.joint_order(len(weight), weight[0].numel())] if len(own) == 2 else flat)
    return order


# --- BackPACK -------------------------------------------------------------------------------------------------------------
def backpacked(case: Case, loss_fn: nn.Module, names: list[str]) -> nn.Module:
    """A sequential copy of the model with the extensions' results on its parameters."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model = backpack.extend(copy.deepcopy(case.model))
    with warnings.catch_warnings(), backpack.backpack(*(getattr(extensions, n)() for n in names)):
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # the input needs no gradient
        backpack.extend(loss_fn)(model(case.x), case.t).backward()
    return model


def images() -> Case:
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES)
    )
    return models.build(layers, 4, 2, 4, 4)


SEQUENTIAL: dict[str, Callable[[], Case]] = {"mlp": models.mlp, "mlp_relu": models.mlp_relu, "images": images}


def sequential(name: str, loss: str) -> Case:
    case = SEQUENTIAL[name]()
    return case if loss == "ce" else case._replace(t=torch.nn.functional.one_hot(case.t, CLASSES).double() - 0.3)


def joined(model: nn.Module, attribute: str) -> dict[str, Tensor]:
    """layer -> (..., o, i + 1): an attribute of weight and bias as one matrix."""
    found = {}
    for name, module in model.named_modules():
        if [*module.parameters(recurse=False)]:
            weight, bias = (getattr(module.get_parameter(k), attribute) for k in ("weight", "bias"))
            o = module.get_parameter("bias").numel()
            found[name] = torch.cat([weight.reshape(*bias.shape[:-1], o, -1), bias[..., None]], -1)
    return found


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_diagonal_is_that_of_backpack(name: str, loss: str, reduction: str) -> None:
    case, loss_fn = sequential(name, loss), LOSSES[loss](reduction=reduction)
    judge = joined(backpacked(case, loss_fn, ["DiagGGNExact"]), "diag_ggn_exact")
    found = blocks_of(measured(case, loss_fn, FisherExact(), Diagonal(granularity="layer")))
    for layer, diagonal in judge.items():
        assert oracles.relative_error(found[layer][0].diagonal(), diagonal.reshape(-1)) < 1e-9


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_from_gradients_of_backpack(name: str, reduction: str) -> None:
    """C = M sum_n b_n b_n^T with b_n = BatchGrad, which divides by the M of the loss; cross-entropy."""
    case, loss_fn = sequential(name, "ce"), nn.CrossEntropyLoss(reduction=reduction)
    M = len(case.x) if reduction == "mean" else 1
    judge = joined(backpacked(case, loss_fn, ["BatchGrad"]), "grad_batch")
    found = blocks_of(measured(case, loss_fn, FisherEmp(), Dense()))
    for layer, rows in judge.items():
        b = rows.flatten(1)
        assert oracles.relative_error(found[layer][0], M * b.mT @ b) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "mlp_relu"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_kflr_is_that_of_backpack(name: str, loss: str) -> None:
    """Weights alone: BackPACK gives the bias a block of its own."""
    case, loss_fn = sequential(name, loss), LOSSES[loss]()
    model = backpacked(case, loss_fn, ["KFLR"])
    for p in case.model.parameters():
        p.requires_grad_(p.ndim > 1)
    found = blocks_of(measured(case, loss_fn, FisherExact(), Kron()))
    for layer, module in model.named_modules():
        if [*module.parameters(recurse=False)]:
            B, A = module.get_parameter("weight").kflr  # type: ignore[attr-defined]
            assert oracles.relative_error(found[f"{layer}.weight"][0], oracles.kron(B, A)) < 1e-9
