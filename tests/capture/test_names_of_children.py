"""Rules that name children by number, in models with ten or more of them: ``1`` names no ``10``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm


def deep() -> nn.Sequential:
    """Twelve children, and as many in the second of them."""
    inner = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    return nn.Sequential(nn.Linear(4, 3), inner, *(nn.Linear(3, 3) for _ in range(10))).double()


def inside(*names: str) -> set[str]:
    """The parameters of some layers, or of all layers in some containers."""
    every = [k for k, _ in deep().named_parameters()]
    return {k for k in every if any(k.startswith(f"{name}.") for name in names)}


RULES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "2": (("2",), inside("2")),
    "1": (("1",), inside("1")),
    "0": (("0",), inside("0")),
    "11": (("11",), inside("11")),
    "1.1": (("1.1",), inside("1.1")),
    "1.10": (("1.10",), inside("1.10")),
    "1.1*": (("1.1*",), inside("1.1", "1.10", "1.11")),
    "1?": (("1?",), inside("10", "11")),
    "[23]": (("[23]",), inside("2", "3")),
    "*.1": (("*.1",), inside("1.1")),
    "10.weight": (("10.weight",), {"10.weight"}),
    "1.1.weight": (("1.1.weight",), {"1.1.weight"}),
    "*1.bias": (("*1.bias",), {"11.bias", "1.1.bias", "1.11.bias"}),
    "2, 10": (("2", "10"), inside("2", "10")),
}


@pytest.mark.parametrize("name", RULES)
def test_ignored_children(name: str) -> None:
    torch.manual_seed(0)
    rules, expected = RULES[name]
    model = deep()
    maker: Any = gm.from_config(model, {"method": "kfac", "ignore": list(rules)})
    assert set(maker.plan.plain) == expected
    x, t = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    plain = torch.autograd.grad(F.cross_entropy(model(x), t), list(model.parameters()))
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
    maker.forward_and_backward()
    kept = {k for (k, p), g in zip(model.named_parameters(), plain, strict=True) if torch.equal(p.grad, g)}  # type: ignore[arg-type]
    assert kept == expected


class Named(nn.Module):
    """Names that begin or end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head2, self.ahead = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.blocks = nn.ModuleDict({"a": nn.Linear(3, 3), "aa": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.ahead, self.blocks["a"], self.blocks["aa"], self.head, self.head2):
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "rule, expected",
    [("head", "head"), ("blocks.a", "blocks.a"), ("*head", "head ahead"), ("head*", "head head2"), ("*.a", "blocks.a")],
)
def test_names_that_begin_or_end_alike(rule: str, expected: str) -> None:
    maker = gm.KfacGradientMaker(Named(), gm.KfacGradientConfig(ignore=(rule,)))
    assert set(maker.plan.plain) == {f"{name}.{k}" for name in expected.split() for k in ("weight", "bias")}


def test_parts_by_the_number_of_a_child() -> None:
    """``split`` reads the same rules."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    maker: Any = gm.METHODS["shampoo"](model, gm.METHODS["shampoo"].Config(split={"1.weight": 2, "10.weight": 3}))
    stacks = {s.name: s.shape[0] for b in maker.plan.blocks for s in b.sites if s.name.endswith("weight")}
    assert stacks == {f"{j}.weight": {1: 2, 10: 3}.get(j, 1) for j in range(12)}
