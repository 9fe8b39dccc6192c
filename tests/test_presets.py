"""Presets are named options, wherever a method is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import gradmaker
from gradmaker import METHODS, from_config

ALL = [(name, key) for name in METHODS for key in getattr(METHODS[name].Config, "presets", {})]


@pytest.mark.parametrize(("method", "preset"), ALL)
def test_a_preset_is_its_options(method: str, preset: str) -> None:
    kind: Any = METHODS[method].Config
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    given = from_config(model, {"method": method, "preset": preset}).config
    assert given == kind(**kind.presets[preset])
    assert given != kind()


def test_given_options_override_a_preset() -> None:
    model = nn.Linear(4, 3)
    found = from_config(model, {"method": "shampoo", "preset": "large", "max_dim": 2}).config
    assert found.max_dim == 2


def test_wrong_presets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preset='larg'.*large"):
        from_config(nn.Linear(4, 3), {"method": "shampoo", "preset": "larg"})
    with pytest.raises(ValueError, match="has no presets"):
        from_config(nn.Linear(4, 3), {"method": "adam", "preset": "large"})
    with pytest.raises(ValueError, match=r"preset='larg'.*large"):
        gradmaker.optimizer(nn.Linear(4, 3), "shampoo", lr=0.1, preset="larg")


def test_the_optimizer_tells_what_a_preset_stands_for(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with caplog.at_level(logging.INFO, "gradmaker"):
        made = gradmaker.optimizer(model, "shampoo", lr=0.1, preset="large")
    told = next(r.getMessage() for r in caplog.records if "preset" in r.getMessage())
    assert "'large' of shampoo" in told and "max_dim=" in told
    assert made.maker.config.max_dim == METHODS["shampoo"].Config.presets["large"]["max_dim"]
    model(torch.randn(5, 4)).square().sum().backward()
    made.step()


def test_groups_take_presets() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = {"0.*": {"method": "muon", "preset": "large"}, "*": "adam"}
    config = from_config(model, {"method": "adam", "groups": groups}).config
    assert config.groups[0].config.iteration == "polar_express"
