"""Configs: every wrong value is refused with its name, every spelling of a method means the same, every parameter is shown."""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradmaker as gm
from gradmaker.config import GradientConfig
from gradmaker.curvature import BatchGradient, Bernoulli, Categorical, FisherEmp, FisherExact, FisherMC
from gradmaker.representations import Diagonal, Kron
from gradmaker.schedule import Linear, Stepped
from gradmaker.solvers import Division, Eigh
from tests.models import ZOO, bare_scale, mlp, normed
from tests.registry import legal_options, taken

CONFIGS: dict[str, Any] = {name: make.Config for name, make in gm.METHODS.items()}
PRECONDITIONED = [name for name in CONFIGS if name != "gradient"]
NAN, INF = float("nan"), float("inf")

OF_AN_OPTIMIZER = {"lr", "weight_decay", "momentum", "nesterov"}
"""Names that no method may give its own options: they are for the optimizer that takes the preconditioned gradient."""

WRONG: dict[str, list[Any]] = {
    "damping": [-1e-9, INF, NAN, "1", True],
    "decay": [-0.1, 1.0, 1, 1.5, NAN, "0.9", True],
    "beta1": [-0.1, 1.0, None, NAN, True],
    "curvature_interval": [0, -1, 1.5, None, True, "weekly", {"Linear": {"first": 1}}, {"Linear": {"frist": 1}}, {}],
    "preconditioner_interval": [0, 2.0, [1], {"Stepped": 3}, {"Linear": {}, "Stepped": {}}],
    "warmup_steps": [-1, 1.5, None, True],
    "start_step": [-1, "0", None],
    "stagger": ["yes", None, 2],
    "nesterov_average": ["yes", None, 2],
    "ignore": ["head", nn.Linear, nn.Linear(1, 1), 3, (3,), (int,), (None,)],
    "groups": [
        3,
        "adam",
        [("a", "adam")],
        {3: "adam"},
        {"a": "adamm"},
        {"a": {"damping": 1.0}},
        {"a": {"method": "kfac", "start_step": 2}},
    ],
    "grafting": ["kept", None, "sgd"],
    "grafting_decay": [-0.1, 1.0, None, NAN, "0.9", True],
    "failures_allowed": [-1, 1.5, "3", True],
    "max_dim": [0, -1, 1.5, None],
    "dtype": ["float16", "double", torch.float16, torch.int64, 32],
    "seed": [None, 1.5, "0"],
    "likelihood": ["categoric", 3, Categorical, {"categorical": {"axes": 1}}],
    "loss_reduction": ["none", None, "avg"],
    "batch_axis": [-1, 1.5, None, True],
    "self_check": ["warn", None, False, "Error"],
}
OWN: list[tuple[str, str, Any]] = [
    ("kfac", "fisher", "FisherMCC"),
    ("kfac", "fisher", FisherMC),
    ("kfac", "fisher", None),
    ("kfac", "fisher", {"FisherMC": {"samples": 0}}),
    ("kfac", "fisher", {"FisherMC": {"sample": 1}}),
    ("kfac", "fisher", {"FisherMC": 2}),
    ("kfac", "fisher", {"FisherMC": {}, "FisherEmp": {}}),
    ("kfac", "split", "phi"),
    ("kfac", "sharing", "expanded"),
    ("kfac", "bias", "both"),
    ("kfac", "damping", None),
    ("shampoo", "root", "lu"),
    ("shampoo", "damping", None),
    ("adam", "damping", None),
    ("unit_ng", "fisher", 3),
    ("full_ng", "fisher", "Hessan"),
    ("custom", "curvature", "Fisher"),
    ("custom", "representation", Diagonal),
    ("custom", "solver", {"Eigh": {"powers": 2}}),
]


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [(m, k, v) for m in ("kfac", "shampoo") for k, values in WRONG.items() for v in values] + OWN,
    ids=lambda v: getattr(v, "__name__", None) or str(v)[:24],
)
def test_a_wrong_value_is_refused_by_name(method: str, key: str, value: Any) -> None:
    if key == "sharing":
        with pytest.raises(ValueError, match="sharing"):
            gm.KfacGradientMaker(mlp().model, gm.KfacGradientConfig(sharing=value))
        return
    options = {"FisherMC": "FisherMC|samples", "Linear": "Linear", "Eigh": "Eigh", "categorical": "Categorical|categorical"}
    inner = options.get(next(iter(value), ""), key) if isinstance(value, dict) else key
    with pytest.raises(ValueError, match=rf"{key}|{inner}"):
        CONFIGS[method](**{key: value})


def test_the_table_of_wrong_values_misses_no_field() -> None:
    assert {f.name for f in fields(GradientConfig)} - {"fallback"} == set(WRONG)


GOOD: dict[str, list[Any]] = {
    "damping": [0, 0.0, 1e9],
    "decay": [0, 0.0, 0.999999, None],
    "beta1": [0, 0.9],
    "curvature_interval": [1, 10**6, Linear(first=1, last=2, total=3)],
    "dtype": [None, "float32", torch.float64],
    "ignore": [(), [], ["0*"], (nn.Tanh,)],
    "likelihood": [None, "categorical", Bernoulli(), {"gaussian": {"reduction": "sum"}}],
    "seed": [0, -5, 2**70],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in GOOD.items() for v in values])
def test_the_ends_of_the_ranges_are_legal(key: str, value: Any) -> None:
    gm.KfacGradientConfig(**{key: value})


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_frozen_keyword_only_values(name: str) -> None:
    config = CONFIGS[name]()
    assert config == CONFIGS[name]() and hash(config) == hash(CONFIGS[name]())
    with pytest.raises(TypeError):
        CONFIGS[name](1e-3)
    if name != "gradient" and "damping" not in config.inapplicable_options():
        assert replace(config, damping=0.5) != config and replace(config, damping=0.5).damping == 0.5
        with pytest.raises(FrozenInstanceError):
            config.damping = 1
        assert hash(CONFIGS[name](**legal_options(name, curvature_interval=Stepped(milestones={0: 1}))))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_option_has_the_name_of_an_optimizers(name: str) -> None:
    assert not {f.name for f in fields(CONFIGS[name])} & OF_AN_OPTIMIZER


# --- spellings ------------------------------------------------------------------------------------------------------------
SAME: dict[str, tuple[dict[str, Any], Any]] = {
    "names": ({"method": "kfac", "fisher": "FisherEmp"}, gm.KfacGradientConfig(fisher=FisherEmp())),
    "options": (
        {"method": "kfac", "fisher": {"FisherMC": {"samples": 2}}, "damping": 0.5},
        gm.KfacGradientConfig(fisher=FisherMC(samples=2), damping=0.5),
    ),
    "no options": ({"method": "kfac", "fisher": {"FisherExact": None}}, gm.KfacGradientConfig(fisher=FisherExact())),
    "parts": ({"method": "kfac", "fisher": FisherExact()}, gm.KfacGradientConfig(fisher=FisherExact())),
    "schedules": (
        {
            "method": "shampoo",
            "curvature_interval": {"Linear": {"first": 1, "last": 5, "total": 10}},
            "preconditioner_interval": {"Stepped": {"milestones": {0: 1, 100: 10}}},
        },
        gm.ShampooGradientConfig(
            curvature_interval=Linear(first=1, last=5, total=10),
            preconditioner_interval=Stepped(milestones={0: 1, 100: 10}),
        ),
    ),
    "likelihood": (
        {"method": "kfac", "likelihood": {"categorical": {"axis": -1}}},
        gm.KfacGradientConfig(likelihood=Categorical(axis=-1)),
    ),
    "list": ({"method": "kfac", "ignore": ["2", "*.bias"]}, gm.KfacGradientConfig(ignore=("2", "*.bias"))),
    "sum": ({"method": "kfac", "decay": None}, gm.KfacGradientConfig(decay=None)),
    "plain": ({"method": "gradient"}, gm.PlainGradientConfig()),
    "triple": (
        {
            "method": "custom",
            "curvature": {"FisherMC": {"samples": 2}},
            "representation": {"Kron": {}},
            "solver": {"Eigh": {"power": -0.5}},
        },
        gm.CustomGradientConfig(curvature=FisherMC(samples=2), representation=Kron(), solver=Eigh(power=-0.5)),
    ),
    "triple by names": (
        {"method": "custom", "curvature": "BatchGradient", "representation": "Diagonal", "solver": "Division", "damping": 0.1},
        gm.CustomGradientConfig(
            curvature=BatchGradient(), representation=Diagonal(), solver=replace(Division(), damping=0.1), damping=0.1
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_mappings_and_files_mean_the_dataclass(name: str, tmp_path: Path) -> None:
    import yaml

    mapping, config = SAME[name]
    given = dict(mapping)
    assert gm.from_config(mlp().model, mapping).config == config
    assert mapping == given  # the caller's mapping stays as it is
    if name != "parts":
        path = tmp_path / "method.yaml"
        path.write_text(yaml.safe_dump(mapping))
        for source in (path, str(path)):
            assert gm.from_config(mlp().model, source).config == config


def test_a_file_may_write_numbers_as_python_does(tmp_path: Path) -> None:
    path = tmp_path / "method.yaml"
    path.write_text(
        "method: custom\ndamping: 1e-3\nignore: ['1e5x']\ncurvature: {FisherMC: {samples: 2}}\n"
        "representation: {Kron: {}}\nsolver: {Eigh: {power: -5E-1}}\n"
    )
    with pytest.raises(ValueError, match="'1e5x' matches no parameter"):  # read as far as the model
        gm.from_config(mlp().model, path)
    path.write_text(path.read_text().replace("ignore: ['1e5x']\n", ""))
    config: Any = gm.from_config(mlp().model, path).config
    assert config.damping == 1e-3 and config.solver.power == -0.5


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, r"needs the key 'method': expected gradient, adagrad, adam, kfac"),
        ({"method": "kfacc"}, r"method='kfacc': expected gradient, .*; did you mean 'kfac'\?"),
        ({"method": "zzz"}, r"method='zzz': expected gradient"),
        ({"method": ["kfac"]}, r"method=\['kfac'\]"),
        (
            {"method": "kfac", "dampin": 1},
            r"method 'kfac' has no option 'dampin': expected .*decay.*; did you mean 'damping'\?",
        ),
        ({"method": "adam", "fisher": "FisherMC"}, r"method 'adam' has no option 'fisher'"),
        ({"method": "gradient", "damping": 1}, r"method 'gradient' has no option 'damping'"),
        ({"method": "kfac", "fisher": "FisherMc"}, r"fisher: 'FisherMc' is unknown: expected .*; did you mean 'FisherMC'\?"),
        (
            {"method": "kfac", "fisher": {"FisherMC": {"sample": 2}}},
            r"FisherMC has no option 'sample': expected .*; did you mean 'samples'\?",
        ),
        ({"method": "kfac", "curvature_interval": {"Linear": {"first": 1}}}, r"Linear: .*missing"),
        ({"method": "custom", "solver": "Cholesky", "representation": "Diagonal"}, r"Cholesky needs .*Solvers that fit"),
        ({"method": "kfac", "ignore": "2"}, r"ignore='2': expected a sequence"),
    ],
)
def test_wrong_mappings_are_refused_with_what_is_legal(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gm.from_config(mlp().model, given)


def test_files_that_are_not_there_or_not_mappings(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"kfac: no such file; give a YAML file, or a mapping like \{'method': 'kfac'\}"
    ):
        gm.from_config(mlp().model, "kfac")
    (tmp_path / "list.yaml").write_text("- kfac\n")
    with pytest.raises(ValueError, match=r"list.yaml: expected a mapping with the key 'method', got list"):
        gm.from_config(mlp().model, tmp_path / "list.yaml")


def test_yaml_is_needed_for_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    path = tmp_path / "x.yaml"
    path.write_text("method: adam")
    monkeypatch.setattr(builtins, "__import__", without)
    gm.from_config(mlp().model, {"method": "adam"})
    with pytest.raises(ImportError, match=r"needs PyYAML: pip install 'gradmaker\[compare\]'"):
        gm.from_config(mlp().model, path)


# --- which parameters -----------------------------------------------------------------------------------------------------
class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x))
        return y


BODY = {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "body.2.0.weight", "body.2.0.bias"}
HEAD = {"head.weight", "head.bias"}
IGNORED: dict[str, tuple[Callable[[Any], tuple[Any, ...]], set[str]]] = {
    "nothing": (lambda m: (), set()),
    "instance": (lambda m: (m.head,), HEAD),
    "instance with modules inside": (lambda m: (m.body,), BODY),
    "class": (lambda m: (nn.LayerNorm,), {"body.1.weight", "body.1.bias"}),
    "class with modules inside": (lambda m: (nn.Sequential,), BODY),
    "name of a module": (lambda m: ("head",), HEAD),
    "name of a module with modules inside": (lambda m: ("body",), BODY),
    "pattern of modules": (lambda m: ("body.[02]",), BODY - {"body.1.weight", "body.1.bias"}),
    "name of a parameter": (lambda m: ("head.bias",), {"head.bias"}),
    "pattern of parameters": (lambda m: ("*.bias",), {k for k in BODY | HEAD if k.endswith("bias")}),
    "several": (lambda m: (m.head, nn.LayerNorm, "body.0.bias"), HEAD | {"body.1.weight", "body.1.bias", "body.0.bias"}),
}


@pytest.mark.parametrize("name", IGNORED)
@pytest.mark.parametrize("method", ["kfac", "adam", "unit_ng", "full_ng"])
def test_what_is_ignored_keeps_its_plain_gradient(method: str, name: str) -> None:
    torch.manual_seed(0)
    model = Nested().double()
    x, t = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    nn.functional.cross_entropy(model(x), t).backward()
    plain = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rules, expected = IGNORED[name]
    maker: Any = gm.from_config(model, {"method": method, "ignore": list(rules(model))})
    maker.setup_loss_call(nn.functional.cross_entropy, maker.setup_model_call(model, x), t)
    maker.forward_and_backward()
    found = {k for k, p in model.named_parameters() if p.grad is not None and torch.equal(p.grad, plain[k])}
    assert found == expected == set(maker.plan.plain)
    assert set(maker.plan.plain.values()) <= {"ignored"}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("haed", r"'haed' matches no parameter: expected .*; did you mean 'head'\?"),
        ("HEAD", r"'HEAD' matches no parameter"),
        (nn.Conv2d, r"Conv2d'> matches no parameter: .*Linear"),
        (nn.Tanh, r"Tanh'> matches no parameter"),
        ("body.2.1", r"'body.2.1' matches no parameter"),
        (nn.Linear(4, 4), r"Linear\(.*\) matches no parameter"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(rule: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"ignore: .*{text}"):
        gm.KfacGradientMaker(Nested(), gm.KfacGradientConfig(ignore=(rule,)))


@pytest.mark.parametrize("fallback", [m for m in CONFIGS if m != "custom"])
def test_what_a_method_does_not_cover_goes_to_the_fallback(fallback: str) -> None:
    case = bare_scale()
    maker: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(fallback=fallback))
    covered = {k for b in maker.plan.blocks for s in b.sites for k in s.parameters}
    leaving = ("gradient", "kfac", "kflr", "kfra", "ekfac", "skfac", "tnt", "smw_ng", "smw_gn", "seng", "kbfgs", "kbfgs_l")
    plain = {"scale"} if fallback in leaving else set()
    assert set(maker.plan.plain) == plain and covered == {k for k, _ in case.model.named_parameters()} - plain
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()


@pytest.mark.parametrize("fallback", ["adamm", "custom", "", None])
def test_an_unknown_fallback_is_refused(fallback: Any) -> None:
    with pytest.raises(ValueError, match=r"fallback=.*expected gradient, adagrad, adam, kfac"):
        gm.KfacGradientMaker(bare_scale().model, gm.KfacGradientConfig(fallback=fallback))


# --- the summary ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", PRECONDITIONED)
def test_the_summary_shows_every_trainable_parameter_once(method: str) -> None:
    for name, case in taken(method, ZOO):
        options = {"bias": "separate"} if method == "kfac" and name.endswith("e") else {}
        maker: Any = gm.METHODS[method](case.model, CONFIGS[method](**options))
        rows = maker.summary().rows
        shown = Counter(k for row in rows for k in row[0].split(", "))
        assert shown == Counter(k for k, p in case.model.named_parameters() if p.requires_grad), name
        text = str(maker.summary())
        assert text.startswith("parameters") and text.endswith(f"total {maker.summary().bytes:,} bytes")
        assert len(text.splitlines()) == len(rows) + 3


def test_the_summary_counts_bytes_and_marks_what_was_not_reached() -> None:
    case = ZOO["unused"]()
    maker: Any = gm.KfacGradientMaker(case.model)
    fresh = maker.summary().bytes
    assert fresh == sum(v.numel() * v.element_size() for b in maker.plan.blocks for v in b.state.values())
    assert "not reached" not in str(maker.summary())
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    tensors = [v for b in maker.plan.blocks for part in (b.state, b.cache) for v in part.values()]
    assert maker.summary().bytes == sum(v.numel() * v.element_size() for v in tensors) > fresh
    assert [row[0] for row in maker.summary().rows if "not reached" in row[0]] == ["idle.weight, idle.bias (not reached)"]
    assert maker.silent() == ["idle"]


def test_the_summary_gives_the_reason_for_a_plain_gradient() -> None:
    case = normed()
    maker: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(ignore=(nn.LayerNorm,)))
    rows = {row[0]: row for row in maker.summary().rows}
    assert rows["norm.weight"][2:] == ("ignored", "-", "plain gradient", 0)
    assert rows["first.weight, first.bias"][1] == "1 x (4, 5)"


def test_a_fallback_averages_by_its_own_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    maker = gm.KfacGradientMaker(model, gm.KfacGradientConfig(fallback="adam", decay=0.5))
    decays = {s.name: b.options.decay for b in maker.plan.blocks for s in b.sites}
    assert decays == {"0": 0.5, "1.weight": gm.AdamGradientConfig().decay, "2": 0.5}
