"""Methods: configs that choose curvature, representation and solver for each site of a model.

One file for each paper or family of methods, with a config (options, defaults, their sources, and `triple`) and a maker, which
registers the name. Code that several methods share is in files beside them; a part that `custom` can name is in the folder of
its axis. The table below has the module that registers each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradmaker.config import build, read_mapping
from gradmaker.maker import GradientMaker
from gradmaker.options.registry import METHODS

__all__ = ["from_config"]

METHODS.expect(
    {
        "gradient": "gradmaker.maker",
        "adagrad": "gradmaker.methods.adagrad",
        "adam": "gradmaker.methods.adam",
        "kfac": "gradmaker.methods.kfac",
        "kflr": "gradmaker.methods.kflr",
        "kfra": "gradmaker.methods.kfra",
        "ekfac": "gradmaker.methods.ekfac",
        "skfac": "gradmaker.methods.skfac",
        "tnt": "gradmaker.methods.tnt",
        "shampoo": "gradmaker.methods.shampoo",
        "full_adagrad": "gradmaker.methods.full_adagrad",
        "one_sided": "gradmaker.methods.one_sided",
        "caspr": "gradmaker.methods.caspr",
        "caspr_adaptive": "gradmaker.methods.caspr_adaptive",
        "soap": "gradmaker.methods.soap",
        "eshampoo": "gradmaker.methods.soap",
        "kradagrad_star": "gradmaker.methods.krad",
        "kradagrad": "gradmaker.methods.krad",
        "kl_shampoo": "gradmaker.methods.kl_shampoo",
        "muon": "gradmaker.methods.muon",
        "unit_ng": "gradmaker.methods.natural_gradient",
        "layer_ng": "gradmaker.methods.natural_gradient",
        "full_ng": "gradmaker.methods.natural_gradient",
        "diag_ng": "gradmaker.methods.natural_gradient",
        "fang": "gradmaker.methods.fang",
        "smw_ng": "gradmaker.methods.smw",
        "smw_gn": "gradmaker.methods.smw",
        "tonga": "gradmaker.methods.tonga",
        "tonga_unit": "gradmaker.methods.tonga",
        "mfac": "gradmaker.methods.mfac",
        "ggt": "gradmaker.methods.ggt",
        "seng": "gradmaker.methods.seng",
        "newton": "gradmaker.methods.newton",
        "hessian_free": "gradmaker.methods.hessian_free",
        "ksd": "gradmaker.methods.ksd",
        "saddle_free": "gradmaker.methods.saddle_free",
        "lissa": "gradmaker.methods.lissa",
        "neumann": "gradmaker.methods.neumann",
        "neumann_practical": "gradmaker.methods.neumann",
        "curveball": "gradmaker.methods.curveball",
        "psgd": "gradmaker.methods.psgd",
        "psgd_kf": "gradmaker.methods.psgd",
        "psgd_whiten": "gradmaker.methods.psgd",
        "adahessian": "gradmaker.methods.adahessian",
        "esgd": "gradmaker.methods.esgd",
        "saddle_free_diagonal": "gradmaker.methods.saddle_free_diagonal",
        "lbfgs": "gradmaker.methods.lbfgs",
        "kbfgs": "gradmaker.methods.kbfgs",
        "kbfgs_l": "gradmaker.methods.kbfgs",
        "custom": "gradmaker.methods.custom",
    }
)


def from_config(model: nn.Module, config: Mapping[str, Any] | str | Path) -> GradientMaker:
    """Make a gradient maker from a mapping or a YAML file: ``{method: kfac, damping: 1e-3}``.

    ValueError for an unknown method or option, with the closest match and all legal names.
    """
    given = read_mapping(config)
    if "method" not in given:
        raise ValueError(f"a config needs the key 'method': expected {', '.join(METHODS)}")
    name = given.pop("method")
    make: Any = METHODS.find("method", name)
    maker: GradientMaker = make(model, build(make.Config, given, f"method {name!r}"))
    return maker
