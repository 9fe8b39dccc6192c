"""Several optimizers: of parts of one model, of two models; each treats its own parameters once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from tests.recipes.protocol import RECIPES, Declared, batches, close, network, same, through_file, weights

FREE: dict[str, dict[str, Any]] = {m: {**options, "max_norm": None} for m, options in RECIPES.items()}
pytestmark = pytest.mark.filterwarnings("ignore::gradmaker.CoverageWarning")  # of the parts of a small model


def halves(model: Any) -> list[list[nn.Parameter]]:
    return [list(model[:3].parameters()), list(model[3:].parameters())]


def step(model: Any, optimizers: list[Any], x: Tensor, t: Tensor) -> None:
    F.cross_entropy(model(x), t).backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def test_the_halves_of_a_model_are_those_of_one_optimizer() -> None:
    """Without a common norm, two makers of one method do what one does."""
    model, whole = network(), network()
    both = [gm.optimizer(model, "kfac", half, **FREE["kfac"]) for half in halves(model)]
    one = gm.optimizer(whole, "kfac", **FREE["kfac"])
    for x, t in batches(6):
        step(model, both, x, t)
        step(whole, [one], x, t)
    close(model, whole)
    assert [o.maker.step for o in both] == [6, 6]


@pytest.mark.parametrize("pair", [("kfac", "soap"), ("soap", "kfac"), ("soap", "soap")])
def test_each_half_with_its_own_method(pair: tuple[str, str]) -> None:
    """Every parameter moves by the step of its own optimizer, and `.grad` of the other's is raw when that comes."""
    model = network()
    optimizers = [gm.optimizer(model, m, half, **FREE[m]) for m, half in zip(pair, halves(model), strict=True)]
    for x, t in batches(5):
        F.cross_entropy(model(x), t).backward()
        raw = [[p.grad.clone() for p in half] for half in halves(model)]  # type: ignore[union-attr]
        for j, optimizer in enumerate(optimizers):
            assert same([p.grad for p in halves(model)[j]], raw[j])  # type: ignore[misc]
            others = [p.grad.clone() for p in halves(model)[1 - j]]  # type: ignore[union-attr]
            optimizer.step()
            assert same([p.grad for p in halves(model)[1 - j]], others)  # type: ignore[misc]
            assert not same([p.grad for p in halves(model)[j]], raw[j])  # type: ignore[misc]
        model.zero_grad()
    assert all(o.maker.step == 5 and not o.maker.skipped for o in optimizers)


@pytest.mark.parametrize("method", RECIPES)
def test_one_optimizer_at_a_time(method: str) -> None:
    """As in alternating training: the other half keeps its weights and its statistics."""
    model = network()
    first, second = (gm.optimizer(model, method, half, **FREE[method]) for half in halves(model))
    for j, (x, t) in enumerate(batches(6)):
        optimizer, other = (first, second) if j % 2 else (second, first)
        kept = [p.detach().clone() for p in halves(model)[0 if other is first else 1]]
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        model.zero_grad()
        assert same([p.detach() for p in halves(model)[0 if other is first else 1]], kept)
    assert first.maker.step == second.maker.step == 3


@pytest.mark.parametrize("method", RECIPES)
def test_an_encoder_and_a_decoder(method: str) -> None:
    """Two models in one loss: that of the first sees its output's gradient through the second."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = network()
            self.encoder, self.decoder = layers[:3], layers[3:]

        def forward(self, x: Tensor) -> Any:
            return self.decoder(self.encoder(x))

    joined = Joined()
    decoder = gm.optimizer(joined.decoder, method, **RECIPES[method])
    encoder = gm.optimizer(joined.encoder, "soap", **RECIPES["soap"])
    declared = Declared(decoder)
    for x, t in batches(4):
        h = joined.encoder(x)
        declared.step(F.cross_entropy, h.detach(), t)
        F.cross_entropy(joined.decoder(h), t).backward()
        for optimizer in (encoder, decoder):
            optimizer.step()
            optimizer.zero_grad()
    close(joined.decoder, declared.model)


def test_one_optimizer_for_two_models_is_refused() -> None:
    first, second = network(), network()
    with pytest.raises(ValueError, match="no parameter of the model"):
        gm.optimizer(first, "kfac", [*first.parameters(), *second.parameters()], **RECIPES["kfac"])


def test_one_module_around_two_models_has_to_be_called() -> None:
    both = nn.ModuleDict({"a": network(), "b": network()})
    optimizer = gm.optimizer(both, "kfac", **RECIPES["kfac"])
    x, t = next(batches(1))
    (F.cross_entropy(both["a"](x), t) + F.cross_entropy(both["b"](x), t)).backward()
    with pytest.raises(RuntimeError, match="parts of the model are called instead of the model itself"):
        optimizer.step()


def test_two_makers_do_not_treat_one_parameter_of_one_optimizer() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = gm.PreconditionedOptimizer(gm.SoapGradientMaker(model), base)
    with pytest.raises(ValueError, match=r"preconditions 0\.weight.* as well"):
        gm.KfacGradientMaker(model).attach(optimizer)


BASES: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", RECIPES)
def test_a_base_that_undoes_the_method_is_warned_of_at_once(method: str, base: str) -> None:
    with pytest.warns(gm.BaseOptimizerWarning, match=rf"{base} .*use torch.optim.SGD"):
        gm.optimizer(network(), method, lr=0.01, base=BASES[base])


@pytest.mark.parametrize("method", RECIPES)
def test_two_optimizers_go_on_bitwise(method: str, tmp_path: Path) -> None:
    made: list[Any] = []
    for _ in range(2):
        model = network()
        made.append((model, [gm.optimizer(model, method, half, **FREE[method]) for half in halves(model)]))
    (model, optimizers), (other, fresh) = made
    for x, t in batches(3):
        step(model, optimizers, x, t)
    other.load_state_dict(through_file(model.state_dict(), tmp_path))
    for one, two in zip(optimizers, fresh, strict=True):
        two.load_state_dict(through_file(one.state_dict(), tmp_path))
    for x, t in batches(3, start=3):
        step(model, optimizers, x, t)
        step(other, fresh, x, t)
    assert same(weights(model), weights(other))
