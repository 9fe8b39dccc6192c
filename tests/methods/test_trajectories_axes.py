"""Thirty steps of every method on axes, by every way of cutting, averaging and grafting, against re-derivations in float64.

One reference for each method, made from the values of its options; what is switched is the same for all of them. Methods of
which a part has a table of its own are here too: test_kronecker_dims, test_caspr, test_soap, test_krad, test_psgd_whiten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS
from tests import models
from tests.kronecker_reference import Reference, Rule, inverse_root, moments, on_axis, unfolded
from tests.methods.test_krad import Alternating, Kl, Star
from tests.methods.test_kronecker_dims import convolution
from tests.methods.test_soap import Eshampoo, Soap, square
from tests.methods.test_trajectories import compare
from tests.models import Case

QUINTIC = (3.4445, -4.7750, 2.0315)


class Product:
    """``m x_k H_k^(-1/2k)``; on the first axis alone with the exponent 1/2 for ``one``."""

    def __init__(self, config: Any, one: bool = False) -> None:
        self.config, self.one, self.history = config, one, list[Tensor]()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g)
        c, axes = self.config, range(1 if self.one else g.ndim)
        for axis in axes:
            H = moments(self.history, axis, c.decay, c.averaging)
            m = on_axis(inverse_root(H, c.damping, -1 / (2 * len(axes))), m, axis)
        return m


class PowerMean:
    """``p`` times the mean over the axes, with inverse roots of order ``2p``."""

    def __init__(self, config: Any) -> None:
        self.config, self.history = config, list[Tensor]()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g)
        c, p = self.config, self.config.p or g.ndim
        factors = [moments(self.history, axis, c.decay, c.averaging) for axis in range(g.ndim)]
        roots = [inverse_root(H, c.damping, -1 / (2 * p)) for H in factors]
        for _ in range(p):
            m = sum(on_axis(X, m, axis) for axis, X in enumerate(roots)) / g.ndim  # type: ignore[assignment]
        return m


class Whole:
    """``(sum g g^T + e lambda_max)^(-1/2) m`` from the singular values of the gradients, all or the last ones."""

    def __init__(self, config: Any) -> None:
        self.config, self.history = config, list[Tensor]()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g.reshape(-1))
        c = self.config
        kept = self.history[-(c.window or len(self.history)) :]
        weights = torch.tensor([(c.decay or 1.0) ** age for age in reversed(range(len(kept)))], dtype=torch.float64)
        weights = weights if c.decay is None else weights / weights.sum()
        _, s, Vh = torch.linalg.svd(weights.sqrt().unsqueeze(1) * torch.stack(kept), full_matrices=True)
        s = torch.cat([s.square(), s.new_zeros(len(Vh))])[: len(Vh)]
        return (Vh.T @ ((Vh @ m.reshape(-1)) / (s + c.damping * s.max()).sqrt())).reshape(m.shape)


class OneWay:
    """CASPR-adaptive's step of the released code; roots at steps 0, T, 2T, ..., but not at the first."""

    def __init__(self, config: Any) -> None:
        self.config, self.t = config, 0

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        if g.ndim < 2:
            return self.adam(g, m)
        c, rows, columns = self.config, *g.shape
        one, other = (torch.eye(d, dtype=g.dtype) for d in (rows, columns))
        if self.t == 0:
            self.L, self.past, self.R, self.P, self.Q = c.start * one, c.start * one, other, one, other
        self.t += 1
        change = 1.0
        T = c.preconditioner_interval
        if self.t > 2 and (self.t - 2) % T == 0:
            ridge = c.damping * torch.linalg.eigvalsh(self.past)[-1]
            change = float((self.P @ (self.past + ridge * one) @ self.P).trace()) / rows
            self.past = self.L
        new = 1.0 if c.decay is None else 1 - c.decay
        self.L = (c.decay or 1.0) * self.L + new * g @ g.T
        K = g.T @ self.P
        self.R = (c.decay or 1.0) * change * self.R + new * K @ K.T / rows
        if self.t > 1 and (self.t - 1) % T == 0:
            self.P, self.Q = (inverse_root(S, c.damping, -0.5) for S in (self.L, self.R))
        return self.P @ m @ self.Q

    def adam(self, g: Tensor, m: Tensor) -> Tensor:
        return elementwise(self, g, m, self.config.decay)


class Polar:
    """Muon's five quintic steps for matrices, Adam for the rest."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        if g.ndim != 2:
            return elementwise(self, g, m, self.config.decay)
        X, (a, b, c) = m / m.norm(), QUINTIC
        for _ in range(5):
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        return max(1.0, m.shape[0] / m.shape[1]) ** 0.5 * X


def elementwise(rule: Any, g: Tensor, m: Tensor, decay: float | None) -> Tensor:
    """Adam's step for what has no matrix; AdaGrad's of a sum."""
    past = rule.__dict__.setdefault("past", [])
    past.append(g.square())
    weights = torch.tensor([(decay or 1.0) ** age for age in reversed(range(len(past)))], dtype=torch.float64)
    v = torch.einsum("t,t...->...", weights, torch.stack(past)) / (1.0 if decay is None else weights.sum())
    return m / (v.sqrt() + 1e-8)


# --- what is switched -----------------------------------------------------------------------------------------------------
CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "blocks": {"block_size": 3},
    "separate": {"merge": "none"},
    "merged": {"merge": "to_2d"},
    "merged_blocks": {"merge": "to_2d", "block_size": 3},
    "greedy_blocks": {"merge": "greedy", "block_size": 4},
}
AVERAGES: dict[str, dict[str, Any]] = {
    "sum": {"decay": None},
    "average": {"decay": 0.9},
    "plain": {"decay": 0.9, "averaging": "plain"},
    "raw": {"decay": 0.9, "averaging": "raw"},
}
LENGTHS: dict[str, dict[str, Any]] = {
    "none": {"grafting": "none"},
    "sgd": {"grafting": "keep"},
    "adagrad": {"grafting": "adagrad"},
    "rmsprop": {"grafting": "rmsprop", "grafting_decay": 0.9},
    "adam": {"grafting": "adam"},
    "adam_decay": {"grafting": "adam", "grafting_decay": 0.8},
    "nesterov": {"grafting": "adam", "beta1": 0.8, "nesterov_average": True, "start_step": 6},
}
ALL = {
    "merge": "to_2d",
    "block_size": 3,
    "decay": 0.9,
    "grafting": "adam",
    "grafting_decay": 0.9,
    "beta1": 0.8,
    "nesterov_average": True,
}

OFTEN: dict[str, Any] = {"preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
ROOTED = OFTEN | {"damping": 1e-4, "grafting": "none"}
METHODS_ON_AXES: dict[str, tuple[Callable[[Any], Rule], dict[str, Any]]] = {
    "shampoo": (Product, ROOTED),
    "one_sided": (lambda c: Product(c, one=True), ROOTED),
    "caspr": (PowerMean, ROOTED | {"beta1": 0.0, "nesterov_average": False}),
    "caspr_p3": (PowerMean, ROOTED | {"beta1": 0.0, "nesterov_average": False, "p": 3}),
    "caspr_axes": (PowerMean, ROOTED | {"beta1": 0.0, "nesterov_average": False, "p": None}),
    "full_adagrad": (Whole, {"damping": 1e-4}),
    "full_adagrad_window": (Whole, {"damping": 1e-4, "window": 6}),
    "caspr_adaptive": (
        OneWay,
        {"preconditioner_interval": 3, "start_step": 0, "grafting": "none", "start": 1e-2, "damping": 1e-4},
    ),
    "kradagrad_star": (lambda c: Star("exact", c.damping, c.decay), OFTEN | {"damping": 1e-3, "grafting": "none"}),
    "kradagrad_star_tr": (
        lambda c: Star("tr", c.damping, c.decay),
        OFTEN | {"damping": 1e-3, "denominator": "tr", "grafting": "none"},
    ),
    "kradagrad": (lambda c: Alternating(c.damping, c.preconditioner_interval, c.start, c.decay), {}),
    "soap": (
        lambda c: Soap(3, c.decay, c.damping, False),
        {"preconditioner_interval": 3, "damping": 1e-4, "beta1": 0.0, "skip_first": False},
    ),
    "eshampoo": (
        lambda c: Eshampoo(1, c.decay, c.damping, 0.5),
        {"preconditioner_interval": 1, "tracking": "eigh", "tolerance": 0.0, "damping": 1e-3, "beta1": 0.0},
    ),
    "kl_shampoo": (lambda c: Kl(c.decay, c.preconditioner_interval), {"preconditioner_interval": 4, "beta1": 0.0}),
    "muon": (Polar, {"beta1": 0.9, "nesterov_average": False}),
}
"""What makes a reference from a config, and where the options start that a row switches."""
FULL_RANK = ("soap", "eshampoo")  # the basis of a null space is anybody's
ABSENT: dict[str, tuple[str, ...]] = {
    "greedy_blocks": ("caspr_adaptive", "muon"),  # the references of these know matrices that are merged before, and vectors
    "separate": ("caspr_adaptive", "full_adagrad", "full_adagrad_window"),  # test_caspr_factors has any number of axes
    "merged": ("full_adagrad", "full_adagrad_window"),  # of what is not cut it says nothing, and is refused
    "sum": ("soap", "eshampoo", "kl_shampoo", "muon"),  # defined by their averages
}


def base_of(method: str) -> str:
    return next(m for m in (method, method.rsplit("_", 1)[0]) if m in METHODS)


def config_of(method: str, row: dict[str, Any]) -> Any:
    return METHODS[base_of(method)].Config(**{**METHODS_ON_AXES[method][1], **row})


def options_of(method: str) -> set[str]:
    return {f.name for f in fields(METHODS[base_of(method)].Config)}


def rows() -> list[tuple[str, str, dict[str, Any]]]:
    tables = (CUTS, AVERAGES, LENGTHS, {"all": ALL})
    every = [(method, name, row) for method in METHODS_ON_AXES for table in tables for name, row in table.items()]
    return [(m, name, cut(m, row)) for m, name, row in every if row.keys() <= options_of(m) and m not in ABSENT.get(name, ())]


def cut(method: str, row: dict[str, Any]) -> dict[str, Any]:
    """Blocks of rank two where a basis has to be unique."""
    return row | {"block_size": 2} if method in FULL_RANK and "block_size" in row and row["block_size"] == 3 else row


ROWS = rows()


def narrow(bias: bool = True) -> Case:
    """A convolution that is a square matrix when merged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        layers = [nn.Conv2d(1, 4, 2, bias=bias), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4, bias)]
        x, t = torch.randn(16, 1, 4, 4, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
        return Case(nn.Sequential(*layers).double(), x, t, lambda y, t: (y - t).square().mean())


def case_of(method: str, row: dict[str, Any]) -> Case:
    if method in FULL_RANK:
        return (narrow if "merge" in row else square)(method == "soap")  # vectors have a basis in the other
    return convolution() if "merge" in row else models.mlp()


@pytest.mark.parametrize("method, name, row", ROWS, ids=lambda x: x if isinstance(x, str) else "")
def test_thirty_steps(method: str, name: str, row: dict[str, Any]) -> None:
    make, _ = METHODS_ON_AXES[method]
    config, case = config_of(method, row), case_of(method, row)
    names = {
        "merge": "merge",
        "block": "block_size",
        "grafting": "grafting",
        "grafting_decay": "grafting_decay",
        "beta1": "beta1",
    }
    names |= {"nesterov_average": "nesterov_average", "start": "start_step", "rows": "side"}
    options = {key: getattr(config, field) for key, field in names.items() if field in options_of(method)}
    maker = METHODS[base_of(method)](case.model, config)
    compare(case, maker, Reference(lambda: make(config), **options), 0.3 if config.grafting == "keep" else 0.02, 1e-6)


def test_every_method_is_switched_in_every_way() -> None:
    for method in METHODS_ON_AXES:
        own = {name for m, name, _ in ROWS if m == method}
        wanted = {*CUTS, *AVERAGES, *LENGTHS, "all"} - {name for name, methods in ABSENT.items() if method in methods}
        missing = {"plain", "raw"} if "averaging" not in options_of(method) else set()
        assert own == wanted - missing, method


def test_unfolding_is_that_of_the_definition() -> None:
    g = torch.arange(24.0).reshape(2, 3, 4)
    for axis in range(3):
        assert torch.equal(unfolded(g, axis), g.movedim(axis, 0).flatten(1))
        assert torch.equal(on_axis(torch.eye(g.shape[axis]), g, axis), g)
