"""Options and modules under their earlier names: read with one warning that names the new one, refused beside it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import gradmaker as gm
from gradmaker.config import GradientConfig
from gradmaker.options.deprecations import MOVED_MODULES, RENAMED_OPTIONS
from gradmaker.schedule import Stepped

ROOT = Path(__file__).resolve().parents[2]
EARLIER: dict[str, Any] = {"norm": "keep", "norm_decay": 0.5, "spread": False, "momentum": 0.5, "nesterov": True}
BESIDE: dict[str, dict[str, Any]] = {"norm_decay": {"grafting": "adam"}, "nesterov": {"beta1": 0.5}}


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


def test_every_earlier_name_is_tried_here() -> None:
    common = {f.name for f in fields(gm.KfacGradientConfig)}
    assert EARLIER.keys() == RENAMED_OPTIONS.keys() and not common & RENAMED_OPTIONS.keys()


@pytest.mark.parametrize("old", EARLIER)
def test_a_config_is_made_and_read_by_earlier_names(old: str) -> None:
    new, beside = RENAMED_OPTIONS[old], BESIDE.get(old, {})
    expected = gm.KfacGradientConfig(**{new: EARLIER[old]}, **beside)
    with pytest.warns(DeprecationWarning, match=f"'{old}' is '{new}' now") as seen:
        made = gm.KfacGradientConfig(**{old: EARLIER[old]}, **beside)
    assert made == expected and len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=f"'{old}' is '{new}' now") as seen:
        assert getattr(made, old) == EARLIER[old]
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("old", EARLIER)
@pytest.mark.parametrize("source", ["mapping", "YAML"])
def test_mappings_and_files_with_earlier_names(old: str, source: str, model: nn.Module, tmp_path: Path) -> None:
    new = RENAMED_OPTIONS[old]
    given: Any = {"method": "shampoo", **BESIDE.get(old, {}), old: EARLIER[old]}
    if source == "YAML":
        (tmp_path / "config.yaml").write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in given.items()))
        given = tmp_path / "config.yaml"
    with pytest.warns(DeprecationWarning, match=f"'{old}' is '{new}' now") as seen:
        maker = gm.from_config(model, given)
    assert getattr(maker.config, new) == EARLIER[old] and len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("old", EARLIER)
def test_both_names_are_refused(old: str, model: nn.Module) -> None:
    both = {old: EARLIER[old], RENAMED_OPTIONS[old]: EARLIER[old]}
    with pytest.raises(ValueError, match=f"{old}=.*'{old}' is the earlier name of '{RENAMED_OPTIONS[old]}'"):
        gm.KfacGradientConfig(**both)
    with pytest.raises(ValueError, match=f"'{old}' is the earlier name of '{RENAMED_OPTIONS[old]}'"):
        gm.from_config(model, {"method": "kfac", **both})


def test_a_wrong_value_is_refused_by_the_new_name() -> None:
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="grafting='kept'"):
        gm.KfacGradientConfig(norm="kept")  # type: ignore[call-arg]


def test_replace_takes_both_names() -> None:
    config = gm.KfacGradientConfig(grafting="adam", damping=0.5)
    assert replace(config, grafting="keep") == gm.KfacGradientConfig(grafting="keep", damping=0.5)
    with pytest.warns(DeprecationWarning, match="'norm' is 'grafting' now") as seen:
        changed: Any = replace(config, norm="keep")  # type: ignore[call-arg]
    assert changed == gm.KfacGradientConfig(grafting="keep", damping=0.5)
    assert len(seen) == 1 and seen[0].filename == __file__


def test_names_of_today_and_wrong_names_are_as_ever(model: nn.Module) -> None:
    config: Any = gm.KfacGradientConfig(grafting="keep")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config and not hasattr(config, "norms")
    assert "grafting" in inspect.signature(gm.KfacGradientConfig).parameters
    assert "norm" not in inspect.signature(gm.KfacGradientConfig).parameters
    with pytest.raises(AttributeError, match="'norms'"):
        _ = config.norms
    with pytest.raises(ValueError, match="no option 'norms'"):
        gm.from_config(model, {"method": "kfac", "norms": "keep"})
    with pytest.raises(ValueError, match="no option 'norm'"):
        gm.from_config(model, {"method": "gradient", "norm": "keep"})  # which never had it


def test_a_config_that_declares_an_earlier_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mine\.norm: this option is 'grafting' now"):

        @dataclass(frozen=True, kw_only=True)
        class Mine(gm.ShampooGradientConfig):
            norm: str = "adam"


def test_abstract_configs_stay_abstract() -> None:
    with warnings.catch_warnings(), pytest.raises(TypeError, match="abstract"):
        GradientConfig()  # type: ignore[abstract]


# --- modules --------------------------------------------------------------------------------------------------------------
NAMES = {
    "gradmaker.layers": "LinearRule",
    "gradmaker.sites": "Site",
    "gradmaker.spectrum": "hvp",
    "gradmaker.step": "Step",
    "gradmaker.verification": "Verification",
}
FORMS = ["import {old} as found", "from {old} import {name}", "from gradmaker import {last} as found"]


def test_every_earlier_path_is_tried_here() -> None:
    assert NAMES.keys() == MOVED_MODULES.keys()


def in_use(old: str) -> bool:
    """Whether there is a package of this name still, with other contents."""
    return (ROOT / old.replace(".", "/")).is_dir()


@pytest.fixture
def unloaded() -> Iterator[None]:
    """Earlier paths as in a new process."""

    def forget() -> None:
        for old, name in NAMES.items():
            if in_use(old):
                vars(import_module(old)).pop(name, None)
            else:
                sys.modules.pop(old, None)
                vars(gm).pop(old.rpartition(".")[2], None)

    forget()
    yield
    forget()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("old", MOVED_MODULES)
def test_modules_by_earlier_paths(old: str, form: str) -> None:
    new, name = MOVED_MODULES[old], NAMES[old]
    text, expected = form.format(old=old, name=name, last=old.rpartition(".")[2]), import_module(new)
    if "as found" in text and in_use(old):
        text += f"; {name} = found.{name}"
    found: dict[str, Any] = {"__name__": "user"}
    with pytest.warns(DeprecationWarning, match=re.escape(new)) as seen:
        exec(compile(text, __file__, "exec"), found)
    assert [(w.filename, w.lineno) for w in seen] == [(__file__, 1)]
    if name in found:
        assert found[name] is getattr(expected, name)
    else:
        assert found["found"] is expected and sys.modules[old] is expected and expected.__name__ == new
    exec(text, found)  # without a warning


def test_a_name_that_was_never_there() -> None:
    for code in ("import gradmaker.nowhere", "from gradmaker.step import Nothing", "from gradmaker import nowhere"):
        with pytest.raises(ImportError, match=r"nowhere|Nothing"):
            exec(code)


def test_an_interval_of_measurements_becomes_one_of_steps() -> None:
    """``basis_interval`` counted measurements: of ekfac, which measures every tenth step, 5 were 50 steps."""
    ekfac, soap = gm.EkfacGradientConfig, gm.SoapGradientConfig
    with pytest.warns(DeprecationWarning, match="basis_interval"):
        assert ekfac(basis_interval=5).preconditioner_interval == 50  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="basis_interval"):
        assert ekfac(basis_interval=5, curvature_interval=3).preconditioner_interval == 15  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="basis_interval"):
        assert soap(basis_interval=7).preconditioner_interval == 7  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="basis_interval"):
        gm.KfacGradientConfig(basis_interval=5)  # type: ignore[call-arg]
    changing = Stepped(milestones={0: 1, 10: 5})
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="counted measurements"):
        ekfac(basis_interval=5, curvature_interval=changing)  # type: ignore[call-arg]
