"""The cells of docs/coverage.md: each case run against dense oracles; one that is accepted and wrong raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gradmaker import KfacGradientConfig, KfacGradientMaker
from gradmaker.curvature import FisherExact
from gradmaker.representations import Dense, Diagonal, Kron, Representation
from tests import models, oracles
from tests.by_hand import by_hand
from tests.capture.test_layers import MORE, Packed, Pooled, two
from tests.measure import EXACT, blocks, ggn, measure, setup
from tests.models import CLASSES, ZOO, Case, build, build_tokens
from tests.named import NAMED, Conv1D, as_linear

Blocks = dict[str, Tensor]  # by site: (B, P, P)


# ------------------------------------------------------------------ attention, by torch and by hand
class Hand(nn.Module):
    """What `nn.MultiheadAttention(batch_first=True)` computes, of four Linear layers with its weights."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        d, self.heads = module.embed_dim, module.num_heads
        bias = module.in_proj_bias is not None
        self.query, self.out = nn.Linear(d, d, bias), nn.Linear(d, d, bias)
        self.key, self.value = nn.Linear(module.kdim, d, bias), nn.Linear(module.vdim, d, bias)
        self.further = [b.detach() for b in (module.bias_k, module.bias_v) if b is not None]  # one more key and value
        packed = module.in_proj_weight
        apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if packed is None else packed.chunk(3)
        self.double()
        with torch.no_grad():
            for j, layer in enumerate((self.query, self.key, self.value)):
                layer.weight.copy_(apart[j])
                if bias:
                    layer.bias.copy_(module.in_proj_bias[j * d : j * d + d])
            for p, q in zip(self.out.parameters(), module.out_proj.parameters(), strict=True):
                p.copy_(q)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **ignored: Any) -> tuple[Tensor, None]:
        pairs = ((self.query, q), (self.key, k), (self.value, v))
        q, k, v = (f(x) for f, x in pairs)
        if self.further:
            k, v = (torch.cat([x, b.expand(len(x), -1, -1)], 1) for x, b in zip((k, v), self.further, strict=True))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if attn_mask is None else ~attn_mask
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2)), None


class Attend(nn.Module):
    """Attention, tanh, mean over the positions, Linear; time first unless ``batch_first``."""

    def __init__(self, layer: nn.Module, inputs: Callable[[Tensor], tuple[Tensor, ...]], masked: bool, weights: bool) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, CLASSES)
        self.inputs, self.masked, self.weights = inputs, masked, weights
        self.time_first = not getattr(layer, "batch_first", True)

    def forward(self, x: Tensor) -> Tensor:
        given = self.inputs(x)
        mask = torch.ones(given[0].shape[1], given[1].shape[1], dtype=torch.bool).triu(1) if self.masked else None
        if self.time_first:
            same = all(v is given[0] for v in given)
            turned = [v.transpose(0, 1) for v in given]
            given = (turned[0],) * 3 if same else tuple(turned)
        y, _ = self.layer(*given, attn_mask=mask, need_weights=self.weights)
        z: Tensor = self.head(torch.tanh(y).mean(0 if self.time_first else 1))
        return z


def attention(
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x, x, x),
    masked: bool = False,
    weights: bool = False,
    hand: bool = False,
    **options: Any,
) -> Case:
    """``hand`` gives the same model with the attention written in Linear layers."""

    def make() -> nn.Module:
        layer = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
        if layer.in_proj_bias is not None:
            nn.init.normal_(layer.in_proj_bias)
            nn.init.normal_(layer.out_proj.bias)
        return Attend(layer, inputs, masked, weights)

    case = build(make, 3, 5, 4)
    if hand:
        case.model.layer, case.model.time_first = Hand(case.model.layer), False  # type: ignore[arg-type]
    return case


def apart(x: Tensor) -> tuple[Tensor, ...]:
    """Fewer queries than keys, of three different tensors."""
    return x[:, :2], x, x + 1


ATTENTION: dict[str, Callable[..., Case]] = {
    "MultiheadAttention, self": attention,
    "MultiheadAttention, time first": partial(attention, batch_first=False),
    "MultiheadAttention, attention mask, weights returned": partial(attention, masked=True, weights=True),
    "MultiheadAttention, keys are values": partial(attention, lambda x: (x[:, :2], x, x)),
    "MultiheadAttention, three inputs of two lengths": partial(attention, apart),
    "MultiheadAttention, kdim and vdim": partial(attention, lambda x: (x[:, :2], x[..., :3], x[..., :2]), kdim=3, vdim=2),
    "MultiheadAttention, bias=False": partial(attention, bias=False),
}


# ------------------------------------------------------------------ further cases
def embedding(**options: Any) -> Case:
    case = build_tokens(lambda: models.Bag(None), 5, 4, 7, tags=False)
    case.model.embedding = nn.Embedding(7, 3, _weight=case.model.embedding.weight.detach(), _freeze=False, **options)  # type: ignore[union-attr]
    return case


class Bags(nn.Module):
    """An embedding bag whose input is one long axis with offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.EmbeddingBag(7, 3), nn.Linear(3, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        offsets = torch.arange(0, tokens.numel(), tokens.shape[1])
        z: Tensor = self.head(torch.tanh(self.layer(tokens.flatten(), offsets)))
        return z


class TiedLanguage(nn.Module):
    """The embedding's weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.hidden, self.head = nn.Embedding(CLASSES, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES, bias=False)
        self.head.weight = self.layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.hidden(self.layer(tokens))).mean(1))
        return z


class LoRA(nn.Module):
    """A frozen Linear layer and a trained product of two thin ones beside it (Hu et al. 2022)."""

    def __init__(self, i: int, o: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(i, o).requires_grad_(False)
        self.down, self.up = nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 2.0 * self.up(self.down(x))
        return y


def evaluated(case: Case) -> Case:
    """Running statistics off their start, then in evaluation mode."""
    case.run()
    case.model.eval()
    return case


def transposed(d: int, **options: Any) -> Case:
    return models.convolution(d, transposed=True, **options)


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, **options)


def spectral() -> Case:
    """In training mode, its singular vectors far from settled."""

    def make() -> nn.Module:
        layer = parametrizations.spectral_norm(nn.Linear(4, 3))
        for vector in layer.buffers():
            vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
        return two(layer)

    return build(make, 5, 4)


# ------------------------------------------------------------------ the table
class Row(NamedTuple):
    """A case, the layer that the row speaks of, and what is a convention about it."""

    make: Callable[[], Case]
    layer: str = "layer"
    note: str = ""  # on all columns
    kfac_note: str = ""


SUMMED = "Calls of one module and layers of one type that share their weight are further positions of one layer."
HELD = "In training mode the statistics of the batch are held fixed, here and in the oracle: gradients of single examples."
NEAREST = "The Kronecker product nearest to the sum of the two that the uses have, as embedding and as linear layer."
SWAPPED = "An input position is a position, and its gradient the patch of output gradients; the bias is a block of its own."
CONV = {"stride": "stride", "dilation": "dilation", "same": 'padding="same"', "groups": "groups", "depthwise": "depthwise"}
CONV |= {mode: f'padding_mode="{mode}"' for mode in ("reflect", "replicate", "circular")}
ROWS: dict[str, Row] = {
    "Linear": Row(models.mlp, "0"),
    "Linear, bias=False": Row(partial(models.mlp, bias=False), "0"),
    "Linear, more axes": Row(partial(build, lambda: Pooled(nn.Linear(3, 4), 4), 4, 2, 5, 3)),
    "Linear, frozen weight": Row(MORE["frozen_weight"], "0"),
    "Linear, called twice": Row(models.called_twice, "shared", kfac_note=SUMMED),
    "Linear, two with one weight": Row(models.tied, "first"),
    "Linear, in a reentrant checkpoint": Row(partial(models.checkpointed, True), "body.0"),
    "Linear, in a checkpoint": Row(partial(models.checkpointed, False), "body.0"),
    "Linear, LoRA beside a frozen one": Row(partial(build, lambda: two(LoRA(4, 3, 2)), 5, 4), "0"),
    **{f"Conv{d}d": Row(ZOO[f"conv{d}d_plain"], "convolution") for d in (1, 2, 3)},
    **{f"Conv{d}d, {text}": Row(ZOO[f"conv{d}d_{name}"], "convolution") for name, text in CONV.items() for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": Row(partial(transposed, d), "convolution", "", SWAPPED) for d in (1, 2, 3)},
    **{
        f"ConvTranspose{d}d, {text}": Row(partial(transposed, d, **options), "convolution", "", SWAPPED)
        for d in (1, 2, 3)
        for text, options in {
            "stride, padding, output_padding": {"stride": 2, "padding": 1, "output_padding": 1},
            "dilation, output_padding": {"dilation": 2, "padding": 1, "output_padding": 1},
            "groups": {"groups": 2, "stride": 2, "padding": 1},
            "bias=False": {"bias": False},
        }.items()
    },
    "ConvTranspose2d, each axis its own": Row(
        partial(transposed, 2, stride=(2, 1), padding=(1, 0), dilation=(1, 2), output_padding=(0, 1)),
        "convolution",
        "",
        SWAPPED,
    ),
    "Embedding": Row(embedding, "embedding"),
    "Embedding, padding_idx": Row(partial(embedding, padding_idx=0), "embedding"),
    "Embedding, max_norm": Row(
        partial(embedding, max_norm=1.0), "embedding", "The curvature is that at the rows which the call has shortened."
    ),
    "Embedding, scale_grad_by_freq": Row(partial(embedding, scale_grad_by_freq=True), "embedding"),
    "Embedding, weight tied to the head": Row(
        partial(build_tokens, TiedLanguage, 5, 4, CLASSES, tags=False), kfac_note=NEAREST
    ),
    "EmbeddingBag": Row(MORE["embedding_bag"], "0"),
    "EmbeddingBag, offsets": Row(partial(build_tokens, Bags, 4, 3, 7, tags=False)),
    "BatchNorm, training": Row(models.NORM_CASES["batch_norm"], "norm", HELD),
    "BatchNorm, evaluation": Row(lambda: evaluated(models.normed("batch_norm")), "norm"),
    **{
        f"{label}{text}": Row(models.NORM_CASES[kind + suffix], "norm")
        for kind, label in {"layer_norm": "LayerNorm", "group_norm": "GroupNorm", "rms_norm": "RMSNorm"}.items()
        for suffix, text in {"": "", "_zero_scale": ", scale 0", "_no_bias": ", bias=None"}.items()
        if kind + suffix in models.NORM_CASES
    },
    "InstanceNorm": Row(MORE["instance_norm"]),
    **{label: Row(make) for label, make in NAMED.items()},
    **{label: Row(make) for label, make in ATTENTION.items()},
    "MultiheadAttention, add_bias_kv": Row(partial(attention, add_bias_kv=True)),
    "TransformerEncoderLayer": Row(MORE["transformer"], "0"),
    "RNN": Row(MORE["rnn"]),
    "LSTM": Row(MORE["lstm_batch_first"]),
    "GRU, bidirectional": Row(MORE["gru_both_ways"]),
    "RNN, packed sequence": Row(partial(build, Packed, 4, 3, 3)),
    "weight_norm": Row(models.weight_norm, "0"),
    "spectral_norm, training": Row(spectral, "0", "The singular vectors are those of the recorded call, held fixed."),
    "bare parameter": Row(models.bare_scale, "scale"),
    "bare parameter, before a batch norm in training": Row(partial(build, models.ScaledNorm, 6, 2, 4), "scale", HELD),
    "subclass with a forward of its own": Row(MORE["subclass"], "0"),
    "any other module (PReLU)": Row(MORE["prelu"], "1"),
}
COLUMNS: dict[str, Representation | None] = {
    "K-FAC": None,
    "dense": Dense(granularity="layer"),
    "unit": Dense(granularity="unit"),
    "diagonal": Diagonal(granularity="layer"),
}


def reference(row: Row) -> Tensor:
    """The Gauss-Newton matrix of the whole model, on a twin of the case."""
    twin = models.checkpointed(None) if row.layer == "body.0" else row.make()
    if row.make is spectral:
        twin = evaluated(twin)
    if row.note is HELD:
        with oracles.frozen_batch_statistics(twin.model, twin.x):
            return ggn(twin)
    return ggn(twin)


def inside(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    """Of sites, those of the layer."""
    mine = {k: v for k, v in found.items() if k == row.layer or k.startswith(f"{row.layer}.")}
    return mine or {k: v for k, v in found.items() if k == "(model)"}


def cell(row: Row, column: str, oracle: Tensor | None) -> str:
    """What a column does with a row. AssertionError where it is accepted and wrong."""
    try:
        return kfac_cell(row) if column == "K-FAC" else block_cell(row, COLUMNS[column], oracle)
    except (ValueError, TypeError) as error:
        return f"refused: {error}"


def block_cell(row: Row, representation: Any, oracle: Tensor | None) -> str:
    maker = measure(row.make(), FisherExact(), representation)
    assert oracle is not None
    mine = inside(row, blocks(maker))
    assert mine
    for name, (C, where) in mine.items():
        expected = torch.stack([oracle[rows][:, rows] for rows in where])
        if isinstance(representation, Diagonal):
            expected = torch.diag_embed(expected.diagonal(dim1=1, dim2=2))
        assert agree(C, expected, oracle), (row.layer, name)
    return word(row, maker.plan.blocks)


def word(row: Row, plan: Any) -> str:
    kinds = {site.kind for block in plan for site in block.sites if site.name in inside(row, {site.name: 0})}
    if kinds == {"generic"}:
        return "generic path"
    exact = "exact per documented convention" if row.note else "exact"
    return mixed(exact, [k for b in plan for s in b.sites if s.kind == "generic" for k in inside(row, {s.name: 0})])


def mixed(exact: str, generic: list[str]) -> str:
    """A layer of which some parameters belong to no rule."""
    names = ", ".join(name.rsplit(".", 1)[-1] for name in generic)
    return f"generic path ({names}); else {exact}" if generic else exact


def agree(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    floor = 1e-6 * float(torch.linalg.norm(scale))  # a block may be zero
    return found.shape == expected.shape and float(torch.linalg.norm(found - expected)) < EXACT * max(
        floor, float(torch.linalg.norm(expected))
    )


# ------------------------------------------------------------------ K-FAC, held against its definition
def kfac_cell(row: Row) -> str:
    case = row.make()
    maker = KfacGradientMaker(case.model, KfacGradientConfig(fisher=FisherExact(), decay=0.0))
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    mine = {k: C for k, (C, _) in inside(row, blocks(maker)).items()}  # type: ignore[arg-type]
    plain = inside(row, maker.plan.plain)
    if not mine:
        assert plain
        return "generic path"
    oracle = reference(row)
    expected = definition(row, maker, oracle)
    assert set(mine) == set(expected)
    for name, C in mine.items():
        assert agree(C, expected[name], expected[name]), (row.layer, name)
    exact = "exact per documented convention" if row.note or row.kfac_note else "exact"
    return mixed(exact, list(plain))


def definition(row: Row, maker: Any, oracle: Tensor) -> Blocks:
    """Kronecker products of the factors by loops over single examples; 2 x 2 blocks of norm layers from the oracle."""
    found: Blocks = {}
    all_blocks = blocks(maker)
    for block in maker.plan.blocks:
        for site in block.sites:
            if site.name not in inside(row, {site.name: 0}):
                continue
            if isinstance(block.triple.representation, Kron):
                found[site.name] = factored(row, site.name)
            else:
                found[site.name] = torch.stack([oracle[rows][:, rows] for rows in all_blocks[site.name][1]])
    return found


def tied_factors(twin: Case, columns: Any) -> Tensor:
    """The product that is nearest to the sum of those of embedding and head, by an SVD of the whole matrix.  # (1, P, P)"""
    (lookup,), (head,) = (oracles.kfac_factors(twin.model, twin.x, k, columns, twin.t.numel()) for k in ("layer", "head"))
    C = oracles.kron(lookup.A, lookup.B) + oracles.kron(head.B, head.A)
    return oracles.kron(*oracles.nearest_kronecker(C, len(head.B))).unsqueeze(0)


def factored(row: Row, site: str) -> Tensor:
    """``B (x) A`` of every group, as the weight is laid out.  # (G, P, P)"""
    twin = models.checkpointed(None) if row.layer == "body.0" else twin_by_hand(row)
    name, part = site.rsplit(".", 1) if site.endswith((".weight", ".bias")) else (site, "both")
    module: Any = twin.model if name == "(model)" else twin.model.get_submodule(name)
    columns = oracles.exact_columns("categorical", twin.t)
    terms = twin.t.numel()
    if isinstance(twin.model, TiedLanguage) and name == "layer":
        return tied_factors(twin, columns)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return transposed_factors(twin, name, part, columns)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        return padded_factors(twin, name, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = oracles.kfac_factors(twin.model, twin.x, name, columns, terms)
    if part == "bias":
        return torch.stack([pair.B for pair in pairs])
    order = (lambda p: (p.A, p.B)) if isinstance(module, nn.Embedding) else (lambda p: (p.B, p.A))
    drop = part == "weight" and getattr(module, "bias", None) is not None
    kept = [pair._replace(A=pair.A[:-1, :-1]) if drop else pair for pair in pairs]
    return torch.stack([oracles.kron(*order(pair)) for pair in kept])


def twin_by_hand(row: Row) -> Case:
    """The same case with attention, recurrent layers and `Conv1D` written in Linear layers, where it has them."""
    case = evaluated(row.make()) if row.make is spectral else row.make()
    by_hand(case.model)
    for path, module in list(case.model.named_modules()):
        if isinstance(module, Conv1D):
            case.model.layer = as_linear(module)
        if isinstance(module, nn.MultiheadAttention):
            parent, _, child = path.rpartition(".")
            setattr(case.model.get_submodule(parent), child, Hand(module))
            if isinstance(case.model, Attend):
                case.model.time_first = False
    if row.layer == "0" and isinstance(case.model, nn.Sequential) and isinstance(case.model[0], nn.TransformerEncoder):
        return case._replace(model=EncoderByHand(case.model))
    return case


class EncoderByHand(nn.Module):
    """One post-norm encoder layer, then what follows it; torch's own forward reads attributes that `Hand` has not."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        encoder, flat, head = self.children()
        layer: Any = encoder.get_submodule("layers.0")
        x = layer.norm1(x + layer.self_attn(x, x, x)[0])
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        z: Tensor = head(flat(x))
        return z


def transposed_rows(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Of one example: inputs (r, C_in) and what each reached, (r, C_out, kernel), zero outside."""
    from itertools import product

    a, reached = [], []
    for position in product(*(range(size) for size in x.shape[2:])):
        a.append(x[(0, slice(None), *position)])
        taps = []
        for offset in product(*(range(size) for size in module.kernel_size)):
            place = zip(position, offset, module.stride, module.padding, module.dilation, strict=True)
            target = [p * s - pad + k * gap for p, k, s, pad, gap in place]
            within = all(0 <= at < size for at, size in zip(target, g.shape[2:], strict=True))
            taps.append(g[(0, slice(None), *target)] if within else torch.zeros_like(g[0].flatten(1)[:, 0]))
        reached.append(torch.stack(taps, 1))
    return torch.stack(a), torch.stack(reached)


def transposed_factors(twin: Case, name: str, part: str, columns: Any) -> Tensor:
    module: Any = twin.model.get_submodule(name)
    tape = oracles.layer_tape(twin.model, twin.x, name, columns)
    if part == "bias":
        rows = torch.cat([g[0][0].flatten(1).mT for _, per_column in tape for g in per_column])
        return (rows.mT @ rows / len(twin.x)).unsqueeze(0)
    G, pairs = module.groups, []
    split = [transposed_rows(module, inputs[0], g[0]) for inputs, per_column in tape for g in per_column]
    a = torch.cat([x for x, _ in split]).unflatten(1, (G, -1))  # the inputs repeat with every column: the mean is the same
    g = torch.cat([y for _, y in split]).unflatten(1, (G, -1)).flatten(2)
    for j in range(G):
        A, B = a[:, j].mT @ a[:, j] / len(a), g[:, j].mT @ g[:, j] / len(twin.x)
        pairs.append(oracles.kron(A, B))
    return torch.stack(pairs)


def padded_factors(twin: Case, name: str, columns: Any) -> Tensor:
    """Padding takes no part."""
    keep = twin.x != 0
    tape = oracles.layer_tape(twin.model, twin.x, name, columns)
    rows = torch.cat([g[0][0][keep[n]] for n, (_, per_column) in enumerate(tape) for g in per_column])
    A = torch.diag(torch.bincount(twin.x[keep], minlength=7).double() / keep.sum())
    return oracles.kron(A, rows.mT @ rows / len(twin.x)).unsqueeze(0)


# ------------------------------------------------------------------ the page
def measured(label: str) -> list[str]:
    """A row of the table."""
    row = ROWS[label]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            oracle = reference(row)
        except RuntimeError:  # only of what is refused
            oracle = None
        return [cell(row, column, oracle) for column in COLUMNS]


def table() -> dict[str, list[str]]:
    """All rows."""
    return {label: measured(label) for label in ROWS}
