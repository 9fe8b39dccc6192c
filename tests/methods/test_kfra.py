"""KFRA: the models that it takes, layers that are not trained; its other tests are in test_kronecker_methods.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, KbfgsGradientConfig, KbfgsGradientMaker, KfraGradientConfig, KfraGradientMaker, from_config
from gradmaker.curvature import FisherRecursive
from gradmaker.maker import GradientMaker
from tests import models, oracles
from tests.models import CLASSES, Case

EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}


def chain() -> Case:
    """Four linear layers, far from linear."""
    sizes = [4, 5, 3, 4, CLASSES]

    def make() -> nn.Module:
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers[:-1])

    case = models.build(make, 7, 4)
    with torch.no_grad():
        for p in case.model.parameters():
            p *= 2
    return case


def step(maker: Any, case: Case) -> Any:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    return maker


def factors(maker: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (B, A)."""
    found = {}
    for block in maker.plan.blocks:
        left, right = block.triple.representation.factors(block.state)
        found |= {s.name: (left[slot][0], right[slot][0]) for s, slot in zip(block.sites, block.slots, strict=True)}
    return found


def recursion(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Every layer's (B, A), by explicit sums over examples."""
    linear = [m for m in case.model.modules() if isinstance(m, nn.Linear)]
    n, a, inputs, slopes = len(case.x), case.x, [], []
    for module in linear:
        inputs.append(torch.cat([a, torch.ones(n, 1).double()], 1))
        a = torch.tanh(module(a)).detach()
        slopes.append(1 - a.square())
    B = oracles.output_hessian("categorical", case.model(case.x).detach(), case.t).mean(0)
    found = {}
    for j in reversed(range(len(linear))):
        found[str(2 * j)] = (B, sum(torch.outer(v, v) for v in inputs[j]) / n)
        if j:
            pulled = (linear[j].weight.mT @ B @ linear[j].weight).detach()
            B = sum(torch.diag(s) @ pulled @ torch.diag(s) for s in slopes[j - 1]) / n
    return found


# --- frozen and ignored layers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frozen", [(), ("0",), ("2",), ("2", "4"), ("6",), ("0", "6")])
@pytest.mark.parametrize("ignored", [True, False])
def test_the_recursion_goes_through_layers_that_are_not_trained(frozen: tuple[str, ...], ignored: bool) -> None:
    case = chain()
    if not ignored:
        for name in frozen:
            case.model.get_submodule(name).requires_grad_(False)
    options = {"ignore": frozen if ignored else (), **EVERY_STEP}
    found = factors(step(KfraGradientMaker(case.model, KfraGradientConfig(**options)), case))
    expected = recursion(case)
    assert set(found) == set(expected) - set(frozen) and found
    for name, (B, A) in found.items():
        assert oracles.relative_error(B, expected[name][0]) < 1e-12, name
        assert oracles.relative_error(A, expected[name][1]) < 1e-12, name


# --- which models it takes ------------------------------------------------------------------------------------------------
def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied() -> nn.Module:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other)


class Softer(nn.ReLU):
    """No element-wise function, whatever it derives from."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Skipping(nn.Sequential):
    """No chain, whatever it derives from."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)
        return y


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (lambda: models.convolution(2).model, "the model is ConvNet"),
    "norm": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2))), "1.0 is LayerNorm"),
    "function": (lambda: nn.Sequential(nn.Linear(2, 2), Softer()), "1 is Softer"),
    "branch": (lambda: nn.Sequential(Skipping(nn.Linear(2, 2))), "0 is Skipping"),
    "called_twice": (shared, "used once, and 0 and 2 share weights"),
    "tied": (tied, "used once, and 0 and 2 share weights"),
    "no_layer": (lambda: nn.Sequential(nn.PReLU()), "0 is PReLU"),
    "nothing": (lambda: nn.Sequential(nn.Tanh()), "the model has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_the_sentence_that_one_can_ask_for(name: str) -> None:
    make, text = REFUSED[name]
    model = make()
    reason = METHODS["kfra"].refuse(model)
    assert reason is not None and text in reason
    assert METHODS["kflr"].refuse(model) is None and GradientMaker.refuse(model) is None
    with pytest.raises(ValueError) as caught:
        from_config(model, {"method": "kfra"})
    assert str(caught.value) == reason
    config: Any = {"method": "custom", "curvature": "FisherRecursive", "representation": "Kron", "solver": "Cholesky"}
    if name not in ("no_layer", "nothing"):
        maker: Any = from_config(model, config)  # as a free triple it is refused when it is measured
        size = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, torch.randn(3, size)), torch.tensor([0, 1, 0]))
        with pytest.raises((ValueError, RuntimeError)):
            maker.forward_and_backward()


@pytest.mark.parametrize(
    "make", [nn.Linear, lambda i, o: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(i, o)), nn.GELU())]
)
def test_chains_are_taken(make: Callable[[int, int], nn.Module]) -> None:
    assert METHODS["kfra"].refuse(make(3, 2)) is None


def test_as_a_fallback_it_is_asked_too() -> None:
    """K-BFGS leaves embeddings, which no chain has."""
    with pytest.raises(ValueError, match=r"fallback='kfra': FisherRecursive .* the model is Bag"):
        KbfgsGradientMaker(models.embedding_mean().model, KbfgsGradientConfig(fallback="kfra"))
    assert KbfgsGradientMaker(chain().model, KbfgsGradientConfig(fallback="kfra")).plan.plain == {}


def test_by_name_it_is_the_recursion_and_it_descends() -> None:
    case = chain()
    maker: Any = from_config(case.model, {"method": "kfra", "damping": 0.1, **EVERY_STEP})
    assert {type(b.triple.curvature) for b in maker.plan.blocks} == {FisherRecursive}
    step(maker, case)
    expected = recursion(case)
    for name, module in case.model.named_children():
        if isinstance(module, nn.Linear):
            assert module.weight.grad is not None and module.bias.grad is not None
            raw = torch.autograd.grad(case.run(), [module.weight, module.bias])
            B, A = expected[name]
            g = torch.cat([raw[0], raw[1].unsqueeze(1)], 1)
            found = torch.cat([module.weight.grad, module.bias.grad.unsqueeze(1)], 1)
            assert oracles.relative_error(found, oracles.kfac_direction(g, A, B, damping=0.1)) < 1e-10
