"""Embeddings with a ``forward`` of their own: the blocks and steps of the tables that they are, and no rule for what is none.

The layers are written out as in the libraries that have them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.capture.finding import layer_sites
from gradmaker.capture.rules.layers import rule_for
from gradmaker.capture.rules.lookups import LookupRule
from gradmaker.curvature import FisherExact
from gradmaker.representations import Dense, Diagonal, Representation
from tests.measure import compare, ggn, measure, setup
from tests.models import CLASSES, Case, build_tokens

pytestmark = pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")  # of rows without an axis of examples
V, D, N, T = 7, 3, 5, 4  # rows and width of a table, sequences and their length


class ScaledWordEmbedding(nn.Embedding):
    """Of BART; Gemma's scale is a buffer."""

    def __init__(self, V: int, d: int, padding: int | None = None, scale: float = 1.75) -> None:
        super().__init__(V, d, padding)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.get_buffer("scale").to(self.weight.dtype)


class OffsetPositions(nn.Embedding):
    """Of BART: a position for each token, two rows further."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1]).expand(len(x), -1) + 2)


class CountedPositions(nn.Embedding):
    """Of OPT: counts a mask."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward((torch.cumsum(mask, 1) * mask - 1).long() + 2)


class SlicedPositions(nn.Embedding):
    """Of Whisper: the same rows for all examples, without an axis of these."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[: x.shape[1]]


class NormedEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


class RolledEmbedding(nn.Embedding):
    """Linear in its table, by other columns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, -1)


class WeightedEmbedding(nn.Embedding):
    """The weights of a mean of rows, or their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if x.is_floating_point() else super().forward(x)


class SummedEmbedding(nn.Embedding):
    """Two rows for each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight[0]


class UnpaddedEmbedding(nn.Embedding):
    """Its padding row has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


class ExtendedEmbedding(ScaledWordEmbedding):
    """A further parameter."""

    def __init__(self, V: int, d: int) -> None:
        super().__init__(V, d)
        self.extra = nn.Parameter(torch.zeros(d))


class Tables(nn.Module):
    """A table, tanh, Linear: one label a token. ``mask``: the table gets ones for all tokens but those of row 0."""

    def __init__(self, table: nn.Embedding, mask: bool = False) -> None:
        super().__init__()
        self.words, self.table, self.head, self.mask = nn.Embedding(V, D), table, nn.Linear(D, CLASSES), mask

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.words(x) + self.table((x > 0).long() if self.mask else x)))
        return z.movedim(-1, 1)


class Spelled(nn.Module):
    """The same with `nn.Embedding`, its index and its scale written out."""

    def __init__(self, model: Tables, index: Callable[[Tensor], Tensor], scale: float) -> None:
        super().__init__()
        own = model.table
        self.words, self.table, self.head = model.words, nn.Embedding(*own.weight.shape, own.padding_idx), model.head
        self.table.weight = own.weight
        self.index, self.scale = index, scale

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.words(x) + self.scale * self.table(self.index(x))))
        return z.movedim(-1, 1)


def tokens(make: Callable[[], nn.Embedding], mask: bool = False) -> Case:
    return build_tokens(lambda: Tables(make(), mask), N, T, V, tags=True)


def counted(x: Tensor) -> Tensor:
    mask = (x > 0).long()
    return mask.cumsum(1) * mask + 1


def shifted(x: Tensor) -> Tensor:
    return (torch.arange(T) + 2).expand(len(x), -1)


LOOKUPS: dict[str, tuple[Callable[[], Case], Callable[[Tensor], Tensor], float]] = {
    "scaled words": (partial(tokens, partial(ScaledWordEmbedding, V, D)), lambda x: x, 1.75),
    "scaled words, padding": (partial(tokens, partial(ScaledWordEmbedding, V, D, 1)), lambda x: x, 1.75),
    "positions, offset": (partial(tokens, partial(OffsetPositions, T + 2, D)), shifted, 1.0),
    "positions, counted": (partial(tokens, partial(CountedPositions, T + 2, D), mask=True), counted, 1.0),
    "positions, sliced": (partial(tokens, partial(SlicedPositions, T, D)), lambda x: torch.arange(T), 1.0),
    "positions, sliced, as many as examples": (partial(tokens, partial(SlicedPositions, N, D)), lambda x: torch.arange(T), 1.0),
}
OTHERS: dict[str, Callable[[], nn.Embedding]] = {
    "normed": partial(NormedEmbedding, V, D),
    "rolled": partial(RolledEmbedding, V, D),
    "weighted": partial(WeightedEmbedding, V, D),
    "summed": partial(SummedEmbedding, V, D),
    "padding with a gradient": partial(UnpaddedEmbedding, V, D, 1),
    "padding among positions": partial(OffsetPositions, V, D, 1),
    "a further parameter": partial(ExtendedEmbedding, V, D),
    "renormalised": partial(UnpaddedEmbedding, V, D, None, 1.0),
}
"""Tables that are none, or that no sample proves."""
GRAINS: dict[str, Representation] = {"layer": Dense(granularity="layer"), "diagonal": Diagonal(granularity="layer")}


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", LOOKUPS)
def test_blocks_are_those_of_the_oracle(name: str, grain: str) -> None:
    """Every number of the Gauss-Newton matrix of the table."""
    case = LOOKUPS[name][0]()
    maker = measure(case, FisherExact(), GRAINS[grain])
    compare(maker, ggn(LOOKUPS[name][0]()))
    (site,) = (s for b in maker.plan.blocks for s in b.sites if "table.weight" in s.parameters)
    assert isinstance(site.rule, LookupRule) and site.kind == "embedding"


METHODS_OF_LAYERS: dict[str, dict[str, Any]] = {
    "kfac": {"fisher": {"FisherExact": {}}},
    "ekfac": {"fisher": {"FisherExact": {}}},
    "unit_ng": {"fisher": {"FisherExact": {}}},
    "skfac": {},
}


@pytest.mark.parametrize("method", METHODS_OF_LAYERS)
@pytest.mark.parametrize("name", LOOKUPS)
def test_steps_are_those_of_the_table_that_is_written_out(name: str, method: str) -> None:
    """Two steps of `nn.Embedding` with the same index, scaled outside."""
    assert method in METHODS
    make, index, scale = LOOKUPS[name]
    case, twin = make(), make()
    assert isinstance(twin.model, Tables)
    twin = twin._replace(model=Spelled(twin.model, index, scale))
    found, expected = ({k: p.grad for k, p in stepped(c, method).items()} for c in (case, twin))
    assert set(found) == set(expected) and "table.weight" in found
    for k, g in expected.items():
        assert found[k] is not None and g is not None and torch.allclose(found[k], g, rtol=1e-9, atol=1e-12), k


def stepped(case: Case, method: str) -> dict[str, nn.Parameter]:
    """The parameters after two steps, with what these leave in ``.grad``."""
    maker = from_config(case.model, {"method": method, **METHODS_OF_LAYERS[method]})
    for _ in range(2):
        case.model.zero_grad()
        setup(maker, case)  # type: ignore[arg-type]
        maker.forward_and_backward()
    return dict(case.model.named_parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_table_has_no_rule(name: str) -> None:
    module = OTHERS[name]()
    assert rule_for(module) is None
    assert all(s.kind == "generic" for s in layer_sites(nn.ModuleDict({"table": module})))


@pytest.mark.parametrize("name", ["normed", "rolled", "summed", "padding with a gradient"])
def test_what_has_no_rule_is_exact_all_the_same(name: str) -> None:
    make = partial(tokens, OTHERS[name])
    compare(measure(make(), FisherExact(), Dense(granularity="layer")), ggn(make()))


def test_a_forward_of_the_instance_has_no_rule() -> None:
    layer = ScaledWordEmbedding(V, D)
    assert isinstance(rule_for(layer), LookupRule)
    layer.forward = partial(type(layer).forward, layer)  # type: ignore[method-assign]
    assert rule_for(layer) is None


@pytest.mark.parametrize("name", LOOKUPS)
def test_the_layer_stays_as_it_was(name: str) -> None:
    """The same table object with the same numbers, and no gradient on anything but a backward pass."""
    case, twin = LOOKUPS[name][0](), LOOKUPS[name][0]()
    table = case.model.get_submodule("table")
    before = table.get_parameter("weight")
    measure(case, FisherExact(), Diagonal(granularity="layer"))
    assert table.get_parameter("weight") is before
    assert torch.equal(before, twin.model.get_parameter("table.weight"))
    assert not table._forward_hooks and not table._forward_pre_hooks


@pytest.mark.parametrize("name", LOOKUPS)
def test_the_rule_holds_on_the_meta_device(name: str) -> None:
    """Also for a table that would fill the memory of the machine."""
    model = LOOKUPS[name][0]().model
    bare = copy.deepcopy(model).to("meta")
    assert [(s.name, s.kind, s.shape) for s in layer_sites(bare)] == [(s.name, s.kind, s.shape) for s in layer_sites(model)]
    with torch.device("meta"):
        assert isinstance(rule_for(model.get_submodule("table")), LookupRule)
        assert isinstance(rule_for(ScaledWordEmbedding(10**6, 10**5)), LookupRule)


def test_half_precision_counts_every_row() -> None:
    """Row numbers beyond those that bfloat16 tells apart."""
    layer = ScaledWordEmbedding(1000, 2).to(torch.bfloat16)
    model = nn.Sequential(layer, nn.Linear(2, CLASSES).to(torch.bfloat16))
    x = torch.tensor([[901], [902], [903]])
    maker = measure(Case(model, x, torch.tensor([[0], [1], [2]]), lambda z, t: nn.functional.cross_entropy(z.mT, t)))
    (block,) = maker.plan.blocks
    diagonal = block.triple.representation.to_dense(block.state)[0].diagonal()[:2000].reshape(1000, 2)
    assert set(diagonal.any(1).nonzero().flatten().tolist()) <= {901, 902, 903}
    assert diagonal[901:904].any()
