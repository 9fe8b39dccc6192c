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

if TYPE_CHECKING:
    from gradmaker.compare import Comparison, Data, compare
    from gradmaker.config import GradientConfig
    from gradmaker.cost_report import cost_report
    from gradmaker.damping_sweep import damping_sweep
    from gradmaker.errors import SelfCheckError, SelfCheckWarning
    from gradmaker.maker import GradientMaker, PlainGradientConfig
    from gradmaker.methods import METHODS, from_config
    from gradmaker.methods.adagrad import AdagradGradientConfig, AdagradGradientMaker
    from gradmaker.methods.adahessian import AdahessianGradientConfig, AdahessianGradientMaker
    from gradmaker.methods.adam import AdamGradientConfig, AdamGradientMaker
    from gradmaker.methods.caspr import CasprGradientConfig, CasprGradientMaker
    from gradmaker.methods.caspr_adaptive import CasprAdaptiveGradientConfig, CasprAdaptiveGradientMaker
    from gradmaker.methods.curveball import CurveballGradientConfig, CurveballGradientMaker
    from gradmaker.methods.custom import CustomGradientConfig, CustomGradientMaker
    from gradmaker.methods.ekfac import EkfacGradientConfig, EkfacGradientMaker
    from gradmaker.methods.esgd import EsgdGradientConfig, EsgdGradientMaker
    from gradmaker.methods.fang import FangGradientConfig, FangGradientMaker
    from gradmaker.methods.full_adagrad import FullAdagradGradientConfig, FullAdagradGradientMaker
    from gradmaker.methods.ggt import GgtGradientConfig, GgtGradientMaker
    from gradmaker.methods.hessian_free import HessianFreeGradientConfig, HessianFreeGradientMaker
    from gradmaker.methods.kbfgs import KbfgsGradientConfig, KbfgsGradientMaker, KbfgsLGradientConfig, KbfgsLGradientMaker
    from gradmaker.methods.kfac import KfacGradientConfig, KfacGradientMaker
    from gradmaker.methods.kflr import KflrGradientConfig, KflrGradientMaker
    from gradmaker.methods.kfra import KfraGradientConfig, KfraGradientMaker
    from gradmaker.methods.kl_shampoo import KlShampooGradientConfig, KlShampooGradientMaker
    from gradmaker.methods.krad import (
        KradagradGradientConfig,
        KradagradGradientMaker,
        KradagradStarGradientConfig,
        KradagradStarGradientMaker,
    )
    from gradmaker.methods.ksd import KsdGradientConfig, KsdGradientMaker
    from gradmaker.methods.lbfgs import LbfgsGradientConfig, LbfgsGradientMaker
    from gradmaker.methods.lissa import LissaGradientConfig, LissaGradientMaker
    from gradmaker.methods.mfac import MfacGradientConfig, MfacGradientMaker
    from gradmaker.methods.muon import MuonGradientConfig, MuonGradientMaker
    from gradmaker.methods.natural_gradient import (
        DiagonalNaturalGradientConfig,
        DiagonalNaturalGradientMaker,
        FullNaturalGradientConfig,
        FullNaturalGradientMaker,
        LayerNaturalGradientConfig,
        LayerNaturalGradientMaker,
        UnitNaturalGradientConfig,
        UnitNaturalGradientMaker,
    )
    from gradmaker.methods.neumann import (
        NeumannGradientConfig,
        NeumannGradientMaker,
        NeumannPracticalGradientConfig,
        NeumannPracticalGradientMaker,
    )
    from gradmaker.methods.newton import NewtonGradientConfig, NewtonGradientMaker
    from gradmaker.methods.one_sided import OneSidedGradientConfig, OneSidedGradientMaker
    from gradmaker.methods.psgd import (
        PsgdGradientConfig,
        PsgdGradientMaker,
        PsgdKfGradientConfig,
        PsgdKfGradientMaker,
        PsgdWhitenGradientConfig,
        PsgdWhitenGradientMaker,
    )
    from gradmaker.methods.saddle_free import SaddleFreeGradientConfig, SaddleFreeGradientMaker
    from gradmaker.methods.saddle_free_diagonal import SaddleFreeDiagonalGradientConfig, SaddleFreeDiagonalGradientMaker
    from gradmaker.methods.seng import SengGradientConfig, SengGradientMaker
    from gradmaker.methods.shampoo import ShampooGradientConfig, ShampooGradientMaker
    from gradmaker.methods.skfac import SkfacGradientConfig, SkfacGradientMaker
    from gradmaker.methods.smw import (
        SmwGaussNewtonGradientConfig,
        SmwGaussNewtonGradientMaker,
        SmwNaturalGradientConfig,
        SmwNaturalGradientMaker,
    )
    from gradmaker.methods.soap import EshampooGradientConfig, EshampooGradientMaker, SoapGradientConfig, SoapGradientMaker
    from gradmaker.methods.tnt import TntGradientConfig, TntGradientMaker
    from gradmaker.methods.tonga import TongaGradientConfig, TongaGradientMaker, TongaUnitGradientConfig, TongaUnitGradientMaker
    from gradmaker.preconditioner import PreconditionedGradientMaker
    from gradmaker.triple import Triple, TripleError, legality

__all__ = [
    "METHODS",
    "AdagradGradientConfig",
    "AdagradGradientMaker",
    "AdahessianGradientConfig",
    "AdahessianGradientMaker",
    "AdamGradientConfig",
    "AdamGradientMaker",
    "CasprAdaptiveGradientConfig",
    "CasprAdaptiveGradientMaker",
    "CasprGradientConfig",
    "CasprGradientMaker",
    "Comparison",
    "CurveballGradientConfig",
    "CurveballGradientMaker",
    "CustomGradientConfig",
    "CustomGradientMaker",
    "Data",
    "DiagonalNaturalGradientConfig",
    "DiagonalNaturalGradientMaker",
    "EkfacGradientConfig",
    "EkfacGradientMaker",
    "EsgdGradientConfig",
    "EsgdGradientMaker",
    "EshampooGradientConfig",
    "EshampooGradientMaker",
    "FangGradientConfig",
    "FangGradientMaker",
    "FullAdagradGradientConfig",
    "FullAdagradGradientMaker",
    "FullNaturalGradientConfig",
    "FullNaturalGradientMaker",
    "GgtGradientConfig",
    "GgtGradientMaker",
    "GradientConfig",
    "GradientMaker",
    "HessianFreeGradientConfig",
    "HessianFreeGradientMaker",
    "KbfgsGradientConfig",
    "KbfgsGradientMaker",
    "KbfgsLGradientConfig",
    "KbfgsLGradientMaker",
    "KfacGradientConfig",
    "KfacGradientMaker",
    "KflrGradientConfig",
    "KflrGradientMaker",
    "KfraGradientConfig",
    "KfraGradientMaker",
    "KlShampooGradientConfig",
    "KlShampooGradientMaker",
    "KradagradGradientConfig",
    "KradagradGradientMaker",
    "KradagradStarGradientConfig",
    "KradagradStarGradientMaker",
    "KsdGradientConfig",
    "KsdGradientMaker",
    "LayerNaturalGradientConfig",
    "LayerNaturalGradientMaker",
    "LbfgsGradientConfig",
    "LbfgsGradientMaker",
    "LissaGradientConfig",
    "LissaGradientMaker",
    "MfacGradientConfig",
    "MfacGradientMaker",
    "MuonGradientConfig",
    "MuonGradientMaker",
    "NeumannGradientConfig",
    "NeumannGradientMaker",
    "NeumannPracticalGradientConfig",
    "NeumannPracticalGradientMaker",
    "NewtonGradientConfig",
    "NewtonGradientMaker",
    "OneSidedGradientConfig",
    "OneSidedGradientMaker",
    "PlainGradientConfig",
    "PreconditionedGradientMaker",
    "PsgdGradientConfig",
    "PsgdGradientMaker",
    "PsgdKfGradientConfig",
    "PsgdKfGradientMaker",
    "PsgdWhitenGradientConfig",
    "PsgdWhitenGradientMaker",
    "SaddleFreeDiagonalGradientConfig",
    "SaddleFreeDiagonalGradientMaker",
    "SaddleFreeGradientConfig",
    "SaddleFreeGradientMaker",
    "SelfCheckError",
    "SelfCheckWarning",
    "SengGradientConfig",
    "SengGradientMaker",
    "ShampooGradientConfig",
    "ShampooGradientMaker",
    "SkfacGradientConfig",
    "SkfacGradientMaker",
    "SmwGaussNewtonGradientConfig",
    "SmwGaussNewtonGradientMaker",
    "SmwNaturalGradientConfig",
    "SmwNaturalGradientMaker",
    "SoapGradientConfig",
    "SoapGradientMaker",
    "TntGradientConfig",
    "TntGradientMaker",
    "TongaGradientConfig",
    "TongaGradientMaker",
    "TongaUnitGradientConfig",
    "TongaUnitGradientMaker",
    "Triple",
    "TripleError",
    "UnitNaturalGradientConfig",
    "UnitNaturalGradientMaker",
    "compare",
    "cost_report",
    "damping_sweep",
    "from_config",
    "legality",
]
__version__ = "0.1.0"

_MODULES = {
    "Comparison": "compare",
    "Data": "compare",
    "GradientConfig": "config",
    "GradientMaker": "maker",
    "METHODS": "methods",
    "PlainGradientConfig": "maker",
    "PreconditionedGradientMaker": "preconditioner",
    "Triple": "triple",
    "TripleError": "triple",
    "compare": "compare",
    "cost_report": "cost_report",
    "damping_sweep": "damping_sweep",
    "SelfCheckError": "errors",
    "SelfCheckWarning": "errors",
    "from_config": "methods",
    "legality": "triple",
}
"""Public name to the module that it stands in; makers and configs of methods are found through `METHODS`."""


def _find(name: str) -> object:
    """A public name, or a submodule, imported. AttributeError if there is none."""
    if name in _MODULES:
        return getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name in __all__:
        from gradmaker.methods import METHODS

        makers = METHODS.values()
        return {made.__name__: made for maker in makers for made in (maker, maker.Config)}[name]
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
    return sorted({*globals(), *__all__})


class _Package(_ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Leaves out submodules that bear the name of a public function, which the import system would put in its place."""
        if not (name in __all__ and isinstance(value, _ModuleType)):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
