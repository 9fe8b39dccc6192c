"""K-FAC-expand and K-FAC-reduce chosen layer by layer: each layer gets what it gets where all layers choose its way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import FisherExact
from tests import models, oracles
from tests.models import CLASSES, Case

EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}


class Mixer(nn.Module):
    """A convolution, two linear maps of its positions, a norm, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 3, 3)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(torch.tanh(self.convolution(x)).mT)).sum(1))
        return y


def mixer() -> Case:
    return models.build(Mixer, 5, 2, 6)


def directions(make: Callable[[], Case], method: str, sharing: Any) -> dict[str, Tensor]:
    """P g of every parameter, in one step from zero statistics."""
    case = make()
    options = {} if method == "kflr" else {"fisher": FisherExact()}
    maker: Any = METHODS[method](case.model, METHODS[method].Config(sharing=sharing, damping=0.05, **options, **EVERY_STEP))
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    return {k: p.grad.clone() for k, p in case.model.named_parameters() if p.grad is not None}


SHARING: dict[str, Callable[[], Case]] = {
    "mixer": mixer,
    "attention": models.attention,
    "convolution": partial(models.convolution, 2, groups=2),
    "tagger": partial(models.tagger, mix=True),
}


@pytest.mark.parametrize("method", ["kfac", "kflr", "ekfac"])
@pytest.mark.parametrize("name", SHARING)
def test_each_layer_is_that_of_its_uniform_choice(name: str, method: str) -> None:
    make = SHARING[name]
    uniform = {how: directions(make, method, how) for how in ("expand", "reduce")}
    names = [k.removesuffix(".weight") for k in uniform["expand"] if k.endswith(".weight")]
    differing = [k for k in names if oracles.relative_error(*(uniform[how][f"{k}.weight"] for how in uniform)) > 1e-3]
    assert len(differing) > (0 if name == "convolution" else 1)  # the embedding, the norm and a pooled head do not care
    for chosen in differing:
        found = directions(make, method, {chosen: "reduce"})
        for key, value in found.items():
            how = "reduce" if key.rpartition(".")[0] == chosen else "expand"
            assert oracles.relative_error(value, uniform[how][key]) < 1e-12, (chosen, key)


@pytest.mark.parametrize("split", ["pi", "exact"])
def test_mixed_choices_against_factors_by_hand(split: str) -> None:
    case = mixer()
    choice = {"convolution": "reduce", "body.0": "expand", "body.3": "reduce", "head": "expand"}
    options: Any = {"fisher": FisherExact(), "split": split, "damping": 0.05, "sharing": choice, **EVERY_STEP}
    maker: Any = METHODS["kfac"](case.model, METHODS["kfac"].Config(**options))
    raw = dict(
        zip(dict(case.model.named_parameters()), torch.autograd.grad(case.run(), [*case.model.parameters()]), strict=True)
    )
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    columns = oracles.exact_columns("categorical", case.t)
    reference = mixer()
    for name, how in choice.items():
        ((A, B),) = oracles.kfac_factors(reference.model, case.x, name, columns, len(case.x), sharing=how)
        g = torch.cat([raw[f"{name}.weight"].flatten(1), raw[f"{name}.bias"].unsqueeze(1)], 1)
        module = case.model.get_submodule(name)
        assert isinstance(module.weight, Tensor) and isinstance(module.bias, Tensor)
        assert module.weight.grad is not None and module.bias.grad is not None
        found = torch.cat([module.weight.grad.flatten(1), module.bias.grad.unsqueeze(1)], 1)
        assert oracles.relative_error(found, oracles.kfac_direction(g, A, B, damping=0.05, split=split)) < 1e-10, name


# --- how layers are named -------------------------------------------------------------------------------------------------
def choices(model: nn.Module, sharing: Any, **options: Any) -> dict[str, str]:
    """Layer -> its choice, of those with Kronecker factors."""
    maker: Any = METHODS["kfac"](model, METHODS["kfac"].Config(sharing=sharing, **options))
    held = [(s.name, b.triple.representation) for b in maker.plan.blocks for s in b.sites]
    return {name: r.sharing for name, r in held if hasattr(r, "sharing")}


@pytest.mark.parametrize(
    ("sharing", "reduced"),
    [
        ("reduce", {"convolution", "body.0", "body.3", "head"}),
        ({"*": "reduce"}, {"convolution", "body.0", "body.3", "head"}),
        ({"body": "reduce"}, {"body.0", "body.3"}),  # what lies inside of a module that is named
        ({"body.3.weight": "reduce"}, {"body.3"}),
        ({"body.[03]": "reduce"}, {"body.0", "body.3"}),
        ({nn.Conv1d: "reduce"}, {"convolution"}),
        ({nn.Sequential: "reduce"}, {"body.0", "body.3"}),
        ({Mixer: "reduce"}, {"convolution", "body.0", "body.3", "head"}),
        ({"body.0": "expand", nn.Linear: "reduce"}, {"body.3", "head"}),  # the first rule decides
        ({nn.Linear: "reduce", "body.0": "expand"}, {"body.0", "body.3", "head"}),
        ([["head", "reduce"]], {"head"}),
    ],
)
def test_rules_name_layers_as_those_of_ignore_do(sharing: Any, reduced: set[str]) -> None:
    found = choices(Mixer(), sharing)
    assert {name for name, how in found.items() if how == "reduce"} == reduced
    assert set(found) == {"convolution", "body.0", "body.3", "head"}


def test_a_module_itself_is_a_rule() -> None:
    model = Mixer()
    assert choices(model, {model.body[3]: "reduce"})["body.3"] == "reduce"
    assert choices(model, {model.body: "reduce"}, bias="separate")["body.3.bias"] == "reduce"


def test_layers_inside_of_attention_have_names() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    everything = choices(Attending(), {nn.MultiheadAttention: "reduce"})
    assert len(everything) == 4 and set(everything.values()) == {"reduce"}
    one = list(everything)[-1]
    assert {k for k, how in choices(Attending(), {one: "reduce"}).items() if how == "reduce"} == {one}


@pytest.mark.parametrize(
    ("sharing", "text"),
    [
        ({"haed": "reduce"}, r"'haed' names no layer .*expected convolution, body.0, body.3, head; did you mean 'head'\?"),
        ({"head": "reduce", "tail.*": "expand"}, r"'tail\.\*' names no layer"),
        ({nn.Conv2d: "reduce"}, "Conv2d.*names no layer"),
        ({"body.2": "reduce"}, r"'body.2' names no layer"),  # a norm layer has no two factors
        ({nn.Linear(2, 2): "reduce"}, "names no layer"),
    ],
)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_rule_that_names_no_layer_is_refused_with_the_layers(method: str, sharing: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"sharing: .*{text}"):
        METHODS[method](Mixer(), METHODS[method].Config(sharing=sharing))


def test_an_embedding_is_expanded_whatever_is_said() -> None:
    with pytest.raises(ValueError, match="sharing: 'embedding' names no layer"):
        METHODS["kfac"](models.Tagger("last", False), METHODS["kfac"].Config(sharing={"embedding": "reduce"}))


@pytest.mark.parametrize(
    ("sharing", "text"),
    [
        ("exband", "sharing='exband': expected expand, reduce, or a mapping.*; did you mean 'expand'"),
        ({"head": "reduced"}, r"sharing\['head'\]='reduced': expected expand, reduce; did you mean 'reduce'"),
        ({3: "reduce"}, "sharing=3: expected a module, a class of modules or a name pattern"),
        ({}, "expected expand, reduce, or a mapping as in"),
        (None, "expected expand, reduce, or a mapping as in"),
        (["reduce"], "expected expand, reduce, or a mapping as in"),
    ],
)
@pytest.mark.parametrize("method", ["kfac", "kflr", "ekfac"])
def test_illegal_choices(method: str, sharing: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        METHODS[method].Config(sharing=sharing)


def test_spellings_are_one_config(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "kfac.yaml"
    path.write_text("method: kfac\nsharing:\n  body.*: reduce\n  head: expand\n")
    expected = METHODS["kfac"].Config(sharing={"body.*": "reduce", "head": "expand"})
    assert from_config(Mixer(), path).config == expected and hash(expected) == hash(from_config(Mixer(), path).config)
    assert METHODS["kfac"].Config(**vars(expected)) == expected


def test_it_trains_and_resumes() -> None:
    case, twin = mixer(), mixer()
    config = METHODS["kfac"].Config(sharing={"body": "reduce"}, damping=0.1)
    maker, second = (METHODS["kfac"](c.model, config) for c in (case, twin))
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    first = case.run().item()
    for _ in range(20):
        optimizer.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
        optimizer.step()
    assert case.run().item() < 0.5 * first
    second.load_state_dict(maker.state_dict())
    assert second.step == 20
