"""`optimizer`: names of options, default routes, groups, and the step that it makes."""

from __future__ import annotations

import logging
import warnings
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.config import GradientConfig
from gradmaker.curvature import Categorical
from gradmaker.front_door.factory import CoverageWarning
from gradmaker.front_door.left_to_adam import left_to_adam
from gradmaker.front_door.routes import BASE_OPTIONS
from gradmaker.options.registry import METHODS


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Gpt(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x) + self.pos_embed[:, : x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def gpt(tied: bool = False) -> Gpt:
    torch.manual_seed(0)
    return Gpt(tied).double()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(7, (3, 5), generator=g), torch.randint(7, (15,), generator=g)


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The param group of each parameter."""
    own = {p: k for k, p in model.named_parameters()}
    return {own[p]: j for j, group in enumerate(optimizer.param_groups) for p in group["params"]}


# --- names ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [m for m in METHODS if m != "gradient"])
def test_no_option_of_a_method_has_a_name_of_the_base_or_of_the_factory(method: str) -> None:
    taken = {*BASE_OPTIONS, "max_norm", "base", "adam", "accumulation", "scaler", "model", "method", "params"}
    assert not taken & {f.name for f in fields(METHODS[method].Config)}


def test_flat_options_go_to_the_base_and_to_the_config() -> None:
    found = gm.optimizer(mlp(), "kfac", lr=0.03, momentum=0.8, nesterov=True, weight_decay=1e-4, damping=0.1, max_norm=2.0)
    (group,) = found.param_groups
    assert isinstance(found.base_optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.03, 0.8, True, 1e-4)
    assert found.maker.config.damping == 0.1 and found.max_norm == 2.0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"dampign": 1.0}, r"'dampign' is no option of KfacGradientConfig: .*did you mean 'damping'"),
        ({"learning_rate": 1.0}, r"'learning_rate' is no option"),
        ({"max_nrom": 1.0}, r"did you mean 'max_norm'"),
        ({"lr": -1.0}, r"lr=-1.0"),
        ({"momentum": 1.0}, r"momentum=1.0"),
        ({"weight_decay": -1e-4}, r"weight_decay=-0.0001"),
        ({"max_norm": 0.0}, r"max_norm=0.0"),
        ({"beta1": 0.9, "momentum": 0.9}, r"momentum=0.9: kfac averages gradients itself \(beta1=0.9\)"),
        ({"base": torch.optim.Rprop, "momentum": 0.9}, r"Rprop has no such option"),
        ({"damping": -1.0}, r"damping=-1.0"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gm.optimizer(mlp(), "kfac", **{"lr": 0.1, **given})


@pytest.mark.parametrize("method", ["kfacc", "gradient", None, 3])
def test_a_method_that_preconditions_nothing_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"method=|preconditions nothing"):
        gm.optimizer(mlp(), method, lr=0.1)


def test_a_method_is_a_name_a_mapping_or_a_config() -> None:
    one = gm.optimizer(mlp(), {"method": "kfac", "damping": 0.5}, lr=0.1)
    two = gm.optimizer(mlp(), gm.KfacGradientConfig(damping=0.5, fallback="adam"), lr=0.1)
    assert one.maker.config.damping == two.maker.config.damping == 0.5
    assert gm.optimizer(mlp(), two.maker.config, lr=0.1, damping=0.2).maker.config.damping == 0.2


# --- the average is taken once --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["kfac", "ekfac", "soap", "shampoo", "muon", "adam", "adagrad", "smw_ng", "psgd_whiten"])
def test_by_default_gradients_are_averaged_once_at_most(method: str) -> None:
    model = gpt()
    found = gm.optimizer(model, method, lr=0.01)
    of = {p: b.options for b in found.maker.plan.blocks for s in b.sites for p in s.parameters.values()}
    for group in found.param_groups:
        for p in group["params"]:
            assert not (group["momentum"] and of[p].beta1)
    momenta = {group["momentum"] for group in found.param_groups if group["method"] == method}
    assert momenta == {0.0 if found.maker.config.beta1 else found.maker.config.usage.momentum}


def test_momentum_in_place_of_the_methods_own_average() -> None:
    with pytest.raises(ValueError, match=r"soap averages gradients itself \(beta1=0.95\)"):
        gm.optimizer(gpt(), "soap", lr=0.01, momentum=0.9)
    found = gm.optimizer(gpt(), "soap", lr=0.01, momentum=0.9, beta1=0)
    assert {g["method"]: g["momentum"] for g in found.param_groups} == {"adam": 0.0, "soap": 0.9}


def test_a_partial_gives_options_of_the_base() -> None:
    found = gm.optimizer(mlp(), "kfac", lr=0.1, base=partial(torch.optim.SGD, momentum=0.3, dampening=0.1))
    assert found.param_groups[0]["momentum"] == 0.3 and found.param_groups[0]["dampening"] == 0.1


def test_a_partial_keeps_what_is_not_given_flat() -> None:
    base = partial(torch.optim.SGD, weight_decay=0.2, momentum=0.3, nesterov=True)
    (group,) = gm.optimizer(mlp(), "kfac", lr=0.1, base=base).param_groups
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.2, 0.3, True)
    (group,) = gm.optimizer(mlp(), "kfac", lr=0.1, base=base, weight_decay=0.0, nesterov=False).param_groups
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.0, 0.3, False)


def test_a_config_is_routed_as_its_name_is() -> None:
    for method in ("kfac", "soap"):
        named, given = gm.optimizer(gpt(), method, lr=0.1), gm.optimizer(gpt(), METHODS[method].Config(), lr=0.1)
        shown = [[(g["method"], g["lr"], g["momentum"], len(g["params"])) for g in o.param_groups] for o in (named, given)]
        assert shown[0] == shown[1] and "adam" in [row[0] for row in shown[0]]


def test_options_of_adam_are_refused_where_nothing_is_left_to_it() -> None:
    with pytest.raises(ValueError, match="adam= would have no effect"):
        gm.optimizer(mlp(), "kfac", lr=0.1, adam={"lr": 1e-4})
    with pytest.raises(ValueError, match="adam= would have no effect"):
        gm.optimizer(gpt(), "soap", lr=0.1, adam={"lr": 1e-4}, groups={"embed.*": "adam", "*": "soap"})


def test_a_base_without_momentum_gets_none() -> None:
    found = gm.optimizer(mlp(), "kfac", lr=0.1, base=torch.optim.ASGD)
    assert isinstance(found.base_optimizer, torch.optim.ASGD) and found.param_groups[0]["lr"] == 0.1


# --- routes ---------------------------------------------------------------------------------------------------------------
HIDDEN = {f"blocks.{j}.{k}.weight" for j in range(2) for k in ("qkv", "out")}


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_weights_are_found(tied: bool) -> None:
    model = gpt(tied)
    assert {k for k, _ in model.named_parameters()} - set(left_to_adam(model)) == HIDDEN


def test_the_only_matrix_is_hidden() -> None:
    assert left_to_adam(nn.Linear(3, 2)) == ("bias",)
    assert left_to_adam(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))) == ("0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("method", ["soap", "shampoo", "muon", "kl_shampoo", "caspr"])
def test_methods_for_hidden_weights_leave_the_rest_to_adam(method: str) -> None:
    model = gpt()
    found = gm.optimizer(model, method, lr=0.01, adam={"lr": 0.002, "decay": 0.9})
    groups = names(model, found)
    assert {k for k in groups if found.param_groups[groups[k]]["method"] == method} == HIDDEN
    assert {g["method"]: g["lr"] for g in found.param_groups} == {"adam": 0.002, method: 0.01}
    decays = {k: b.options.decay for b in found.maker.plan.blocks for s in b.sites for k in s.parameters}
    assert decays["embed.weight"] == decays["norm.bias"] == 0.9 and decays["blocks.0.qkv.weight"] != 0.9


def test_adam_has_the_rate_of_a_method_with_steps_of_its_size_alone() -> None:
    rates = {
        method: {g["lr"] for g in gm.optimizer(gpt(), method, lr=0.01, **options).param_groups}
        for method, options in (("soap", {}), ("shampoo", {}), ("muon", {}))
    }
    assert rates == {"soap": {0.01}, "shampoo": {0.01, 1e-3}, "muon": {0.01, 1e-3}}
    assert {g["lr"] for g in gm.optimizer(gpt(), "muon", lr=0.01, scale="rms").param_groups} == {0.01}


def test_what_kfac_does_not_cover_goes_to_adam() -> None:
    model = gpt()
    found = gm.optimizer(model, "kfac", lr=0.1, adam={"lr": 0.003, "beta1": 0.5})
    groups = names(model, found)
    assert {k for k in groups if found.param_groups[groups[k]]["method"] == "adam"} == {"pos_embed"}
    assert {g["method"]: (g["lr"], g["momentum"]) for g in found.param_groups} == {"kfac": (0.1, 0.9), "adam": (0.003, 0.0)}
    assert found.maker.plan.methods["fallback"].beta1 == 0.5


def test_groups_have_their_own_options() -> None:
    model = gpt()
    groups = {
        "embed.*": {"method": "adam", "lr": 0.3, "weight_decay": 0.0, "damping": 1e-4},
        ("*.bias", nn.LayerNorm): "adam",
        "head.*": {"method": "soap", "lr": 0.02},
        "blocks.0.*": {"method": "soap", "preconditioner_interval": 3},
        "*": "soap",
    }
    found = gm.optimizer(model, "soap", lr=0.01, weight_decay=0.1, groups=groups)
    of = names(model, found)
    rates = {k: (found.param_groups[j]["lr"], found.param_groups[j]["weight_decay"]) for k, j in of.items()}
    assert rates["embed.weight"] == (0.3, 0.0) and rates["head.weight"] == (0.02, 0.1) and rates["norm.bias"] == (0.01, 0.1)
    assert len(found.param_groups) == 5  # one for each pattern
    assert of["blocks.0.qkv.weight"] != of["blocks.1.qkv.weight"] != of["head.weight"]
    assert found.maker.plan.methods["blocks.0.*"].preconditioner_interval == 3


def test_a_parameter_without_a_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="groups: no rule matches"):
        gm.optimizer(gpt(), "soap", lr=0.01, groups={"*embed*": "adam"})
    with pytest.raises(ValueError, match="adam= would have no effect"):
        gm.optimizer(mlp(), "adam", lr=0.01, adam={"lr": 0.1})


# --- params ---------------------------------------------------------------------------------------------------------------
def test_given_param_groups_keep_their_options() -> None:
    model = gpt()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    given = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    found = gm.optimizer(model, "soap", given, lr=0.01)
    of = names(model, found)
    assert set(of) == {k for k, _ in model.named_parameters()}
    for k, p in model.named_parameters():
        assert found.param_groups[of[k]]["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    assert [g["method"] for g in found.param_groups] == ["adam", "soap", "adam"]
    assert given == [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def test_named_parameters_and_subsets() -> None:
    model = mlp()
    found = gm.optimizer(model, "kfac", model[0].named_parameters(), lr=0.1)
    assert set(names(model, found)) == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match=r"a tensor of shape \(8, 4\) that is no parameter of the model"):
        gm.optimizer(model, "kfac", mlp().parameters(), lr=0.1)


def test_parameters_that_are_ignored_keep_their_gradient() -> None:
    model = mlp()
    found = gm.optimizer(model, "kfac", lr=0.1, ignore=("4",))
    assert {g["method"] for g in found.param_groups} == {"kfac", "gradient"}


# --- the step -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["kfac", "soap", "muon", "shampoo", "adam"])
def test_the_step_is_that_of_the_declared_protocol(method: str) -> None:
    """Oracle: the makers of the two groups, each in the declared protocol, and SGD by hand."""
    model, other = gpt(), gpt()
    found = gm.optimizer(model, method, lr=0.01, weight_decay=0.1, max_norm=0.5)
    maker: Any = METHODS[method](other, found.maker.config)
    momentum: dict[str, Tensor] = {}
    x, t = tokens()
    of = {k: found.param_groups[j] for k, j in names(model, found).items()}
    for _ in range(3):
        found.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), t).backward()
        found.step()
        other.zero_grad()
        y = maker.setup_model_call(other, x)
        maker.setup_loss_call(F.cross_entropy, y.flatten(0, 1), t)
        maker.forward_and_backward()
        g = {k: p.grad for k, p in other.named_parameters() if p.grad is not None}
        norm = torch.stack([v.norm() for v in g.values()]).norm()
        with torch.no_grad():
            for k, p in other.named_parameters():
                u = g[k] * min(1.0, float(0.5 / (norm + 1e-6)))
                momentum[k] = of[k]["momentum"] * momentum.get(k, torch.zeros_like(u)) + u
                p.mul_(1 - of[k]["lr"] * 0.1)
                p.sub_(of[k]["lr"] * momentum[k])
        for k, p in model.named_parameters():
            torch.testing.assert_close(p, other.get_parameter(k), rtol=1e-9, atol=1e-11, msg=k)


def test_a_likelihood_by_name_is_that_of_a_mean_over_tokens() -> None:
    """As `attach` takes it; it is what is read from the gradient of such a loss."""
    models = gpt(), gpt()
    read, named = (
        gm.optimizer(m, "kfac", lr=0.1, **o) for m, o in zip(models, ({}, {"likelihood": "categorical"}), strict=True)
    )
    assert named.maker.config.likelihood == Categorical(axis=-1)
    x, t = tokens()
    for _ in range(3):
        for model, optimizer in zip(models, (read, named), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), t).backward()
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=r"likelihood='categoric'.*did you mean 'categorical'"):
        gm.optimizer(gpt(), "kfac", lr=0.1, likelihood="categoric")


# --- what is said ---------------------------------------------------------------------------------------------------------
def test_the_share_of_each_method_is_logged(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="gradmaker"):
        gm.optimizer(gpt(), "kfac", lr=0.1)
    assert "kfac treats" in caplog.text and "adam" in caplog.text


def test_a_method_that_treats_little_is_warned_of() -> None:
    model = nn.Sequential(nn.Embedding(200, 4), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.warns(CoverageWarning, match="muon treats|muon"):
        gm.optimizer(model, "muon", lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm.optimizer(mlp(), "kfac", lr=0.1)


def test_presets_are_of_configs() -> None:
    assert GradientConfig.usage.momentum == 0.9 and not GradientConfig.usage.hidden


# --- every method ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [m for m in METHODS if m != "gradient"])
def test_every_method_steps_or_says_that_it_needs_the_declared_calls(method: str) -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    x, t = torch.randn(16, 4).double(), torch.randint(3, (16,))
    try:
        found = gm.optimizer(model, method, lr=0.01)
    except ValueError as error:
        assert "has to differentiate or repeat the loss" in str(error)
        assert {type(b.triple.curvature).__name__ for b in METHODS[method](model).plan.blocks} <= {  # type: ignore[attr-defined]
            *("Hessian", "GaussNewton", "HessianProbe", "Secant", "LayerSecant"),
        }
        return
    for _ in range(2):
        found.zero_grad()
        F.cross_entropy(model(x), t).backward()
        raw = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert any(not torch.allclose(p.grad, g) for p, g in zip(model.parameters(), raw, strict=True) if p.grad is not None)


# --- cost -----------------------------------------------------------------------------------------------------------------
def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


@pytest.mark.parametrize(("options", "warned"), [({}, 1), ({"preconditioner_interval": 50}, 0)])
def test_a_costly_default_is_told_before_the_first_step(options: dict[str, Any], warned: int, monkeypatch: Any) -> None:
    """At the first pass, once; not for intervals that were chosen."""
    monkeypatch.setattr("gradmaker.front_door.factory.WITHIN", 60.0)
    monkeypatch.setattr("gradmaker.front_door.factory.MOST", 60.0)
    monkeypatch.setattr("gradmaker.costs.prediction.COSTLY", 1.5)  # whatever the rates of this machine
    model = wide()
    found = gm.optimizer(model, "kfac", lr=0.1, **options)
    x, t = torch.randn(16, 400), torch.randint(10, (16,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            found.zero_grad()
            F.cross_entropy(model(x), t).backward()
            found.step()
    told = [w for w in seen if issubclass(w.category, gm.CostlyMethodWarning)]
    assert len(told) == warned
    if told:
        assert "x Adam's" in str(told[0].message) and "preconditioner_interval=" in str(told[0].message)
    assert not found.maker.silent()
