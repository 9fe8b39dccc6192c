"""gradmaker: gradient preconditioning as curvature x representation x solver.

Public names are imported when they are first used (PEP 562): ``import gradmaker`` costs nothing beside ``import torch``.
"""

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

_root = _Path(__file__).resolve().parents[1]
if (_root / "setup.cfg").is_file():  # a checkout: curvature/, representations/ and solvers/ sit beside this folder
    __path__ = [str(_root / "gradmaker"), str(_root)]
del _root

if TYPE_CHECKING:  # for type checkers and editors; at run time makers and configs are found through `METHODS`
    from gradmaker.compare import Comparison as Comparison, Task as Task, compare as compare
    from gradmaker.config import GradientConfig as GradientConfig
    from gradmaker.costs.layers import cost_report as cost_report
    from gradmaker.costs.prediction import cost as cost
    from gradmaker.damping_sweep import damping_sweep as damping_sweep
    from gradmaker.errors import (
        CostError as CostError,
        CostlyMethodWarning as CostlyMethodWarning,
        SelfCheckError as SelfCheckError,
        SelfCheckWarning as SelfCheckWarning,
    )
    from gradmaker.fidelity import (
        Fidelity as Fidelity,
        FidelityAlong as FidelityAlong,
        fidelity as fidelity,
        fidelity_along as fidelity_along,
    )
    from gradmaker.front_door.bases import BaseOptimizerWarning as BaseOptimizerWarning
    from gradmaker.front_door.factory import CoverageWarning as CoverageWarning, optimizer as optimizer
    from gradmaker.front_door.optimizer import (
        PreconditionedOptimizer as PreconditionedOptimizer,
        SkippedStepWarning as SkippedStepWarning,
    )
    from gradmaker.maker import GradientMaker as GradientMaker, PlainGradientConfig as PlainGradientConfig
    from gradmaker.methods import from_config as from_config
    from gradmaker.methods.adagrad import (
        AdagradGradientConfig as AdagradGradientConfig,
        AdagradGradientMaker as AdagradGradientMaker,
    )
    from gradmaker.methods.adahessian import (
        AdahessianGradientConfig as AdahessianGradientConfig,
        AdahessianGradientMaker as AdahessianGradientMaker,
    )
    from gradmaker.methods.adam import AdamGradientConfig as AdamGradientConfig, AdamGradientMaker as AdamGradientMaker
    from gradmaker.methods.caspr import CasprGradientConfig as CasprGradientConfig, CasprGradientMaker as CasprGradientMaker
    from gradmaker.methods.caspr_adaptive import (
        CasprAdaptiveGradientConfig as CasprAdaptiveGradientConfig,
        CasprAdaptiveGradientMaker as CasprAdaptiveGradientMaker,
    )
    from gradmaker.methods.curveball import (
        CurveballGradientConfig as CurveballGradientConfig,
        CurveballGradientMaker as CurveballGradientMaker,
    )
    from gradmaker.methods.custom import (
        CustomGradientConfig as CustomGradientConfig,
        CustomGradientMaker as CustomGradientMaker,
    )
    from gradmaker.methods.ekfac import EkfacGradientConfig as EkfacGradientConfig, EkfacGradientMaker as EkfacGradientMaker
    from gradmaker.methods.esgd import EsgdGradientConfig as EsgdGradientConfig, EsgdGradientMaker as EsgdGradientMaker
    from gradmaker.methods.fang import FangGradientConfig as FangGradientConfig, FangGradientMaker as FangGradientMaker
    from gradmaker.methods.full_adagrad import (
        FullAdagradGradientConfig as FullAdagradGradientConfig,
        FullAdagradGradientMaker as FullAdagradGradientMaker,
    )
    from gradmaker.methods.ggt import GgtGradientConfig as GgtGradientConfig, GgtGradientMaker as GgtGradientMaker
    from gradmaker.methods.hessian_free import (
        HessianFreeGradientConfig as HessianFreeGradientConfig,
        HessianFreeGradientMaker as HessianFreeGradientMaker,
    )
    from gradmaker.methods.kbfgs import (
        KbfgsGradientConfig as KbfgsGradientConfig,
        KbfgsGradientMaker as KbfgsGradientMaker,
        KbfgsLGradientConfig as KbfgsLGradientConfig,
        KbfgsLGradientMaker as KbfgsLGradientMaker,
    )
    from gradmaker.methods.kfac import KfacGradientConfig as KfacGradientConfig, KfacGradientMaker as KfacGradientMaker
    from gradmaker.methods.kflr import KflrGradientConfig as KflrGradientConfig, KflrGradientMaker as KflrGradientMaker
    from gradmaker.methods.kfra import KfraGradientConfig as KfraGradientConfig, KfraGradientMaker as KfraGradientMaker
    from gradmaker.methods.kl_shampoo import (
        KlShampooGradientConfig as KlShampooGradientConfig,
        KlShampooGradientMaker as KlShampooGradientMaker,
    )
    from gradmaker.methods.krad import (
        KradagradGradientConfig as KradagradGradientConfig,
        KradagradGradientMaker as KradagradGradientMaker,
        KradagradStarGradientConfig as KradagradStarGradientConfig,
        KradagradStarGradientMaker as KradagradStarGradientMaker,
    )
    from gradmaker.methods.ksd import KsdGradientConfig as KsdGradientConfig, KsdGradientMaker as KsdGradientMaker
    from gradmaker.methods.lbfgs import LbfgsGradientConfig as LbfgsGradientConfig, LbfgsGradientMaker as LbfgsGradientMaker
    from gradmaker.methods.lissa import LissaGradientConfig as LissaGradientConfig, LissaGradientMaker as LissaGradientMaker
    from gradmaker.methods.mfac import MfacGradientConfig as MfacGradientConfig, MfacGradientMaker as MfacGradientMaker
    from gradmaker.methods.muon import MuonGradientConfig as MuonGradientConfig, MuonGradientMaker as MuonGradientMaker
    from gradmaker.methods.natural_gradient import (
        DiagonalNaturalGradientConfig as DiagonalNaturalGradientConfig,
        DiagonalNaturalGradientMaker as DiagonalNaturalGradientMaker,
        FullNaturalGradientConfig as FullNaturalGradientConfig,
        FullNaturalGradientMaker as FullNaturalGradientMaker,
        LayerNaturalGradientConfig as LayerNaturalGradientConfig,
        LayerNaturalGradientMaker as LayerNaturalGradientMaker,
        UnitNaturalGradientConfig as UnitNaturalGradientConfig,
        UnitNaturalGradientMaker as UnitNaturalGradientMaker,
    )
    from gradmaker.methods.neumann import (
        NeumannGradientConfig as NeumannGradientConfig,
        NeumannGradientMaker as NeumannGradientMaker,
        NeumannPracticalGradientConfig as NeumannPracticalGradientConfig,
        NeumannPracticalGradientMaker as NeumannPracticalGradientMaker,
    )
    from gradmaker.methods.newton import (
        NewtonGradientConfig as NewtonGradientConfig,
        NewtonGradientMaker as NewtonGradientMaker,
    )
    from gradmaker.methods.one_sided import (
        OneSidedGradientConfig as OneSidedGradientConfig,
        OneSidedGradientMaker as OneSidedGradientMaker,
    )
    from gradmaker.methods.psgd import (
        PsgdGradientConfig as PsgdGradientConfig,
        PsgdGradientMaker as PsgdGradientMaker,
        PsgdKfGradientConfig as PsgdKfGradientConfig,
        PsgdKfGradientMaker as PsgdKfGradientMaker,
        PsgdWhitenGradientConfig as PsgdWhitenGradientConfig,
        PsgdWhitenGradientMaker as PsgdWhitenGradientMaker,
    )
    from gradmaker.methods.saddle_free import (
        SaddleFreeGradientConfig as SaddleFreeGradientConfig,
        SaddleFreeGradientMaker as SaddleFreeGradientMaker,
    )
    from gradmaker.methods.saddle_free_diagonal import (
        SaddleFreeDiagonalGradientConfig as SaddleFreeDiagonalGradientConfig,
        SaddleFreeDiagonalGradientMaker as SaddleFreeDiagonalGradientMaker,
    )
    from gradmaker.methods.seng import SengGradientConfig as SengGradientConfig, SengGradientMaker as SengGradientMaker
    from gradmaker.methods.shampoo import (
        ShampooGradientConfig as ShampooGradientConfig,
        ShampooGradientMaker as ShampooGradientMaker,
    )
    from gradmaker.methods.skfac import SkfacGradientConfig as SkfacGradientConfig, SkfacGradientMaker as SkfacGradientMaker
    from gradmaker.methods.smw import (
        SmwGaussNewtonGradientConfig as SmwGaussNewtonGradientConfig,
        SmwGaussNewtonGradientMaker as SmwGaussNewtonGradientMaker,
        SmwNaturalGradientConfig as SmwNaturalGradientConfig,
        SmwNaturalGradientMaker as SmwNaturalGradientMaker,
    )
    from gradmaker.methods.soap import (
        EshampooGradientConfig as EshampooGradientConfig,
        EshampooGradientMaker as EshampooGradientMaker,
        SoapGradientConfig as SoapGradientConfig,
        SoapGradientMaker as SoapGradientMaker,
    )
    from gradmaker.methods.tnt import TntGradientConfig as TntGradientConfig, TntGradientMaker as TntGradientMaker
    from gradmaker.methods.tonga import (
        TongaGradientConfig as TongaGradientConfig,
        TongaGradientMaker as TongaGradientMaker,
        TongaUnitGradientConfig as TongaUnitGradientConfig,
        TongaUnitGradientMaker as TongaUnitGradientMaker,
    )
    from gradmaker.options.registry import Registry as Registry, register as register
    from gradmaker.preconditioner import (
        Preconditioned as Preconditioned,
        PreconditionedGradientMaker as PreconditionedGradientMaker,
    )
    from gradmaker.scale.targets import checkpoint_targets as checkpoint_targets
    from gradmaker.triple import Triple as Triple, TripleError as TripleError, legality as legality
    from gradmaker.version import __version__ as __version__

    METHODS: Registry[type[GradientMaker]]

_MODULES = {
    "__version__": "version",
    "BaseOptimizerWarning": "front_door.bases",
    "Comparison": "compare",
    "CostError": "errors",
    "CostlyMethodWarning": "errors",
    "CoverageWarning": "front_door.factory",
    "Fidelity": "fidelity",
    "FidelityAlong": "fidelity",
    "GradientConfig": "config",
    "GradientMaker": "maker",
    "METHODS": "options.registry",
    "PlainGradientConfig": "maker",
    "Preconditioned": "preconditioner",
    "PreconditionedGradientMaker": "preconditioner",
    "PreconditionedOptimizer": "front_door.optimizer",
    "Registry": "options.registry",
    "SelfCheckError": "errors",
    "SelfCheckWarning": "errors",
    "SkippedStepWarning": "front_door.optimizer",
    "Task": "compare",
    "Triple": "triple",
    "TripleError": "triple",
    "compare": "compare",
    "checkpoint_targets": "scale.targets",
    "cost": "costs.prediction",
    "cost_report": "costs.layers",
    "damping_sweep": "damping_sweep",
    "fidelity": "fidelity",
    "fidelity_along": "fidelity",
    "from_config": "methods",
    "legality": "triple",
    "optimizer": "front_door.factory",
    "register": "options.registry",
}
"""The module of each public name that belongs to no method."""


def _of_methods() -> dict[str, object]:
    """The makers of the library's methods and their configs, by name."""
    from gradmaker.options.registry import METHODS

    makers = [maker for maker in METHODS.values() if maker.__module__.startswith(f"{__name__}.")]
    return {made.__name__: made for maker in makers for made in (maker, maker.Config)}


def _public() -> list[str]:
    return sorted({*_MODULES, *_of_methods()})


def _find(name: str) -> object:
    """A public name, or a submodule, imported on demand. AttributeError if there is none."""
    if name in _MODULES:
        return getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name == "__all__":
        return _public()
    if name.endswith(("GradientMaker", "GradientConfig")) and name in (found := _of_methods()):
        return found[name]
    missing = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):
        raise AttributeError(missing)
    try:
        return _import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(missing) from None


if not TYPE_CHECKING:  # where any name would do

    def __getattr__(name):
        value = globals()[name] = _find(name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})


class _Package(_ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Ignore a submodule with the name of a public function, for which the import system would replace the function."""
        if not (name in _MODULES and isinstance(value, _ModuleType)):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package


class _Moved:
    """A finder of modules by their earlier names; the last one in the import system."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        """The spec of a module that was moved; None for any other."""
        if name.partition(".")[0] != __name__:
            return None
        from gradmaker.options.deprecations import moved_module

        return moved_module(name)


_sys.meta_path.append(_Moved)  # type: ignore[arg-type]
