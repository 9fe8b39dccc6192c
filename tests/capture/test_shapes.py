"""How tensors fall into blocks: parts by layer or by name, merging of axes, and that nothing but the blocks changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, PreconditionedGradientMaker, Triple, from_config
from gradmaker.capture.rules.parts import natural_parts
from gradmaker.capture.shapes import ShapePolicy
from gradmaker.curvature import BatchGradient, probe
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.rules import paths
from gradmaker.representations import KronDims
from gradmaker.representations.capabilities import Factored
from gradmaker.solvers import Solver
from tests import oracles

AXES = [name for name, make in METHODS.items() if issubclass(make.Config, AxesGradientConfig)]
SCHEDULE: dict[str, Any] = {"preconditioner_interval": 2, "warmup_steps": 0, "stagger": False}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Zoo(nn.Module):
    """Parameters that hold several maps, and such that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
        self.cells = nn.ModuleList([nn.LSTMCell(3, 2), nn.GRUCell(3, 2), nn.RNNCell(3, 2)])
        self.gru = nn.GRU(3, 2)
        self.rnn = nn.RNN(3, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.other = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
        self.grouped = nn.Conv2d(4, 6, (3, 2), groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.transposed = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.qkv = nn.Linear(4, 12)
        self.heads = nn.Parameter(torch.zeros(2, 3, 5))
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.scale = nn.Parameter(torch.zeros(()))
        self.double()


PARTS = {
    "lstm.weight_ih_l0": 4,
    "lstm.weight_hh_l1_reverse": 4,
    "lstm.bias_ih_l0": 4,
    "lstm.weight_hr_l0": 1,
    "cells.0.weight_ih": 4,
    "cells.1.bias_hh": 3,
    "cells.2.weight_hh": 1,
    "gru.weight_hh_l0": 3,
    "rnn.weight_ih_l0": 1,
    "attention.in_proj_weight": 3,
    "attention.in_proj_bias": 3,
    "attention.out_proj.weight": 1,
    "other.q_proj_weight": 1,
    "other.in_proj_bias": 3,
    "other.bias_k": 1,
    "grouped.weight": 2,
    "grouped.bias": 1,
    "depthwise.weight": 4,
    "transposed.weight": 2,
    "qkv.weight": 1,
    "heads": 1,
    "scale": 1,
}


def test_layers_say_how_many_maps_a_parameter_holds() -> None:
    model = Zoo()
    held = paths(model)
    assert {name: natural_parts(held[model.get_parameter(name)], model.get_parameter(name)) for name in PARTS} == PARTS
    shared = nn.ModuleList([nn.LSTM(3, 4), nn.ParameterList([nn.Parameter(torch.zeros(1))])])
    shared[1][0] = shared[0].weight_ih_l0  # its two owners do not agree
    assert natural_parts(paths(shared)[shared[1][0]], shared[1][0]) == 1


# --- nothing but the blocks changes ---------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Identity(Solver[Factored]):
    """``P = I``."""

    def prepare(self, representation: Any, state: Any, previous: Any) -> dict[str, Tensor]:
        return {"one": torch.ones_like(state["mass"])}

    def solve(self, representation: Any, cache: Any, g: Tensor) -> Tensor:
        return g * cache["one"].view(-1, *[1] * (g.ndim - 1))

    def operator(self, representation: Any, state: Any) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(AxesGradientConfig):
    def triple(self, site: Any) -> Triple:
        return Triple(BatchGradient(), KronDims(), Identity())


class IdentityMaker(PreconditionedGradientMaker):
    Config = IdentityConfig


def given(model: nn.Module, maker: Any, seed: int) -> dict[str, Tensor]:
    """One step on gradients of one's own, some of them in other memory formats."""
    for k, p in enumerate(model.parameters()):
        g = randn(*p.shape, seed=seed + k)
        p.grad = g.to(memory_format=torch.channels_last) if g.ndim == 4 else g.mT.contiguous().mT if g.ndim == 2 else g
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    maker.precondition()
    return before


@pytest.mark.parametrize("split", [(), "layers", {"qkv": 3, "heads": 2, "grouped.*": 2}])
@pytest.mark.parametrize("merge", ["none", "squeeze", "to_2d", "balanced", "greedy"])
@pytest.mark.parametrize("block_size", [None, 3])
def test_reading_and_writing_is_the_identity(split: Any, merge: Any, block_size: int | None) -> None:
    """P = I leaves every bit of every gradient, and every entry lies in one block."""
    model = Zoo()
    maker = IdentityMaker(model, IdentityConfig(split=split, merge=merge, block_size=block_size))
    before = given(model, maker, 0)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]), name
    entries = sum(b.frame.stack * torch.Size(b.frame.shape).numel() for b in maker.plan.blocks)
    assert entries == sum(p.numel() for p in model.parameters())
    names = [s.name for b in maker.plan.blocks for s in b.sites]
    assert len(set(names)) == len(names)


def test_blocks_of_layers() -> None:
    model = Zoo()
    maker = IdentityMaker(model, IdentityConfig(split="layers", merge="to_2d"))
    shapes = {s.name: s.shape for b in maker.plan.blocks for s in b.sites}
    expected = {
        "lstm.weight_ih_l0": (4, 4, 3),
        "lstm.bias_ih_l0": (4, 4),
        "lstm.weight_hr_l0": (1, 2, 4),
        "attention.in_proj_weight": (3, 4, 4),
        "grouped.weight": (2, 3, 12),
        "depthwise.weight": (4, 9),
        "transposed.weight": (2, 2, 9),
        "qkv.weight": (1, 12, 4),
        "heads": (1, 2, 15),
        "position": (1, 5, 4),
        "scale": (1, 1),
    }
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize(
    "shape, balanced",
    [
        ((8, 64, 512), (512, 512)),  # heads, width of a head, model: the sides of an attention projection
        ((512, 8, 64), (512, 512)),
        ((64, 3, 7, 7), (64, 147)),
        ((64, 64, 3, 3), (64, 576)),
        ((32, 128, 5), (32, 640)),
        ((1, 197, 768), (197, 768)),
        ((5, 3), (5, 3)),
        ((7,), (7,)),
        ((), (1,)),
    ],
)
def test_balanced_merging(shape: tuple[int, ...], balanced: tuple[int, ...]) -> None:
    """Attention as CASPR's code has it, (a, b, c) -> (a, bc) if b < a else (ab, c); convolutions stay (O, I H W)."""
    assert ShapePolicy("balanced")._merged(shape) == balanced
    (view,) = ShapePolicy("balanced").views(shape)
    assert view.shape == (1, *balanced)


# --- parts are parameters of their own ------------------------------------------------------------------------------------
class Tensors(nn.Module):
    """Parameters that are given their gradients."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes])


def run(config: dict[str, Any], steps: list[list[Tensor]]) -> list[Tensor]:
    """The last step's preconditioned gradients."""
    model = Tensors(*(tuple(g.shape) for g in steps[0]))
    maker = from_config(model, config)
    for gradients in steps:
        for p, g in zip(model.w, gradients, strict=True):
            p.grad = g.clone()
        maker.precondition()
    return [p.grad for p in model.w if p.grad is not None]


@pytest.mark.parametrize("method", AXES)
@pytest.mark.parametrize("shape", [(12, 5), (8,), (6, 2, 3)])
@pytest.mark.parametrize("block_size", [None, 4])
def test_parts_equal_separate_parameters(
    method: str, shape: tuple[int, ...], block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12, with the method's own averages, refreshes, lengths; noise that is drawn by name is made the same for all."""
    monkeypatch.setattr(
        probe, "_normal", lambda _, shape: torch.linspace(-1, 2, prod(shape[1:])).expand(shape[0], -1).reshape(shape)
    )
    parts = 2 if len(shape) > 1 else 4
    config = {"method": method, "block_size": block_size, **SCHEDULE}
    if method == "full_adagrad":  # eight gradients leave its matrix without full rank: its ridge of 1e-8 magnifies rounding
        config["damping"] = 1e-2
    steps = [randn(*shape, seed=k) for k in range(8)]
    (together,) = run({**config, "split": {"w.0": parts}}, [[g] for g in steps])
    apart = run(config, [list(g.chunk(parts)) for g in steps])
    whole = run(config, [[g] for g in steps])
    assert oracles.relative_error(together, torch.cat(apart)) < 1e-12
    if method == "shampoo" and block_size is None:  # others may be element-wise in this shape or at these steps
        assert oracles.relative_error(together, whole[0]) > 1e-3


class Gates(nn.Module):
    """One step of an LSTM, its four gates in one parameter or in four."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        weights = [randn(4, 3, seed=k) for k in range(4)]
        self.cell = nn.LSTMCell(3, 4, bias=False).double()
        with torch.no_grad():
            self.cell.weight_ih.copy_(torch.cat(weights))
            self.cell.weight_hh.copy_(randn(16, 4, seed=9) / 2)
        self.apart = None if fused else nn.ParameterList([nn.Parameter(w.clone()) for w in weights])
        self.cell.weight_ih.requires_grad_(fused)
        self.cell.weight_hh.requires_grad_(False)

    def weight(self) -> Tensor:
        return self.cell.weight_ih if self.apart is None else torch.cat(list(self.apart))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_ones(len(x), 4) / 2
        i, f, g, o = (F.linear(x, self.weight()) + F.linear(h, self.cell.weight_hh)).chunk(4, 1)
        return o.sigmoid() * torch.tanh(f.sigmoid() * h + i.sigmoid() * g.tanh())


def trained(model: Any, config: dict[str, Any], x: Tensor) -> Tensor:
    maker = from_config(model, config)
    for k in range(10):
        model.zero_grad()
        y = maker.setup_model_call(model, x.roll(k, -1))
        maker.setup_loss_call(lambda y: (y - 0.3).square().mean(), y)
        maker.forward_and_backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * (0 if p.grad is None else p.grad)
    return model.weight().detach()


def test_an_lstm_trains_as_its_gates() -> None:
    config = {"method": "shampoo", "preconditioner_interval": 1}
    fused = trained(Gates(True), {**config, "split": "layers"}, randn(6, 3, seed=20))
    assert oracles.relative_error(fused, trained(Gates(False), config, randn(6, 3, seed=20))) < 1e-12
    assert oracles.relative_error(fused, trained(Gates(True), config, randn(6, 3, seed=20))) > 1e-4


class Grouped(nn.Module):
    """A convolution of two groups, or two convolutions."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        weight = randn(6, 2, 3, seed=1)
        self.whole = nn.Conv1d(4, 6, 3, groups=2, bias=False).double() if fused else None
        self.halves = None if fused else nn.ModuleList([nn.Conv1d(2, 3, 3, bias=False).double() for _ in range(2)])
        with torch.no_grad():
            for part, own in zip(weight.chunk(1 if fused else 2), self.parameters(), strict=True):
                own.copy_(part)

    def weight(self) -> Tensor:
        return torch.cat(list(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        if self.halves is None:
            y: Tensor = self.whole(x)
            return y
        return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, 1), strict=True)], 1)


@pytest.mark.parametrize("method", ["shampoo", "soap", "muon"])
def test_a_grouped_convolution_trains_as_its_groups(method: str) -> None:
    config, x = {"method": method, "merge": "to_2d"}, randn(5, 4, 8, seed=3)
    fused = trained(Grouped(True), {**config, "split": "layers"}, x)
    assert oracles.relative_error(fused, trained(Grouped(False), config, x)) < 1e-12


def test_order_three_is_dense() -> None:
    """(H_1 (x) H_2 (x) H_3)^(-1/6) g of each part, with whole matrices."""
    steps = [randn(4, 3, 2, seed=k) for k in range(6)]
    options = {"method": "shampoo", "grafting": "none", "decay": None, "damping": 1e-6, "preconditioner_interval": 1}
    for split, parts in (((), 1), ({"w.0": 2}, 2)):
        (found,) = run({**options, "split": split}, [[g] for g in steps])
        for j, value in enumerate(found.chunk(parts)):
            pieces = [g.chunk(parts)[j] for g in steps]
            roots = []
            for axis, d in enumerate(value.shape):
                H = sum(torch.tensordot(g, g, dims=([k for k in range(3) if k != axis],) * 2) for g in pieces)
                ridge = 1e-6 * torch.linalg.eigvalsh(H)[-1] * torch.eye(d, dtype=torch.float64)
                roots.append(oracles.matrix_power(H + ridge, -1 / 6))
            P = reduce(oracles.kron, roots)
            assert oracles.relative_error(value.reshape(-1), P @ pieces[-1].reshape(-1)) < 1e-10


# --- options --------------------------------------------------------------------------------------------------------------
def test_rules_are_those_of_ignore() -> None:
    """The first that fits; a name, a pattern, a class, a module; a pair of lists as YAML has it."""
    model = Zoo()
    for rule in ("gru", "g*u.*", nn.GRU, model.gru):
        maker: Any = from_config(model, {"method": "shampoo", "split": {rule: 3}})
        assert {s.shape for b in maker.plan.blocks for s in b.sites if s.name == "gru.weight_ih_l0"} == {(3, 2, 3)}
    pairs = [["qkv.bias", 2], ["qkv", 3]]
    maker = from_config(model, {"method": "shampoo", "split": pairs})
    shapes = {s.name: s.shape for b in maker.plan.blocks for s in b.sites}
    assert (shapes["qkv.weight"], shapes["qkv.bias"]) == ((3, 4, 4), (2, 6))
    config = maker.config
    assert hash(config) and METHODS["shampoo"].Config(**vars(config)) == config


@pytest.mark.parametrize(
    "split, match",
    [
        ("gates", "expected 'layers', or numbers of parts by name"),
        (3, "expected 'layers'"),
        ({"qkv": 0}, "0 parts for 'qkv': expected an integer of at least 1"),
        ({"qkv": 2.0}, "2.0 parts"),
        ({3: 2}, "split=3: expected a module"),
        ({"kqv": 3}, "split: 'kqv' matches none of heads, position, scale, lstm.weight_ih_l0"),
        ({"qkv": 5}, r"split: qkv.weight: a tensor of shape \(12, 4\) does not divide into 5 equal parts"),
        ({"scale": 2}, r"split: scale: a tensor of shape \(\) does not divide into 2"),
    ],
)
def test_wrong_splits_are_refused(split: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        from_config(Zoo(), {"method": "shampoo", "split": split})
