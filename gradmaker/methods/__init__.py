"""Methods: recipes that choose a triple for each site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradmaker.config import build, read_mapping
from gradmaker.maker import GradientMaker
from gradmaker.methods.adagrad import AdagradGradientMaker
from gradmaker.methods.adahessian import AdahessianGradientMaker
from gradmaker.methods.adam import AdamGradientMaker
from gradmaker.methods.caspr import CasprGradientMaker
from gradmaker.methods.caspr_adaptive import CasprAdaptiveGradientMaker
from gradmaker.methods.curveball import CurveballGradientMaker
from gradmaker.methods.custom import CustomGradientMaker
from gradmaker.methods.ekfac import EkfacGradientMaker
from gradmaker.methods.esgd import EsgdGradientMaker
from gradmaker.methods.fang import FangGradientMaker
from gradmaker.methods.full_adagrad import FullAdagradGradientMaker
from gradmaker.methods.ggt import GgtGradientMaker
from gradmaker.methods.hessian_free import HessianFreeGradientMaker
from gradmaker.methods.kbfgs import KbfgsGradientMaker, KbfgsLGradientMaker
from gradmaker.methods.kfac import KfacGradientMaker
from gradmaker.methods.kflr import KflrGradientMaker
from gradmaker.methods.kfra import KfraGradientMaker
from gradmaker.methods.kl_shampoo import KlShampooGradientMaker
from gradmaker.methods.krad import KradagradGradientMaker, KradagradStarGradientMaker
from gradmaker.methods.ksd import KsdGradientMaker
from gradmaker.methods.lbfgs import LbfgsGradientMaker
from gradmaker.methods.lissa import LissaGradientMaker
from gradmaker.methods.mfac import MfacGradientMaker
from gradmaker.methods.muon import MuonGradientMaker
from gradmaker.methods.natural_gradient import (
    DiagonalNaturalGradientMaker,
    FullNaturalGradientMaker,
    LayerNaturalGradientMaker,
    UnitNaturalGradientMaker,
)
from gradmaker.methods.neumann import NeumannGradientMaker, NeumannPracticalGradientMaker
from gradmaker.methods.newton import NewtonGradientMaker
from gradmaker.methods.one_sided import OneSidedGradientMaker
from gradmaker.methods.psgd import PsgdGradientMaker, PsgdKfGradientMaker, PsgdWhitenGradientMaker
from gradmaker.methods.saddle_free import SaddleFreeGradientMaker
from gradmaker.methods.saddle_free_diagonal import SaddleFreeDiagonalGradientMaker
from gradmaker.methods.seng import SengGradientMaker
from gradmaker.methods.shampoo import ShampooGradientMaker
from gradmaker.methods.skfac import SkfacGradientMaker
from gradmaker.methods.smw import SmwGaussNewtonGradientMaker, SmwNaturalGradientMaker
from gradmaker.methods.soap import EshampooGradientMaker, SoapGradientMaker
from gradmaker.methods.tnt import TntGradientMaker
from gradmaker.methods.tonga import TongaGradientMaker, TongaUnitGradientMaker
from gradmaker.options.suggestions import did_you_mean

__all__ = ["METHODS", "from_config"]

METHODS: dict[str, type[GradientMaker]] = {
    "gradient": GradientMaker,
    "adagrad": AdagradGradientMaker,
    "adam": AdamGradientMaker,
    "kfac": KfacGradientMaker,
    "kflr": KflrGradientMaker,
    "kfra": KfraGradientMaker,
    "ekfac": EkfacGradientMaker,
    "skfac": SkfacGradientMaker,
    "tnt": TntGradientMaker,
    "shampoo": ShampooGradientMaker,
    "full_adagrad": FullAdagradGradientMaker,
    "one_sided": OneSidedGradientMaker,
    "caspr": CasprGradientMaker,
    "caspr_adaptive": CasprAdaptiveGradientMaker,
    "soap": SoapGradientMaker,
    "eshampoo": EshampooGradientMaker,
    "kradagrad_star": KradagradStarGradientMaker,
    "kradagrad": KradagradGradientMaker,
    "kl_shampoo": KlShampooGradientMaker,
    "muon": MuonGradientMaker,
    "unit_ng": UnitNaturalGradientMaker,
    "layer_ng": LayerNaturalGradientMaker,
    "full_ng": FullNaturalGradientMaker,
    "diag_ng": DiagonalNaturalGradientMaker,
    "fang": FangGradientMaker,
    "smw_ng": SmwNaturalGradientMaker,
    "smw_gn": SmwGaussNewtonGradientMaker,
    "tonga": TongaGradientMaker,
    "tonga_unit": TongaUnitGradientMaker,
    "mfac": MfacGradientMaker,
    "ggt": GgtGradientMaker,
    "seng": SengGradientMaker,
    "newton": NewtonGradientMaker,
    "hessian_free": HessianFreeGradientMaker,
    "ksd": KsdGradientMaker,
    "saddle_free": SaddleFreeGradientMaker,
    "lissa": LissaGradientMaker,
    "neumann": NeumannGradientMaker,
    "neumann_practical": NeumannPracticalGradientMaker,
    "curveball": CurveballGradientMaker,
    "psgd": PsgdGradientMaker,
    "psgd_kf": PsgdKfGradientMaker,
    "psgd_whiten": PsgdWhitenGradientMaker,
    "adahessian": AdahessianGradientMaker,
    "esgd": EsgdGradientMaker,
    "saddle_free_diagonal": SaddleFreeDiagonalGradientMaker,
    "lbfgs": LbfgsGradientMaker,
    "kbfgs": KbfgsGradientMaker,
    "kbfgs_l": KbfgsLGradientMaker,
    "custom": CustomGradientMaker,
}
"""Method by name, as in ``{method: kfac}``."""


def from_config(model: nn.Module, config: Mapping[str, Any] | str | Path) -> GradientMaker:
    """A maker from a mapping or a YAML file: ``{method: kfac, damping: 1e-3}``.

    ValueError on unknown methods and options, with the close match and all that is legal.
    """
    given = read_mapping(config)
    if "method" not in given:
        raise ValueError(f"a config needs the key 'method': expected {', '.join(METHODS)}")
    name = given.pop("method")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method={name!r}: {did_you_mean(name, list(METHODS))}")
    make = METHODS[name]
    return make(model, build(make.Config, given, f"method {name!r}"))
