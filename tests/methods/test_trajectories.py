"""Whole runs against re-derivations: torch's optimizers, and `tests.oracles`, which share no code with the library.

Every reference keeps its own copy of the model, computes its own gradients and statistics, and takes its own steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.methods.adagrad import AdagradGradientConfig
from gradmaker.methods.adam import AdamGradientConfig
from gradmaker.methods.kfac import KfacGradientConfig
from gradmaker.methods.shampoo import ShampooGradientConfig
from tests import models, oracles
from tests.models import CLASSES, Case

STEPS = 30


def maker_step(maker: Any, case: Case) -> None:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()


def batch(case: Case, step: int) -> Case:
    """Other examples (in other proportions) and other targets at each step."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(len(case.x), (len(case.x),), generator=generator)
    return case._replace(x=case.x[rows], t=case.t[rows.roll(1)])


def sgd(model: nn.Module, directions: dict[str, Tensor], lr: float) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= lr * directions[name]


def raw(case: Case) -> dict[str, Tensor]:
    named = dict(case.model.named_parameters())
    return dict(zip(named, torch.autograd.grad(case.run(), list(named.values())), strict=True))


def compare(case: Case, maker: Any, reference: Callable[[Case, int], dict[str, Tensor]], lr: float, tolerance: float) -> None:
    """`reference(case, step)` gives the direction of every parameter of its own copy of the model."""
    twin = case._replace(model=copy.deepcopy(case.model))
    start = oracles.parameter_vector(case.model)
    for step in range(STEPS):
        maker_step(maker, batch(case, step))
        sgd(case.model, {k: p.grad for k, p in case.model.named_parameters() if p.grad is not None}, lr)
        sgd(twin.model, reference(batch(twin, step), step), lr)
        found, expected = oracles.parameter_vector(case.model), oracles.parameter_vector(twin.model)
        assert oracles.relative_error(found - start, expected - start) < tolerance, f"step {step}"
    assert oracles.relative_error(found, start) > 1e-2  # it went somewhere


# --- torch.optim ----------------------------------------------------------------------------------------------------------
ELEMENTWISE: dict[str, tuple[str, Any, Callable[..., torch.optim.Optimizer]]] = {
    "adam": ("adam", AdamGradientConfig(), partial(torch.optim.Adam, lr=1e-2)),
    "adam_other": (
        "adam",
        AdamGradientConfig(beta1=0.7, decay=0.9, damping=1e-3),
        partial(torch.optim.Adam, lr=1e-2, betas=(0.7, 0.9), eps=1e-3),
    ),
    "adam_without_momentum": ("adam", AdamGradientConfig(beta1=0.0), partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.999))),
    "adagrad": ("adagrad", AdagradGradientConfig(), partial(torch.optim.Adagrad, lr=1e-2)),
    "adagrad_other": ("adagrad", AdagradGradientConfig(damping=1e-2), partial(torch.optim.Adagrad, lr=1e-2, eps=1e-2)),
}


@pytest.mark.parametrize("row", ELEMENTWISE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("make", [models.mlp, partial(models.convolution, 2), models.normed, models.embedding_mean])
def test_element_wise_is_torchs(row: str, dtype: torch.dtype, tolerance: float, make: Callable[[], Case]) -> None:
    method, config, optimizer_of = ELEMENTWISE[row]
    case = make()
    case.model.to(dtype)
    case = case._replace(x=case.x.to(dtype) if case.x.is_floating_point() else case.x)
    twin = case._replace(model=copy.deepcopy(case.model))
    maker, plain = METHODS[method](case.model, config), torch.optim.SGD(case.model.parameters(), 1e-2)
    optimizer = optimizer_of(twin.model.parameters())
    start = oracles.parameter_vector(case.model)
    for step in range(50):
        maker_step(maker, batch(case, step))
        plain.step()
        optimizer.zero_grad()
        batch(twin, step).run().backward()
        optimizer.step()
        found, expected = oracles.parameter_vector(case.model), oracles.parameter_vector(twin.model)
        assert oracles.relative_error(found, expected) < tolerance, f"step {step}"
    assert oracles.relative_error(found, start) > 1e-2


# --- the oracles' Fishers -------------------------------------------------------------------------------------------------
def columns_of(case: Case, empirical: bool) -> oracles.Columns:
    if empirical:
        return oracles.empirical_columns("categorical", case.t, example="sequence")
    return oracles.exact_columns("categorical", case.t)


def select_of(case: Case) -> oracles.Select:
    """Taggers give torch's (n, C, r)."""
    return (lambda y: y.mT) if case.t.ndim == 2 else oracles.identity


def dense_fisher(case: Case, empirical: bool, names: list[str] | None = None) -> Tensor:
    columns, terms = columns_of(case, empirical), case.t.numel()
    return oracles.fisher_from_columns(case.model, case.x, columns, terms, names, select_of(case))


# --- K-FAC ----------------------------------------------------------------------------------------------------------------
def conv_norm(norm: str = "layer") -> Case:
    """A grouped convolution, a norm without coupling between examples, and Linear."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 4, 2, groups=2)
            self.norm = nn.LayerNorm(4) if norm == "layer" else nn.GroupNorm(2, 4)
            self.head = nn.Linear(4, CLASSES)
            nn.init.normal_(self.norm.weight, 1.0, 0.3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.convolution(x)
            h = self.norm(h.mT).mT if isinstance(self.norm, nn.LayerNorm) else self.norm(h)
            y: Tensor = self.head(torch.tanh(h).sum(2))
            return y

    return models.build(Net, 4, 2, 4)


class Kfac:
    """K-FAC re-derived: factors of each layer from loops over examples, their whole history, dense or factored inverses."""

    def __init__(self, config: KfacGradientConfig) -> None:
        self.config, self.empirical = config, isinstance(config.fisher, FisherEmp)
        self.history: dict[str, oracles.State] = {}
        self.factors: dict[str, list[oracles.Factors]] = {}  # as of the last refresh
        self.blocks: dict[str, Tensor] = {}  # of norm layers: (channels, 2, 2), or (channels, 1, 1) for a bias on its own

    def __call__(self, case: Case, step: int) -> dict[str, Tensor]:
        g, out = raw(case), {}
        for name, module in case.model.named_modules():
            if not [*module.parameters(recurse=False)]:
                continue
            measure = step % self.config.curvature_interval == 0
            refresh = step % self.config.preconditioner_interval == 0
            treat = self.norm if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) else self.layer
            out |= treat(case, name, module, g, measure, refresh)
        return out

    def averaged(self, key: str, fresh: Tensor | None, kind: str) -> Tensor:
        """B and dense blocks as the decay says; A likewise, but a mean where B is summed, so that the product sums."""
        state = self.history.setdefault(key, {})
        if fresh is not None:
            value = oracles.averaged(state, kind, fresh, self.config.decay)
            count = len(state[kind]) if self.config.decay is None and kind == "A" else 1
            state["now"] = value / count
        now: Tensor = state["now"]
        return now

    def layer(
        self, case: Case, name: str, module: Any, g: dict[str, Tensor], measure: bool, refresh: bool
    ) -> dict[str, Tensor]:
        pairs: list[Any] = [None] * getattr(module, "groups", 1)
        if measure:
            columns, select = columns_of(case, self.empirical), select_of(case)
            options: Any = {"sharing": self.config.sharing, "select": select}
            pairs = oracles.kfac_factors(case.model, case.x, name, columns, case.t.numel(), **options)
        current = []
        for group, pair in enumerate(pairs):
            A = self.averaged(f"{name}/A{group}", pair and pair.A, "A")
            B = self.averaged(f"{name}/B{group}", pair and pair.B, "B")
            current.append(oracles.Factors(A, B))
        if refresh:
            self.factors[name] = current
        G = len(current)
        weight = g[f"{name}.weight"].reshape(G, -1, g[f"{name}.weight"][0].numel())
        bias = None if module.__dict__["_parameters"].get("bias") is None else g[f"{name}.bias"].reshape(G, -1, 1)
        out = [self.solve(self.factors[name][k], weight[k], None if bias is None else bias[k], module) for k in range(G)]
        result = {f"{name}.weight": torch.stack([w for w, _ in out]).reshape(module.weight.shape)}
        if bias is not None:
            result[f"{name}.bias"] = torch.stack([b for _, b in out]).reshape(-1)
        return result

    def solve(self, pair: oracles.Factors, w: Tensor, b: Tensor | None, module: nn.Module) -> tuple[Tensor, Tensor]:
        A, B = pair
        options: Any = {"damping": self.config.damping, "split": self.config.split}
        if isinstance(module, nn.Embedding):
            return oracles.kfac_direction(w.mT, A, B, **options).mT, w
        if b is None:
            return oracles.kfac_direction(w, A, B, **options), w
        if self.config.bias == "joint":
            direction = oracles.kfac_direction(torch.cat([w, b], 1), A, B, **options)
            return direction[:, :-1], direction[:, -1:]
        of_bias = oracles.kfac_direction(b, A[-1:, -1:], B, **options)
        return oracles.kfac_direction(w, A[:-1, :-1], B, **options), of_bias

    def norm(self, case: Case, name: str, module: Any, g: dict[str, Tensor], measure: bool, refresh: bool) -> dict[str, Tensor]:
        names, channels = [f"{name}.weight", f"{name}.bias"], len(module.weight)
        fresh = dense_fisher(case, self.empirical, names) if measure else None
        C = self.averaged(name, fresh, "C")
        if refresh:
            self.blocks[name] = oracles.unit_blocks(oracles.reorder(C, oracles.joint_order(channels, 1)), channels, 2)
        pairs = torch.stack([g[k] for k in names], 1)
        blocks = self.blocks[name]
        if self.config.bias == "separate":
            blocks = torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))
        solved = torch.stack([oracles.tikhonov_solve(blocks[c], self.config.damping, pairs[c]) for c in range(channels)])
        return dict(zip(names, solved.unbind(1), strict=True))


EXACT, EMP = FisherExact(), FisherEmp()
KFAC_ROWS: dict[str, tuple[Callable[[], Case], dict[str, Any]]] = {
    "exact": (models.mlp, {"fisher": EXACT, "decay": 0.9}),
    "exact_tikhonov": (models.mlp, {"fisher": EXACT, "decay": 0.9, "split": "exact"}),
    "emp": (models.mlp, {"fisher": EMP, "decay": 0.9}),
    "emp_tikhonov_local": (models.mlp, {"fisher": EMP, "decay": 0.0, "split": "exact"}),
    "summed": (models.mlp, {"fisher": EXACT, "decay": None}),
    "summed_intervals": (models.mlp, {"fisher": EMP, "decay": None, "curvature_interval": 3, "preconditioner_interval": 3}),
    "intervals": (models.mlp, {"fisher": EXACT, "curvature_interval": 3, "preconditioner_interval": 3}),
    "stale_inverse": (models.mlp, {"fisher": EXACT, "preconditioner_interval": 3, "split": "exact"}),
    "stale_statistics": (models.mlp, {"fisher": EMP, "curvature_interval": 3}),
    "separate": (models.mlp, {"fisher": EXACT, "bias": "separate"}),
    "separate_tikhonov": (models.mlp, {"fisher": EMP, "bias": "separate", "split": "exact"}),
    "no_bias": (partial(models.mlp, bias=False), {"fisher": EXACT}),
    "conv_norm": (conv_norm, {"fisher": EXACT, "decay": 0.9}),
    "conv_norm_group": (partial(conv_norm, "group"), {"fisher": EMP, "decay": 0.9}),
    "conv_norm_separate": (conv_norm, {"fisher": EXACT, "bias": "separate", "preconditioner_interval": 3}),
    "conv_norm_summed": (conv_norm, {"fisher": EMP, "decay": None, "split": "exact"}),
    "conv_reduce": (conv_norm, {"fisher": EXACT, "sharing": "reduce"}),
    "embedding": (models.embedding_mean, {"fisher": EXACT, "split": "exact"}),
    "embedding_pi": (models.embedding_mean, {"fisher": EMP}),
    "called_twice": (models.called_twice, {"fisher": EXACT}),
    "called_twice_reduce": (models.called_twice, {"fisher": EMP, "sharing": "reduce"}),
    "tagger": (partial(models.tagger, mix=True), {"fisher": EXACT}),
    "tagger_emp": (partial(models.tagger, mix=True), {"fisher": EMP, "split": "exact"}),
}


@pytest.mark.parametrize("row", KFAC_ROWS)
def test_kfac(row: str) -> None:
    make, options = KFAC_ROWS[row]
    case = make()
    schedule = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
    config = KfacGradientConfig(**{"damping": 1e-2, **schedule, **options})
    compare(case, METHODS["kfac"](case.model, config), Kfac(config), 5e-3, 1e-8)


# --- Shampoo --------------------------------------------------------------------------------------------------------------
class Shampoo:
    """Shampoo re-derived: the history of gradients, roots of its statistics, one dense Kronecker product a tensor."""

    def __init__(self, config: ShampooGradientConfig) -> None:
        self.config = config
        self.measured: dict[str, list[Tensor]] = {}
        self.all: dict[str, list[Tensor]] = {}
        self.P: dict[str, Tensor] = {}
        self.oracle: dict[str, oracles.State] = {}

    def __call__(self, case: Case, step: int) -> dict[str, Tensor]:
        out = {}
        for name, g in raw(case).items():
            self.all.setdefault(name, []).append(g)
            if step % self.config.curvature_interval == 0:
                self.measured.setdefault(name, []).append(g)
            if step % self.config.preconditioner_interval == 0:
                self.P[name] = self.dense(self.measured[name])
            out[name] = (self.P[name] @ g.reshape(-1)).view_as(g)
            if self.config.curvature_interval == self.config.preconditioner_interval == 1:
                state = self.oracle.setdefault(name, {})
                assert self.config.damping is not None
                judge = oracles.shampoo_direction(g, state, decay=self.config.decay, eps=self.config.damping)
                assert oracles.relative_error(out[name], judge) < 1e-8
            out[name] = self.rescaled(out[name], g, self.all[name])
        return out

    def dense(self, history: list[Tensor]) -> Tensor:
        shape, product = history[0].shape, torch.ones(1, 1, dtype=torch.float64)
        for axis, size in enumerate(shape):
            moments = [h.movedim(axis, 0).reshape(size, -1) for h in history]
            state: oracles.State = {}
            for m in moments:
                H = oracles.averaged(state, "H", m @ m.mT, self.config.decay)
            ridge = self.config.damping * torch.linalg.eigvalsh(H)[-1]
            root = oracles.matrix_power(H + ridge * torch.eye(size, dtype=H.dtype), -1 / (2 * len(shape)))
            product = oracles.kron(product, root)
        return product

    def rescaled(self, u: Tensor, g: Tensor, history: list[Tensor]) -> Tensor:
        squares, kind = torch.stack(history).square(), self.config.grafting
        if kind == "none":
            return u
        if kind == "keep":
            target = g
        elif kind == "adagrad":
            target = g / (squares.sum(0).sqrt() + 1e-10)
        else:
            ages = torch.arange(len(history) - 1, -1, -1, dtype=g.dtype)
            weights = 0.999**ages / (0.999**ages).sum()
            target = g / (torch.einsum("t,t...->...", weights, squares).sqrt() + 1e-8)
        return u * target.norm() / u.norm()


SHAMPOO_ROWS: dict[str, tuple[Callable[[], Case], dict[str, Any]]] = {
    "sum": (models.mlp, {"decay": None, "grafting": "none"}),
    "average": (models.mlp, {"decay": 0.9, "grafting": "none"}),
    "keep": (models.mlp, {"decay": 0.9, "grafting": "keep"}),
    "adagrad": (models.mlp, {"decay": None, "grafting": "adagrad"}),
    "adam": (models.mlp, {"decay": 0.9, "grafting": "adam"}),
    "intervals": (models.mlp, {"grafting": "none", "curvature_interval": 3, "preconditioner_interval": 3}),
    "stale_roots": (models.mlp, {"grafting": "adam", "preconditioner_interval": 4}),
    "stale_statistics": (models.mlp, {"grafting": "adagrad", "decay": None, "curvature_interval": 3}),
    "order_4": (partial(models.convolution, 2, groups=2), {"decay": None, "grafting": "none"}),
    "order_4_keep": (partial(models.convolution, 2), {"decay": 0.9, "grafting": "keep", "preconditioner_interval": 3}),
    "order_5": (partial(models.convolution, 3, groups=4), {"decay": 0.9, "grafting": "adam"}),
    "vectors": (models.normed, {"decay": None, "grafting": "none"}),
    "large_ridge": (models.mlp, {"damping": 0.1, "grafting": "none"}),
    "embedding": (models.embedding_mean, {"decay": 0.9, "grafting": "none", "damping": 1e-3}),
}


@pytest.mark.parametrize("row", SHAMPOO_ROWS)
@pytest.mark.parametrize("root, tolerance", [("eigh", 1e-7), ("newton", 1e-5)])
def test_shampoo(row: str, root: str, tolerance: float) -> None:
    make, options = SHAMPOO_ROWS[row]
    case = make()
    schedule = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
    config = ShampooGradientConfig(**{"decay": 0.9, "root": root, **schedule, **options})
    lr = 0.3 if config.grafting == "keep" else 0.02
    compare(case, METHODS["shampoo"](case.model, config), Shampoo(config), lr, tolerance)
