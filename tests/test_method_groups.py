"""Groups: methods by name pattern, in one maker with one plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.curvature import FisherExact
from gradmaker.plan import FALLBACK


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.hidden(self.norm(self.embed(x)).mean(1))) * self.scale)


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randint(7, (6, 3), generator=g), torch.randint(3, (6,), generator=g)) for _ in range(count)]


def step(maker: Any, batch: tuple[Tensor, Tensor]) -> None:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(maker.model, batch[0]), batch[1])
    maker.forward_and_backward()


def directions(maker: Any, count: int) -> list[dict[str, Tensor]]:
    found = []
    for batch in batches(count):
        step(maker, batch)
        found.append({k: p.grad.clone() for k, p in maker.model.named_parameters()})
        with torch.no_grad():
            for p in maker.model.parameters():
                p -= 0.01 * p.grad.sign()  # the same weights whatever the preconditioner of another group
                p.grad = None
    return found


SPLIT = {("embed.*", nn.LayerNorm, "*.bias", "scale"): {"method": "adam", "beta1": 0.5}, "*": "soap"}
REST = ("hidden.weight", "head.weight")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("soap", {"preconditioner_interval": 2}),
        ("shampoo", {}),
        ("kfac", {"fisher": FisherExact()}),
        ("muon", {}),
        ("adam", {}),
    ],
)
def test_each_group_gets_what_its_method_alone_gives(method: str, options: dict[str, Any]) -> None:
    config: Any = gm.METHODS[method].Config
    rest = {"method": "esgd" if method == "adam" else "adam", "damping": 1e-3}
    groups = {"hidden.*": method, "*": rest}
    both: Any = gm.METHODS[method](tokens(), config(groups=groups, **options))
    others: Any = gm.from_config(tokens(), {**rest, "ignore": ("hidden.*",)})
    alone: Any = gm.METHODS[method](tokens(), config(ignore=("embed", "norm", "scale", "head"), **options))
    start = copy.deepcopy(both.model.state_dict())
    for j, batch in enumerate(batches(5)):
        for maker in (both, others, alone):
            maker.model.load_state_dict({k: v + 0.01 * j for k, v in start.items()})
            maker.model.zero_grad()
            step(maker, batch)
        for k, p in both.model.named_parameters():
            expected = (alone if k.startswith("hidden") else others).model.get_parameter(k).grad
            torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12, msg=k)


def test_the_first_rule_that_matches_decides() -> None:
    groups = {"hidden.weight": {"method": "adam", "damping": 0.5}, "hidden.*": "adam", nn.Module: "soap"}
    maker = gm.SoapGradientMaker(tokens(), gm.SoapGradientConfig(groups=groups))
    of = {k: b.options.method for b in maker.plan.blocks for s in b.sites for k in s.parameters}
    assert of["hidden.weight"] == "hidden.weight" and of["hidden.bias"] == "hidden.*"
    assert {of[k] for k in of if not k.startswith("hidden")} == {"method"}


def test_a_layer_may_be_divided() -> None:
    maker = gm.KfacGradientMaker(tokens(), gm.KfacGradientConfig(groups={"*.bias": "adam", "scale": "adam", "*": "kfac"}))
    found = {k: (b.options.method, tuple(s.shape)) for b in maker.plan.blocks for s in b.sites for k in s.parameters}
    assert found["hidden.weight"] == ("method", (1, 5, 4)) and found["hidden.bias"] == ("*.bias", (1, 5))
    assert maker.plan.plain == {}


def test_what_no_method_of_a_group_covers_goes_to_the_fallback() -> None:
    options: dict[str, Any] = {"groups": {"embed.*": "adam", "*": "kfac"}}
    maker = gm.KfacGradientMaker(tokens(), gm.KfacGradientConfig(fallback="adagrad", **options))
    assert {b.options.method for b in maker.plan.blocks for s in b.sites if s.name == "scale"} == {FALLBACK}
    assert "scale" in gm.KfacGradientMaker(tokens(), gm.KfacGradientConfig(**options)).plan.plain
    swapped = gm.AdamGradientConfig(groups={"*": "kfac"}, fallback="adagrad")  # adam itself leaves nothing to a fallback
    assert FALLBACK in gm.AdamGradientMaker(tokens(), swapped).plan.methods


def test_the_plain_gradient_is_a_method_of_a_group() -> None:
    maker = gm.SoapGradientMaker(tokens(), gm.SoapGradientConfig(groups={"head.*": "gradient", "*": "soap"}))
    assert maker.plan.plain == {k: "groups['head.*']: gradient" for k in ("head.weight", "head.bias")}
    plain = tokens()
    F.cross_entropy(plain(batches(1)[0][0]), batches(1)[0][1]).backward()
    step(maker, batches(1)[0])
    torch.testing.assert_close(maker.model.get_parameter("head.weight").grad, plain.get_parameter("head.weight").grad)


def test_groups_keep_their_own_intervals_and_options() -> None:
    groups = {
        "head.*": {"method": "kfac", "curvature_interval": 3, "warmup_steps": 0, "damping": 1.0},
        "scale": gm.AdamGradientConfig(beta1=0.2),
        "*": "kfac",
    }
    maker = gm.KfacGradientMaker(tokens(), gm.KfacGradientConfig(groups=groups, damping=1e-2))
    damping = {s.name: b.triple.solver.damping for b in maker.plan.blocks for s in b.sites}  # type: ignore[attr-defined]
    assert damping["head"] == 1.0 and damping["hidden"] == 1e-2
    averages = {s.name: b.options.beta1 for b in maker.plan.blocks for s in b.sites}
    assert averages["scale"] == 0.2 and averages["head"] == 0.0
    due = []
    for batch in batches(4):
        step(maker, batch)
        due.append("head.*" in maker.step_state.would_ask(maker.plan.blocks))
    assert due == [False, False, True, False]


@pytest.mark.parametrize("at", [1, 3])
def test_a_state_with_groups_resumes_bitwise(at: int) -> None:
    config = gm.SoapGradientConfig(groups=SPLIT, preconditioner_interval=2)
    whole, first = (gm.SoapGradientMaker(tokens(), config) for _ in range(2))
    expected = directions(whole, 5)
    made = batches(5)
    for batch in made[:at]:
        step(first, batch)
        with torch.no_grad():
            for p in first.model.parameters():
                assert p.grad is not None
                p -= 0.01 * p.grad.sign()
                p.grad = None
    model = tokens()
    model.load_state_dict(first.model.state_dict())
    second = gm.SoapGradientMaker(model, config)
    second.load_state_dict(first.state_dict())
    step(second, made[at])
    for k, p in model.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, expected[at][k]), k


def test_a_state_of_other_groups_is_refused() -> None:
    one = gm.SoapGradientMaker(tokens(), gm.SoapGradientConfig(groups=SPLIT))
    two = gm.SoapGradientMaker(tokens(), gm.SoapGradientConfig(groups={"*.weight": "soap", "*": "adam"}))
    step(one, batches(1)[0])
    with pytest.raises(ValueError, match="load_state_dict"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ({"embed.*": "adam"}, r"no rule matches head.bias, head.weight, hidden.bias, .* and 2 more: add one for the rest"),
        ({"emebd.*": "adam", "*": "soap"}, r"'emebd.\*' matches no parameter"),
        ({"*": "gradient"}, "no group has a method but the plain gradient"),
        ({"scale": "kfac", "*": "adam"}, r"groups\['scale'\] covers no parameter"),
        ({"embed.*": "kfra", "*": "adam"}, "kfra|FisherRecursive|covers"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused(groups: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gm.SoapGradientMaker(tokens(), gm.SoapGradientConfig(groups=groups))


def test_options_of_the_maker_are_refused_in_a_group() -> None:
    with pytest.raises(ValueError, match=r"groups\['\*'\]: clip=0.001 is an option of the whole maker"):
        gm.AdamGradientConfig(groups={"*": {"method": "kfac", "clip": 1e-3, "clip_learning_rate": 0.1}})
    with pytest.raises(ValueError, match=r"start_step=2 is an option of the whole maker"):
        gm.AdamGradientConfig(groups={"*": {"method": "kfac", "start_step": 2}})
    same = gm.AdamGradientConfig(seed=3, groups={"*": gm.KfacGradientConfig(seed=3)})  # says the same
    assert same.groups[0].config == gm.KfacGradientConfig(seed=3)  # type: ignore[index]


def test_yaml_spells_groups(tmp_path: Any) -> None:
    path = tmp_path / "soap.yaml"
    path.write_text("method: soap\ngroups:\n  'embed*': {method: adam, beta1: 0.8}\n  '*': soap\n")
    maker: Any = gm.from_config(tokens(), path)
    assert maker.plan.methods["embed*"].beta1 == 0.8


def test_adaptive_damping_is_that_of_the_maker_itself() -> None:
    config = gm.KfacGradientConfig(
        adaptive_damping={"AdaptiveDamping": {}},
        damping=1.0,
        groups={"head.*": {"method": "kfac", "damping": 1.0}, "*": "kfac"},
    )
    maker = gm.KfacGradientMaker(tokens(), config)
    assert maker.trust_region is not None
    assert {b.options.method for b in maker.trust_region._own} == {"method"}
