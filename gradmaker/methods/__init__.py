"""Methods: recipes that choose a triple for each site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradmaker.config import build, read_mapping
from gradmaker.maker import GradientMaker
from gradmaker.methods.caspr_adaptive import CasprAdaptiveGradientMaker
from gradmaker.methods.custom import CustomGradientMaker
from gradmaker.methods.eigen_kronecker import EshampooGradientMaker, SoapGradientMaker
from gradmaker.methods.elementwise import AdagradGradientMaker, AdamGradientMaker
from gradmaker.methods.fisher_kronecker import (
    EkfacGradientMaker,
    KflrGradientMaker,
    KfraGradientMaker,
    SkfacGradientMaker,
    TntGradientMaker,
)
from gradmaker.methods.full_adagrad import FullAdagradGradientMaker
from gradmaker.methods.inverse_kronecker import KlShampooGradientMaker, KradagradGradientMaker, KradagradStarGradientMaker
from gradmaker.methods.kronecker import KfacGradientMaker, ShampooGradientMaker
from gradmaker.methods.low_rank import (
    GgtGradientMaker,
    MfacGradientMaker,
    SengGradientMaker,
    SmwGaussNewtonGradientMaker,
    SmwNaturalGradientMaker,
    TongaGradientMaker,
    TongaUnitGradientMaker,
)
from gradmaker.methods.matrix_free import (
    CurveballGradientMaker,
    HessianFreeGradientMaker,
    KsdGradientMaker,
    NewtonGradientMaker,
    SaddleFreeGradientMaker,
)
from gradmaker.methods.natural import (
    DiagonalNaturalGradientMaker,
    FullNaturalGradientMaker,
    LayerNaturalGradientMaker,
    UnitNaturalGradientMaker,
)
from gradmaker.methods.probes import (
    AdahessianGradientMaker,
    EsgdGradientMaker,
    PsgdGradientMaker,
    PsgdKfGradientMaker,
    PsgdWhitenGradientMaker,
    SaddleFreeDiagonalGradientMaker,
)
from gradmaker.methods.secants import KbfgsGradientMaker, KbfgsLGradientMaker, LbfgsGradientMaker
from gradmaker.methods.series import LissaGradientMaker, NeumannGradientMaker, NeumannPracticalGradientMaker
from gradmaker.methods.sparse_inverse import FangGradientMaker
from gradmaker.methods.spectral import MuonGradientMaker
from gradmaker.methods.tensor_kronecker import CasprGradientMaker, OneSidedGradientMaker
from gradmaker.triple import did_you_mean

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
