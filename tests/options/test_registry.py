"""Registration: what is registered is legal everywhere, what could not be used by its name is refused, nothing else changes."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradmaker
import gradmaker.methods
from gradmaker import METHODS, GradientConfig, Preconditioned, Triple, TripleError, from_config, legality, register
from gradmaker.capture.rules.layers import RULES, LinearRule
from gradmaker.curvature import CURVATURES, BatchGradient
from gradmaker.grafting import GRAFTINGS, Keep
from gradmaker.options.registry import Registry, temporary_registrations
from gradmaker.representations import REPRESENTATIONS, Diagonal, Kron
from gradmaker.solvers import SOLVERS, Cholesky, Division, Solver

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("registrations")


@dataclass(frozen=True, kw_only=True)
class MineGradientConfig(GradientConfig):
    """The gradient times ``1 / (1 + damping)``, roughly."""

    per_tensor: ClassVar[bool] = True
    scale: float = 1.0

    def triple(self, site: Any) -> Triple | None:
        return Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=self.scale))


class MineGradientMaker(Preconditioned[MineGradientConfig]):
    """A method of a user."""

    Config = MineGradientConfig


@dataclass(frozen=True, kw_only=True)
class Mine(Division):
    """A solver of a user."""


@dataclass(frozen=True, kw_only=True)
class MineGradient(BatchGradient):
    """A curvature of a user."""


@dataclass(frozen=True, kw_only=True)
class MineDiagonal(Diagonal):
    """A representation of a user."""


class MineKeep(Keep):
    """A grafting rule of a user."""


class Layer(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class LayerRule(LinearRule):
    types = (Layer,)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(maker: Any, net: nn.Module) -> None:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(net, torch.randn(5, 3)), torch.randint(2, (5,)))
    maker.forward_and_backward()


# --- a method -------------------------------------------------------------------------------------------------------------
def test_a_method_is_legal_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method='mine'"):
        from_config(model(), {"method": "mine"})
    before = [*METHODS]
    assert register("mine", MineGradientMaker) is MineGradientMaker
    assert [*METHODS] == [*before, "mine"] and len(METHODS) == len(before) + 1 and METHODS["mine"] is MineGradientMaker
    (tmp_path / "mine.yaml").write_text("method: mine\nscale: 1e-2\n")
    for given in ({"method": "mine", "scale": 1e-2}, tmp_path / "mine.yaml"):
        net = model()
        maker: Any = from_config(net, given)
        assert isinstance(maker, MineGradientMaker) and maker.config.scale == 1e-2
        step(maker, net)
    fallback: Any = from_config(nn.Sequential(nn.Linear(3, 3), Layer(3, 2)), {"method": "kfac", "fallback": "mine"})
    assert Division(power=-0.5, damping=1.0) in {b.triple.solver for b in fallback.plan.blocks}
    for option, method in (("method", "mime"), ("fallback", "kfac")):
        with pytest.raises(ValueError, match=r"custom, mine; did you mean 'mine'|kbfgs_l, mine; did you mean 'mine'"):
            from_config(model(), {"method": method, **({"fallback": "mime"} if option == "fallback" else {})})


def test_the_decorator_gives_back_what_it_decorates() -> None:
    @register("other")
    class OtherGradientMaker(Preconditioned[MineGradientConfig]):
        Config = MineGradientConfig

    assert METHODS["other"] is OtherGradientMaker


def test_rows_of_the_comparison() -> None:
    pytest.importorskip("yaml")
    from gradmaker.compare.parsing import parse_rows

    register("mine", MineGradientMaker)
    row, other = parse_rows(["mine", {"method": "mine", "scale": 2.0, "label": "twice"}], None, None)
    assert row.maker == {"method": "mine"} and other.label == "twice"


def test_registrations_are_undone() -> None:
    before = {registry.kind: dict(registry.entries) for registry in Registry.known}
    with temporary_registrations():
        for name, given in (("mine", MineGradientMaker), ("mine", MineKeep()), (None, Mine), (None, LayerRule)):
            register(name, given) if name else register(given)  # type: ignore[call-overload]
        assert "mine" in METHODS and "mine" in GRAFTINGS and "Mine" in SOLVERS and "LayerRule" in RULES
    assert {registry.kind: dict(registry.entries) for registry in Registry.known} == before


# --- parts ----------------------------------------------------------------------------------------------------------------
def test_parts_are_legal_in_configs_errors_and_tables() -> None:
    for part in (MineGradient, MineDiagonal, Mine):
        assert register(part) is part
    assert [*CURVATURES][-1] == "MineGradient" and [*REPRESENTATIONS][-1] == "MineDiagonal" and [*SOLVERS][-1] == "Mine"
    given = {
        "method": "custom",
        "curvature": "MineGradient",
        "representation": "MineDiagonal",
        "solver": {"Mine": {"power": -0.5}},
    }
    net = model()
    maker: Any = from_config(net, given)
    assert maker.config.solver == Mine(power=-0.5) and maker.config.curvature == MineGradient()
    step(maker, net)
    with pytest.raises(TripleError, match=r"Solvers that fit .*, Mine$"):
        Triple(MineGradient(), MineDiagonal(), Cholesky())
    with pytest.raises(ValueError, match=r"'Mime' is unknown: .* did you mean 'Mine'\?"):
        from_config(model(), {"method": "custom", "solver": "Mime"})
    assert ("MineGradient", "MineDiagonal(tensor)", "Mine", None) in [*legality()]


def test_a_layer_rule_that_is_registered_later_comes_first() -> None:
    net = nn.Sequential(Layer(3, 2))
    assert {s.kind for b in maker_of(net).plan.blocks for s in b.sites} == {"generic"}
    assert register(LayerRule) is LayerRule
    maker = maker_of(net)
    assert {s.kind for b in maker.plan.blocks for s in b.sites} == {"matrix"} and isinstance(RULES["LayerRule"], LayerRule)

    class Again(LayerRule):
        pass

    register("Again", Again())
    assert {type(s.rule) for b in maker_of(net).plan.blocks for s in b.sites} == {Again}


def maker_of(net: nn.Module) -> Any:
    return from_config(net, {"method": "unit_ng"})


def test_one_rule_of_the_library_fits_a_layer() -> None:
    kinds = [kind for rule in RULES.values() for kind in rule.types]
    assert len(kinds) == len({*kinds})
    assert not [(a, b) for a in kinds for b in kinds if a is not b and issubclass(a, b) and a.forward is b.forward]


def test_a_grafting_rule_is_an_option() -> None:
    register("mine", MineKeep())
    net = model()
    maker: Any = from_config(net, {"method": "shampoo", "grafting": "mine"})
    step(maker, net)
    assert {type(b.options.grafting) for b in maker.plan.blocks} == {MineKeep}
    with pytest.raises(ValueError, match=r"grafting='mime': expected none, keep, .*, mine; did you mean 'mine'\?"):
        from_config(net, {"method": "shampoo", "grafting": "mime"})


# --- refusals -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Needy(Division):
    rank: int = field()


class Plain(Division):
    pass


class AbstractGradientMaker(Preconditioned[GradientConfig]):
    Config = GradientConfig


class Settings:
    pass


class LooseGradientMaker(gradmaker.GradientMaker):
    Config = Settings


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (("kfac", MineGradientMaker), ValueError, "the method 'kfac' is one of the library's: give yours a name of its own"),
        (("mine", AbstractGradientMaker), ValueError, "AbstractGradientMaker has an abstract Config, .*: it lacks triple"),
        (("mine", LooseGradientMaker), ValueError, "LooseGradientMaker has a Config that is no dataclass"),
        ((MineGradientMaker,), ValueError, r"a method is registered by a name: register\('...', MineGradientMaker\)"),
        ((MineKeep(),), ValueError, r"a grafting rule is registered by a name"),
        (("mine", Mine), ValueError, "a solver bears the name of its class"),
        ((Needy,), ValueError, "Needy has to be made without arguments too: give a default to rank"),
        ((Plain,), ValueError, "Plain is no dataclass: write @register above @dataclass"),
        ((Solver,), ValueError, "Solver is abstract: it lacks "),
        (
            (type("Kron", (MineDiagonal,), {"__dataclass_fields__": {}}),),
            ValueError,
            "the representation 'Kron' is registered al",
        ),
        (("keep", MineKeep()), ValueError, "the grafting rule 'keep' is registered already, as Keep"),
        ((nn.Linear,), TypeError, "none of these: a method, .*a layer rule, .*a solver"),
        (("mine", 3), TypeError, "3 is none of these"),
        ((Division(),), TypeError, r"Division\(.*\) is none of these"),
    ],
)
def test_what_could_not_be_used_is_refused(given: Any, error: type[Exception], text: str) -> None:
    before = [dict(registry.entries) for registry in Registry.known]
    with pytest.raises(error, match=text):
        register(*given)
    assert [dict(registry.entries) for registry in Registry.known] == before


def test_one_definition_may_run_again_and_another_may_not() -> None:
    """As a cell of a notebook does."""

    def define(name: str) -> Any:
        return dataclass(frozen=True)(type(name, (Division,), {"__module__": "notebook", "__qualname__": name}))

    first, second = define("Cell"), define("Cell")
    register(first)
    register(second)
    assert SOLVERS["Cell"] is second
    register("mine", MineGradientMaker)
    with pytest.raises(ValueError, match="the method 'mine' is registered already, as <class"):
        register("mine", type("Other", (MineGradientMaker,), {}))


def test_a_maker_says_the_config_that_it_is_typed_with() -> None:
    with pytest.raises(
        TypeError, match="Wrong is a maker for MineGradientConfig: its body has to say Config = MineGradientConfig"
    ):

        class Wrong(Preconditioned[MineGradientConfig]):
            pass

    maker = MineGradientMaker(model(), MineGradientConfig(scale=2.0))
    assert maker.config.scale == 2.0
    with pytest.raises(TypeError, match="MineGradientMaker takes a MineGradientConfig, got AdamGradientConfig"):
        MineGradientMaker(model(), gradmaker.AdamGradientConfig())  # type: ignore[arg-type]


# --- the library's own ----------------------------------------------------------------------------------------------------
def test_the_table_of_methods_is_what_their_modules_register() -> None:
    found = {}
    for module in pkgutil.iter_modules(gradmaker.methods.__path__, "gradmaker.methods."):
        for made in vars(import_module(module.name)).values():
            if isinstance(made, type) and made.__module__ == module.name and issubclass(made, gradmaker.GradientMaker):
                found[made] = module.name
    registered = {maker: METHODS.expected[name] for name, maker in METHODS.items()}
    bases = {maker for maker in found if maker not in registered}
    assert not [base for base in bases if not any(issubclass(maker, base) for maker in registered)]
    assert registered == {gradmaker.GradientMaker: "gradmaker.maker"} | {m: n for m, n in found.items() if m not in bases}
    assert list(METHODS) == list(METHODS.expected) and METHODS.entries.keys() == METHODS.expected.keys()


def test_parts_bear_the_names_of_their_classes() -> None:
    for registry in (CURVATURES, REPRESENTATIONS, SOLVERS):
        assert all(name == part.__name__ for name, part in registry.items())
    assert all(name == type(rule).__name__ for name, rule in RULES.items())
    assert repr(CURVATURES).startswith("Registry(curvature: FisherExact, FisherMC") and Kron in REPRESENTATIONS.values()


def python(code: str, *arguments: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_a_method_is_imported_when_it_is_looked_up(tmp_path: Path) -> None:
    code = """
import sys, gradmaker
loaded = lambda: sorted(name for name in sys.modules if name.startswith("gradmaker.methods."))
print("soap" in gradmaker.METHODS, len(gradmaker.METHODS), loaded())
print(gradmaker.METHODS["adam"].__name__, loaded())
"""
    first, second = python(code, folder=tmp_path).splitlines()
    assert first == f"True {len(METHODS)} []" and second == "AdamGradientMaker ['gradmaker.methods.adam']"


MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

from gradmaker import GradientConfig, Preconditioned, Triple, register
from gradmaker.curvature import BatchGradient
from gradmaker.representations import Diagonal
from gradmaker.solvers import Division


@dataclass(frozen=True, kw_only=True)
class MineGradientConfig(GradientConfig):
    per_tensor: ClassVar[bool] = True

    def triple(self, site):
        return Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=self.damping))


@register("mine")
class MineGradientMaker(Preconditioned[MineGradientConfig]):
    """Mine."""

    Config = MineGradientConfig
'''


def test_a_method_is_a_row_of_the_tests_over_all_methods(tmp_path: Path) -> None:
    (tmp_path / "my_methods.py").write_text(MODULE)
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    wanted = ["-p", "my_methods", "-p", "no:cacheprovider", "-q", "-k", "mine and not thirty", "tests/methods/test_methods.py"]
    printed = python(code, *wanted, folder=tmp_path)
    passed = int(printed.rpartition(" passed")[0].split()[-1])
    assert passed >= 60 and "failed" not in printed, printed
