"""Options and sizes of layers that nothing else varies: eps of norms, sides that differ, groups; against dense oracles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.representations import Dense, Diagonal, Kron
from tests import models, oracles
from tests.capture.test_layers import Pooled, copied, randomised
from tests.curvature.test_fisher import close, factors_of
from tests.measure import blocks, compare, ggn, measure
from tests.models import Case

GRAINS = (Dense(granularity="full"), Dense(granularity="layer"), Diagonal(granularity="layer"))

# ------------------------------------------------------------------ eps of norms
NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], bool]] = {  # what makes it, its input, channels second
    "layer_norm": (partial(nn.LayerNorm, 4), (5, 3, 4), False),
    "layer_norm_wide": (partial(nn.LayerNorm, (3, 4)), (5, 3, 4), False),
    "rms_norm": (partial(nn.RMSNorm, 4), (5, 3, 4), False),
    "group_norm": (partial(nn.GroupNorm, 2, 4), (5, 4, 3), True),
    "group_norm_of_one_group": (partial(nn.GroupNorm, 1, 4), (5, 4, 3), True),
    "batch_norm": (partial(nn.BatchNorm1d, 4), (5, 4), False),
    "batch_norm_images": (partial(nn.BatchNorm2d, 4), (5, 4, 3, 2), True),
    "batch_norm_untracked": (partial(nn.BatchNorm1d, 4, track_running_stats=False), (5, 4), False),
    "instance_norm": (partial(nn.InstanceNorm1d, 4, affine=True), (5, 4, 3), True),
    "instance_norm_tracked": (partial(nn.InstanceNorm1d, 4, affine=True, track_running_stats=True), (5, 4, 3), True),
}
EPS: dict[str, tuple[dict[str, Any], float]] = {  # options, and the size of the inputs: their square is near eps
    "default": ({}, 1e-3),
    "small": ({"eps": 1e-8}, 1e-4),
    "large": ({"eps": 0.5}, 1.0),
}


def normed(name: str, options: dict[str, Any], size: float, trained: bool = True) -> Case:
    """A norm on the inputs, which are as small as its eps; out of training its running statistics are off their start."""
    make, shape, channels_second = NORMS[name]
    if name == "rms_norm" and not options:
        size = 1e-8  # its default is the roundoff of the dtype
    case = models.build(lambda: Pooled(randomised(make(**options)), 4, channels_second), *shape)
    case = case._replace(x=size * (case.x + 0.3))
    if not trained:
        case.run()
        case.model.eval()
    return case


@pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", NORMS)
def test_eps_of_norms(name: str, eps: str, trained: bool) -> None:
    oracle = ggn(normed(name, *EPS[eps], trained))
    for representation in GRAINS:
        compare(measure(normed(name, *EPS[eps], trained), FisherExact(), representation), oracle)


def test_eps_matters() -> None:
    """Else the test before would see nothing: three times the eps moves the matrix by far more than it tolerates."""
    for name, (options, size) in itertools.product(NORMS, EPS.values()):
        case = normed(name, options, size)
        oracle, layer = ggn(case), case.model.get_submodule("layer")
        layer.eps = 3 * (layer.eps or torch.finfo(torch.float64).eps)  # type: ignore[assignment, operator]
        assert oracles.relative_error(ggn(case), oracle) > 1e-2, name


@pytest.mark.parametrize("dtype, size, tolerance", [(torch.float64, 1e-8, 1e-10), (torch.float32, 3e-4, 1e-3)])
def test_rms_norm_without_eps_takes_that_of_its_dtype(dtype: torch.dtype, size: float, tolerance: float) -> None:
    """``eps=None``: the roundoff of the layer's dtype, not that of the statistics."""
    make = partial(normed, "rms_norm", {"eps": None}, size)
    twin, case = make(), make()
    x = case.x.to(dtype)
    eps = torch.finfo(dtype).eps
    layer = twin.model.get_submodule("layer")
    layer.eps = eps  # type: ignore[assignment]
    oracle = ggn(twin._replace(x=x.double()))
    case = case._replace(model=case.model.to(dtype), x=x)
    found = measure(case, FisherExact(), Dense(granularity="layer"), dtype=torch.float64)
    compare(found, oracle, tolerance=tolerance)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_eps_of_batch_norms_inside_of_a_repeated_call(eps: float) -> None:
    """Parameters of no layer: their module is called again for single examples, with statistics and eps of the batch."""

    def make() -> Case:
        case = models.build(models.ScaledNorm, 6, 2, 4)
        for norm in case.model.norms:  # type: ignore[union-attr]
            norm.eps = eps  # type: ignore[union-attr, assignment]
        return case._replace(x=case.x * (1e-2 if eps < 0.1 else 1.0))

    twin = make()
    with oracles.frozen_batch_statistics(twin.model, twin.x):
        oracle = ggn(twin)
    compare(measure(make(), FisherExact(), Dense(granularity="layer")), oracle, skip=("conv", "norms.0"))


# ------------------------------------------------------------------ transposed convolutions, sides and groups
TRANSPOSED: dict[str, tuple[int, int, dict[str, Any]]] = {  # channels in and out
    "narrower": (4, 2, {}),
    "wider": (2, 4, {}),
    "square": (3, 3, {}),
    "square_groups": (4, 4, {"groups": 2}),
    "narrower_groups": (6, 2, {"groups": 2}),
    "wider_groups": (2, 6, {"groups": 2, "bias": False}),
    "strided": (4, 2, {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)}),
    "dilated": (2, 4, {"dilation": (1, 2)}),
}


def transposed(name: str) -> Case:
    ins, outs, options = TRANSPOSED[name]
    layer = partial(nn.ConvTranspose2d, ins, outs, (3, 2), **options)
    return models.build(lambda: Pooled(layer(), outs, True), 3, ins, 3, 4)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name: str) -> None:
    oracle = ggn(transposed(name))
    for representation in (*GRAINS, Dense(granularity="unit")):
        compare(measure(transposed(name), FisherExact(), representation), oracle)


def transposed_factors(case: Case) -> list[oracles.Factors]:
    """A from the channels at each input position, B from the output gradients that the position reaches, by index loops."""
    layer: Any = case.model.get_submodule("layer")
    n, ins, *space = case.x.shape
    groups, kernel = layer.groups, layer.kernel_size
    size = layer.out_channels // groups * kernel[0] * kernel[1]
    A = [torch.zeros(ins // groups, ins // groups).double() for _ in range(groups)]
    B = [torch.zeros(size, size).double() for _ in range(groups)]
    tape = oracles.layer_tape(case.model, case.x, "layer", oracles.exact_columns("categorical", case.t))
    for (inputs, columns), j in itertools.product(tape, range(groups)):
        for u, v in itertools.product(*map(range, space)):
            a = inputs[0][0].chunk(groups)[j][:, u, v]
            A[j] += torch.outer(a, a) / (n * space[0] * space[1])
            for (g,) in columns:
                reached = [read(layer, g[0].chunk(groups)[j], u, v, p, q) for p in range(kernel[0]) for q in range(kernel[1])]
                patch = torch.stack(reached, 1).reshape(-1)  # channel, then kernel
                B[j] += torch.outer(patch, patch) / n
    return [oracles.Factors(*pair) for pair in zip(A, B, strict=True)]


def read(layer: Any, g: Tensor, u: int, v: int, p: int, q: int) -> Tensor:
    """The gradient at what kernel element (p, q) makes of input position (u, v); zero outside."""
    at = [
        position * layer.stride[k] - layer.padding[k] + tap * layer.dilation[k]
        for k, (position, tap) in enumerate(((u, p), (v, q)))
    ]
    inside = all(0 <= x < size for x, size in zip(at, g.shape[1:], strict=True))
    return g[:, at[0], at[1]] if inside else torch.zeros_like(g[:, 0, 0])


@pytest.mark.parametrize("name", TRANSPOSED)
def test_kronecker_factors_of_transposed_convolutions(name: str) -> None:
    expected = transposed_factors(transposed(name))
    maker = measure(transposed(name), FisherExact(), Kron(), max_dim=64)
    by_site = {site.name: pair for b in maker.plan.blocks for site, pair in sided(b).items()}
    left, right = by_site["layer.weight" if "layer.weight" in by_site else "layer"]
    for j, pair in enumerate(expected):
        assert close(left[j], pair.A) and close(right[j], pair.B), j


def sided(block: Any) -> dict[Any, tuple[Tensor, Tensor]]:
    """By site: the factors of rows and columns."""
    left, right = (torch.diag_embed(f) if f.ndim == 2 else f for f in block.triple.representation.factors(block.state))
    return {site: (left[slot], right[slot]) for site, slot in zip(block.sites, block.slots, strict=True)}


# ------------------------------------------------------------------ as many outputs as inputs
def test_factors_of_square_layers() -> None:
    """With o = i + 1 both factors of a layer have one size: the two sides may not be exchanged."""
    case, twin = (models.build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), 6, 3) for _ in range(2))
    found = factors_of(measure(case, FisherExact(), Kron()))
    columns = oracles.exact_columns("categorical", case.t)
    for layer in ("0", "2"):
        (expected,) = oracles.kfac_factors(twin.model, twin.x, layer, columns, 6)
        assert expected.A.shape == expected.B.shape
        assert close(found[layer][0][0], expected.A) and close(found[layer][1][0], expected.B)


def test_a_square_embedding() -> None:
    """As many tokens as columns."""

    def make() -> Case:
        layers = partial(nn.Embedding, 4, 4), nn.Flatten, partial(nn.Linear, 12, 3)
        return models.build_tokens(lambda: nn.Sequential(*(layer() for layer in layers)), 5, 3, 4, tags=False)

    oracle = ggn(make())
    for representation in (*GRAINS, Dense(granularity="unit")):
        compare(measure(make(), FisherExact(), representation), oracle)
    C = blocks(measure(make(), FisherEmp(), Kron()))["0.weight"][0][0]
    twin = make()
    (expected,) = oracles.kfac_factors(twin.model, twin.x, "0", oracles.empirical_columns("categorical", twin.t), 5)
    assert oracles.relative_error(C, oracles.kron(expected.A, expected.B)) < 1e-12


# ------------------------------------------------------------------ attention of several widths
class Across(nn.Module):
    """Two queries of width 4 look at keys and values of widths and a number of their own."""

    def __init__(self, kdim: int, vdim: int, keys: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=kdim, vdim=vdim, batch_first=True, **options)
        self.head, self.kdim, self.vdim, self.keys = nn.Linear(4, 3), kdim, vdim, keys

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[:, : self.keys, : self.kdim], x[:, : self.keys, -self.vdim :]
        y, _ = self.attention(x[:, -2:, :4], key, value, need_weights=False)
        z: Tensor = self.head(torch.tanh(y).flatten(1).unflatten(1, (2, 4)).sum(1))
        return z


WIDTHS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "keys_wider": (5, 3, 3, {}),
    "values_wider": (3, 5, 3, {}),
    "as_many_keys_as_examples": (3, 5, 4, {}),
    "as_many_keys_as_queries": (5, 3, 2, {"bias": False}),
    "keys_as_wide": (4, 6, 5, {"add_zero_attn": True}),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_attention_with_keys_and_values_of_other_widths(name: str) -> None:
    kdim, vdim, keys, options = WIDTHS[name]
    make = partial(models.build, lambda: Across(kdim, vdim, keys, **options), 4, 5, 6)
    oracle = ggn(make())
    for representation in (*GRAINS, Dense(granularity="unit")):
        compare(measure(make(), FisherExact(), representation), oracle)


# ------------------------------------------------------------------ a masked sequence, a layer that is called twice
class Twice(nn.Module):
    """A tagger whose hidden layer is called two or three times."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head, self.calls = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3), calls

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for _ in range(self.calls):
            h = torch.tanh(self.hidden(h))
        z: Tensor = self.head(h)
        return z


def masked_tagger(calls: int) -> Case:
    """Sequences of other lengths: 3, 0, 5 and 1 of 5 tokens count, and one of them in the middle does not."""
    loss: Any = models.TAGGER_LOSS["last"]
    case = models.build_tokens(lambda: Twice(calls), 4, 5, 7, loss, tags=True)
    length = torch.tensor([3, 0, 5, 1]).unsqueeze(1)
    t = torch.where(torch.arange(5) < length, case.t, -100)
    t[2, 1] = -100
    return case._replace(t=t)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("calls", [2, 3])
def test_masked_sequences_through_a_layer_that_is_called_again(calls: int, sharing: Any) -> None:
    case, twin = masked_tagger(calls), masked_tagger(calls)
    found = factors_of(measure(case, FisherExact(), Kron(sharing=sharing)))
    columns, valid = oracles.exact_columns("categorical", case.t), case.t >= 0
    for layer in ("hidden", "head"):
        (expected,) = oracles.kfac_factors(twin.model, twin.x, layer, columns, int(valid.sum()), sharing=sharing, valid=valid)
        assert close(found[layer][0][0], expected.A), layer
        assert close(found[layer][1][0], expected.B), layer


@pytest.mark.parametrize("calls", [2, 3])
def test_matrices_of_masked_sequences_through_a_layer_that_is_called_again(calls: int) -> None:
    oracle = ggn(masked_tagger(calls))
    for representation in GRAINS:
        compare(measure(masked_tagger(calls), FisherExact(), representation), oracle)


# ------------------------------------------------------------------ unbiased scale by running statistics
def test_batch_norm_in_evaluation_scales_by_its_running_variance() -> None:
    """Running statistics far from those of the batch, in a layer with a norm behind it."""
    case, twin = (models.normed("batch_norm", positions=3) for _ in range(2))
    for each in (case, twin):
        norm: Any = each.model.get_submodule("norm")
        norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        norm.running_var.copy_(torch.tensor([0.1, 5.0, 1.0, 2.0]))
        each.model.eval()
    compare(measure(case, FisherExact(), Dense(granularity="layer")), ggn(twin))


def test_a_transposed_convolution_of_one_position_is_a_linear_layer() -> None:
    """Three channels to two, kernel 2 x 2: a matrix (8, 3), whose block is that of the layer in another order."""
    x = torch.randn(4, 3, 1, 1).double()
    layer, linear = nn.ConvTranspose2d(3, 2, 2, bias=False).double(), nn.Linear(3, 8, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(layer.weight.reshape(3, 8).mT)
    head = nn.Linear(8, 3).double()
    found = []
    for first, inputs in ((nn.Sequential(layer, nn.Flatten()), x), (linear, x.flatten(1))):
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3).double())
        copied(model[2], head)
        case = Case(model, inputs, torch.tensor([0, 1, 2, 0]), F.cross_entropy)
        found.append(next(iter(blocks(measure(case, FisherExact(), Dense())).values()))[0][0])
    order = torch.arange(24).reshape(3, 8).mT.reshape(-1)  # (i, o) to (o, i)
    assert oracles.relative_error(oracles.reorder(found[0], order), found[1]) < 1e-10
