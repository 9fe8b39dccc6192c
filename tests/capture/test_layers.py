"""Every layer rule, and the generic fallback, against dense oracles: through a maker, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from gradmaker.capture.finding import layer_sites
from gradmaker.curvature import FisherEmp, FisherExact, FisherMC
from gradmaker.errors import SelfCheckError
from gradmaker.representations import Dense, Diagonal, Elementwise, Kron, Representation
from tests import models, oracles
from tests.measure import EXACT, blocks, compare, ggn, measure, site_order
from tests.models import CLASSES, ZOO, Case, build, build_tokens

COUPLED = [name for name in ZOO if name.startswith("batch_norm")]
GRAINS: dict[str, Representation] = {
    "full": Dense(granularity="full"),
    "layer": Dense(granularity="layer"),
    "unit": Dense(granularity="unit"),
    "diagonal": Diagonal(granularity="layer"),
}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for weight norm


def reference(name: str, make: Callable[[], Case]) -> tuple[Case, Tensor]:
    """A twin of a case that nothing has touched, with its oracle."""
    twin = models.checkpointed(None) if name.startswith("checkpoint") else make()
    return twin, ggn(twin, models.logits_of if name.startswith("structured") else oracles.identity)


# ------------------------------------------------------------------ the zoo
@pytest.mark.parametrize("name", [name for name in ZOO if name not in COUPLED])
def test_zoo(name: str) -> None:
    """Full, layer, unit and diagonal blocks are slices of the Gauss-Newton matrix."""
    case, oracle = reference(name, ZOO[name])
    for representation in GRAINS.values():
        compare(measure(ZOO[name](), FisherExact(), representation), oracle)


@pytest.mark.parametrize("name", COUPLED)
def test_batch_norm_in_training(name: str) -> None:
    """Its own block and all that follows hold no coupling of examples; before it the coupling is in the output gradients."""
    case, oracle = reference(name, ZOO[name])
    for representation in (GRAINS["layer"], GRAINS["unit"], GRAINS["diagonal"]):
        compare(measure(ZOO[name](), FisherExact(), representation), oracle, skip=("first",))
    C, where = blocks(measure(ZOO[name](), FisherEmp(), Dense(granularity="layer")))["first"]
    assert float(torch.linalg.norm(C[0] - coupled_block(case))) < EXACT


def coupled_block(case: Case) -> Tensor:
    """The empirical Fisher of ``first`` from the gradients of its outputs in the whole batch."""
    seen: list[Tensor] = []
    handle = case.model.get_submodule("first").register_forward_hook(lambda m, a, y: seen.append(y))
    with oracles.quiet_batch_norm(case.model):
        (g,) = torch.autograd.grad(case.run(), seen)
    handle.remove()
    a = torch.cat([case.x, torch.ones_like(case.x[..., :1])], -1).reshape(len(case.x), -1, 5)
    J = torch.einsum("nro,nri->noi", g.reshape(len(g), -1, 4), a).flatten(1)
    return len(case.x) * J.mT @ J


def test_parameters_of_no_layer_before_batch_norms() -> None:
    """Their call is repeated for single examples, with mean and variance of the batch as constants, and nothing is moved."""
    case, twin, plain = (models.build(models.ScaledNorm, 6, 2, 4) for _ in range(3))
    with oracles.frozen_batch_statistics(twin.model, twin.x):
        oracle = ggn(twin)
    for representation in (GRAINS["layer"], GRAINS["unit"], GRAINS["diagonal"]):
        case = models.build(models.ScaledNorm, 6, 2, 4)
        compare(measure(case, FisherExact(), representation), oracle, skip=("conv", "norms.0"))  # before a coupling
    plain.run()
    assert all(torch.equal(b, c) for b, c in zip(case.model.buffers(), plain.model.buffers(), strict=True))
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in case.model.modules())


@pytest.mark.parametrize("name", COUPLED)
def test_batch_norm_in_evaluation(name: str) -> None:
    case = ZOO[name]()
    case.model.train()
    case.run()  # running statistics off their start
    case.model.eval()
    oracle = ggn(case)
    compare(measure(case), oracle)


# ------------------------------------------------------------------ layers that the zoo lacks
class Recurrent(nn.Module):
    """A recurrent layer, then the last output; its own input is time first unless ``batch_first``."""

    def __init__(self, make: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = make(3, 2, **options)
        self.head = nn.Linear(4 if options.get("bidirectional") else 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        z: Tensor = self.head(y.sum(1 if self.layer.batch_first else 0))
        return z


class Attended(nn.Module):
    """`nn.MultiheadAttention`, with or without a mask over positions, then the mean."""

    def __init__(self, batch_first: bool, masked: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options), nn.Linear(4, CLASSES)
        nn.init.normal_(self.attention.in_proj_bias)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        time = 1 if self.attention.batch_first else 0
        mask = torch.ones(x.shape[time], x.shape[time], dtype=torch.bool).triu(1) if self.masked else None
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        z: Tensor = self.head(torch.tanh(y).mean(time))
        return z


class Pooled(nn.Module):
    """A layer on its own, tanh, mean over the positions, Linear."""

    def __init__(self, layer: nn.Module, width: int, channels_second: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.channels_second = layer, nn.Linear(width, CLASSES), channels_second

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        h = h.flatten(2).mT if self.channels_second else h
        z: Tensor = self.head(h.flatten(1, -2).mean(1) if h.ndim > 2 else h)
        return z


class Positions(nn.Module):
    """Token and position embeddings; the positions are looked up once for all examples, as language models do."""

    def __init__(self, lead: bool) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(7, 3), nn.Embedding(6, 3), nn.Linear(3, CLASSES)
        self.lead = lead

    def forward(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1])
        h = self.token(tokens) + self.position(index.unsqueeze(0) if self.lead else index)
        z: Tensor = self.head(torch.tanh(h).mean(1))
        return z


class Patches(nn.Module):
    """A class token and positions as bare parameters of the model, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 3), nn.Linear(3, CLASSES)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(1, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        z: Tensor = self.head((torch.tanh(h) * torch.arange(1.0, 5.0).reshape(-1, 1)).mean(1))
        return z


class Scaled(nn.Linear):
    """A subclass with a forward of its own: no rule may take it for a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.square(), self.bias)


class ByKeyword(nn.Module):
    """Layers called by keyword, and on time-first and flattened activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(input=x)).transpose(0, 1)
        h = torch.tanh(self.second(h)).transpose(0, 1)
        z: Tensor = self.third(h.flatten(0, 1))
        return z.unflatten(0, (len(x), -1)).mean(1)


def part_frozen(which: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model[0].get_parameter(which).requires_grad_(False)
    return model


def two(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, CLASSES))


def randomised(norm: nn.Module) -> nn.Module:
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(12, CLASSES))


spectral = parametrizations.spectral_norm
weighted = parametrizations.weight_norm
MORE: dict[str, Callable[[], Case]] = {
    "rnn": partial(build, lambda: Recurrent(nn.RNN), 4, 3, 3),
    "lstm_batch_first": partial(build, lambda: Recurrent(nn.LSTM, batch_first=True), 4, 3, 3),
    "lstm_square": partial(build, lambda: Recurrent(nn.LSTM), 3, 3, 3),  # as many steps as examples
    "lstm_layers": partial(build, lambda: Recurrent(nn.LSTM, num_layers=2, batch_first=True), 2, 3, 3),
    "gru": partial(build, lambda: Recurrent(nn.GRU), 4, 3, 3),
    "gru_both_ways": partial(build, lambda: Recurrent(nn.GRU, bidirectional=True, batch_first=True), 4, 3, 3),
    "attention_batch_first": partial(build, lambda: Attended(True), 4, 3, 4),
    "attention_time_first": partial(build, lambda: Attended(False), 4, 3, 4),
    "attention_square": partial(build, lambda: Attended(False), 3, 3, 4),
    "attention_masked": partial(build, lambda: Attended(True, True), 4, 3, 4),
    "attention_masked_square": partial(build, lambda: Attended(True, True), 3, 3, 4),
    "attention_apart": partial(build, lambda: Attended(True, add_bias_kv=True), 3, 2, 4),
    "transformer": partial(build, encoder, 4, 3, 4),
    "prelu": partial(build, lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, CLASSES)), 5, 4),
    "instance_norm": partial(build, lambda: Pooled(randomised(nn.InstanceNorm1d(3, affine=True)), 3, True), 5, 3, 4),
    "layer_norm_wide": partial(build, lambda: Pooled(randomised(nn.LayerNorm((3, 2))), 2), 4, 5, 3, 2),
    "layer_norm_wide_alone": partial(build, lambda: Pooled(randomised(nn.LayerNorm((3, 2))), 2), 4, 3, 2),
    "rms_norm_wide": partial(build, lambda: Pooled(randomised(nn.RMSNorm((3, 2))), 2), 4, 3, 2),
    "group_norm_images": partial(build, lambda: Pooled(randomised(nn.GroupNorm(2, 4)), 4, True), 4, 4, 3, 2),
    "linear_images": partial(build, lambda: Pooled(nn.Linear(3, 4), 4), 4, 2, 5, 3),
    "weight_norm_conv": partial(build, lambda: Pooled(weighted(nn.Conv1d(2, 3, 2)), 3, True), 4, 2, 5),
    "spectral_norm": partial(build, lambda: two(spectral(nn.Linear(4, 3))).eval(), 5, 4),
    "subclass": partial(build, lambda: two(Scaled(4, 3)), 5, 4),
    "by_keyword": partial(build, ByKeyword, 4, 3, 3),
    "patches": partial(build, Patches, 4, 3, 3),
    "frozen_weight": partial(build, lambda: part_frozen("weight"), 5, 4),
    "frozen_bias": partial(build, lambda: part_frozen("bias"), 5, 4),
    "embedding_single": partial(build_tokens, lambda: models.Bag(None), 5, 1, 7, tags=False),
    "embedding_bag": partial(build_tokens, lambda: two(nn.EmbeddingBag(7, 3)), 5, 4, 7, tags=False),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_layers(name: str) -> None:
    case, oracle = reference(name, MORE[name])
    for representation in GRAINS.values():
        compare(measure(MORE[name](), FisherExact(), representation), oracle)


# ------------------------------------------------------------------ what cannot be told apart is refused
class OwnPositions(nn.Module):
    """A module that returns positions without an axis for the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[: tokens.shape[1]]


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(7, 3), OwnPositions(), nn.Linear(3, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.token(tokens) + self.position(tokens)).mean(1))
        return z


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(3, 2), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 1]), batch_first=True)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])
        z: Tensor = self.head(y.sum(0))
        return z


class Unbatched(nn.Module):
    """Treats the model's input as one image without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(4, 2, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.layer(x)).flatten()).expand(len(x), -1)
        return z


NO_AXIS: dict[str, Callable[[], Case]] = {
    "positions": partial(build_tokens, lambda: Positions(False), 4, 6, 7, tags=False),
    "positions_multiple": partial(build_tokens, lambda: Positions(False), 3, 6, 7, tags=False),
    "positions_as_many": partial(build_tokens, lambda: Positions(False), 6, 6, 7, tags=False),
    "own_positions": partial(build_tokens, Shifted, 4, 6, 7, tags=False),
    "packed": partial(build, Packed, 4, 3, 3),
    "positions_lead": partial(build_tokens, lambda: Positions(True), 4, 6, 7, tags=False),
    "positions_lead_multiple": partial(build_tokens, lambda: Positions(True), 3, 6, 7, tags=False),
    "unbatched_convolution": partial(build, Unbatched, 4, 3, 3),
}


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize("name", NO_AXIS)
def test_calls_without_an_axis_of_examples(name: str) -> None:
    """Their gradients are taken one example at a time; a size that is that of the batch by chance says nothing."""
    case, oracle = reference(name, NO_AXIS[name])
    for representation in GRAINS.values():
        compare(measure(NO_AXIS[name](), FisherExact(), representation), oracle)


@pytest.mark.parametrize("name", NO_AXIS)
def test_calls_without_an_axis_of_examples_may_be_errors(name: str) -> None:
    case = NO_AXIS[name]()
    with pytest.raises(SelfCheckError, match=r"examples.*self_check='fallback'.*ignore="):
        measure(case, self_check="error")
    assert all(p.grad is None for p in case.model.parameters())


# ------------------------------------------------------------------ layers that are others in disguise
def first_block(model: nn.Module, x: Tensor) -> Tensor:
    maker = measure(Case(model.double(), x, torch.arange(len(x)) % CLASSES, F.cross_entropy), FisherExact(), Dense())
    return next(iter(blocks(maker).values()))[0]


def copied(target: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.copy_(q.reshape(p.shape))


class Flat(nn.Module):
    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.layer(x)).flatten(1))
        return z


def test_pointwise_convolution_is_a_linear_layer() -> None:
    x, conv, linear = torch.randn(4, 3, 5).double(), nn.Conv1d(3, 2, 1), nn.Linear(3, 2)
    copied(linear, conv)
    a, b = nn.Linear(10, CLASSES), nn.Linear(10, CLASSES)
    with torch.no_grad():  # the head reads (channel, position) in one, (position, channel) in the other
        b.bias.copy_(a.bias)
        b.weight.copy_(a.weight.reshape(-1, 2, 5).mT.reshape(-1, 10))
    found, expected = first_block(Flat(conv, a), x), first_block(Flat(linear, b), x.mT.contiguous())
    assert oracles.relative_error(found, expected) < EXACT


def test_convolution_over_the_whole_input_is_a_linear_layer() -> None:
    x, conv, linear = torch.randn(4, 3, 2, 2).double(), nn.Conv2d(3, 2, 2), nn.Linear(12, 2)
    copied(linear, conv)
    head = nn.Linear(2, CLASSES)
    found, expected = first_block(Flat(conv, head), x), first_block(Flat(nn.Sequential(nn.Flatten(), linear), head), x)
    assert oracles.relative_error(found, expected) < EXACT


def test_groups_are_separate_convolutions_in_one_block() -> None:
    """Each group's part of the layer's block is the block of a convolution of its own channels."""
    conv, head = nn.Conv1d(4, 6, 2, groups=2).double(), nn.Linear(6 * 4, CLASSES).double()
    halves = [nn.Conv1d(2, 3, 2).double() for _ in range(2)]
    for j, half in enumerate(halves):
        copied(half, nn.ParameterList([conv.weight[3 * j : 3 * j + 3], conv.bias[3 * j : 3 * j + 3]]))

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves, self.head = nn.ModuleList(halves), head

        def forward(self, x: Tensor) -> Tensor:
            parts = [half(v) for half, v in zip(self.halves, x.chunk(2, 1), strict=True)]
            z: Tensor = self.head(torch.tanh(torch.cat(parts, 1)).flatten(1))
            return z

    x, t = torch.randn(3, 4, 5).double(), torch.tensor([0, 1, 2])
    whole = first_block(Flat(conv, head), x)[0]
    apart = blocks(measure(Case(Split(), x, t, F.cross_entropy), FisherExact(), Dense()))
    half = len(whole) // 2
    for j in range(2):
        own = slice(half * j, half * (j + 1))
        assert oracles.relative_error(whole[own, own], apart[f"halves.{j}"][0][0]) < EXACT
    assert float(whole[:half, half:].norm()) > 0.1 * float(whole.norm())


def test_attention_by_hand_is_the_module() -> None:
    """`nn.MultiheadAttention` and Linear layers on the same weights: four blocks each, the same ones."""
    module = Attended(True).double()
    attention, d = module.attention, 4

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(d, d).double() for _ in range(4))
            self.head = module.head
            with torch.no_grad():
                for j, layer in enumerate((self.q, self.k, self.v)):
                    layer.weight.copy_(attention.in_proj_weight[j * d : j * d + d])
                    layer.bias.copy_(attention.in_proj_bias[j * d : j * d + d])
            copied(self.out, attention.out_proj)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            z: Tensor = self.head(torch.tanh(self.out(y)).mean(1))
            return z

    x, t = torch.randn(4, 3, d).double(), torch.tensor([0, 1, 2, 0])
    by_hand = blocks(measure(Case(Hand(), x, t, F.cross_entropy), FisherExact(), Dense()))
    by_module = blocks(measure(Case(module, x, t, F.cross_entropy), FisherExact(), Dense()))
    for name, part in {"q": "query", "k": "key", "v": "value", "out": "out"}.items():
        assert oracles.relative_error(by_module[f"attention.{part}"][0], by_hand[name][0]) < EXACT


# ------------------------------------------------------------------ embeddings
class Largest(TorchDispatchMode):
    """The most elements that any tensor had which was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [v for v in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(v, Tensor)]
        self.numel = max([self.numel, *(v.numel() for v in found)])
        return out


@pytest.mark.parametrize("curvature", [FisherMC(), FisherEmp()], ids=["mc", "emp"])
@pytest.mark.parametrize("representation", [Kron(), Kron(sharing="reduce"), Diagonal(granularity="layer")], ids=str)
def test_large_vocabulary(curvature: Any, representation: Representation) -> None:
    """Nothing larger than the weight itself is made, let alone V x V."""
    V, d = 50_000, 2
    model = nn.Sequential(nn.Embedding(V, d), nn.Flatten(), nn.Linear(3 * d, CLASSES))
    case = Case(model, torch.randint(V, (4, 3)), torch.tensor([0, 1, 2, 0]), F.cross_entropy)
    with Largest() as seen:
        measure(case, curvature, representation, **({} if isinstance(representation, Elementwise) else {"max_dim": 10**6}))
    assert V * d <= seen.numel <= V * (d + 1)


@pytest.mark.parametrize("padding", [None, 0])
def test_embedding_factor_counts_tokens(padding: int | None) -> None:
    case = models.embedding_mean(padding)
    maker = measure(case, FisherExact(), Kron())
    block = next(b for b in maker.plan.blocks if b.sites[0].kind == "embedding")
    counts = torch.bincount(case.x.reshape(-1), minlength=7).double()
    if padding is not None:
        assert counts[padding] > 0
        counts[padding] = 0
    left, _ = block.triple.representation.factors(block.state)  # type: ignore[attr-defined]
    assert torch.allclose(left[0], counts / counts.sum(), atol=1e-14)


# ------------------------------------------------------------------ who claims what
@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_every_trainable_parameter_is_claimed_once(name: str) -> None:
    model = (ZOO | MORE)[name]().model
    sites = layer_sites(model)
    claimed = torch.cat([site_order(model, site) for site in sites]).sort().values
    assert torch.equal(claimed, torch.arange(sum(p.numel() for p in model.parameters() if p.requires_grad)))
