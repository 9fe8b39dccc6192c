"""`coverage`: every entry of every parameter in one share, and a line that is never rounder than the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gradmaker import METHODS, KfacGradientConfig, from_config
from gradmaker.methods.kfac import KfacGradientMaker
from gradmaker.options.registry import temporary_registrations
from gradmaker.plan import Plan
from gradmaker.preconditioner import Preconditioned
from gradmaker.reports.coverage import PLAIN, Coverage, Share, coverage, method_name, percent
from tests.models import ZOO
from tests.registry import taken


class Net(nn.Module):
    """A table, a norm, a matrix of each layout, and parameters outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.up = nn.Embedding(50, 4), nn.LayerNorm(4), nn.Linear(4, 30)
        self.conv, self.attention = nn.Conv1d(6, 4, 3, groups=2), nn.MultiheadAttention(4, 2)
        self.token, self.frozen = nn.Parameter(torch.zeros(1, 4)), nn.Linear(3, 3).requires_grad_(False)
        self.phase = nn.Parameter(torch.zeros(5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


NAMES = dict(Net().named_parameters())


def plan_of(model: nn.Module, method: str = "kfac", **options: Any) -> Plan:
    found: Plan = from_config(model, {"method": method, **options}).plan  # type: ignore[attr-defined]
    return found


def entries(*parts: str) -> int:
    """The entries of all parameters whose name starts so, real and imaginary parts apart."""
    return sum(p.numel() * (1 + p.is_complex()) for k, p in NAMES.items() if k.startswith(parts))


def test_shares_of_kfac() -> None:
    found = coverage(plan_of(Net(), max_dim=20))
    by_parts = {(s.method, s.parts, s.diagonal): s for s in found.shares}
    assert by_parts["kfac", "Kron x Cholesky", "one-hot"].sizes == {"table.weight": 200}
    assert by_parts["kfac", "Kron x Cholesky", "long side"].sizes == {"up.weight": 120, "up.bias": 30}
    assert by_parts["kfac", "Dense x Cholesky", ""].count == entries("norm")
    assert by_parts["kfac", "Kron x Cholesky", ""].count == entries("conv", "attention")
    plain = by_parts[PLAIN, "not covered, fallback 'gradient'", ""]
    assert plain.sizes == {"token": 4, "phase": 10}
    assert found.count == entries("") - entries("frozen")
    assert len(found.shares) == 5 and found.shares[-1] is plain
    assert found.methods == {"kfac": 1 - 14 / found.count, PLAIN: 14 / found.count}
    assert str(found) == "kfac treats 97.2 % of the parameters, plain gradient 2.8 %"
    table = found.table().splitlines()
    assert table[0] == str(found)
    assert table[-1] == "  2.8 % plain gradient: not covered, fallback 'gradient': token, phase"
    assert "kfac: Kron x Cholesky, diagonal factor of one-hot inputs" in found.table()


def test_fallback_and_ignored_have_shares() -> None:
    found = coverage(plan_of(Net(), fallback="adam", ignore=("up.*",)))
    assert list(found.methods) == ["kfac", "adam", PLAIN]
    assert found.methods["adam"] * found.count == pytest.approx(14)
    assert found.shares[-1].parts == "ignored" and set(found.shares[-1].sizes) == {"up.weight", "up.bias"}
    assert sum(found.methods.values()) == pytest.approx(1)


def test_configs_by_any_key_of_the_plan() -> None:
    """The name is that of the config under the key of the block, whatever the key is; two configs of one method add up."""
    plan = plan_of(Net(), fallback="adam")
    keys = {"method": "*.weight", "fallback": "token"}
    for block in plan.blocks:
        block.options = replace(block.options, method=keys[block.options.method])
    routed = replace(plan, methods={keys[k]: c for k, c in plan.methods.items()})
    assert coverage(routed).methods == coverage(plan_of(Net(), fallback="adam")).methods
    same = replace(routed, methods={"*.weight": KfacGradientConfig(), "token": KfacGradientConfig(damping=1.0)})
    assert coverage(same).methods == {"kfac": 1.0}
    assert str(coverage(same)) == "kfac treats 100 % of the parameters"


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("gradient", "custom")])
def test_every_entry_is_in_one_share(method: str) -> None:
    """Of parameters in parts, in pieces, in groups, tied, and of parametrizations, on the small zoo."""
    for name, case in taken(method, ZOO):
        found = coverage(METHODS[method](case.model).plan)  # type: ignore[attr-defined]
        sizes: dict[str, int] = {}
        for share in found.shares:
            assert share.method in (method, PLAIN), (name, share)
            for key, size in share.sizes.items():
                sizes[key] = sizes.get(key, 0) + size
        trained = {k: p.numel() * (1 + p.is_complex()) for k, p in case.model.named_parameters() if p.requires_grad}
        assert sizes == trained, name


def test_name_of_an_unregistered_config() -> None:
    class MineGradientConfig(KfacGradientConfig):
        pass

    class MineGradientMaker(Preconditioned[MineGradientConfig]):
        Config = MineGradientConfig

    assert method_name(MineGradientConfig()) == "Mine"
    with temporary_registrations():
        from gradmaker import register

        register("mine", MineGradientMaker)
        assert method_name(MineGradientConfig()) == "mine"
        assert method_name(KfacGradientMaker.Config()) == "kfac"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100 %"),
        (1 - 1e-9, "over 99.9 %"),
        (0.9996, "over 99.9 %"),
        (0.999, "99.9 %"),
        (0.9889, "98.9 %"),
        (0.5, "50.0 %"),
        (0.001, "0.1 %"),
        (0.0004, "under 0.1 %"),
        (0.0, "0 %"),
    ],
)
def test_percent_is_never_rounder_than_the_truth(share: float, text: str) -> None:
    assert percent(share) == text


def test_line_of_nearly_all() -> None:
    shares = [Share("kfac", "Kron x Cholesky", "", {"a": 10**6}), Share("adam", "Diagonal x Divide", "", {"b": 3})]
    assert str(Coverage(shares)) == "kfac treats over 99.9 % of the parameters, adam under 0.1 %"
