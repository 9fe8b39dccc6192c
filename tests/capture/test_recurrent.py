"""Matrices of recurrent layers: K-FAC's factors against the same layers written out in Linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.errors import SelfCheckWarning
from gradmaker.representations import Dense, Kron
from tests import oracles
from tests.by_hand import by_hand
from tests.coverage import Packed
from tests.measure import EXACT, blocks, compare, custom, ggn, measure, setup
from tests.models import CLASSES, Case, build

I, H = 3, 2  # noqa: E741


class Model(nn.Module):
    """A head on the mean output and the last states, from states that are given or zero."""

    def __init__(self, make: Callable[..., nn.Module], states: bool = True, start: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer: Any = make(I, H, **options)
        way = 2 if options.get("bidirectional") else 1
        width, count = options.get("proj_size", 0) or H, way * options.get("num_layers", 1)
        long = make is nn.LSTM
        self.head = nn.Linear(way * width + states * count * (width + (H if long else 0)), CLASSES)
        self.states, self.start, self.count, self.width, self.long = states, start, count, width, long

    def forward(self, x: Tensor) -> Tensor:
        n, first = len(x), self.layer.batch_first
        given = ()
        if self.start:
            each = torch.arange(1.0, self.count + 1).to(x)[:, None, None]  # of each layer and direction another
            h, c = 0.3 * each.expand(-1, n, self.width), -0.2 * each.expand(-1, n, H)
            given = ((h, c),) if self.long else (h,)
        y, state = self.layer(x if first else x.transpose(0, 1), *given)
        found = [y.mean(1 if first else 0)]
        if self.states:
            found += [v.transpose(0, 1).flatten(1) for v in (state if self.long else (state,))]
        z: Tensor = self.head(torch.cat(found, 1))
        return z


class Loop(nn.Module):
    """A cell that is called once a step; both states of an LSTM cell are used."""

    def __init__(self, make: Callable[..., nn.Module], start: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer: Any = make(I, H, **options)
        self.long = make is nn.LSTMCell
        self.head, self.start = nn.Linear(2 * H if self.long else H, CLASSES), start

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        if self.start:
            h = x.new_full((len(x), H), 0.4)
            state = (h, 0.5 * h) if self.long else h
        for step in x.unbind(1):
            state = self.layer(step, state) if state is not None else self.layer(step)
        z: Tensor = self.head(torch.cat(state, 1) if self.long else state)
        return z


def of(make: Callable[[], nn.Module], n: int = 4, steps: int = 3) -> Callable[[], Case]:
    return partial(build, make, n, steps, I)


LAYERS: dict[str, Callable[[], Case]] = {
    "RNN": of(partial(Model, nn.RNN)),
    "RNN, relu, time first, as many steps as examples": of(partial(Model, nn.RNN, nonlinearity="relu"), 3, 3),
    "RNN, bias=False, from a state": of(partial(Model, nn.RNN, bias=False, start=True, batch_first=True)),
    "LSTM": of(partial(Model, nn.LSTM, batch_first=True)),
    "LSTM, outputs alone": of(partial(Model, nn.LSTM, states=False)),
    "LSTM, from a state, time first": of(partial(Model, nn.LSTM, start=True)),
    "LSTM, two layers, both ways": of(partial(Model, nn.LSTM, num_layers=2, bidirectional=True, start=True, batch_first=True)),
    "LSTM, projected": of(partial(Model, nn.LSTM, proj_size=1, num_layers=2, start=True, batch_first=True)),
    "GRU": of(partial(Model, nn.GRU)),
    "GRU, both ways, from a state": of(partial(Model, nn.GRU, bidirectional=True, start=True, batch_first=True)),
    "RNNCell": of(partial(Loop, nn.RNNCell)),
    "RNNCell, relu, bias=False": of(partial(Loop, nn.RNNCell, nonlinearity="relu", bias=False)),
    "LSTMCell": of(partial(Loop, nn.LSTMCell)),
    "LSTMCell, from zero": of(partial(Loop, nn.LSTMCell, start=False)),
    "GRUCell": of(partial(Loop, nn.GRUCell)),
}


def twin(name: str, renamed: bool = False) -> Case:
    case = LAYERS[name]()
    return case._replace(model=by_hand(case.model, renamed))


def renamed(name: str) -> str:
    """Of a parameter: that of the Linear layer which stands for it."""
    return re.sub(r"(weight|bias)_([ih][hr].*)", r"\2.\1", name)


def parts(model: nn.Module) -> list[str]:
    """Names of the matrices, as sites bear them."""
    return [f"layer.{k.removeprefix('weight_')}" for k, _ in model.layer.named_parameters() if k.startswith("weight")]  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("name", LAYERS)
def test_the_written_out_layers_are_the_layers(name: str) -> None:
    case, other = LAYERS[name](), twin(name)
    torch.testing.assert_close(case.run(), other.run(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "sharing"), [*((name, "expand") for name in LAYERS), ("LSTM", "reduce"), ("GRUCell", "reduce")]
)
def test_factors_are_those_of_linear_layers(name: str, sharing: Any) -> None:
    """With the steps as positions, by loops over single examples."""
    found = blocks(measure(LAYERS[name](), FisherExact(), Kron(sharing=sharing)))
    case = twin(name)
    columns = oracles.exact_columns("categorical", case.t)
    made = parts(LAYERS[name]().model)
    if sharing == "expand":
        assert {k.removesuffix(".weight") for k in found} == {*made, "head"}
    for part in made:
        (pair,) = oracles.kfac_factors(case.model, case.x, part, columns, len(case.t), sharing=sharing)
        bias = case.model.get_submodule(part).bias is not None
        expected = oracles.kron(pair.B, pair.A)
        C = found[part if bias else f"{part}.weight"][0][0]
        assert oracles.relative_error(C, expected) < EXACT, part


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_those_of_the_whole_matrix(name: str) -> None:
    compare(measure(LAYERS[name](), FisherExact(), Dense(granularity="full")), ggn(LAYERS[name]()))


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_that_of_linear_layers(name: str) -> None:
    """K-FAC on the empirical Fisher matrix, whose output gradients come from the ordinary backward pass; every parameter."""
    steps = []
    for case in (LAYERS[name](), twin(name, renamed=True)):
        maker: Any = METHODS["kfac"](case.model, METHODS["kfac"].Config(fisher=FisherEmp(), damping=0.01))  # type: ignore[call-arg]
        assert not maker.plan.plain
        setup(maker, case)
        maker.forward_and_backward()
        steps.append({k: p.grad for k, p in case.model.named_parameters()})
    assert {renamed(k) for k in steps[0]} == set(steps[1])
    for k, g in steps[0].items():
        assert oracles.relative_error(g, steps[1][renamed(k)]) < 1e-9, k


@pytest.mark.parametrize("name", ["LSTM", "GRU, both ways, from a state", "LSTMCell"])
def test_verify_passes(name: str) -> None:
    case = LAYERS[name]()
    maker: Any = METHODS["kfac"](case.model)
    setup(maker, case)
    maker.forward_and_backward()
    result = maker.verify()
    assert result.passed and result.complete, str(result)


def test_single_precision_is_within_the_tolerance_of_the_checks() -> None:
    """Nothing is said of a hundred steps."""
    torch.manual_seed(0)
    model = Model(nn.LSTM, batch_first=True)
    case = Case(model, torch.randn(8, 100, I), torch.randint(CLASSES, (8,)), torch.nn.functional.cross_entropy)
    maker: Any = METHODS["kfac"](model)
    setup(maker, case)
    maker.forward_and_backward()
    assert not maker.plan.plain and maker.verify().passed


class Mixed(nn.Module):
    """The last states alone go on, and examples depend on each other in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(I, H, batch_first=True), nn.Linear(2 * H, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([v[0] for v in self.layer(x)[1]], 1)
        z: Tensor = self.head(h - h.mean(0))
        return z


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
def test_examples_that_mix_in_the_last_states_are_found() -> None:
    """By the gradients of all outputs, of which the first is zero."""
    make = of(Mixed)
    compare(measure(make(), FisherExact(), Dense(granularity="layer")), ggn(make()))


# ------------------------------------------------------------------ calls that the rule cannot read
class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(I, H, 2, dropout=0.5, batch_first=True), nn.Linear(H, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.layer(x)[0].mean(1))
        return z


UNREADABLE = {
    "packed": (partial(build, Packed, 4, 3, 3), "a packed sequence has no axis of examples"),
    "dropout": (partial(build, Dropped, 4, 3, I), "the dropout between its layers cannot be repeated"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_calls_that_cannot_be_repeated_lose_the_rule(name: str) -> None:
    make, reason = UNREADABLE[name]
    case = make()
    maker: Any = METHODS["kfac"](case.model)
    setup(maker, case)
    with pytest.warns(SelfCheckWarning, match=reason):
        maker.forward_and_backward()
    assert set(maker.plan.plain) == {k for k, _ in case.model.named_parameters() if k.startswith("layer.")}
    off: Any = METHODS["kfac"](make().model, METHODS["kfac"].Config(self_check="off"))  # type: ignore[call-arg]
    setup(off, case._replace(model=off.model))
    with pytest.raises(ValueError, match=reason):
        off.forward_and_backward()


def test_without_dropout_in_evaluation_it_has_the_rule() -> None:
    case = build(Dropped, 4, 3, I)
    case.model.eval()
    compare(measure(case, FisherExact(), Dense(granularity="layer")), ggn(case))
    maker = custom(case.model, FisherExact(), Kron())
    assert {s.name for b in maker.plan.blocks for s in b.sites} >= {"layer.ih_l1", "layer.hh_l1"}


class OwnCell(nn.GRUCell):
    """A subclass with a ``forward`` of its own is not the cell that it inherits from."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, state)


def test_a_cell_with_its_own_forward_is_generic() -> None:
    maker = custom(Loop(OwnCell).double(), FisherExact(), Dense(granularity="layer"))
    assert {s.kind for b in maker.plan.blocks for s in b.sites} == {"generic", "matrix"}


def test_a_shared_matrix_is_generic() -> None:
    """As of two cells with one matrix."""
    model = nn.ModuleList([nn.GRUCell(I, I), nn.GRUCell(I, I)])
    model[1].weight_hh = model[0].weight_hh
    maker = custom(model.double(), FisherExact(), Dense(granularity="layer"))
    kinds = {s.name: s.kind for b in maker.plan.blocks for s in b.sites}
    assert kinds["0.weight_hh"] == "generic" and kinds["0.ih"] == kinds["1.hh.bias"] == "matrix"
