"""A small float64 zoo: every entry of `ZOO` is a zero-argument factory of a `Case` (model, x, t, loss).

The loss takes (model output, target), whatever the output is; `case.run()` is one forward and loss. Building a case leaves the
global random state alone, and the same factory always gives the same numbers. Nothing here imports gradmaker.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES = 3


class Case(NamedTuple):
    """A model with one batch; unpacks as `model, x, t, loss`."""

    model: nn.Module
    x: Tensor
    t: Tensor
    loss: Callable[[Any, Tensor], Tensor]

    def run(self) -> Tensor:
        return self.loss(self.model(self.x), self.t)


def build(
    make: Callable[[], nn.Module], *size: int, loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy, seed: int = 0
) -> Case:
    """A classifier case on normal inputs of the given size (batch first); every parameter is moved off its special values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Case(make().double(), torch.randn(*size, dtype=torch.float64), torch.randint(CLASSES, size[:1]), loss)


def build_tokens(
    make: Callable[[], nn.Module],
    n: int,
    r: int,
    vocabulary: int,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    *,
    tags: bool,
) -> Case:
    """As `build`, on token indices; the targets are one class an example, or one a token (`tags`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        target = torch.randint(CLASSES, (n, r) if tags else (n,))
        return Case(make().double(), torch.randint(vocabulary, (n, r)), target, loss)


# --- plain networks -------------------------------------------------------------------------------------------------------


def mlp(bias: bool = True) -> Case:
    return build(lambda: nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, CLASSES, bias)), 6, 4)


def mlp_relu(inplace: bool = False) -> Case:
    return build(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, CLASSES)), 6, 4)


def linear() -> Case:
    return build(lambda: nn.Linear(4, CLASSES), 6, 4)


def _with_real_target(case: Case, loss: Callable[[Any, Tensor], Tensor]) -> Case:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        return Case(case.model, case.x, torch.rand_like(case.model(case.x)), loss)


def mlp_gaussian() -> Case:
    return _with_real_target(mlp(), F.mse_loss)


def mlp_bernoulli() -> Case:
    return _with_real_target(mlp(), F.binary_cross_entropy_with_logits)


def deep_linear(r: int | None = None, pooled: bool = False) -> Case:
    """Three Linear layers and MSE; with r positions an example, per position or mean-pooled before the loss."""
    size = (5, 4) if r is None else (5, r, 4)
    case = build(lambda: DeepLinear(pooled), *size)
    return _with_real_target(case, F.mse_loss)


class DeepLinear(nn.Module):
    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2))
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.mean(1) if self.pooled else y


# --- convolutions ---------------------------------------------------------------------------------------------------------

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
KERNEL: dict[int, tuple[int, ...]] = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}  # an even edge makes 'same' padding lopsided
IMAGE: dict[int, tuple[int, ...]] = {1: (7,), 2: (5, 6), 3: (4, 5, 4)}


class ConvNet(nn.Module):
    """Convolution, tanh, then a fixed non-uniform pooling, so that every position has its own output gradient."""

    pool: Tensor

    def __init__(self, convolution: nn.Module, channels: int, image: tuple[int, ...]) -> None:
        super().__init__()
        self.convolution = convolution
        self.head = nn.Linear(channels, CLASSES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns, once a process, that a lopsided 'same' padding copies the input
            positions = convolution(torch.zeros(1, 4, *image)).shape[2:]
        self.register_buffer("pool", torch.randn(channels, *positions) / positions.numel() ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((torch.tanh(self.convolution(x)) * self.pool).flatten(2).sum(2))
        return y


def convolution(dimensions: int = 2, channels: int = 4, transposed: bool = False, **options: Any) -> Case:
    """Options are those of the torch layer: stride, dilation, padding, padding_mode, groups, bias, output_padding."""
    layer = (TRANSPOSED if transposed else CONVOLUTION)[dimensions]
    image = IMAGE[dimensions]
    return build(lambda: ConvNet(layer(4, channels, KERNEL[dimensions], **options), channels, image), 3, 4, *image)


CONV_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "same_dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "dilation": 2},
    "same_reflect": {"padding": "same", "padding_mode": "reflect"},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4},
    "depthwise_multiplier": {"groups": 4, "channels": 8, "bias": False},
}
CONV_CASES: dict[str, Callable[[], Case]] = {
    f"conv{d}d_{name}": partial(convolution, d, **options) for d in (1, 2, 3) for name, options in CONV_OPTIONS.items()
}
TRANSPOSED_CASES: dict[str, Callable[[], Case]] = {
    f"conv_transpose{d}d": partial(convolution, d, transposed=True, stride=2, padding=1, output_padding=1, groups=2)
    for d in (1, 2, 3)
}


# --- tokens ---------------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Embedding, mean over the positions, Linear."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=padding_idx)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.embedding(tokens)).mean(1))
        return y


class Tagger(nn.Module):
    """Logits of every token: (n, r, C), or torch's (n, C, r), or flat (n r, C). `mix` couples neighbouring tokens."""

    def __init__(self, layout: str, mix: bool) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 3), nn.Linear(3, 4), nn.Linear(4, CLASSES)
        self.layout, self.mix = layout, mix

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embedding(tokens)))
        y: Tensor = self.head(h + h.roll(1, 1) if self.mix else h)
        return {"last": y, "torch": y.mT, "flat": y.flatten(0, 1)}[self.layout]


def _loss_last(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.mT, t)


def _loss_flat(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t.flatten())


TAGGER_LOSS: dict[str, Callable[[Any, Tensor], Tensor]] = {"last": _loss_last, "torch": F.cross_entropy, "flat": _loss_flat}


def embedding_mean(padding_idx: int | None = None) -> Case:
    return build_tokens(lambda: Bag(padding_idx), 5, 4, 7, tags=False)


def tagger(layout: str = "torch", mix: bool = False) -> Case:
    return build_tokens(lambda: Tagger(layout, mix), 4, 3, 7, TAGGER_LOSS[layout], tags=True)


class Attention(nn.Module):
    """One head of attention written with Linear layers, a residual, a mean over the positions."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.head = nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        score = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        y: Tensor = self.head((x + self.output(score.softmax(-1) @ self.value(x))).mean(1))
        return y


def attention() -> Case:
    return build(lambda: Attention(3), 4, 4, 3)


# --- normalisation --------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Linear, a norm with random (or zero) scale and (or without) shift, tanh, Linear; positions are axis 1 or the last one."""

    def __init__(self, norm: nn.Module, zero_scale: bool, bias: bool, channels_second: bool) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 4), norm, nn.Linear(4, CLASSES)
        self.channels_second = channels_second
        nn.init.zeros_(norm.weight) if zero_scale else nn.init.normal_(norm.weight, 1.0, 0.3)
        if getattr(norm, "bias", None) is not None:
            nn.init.normal_(norm.bias)
            if not bias:
                norm.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.norm(h.mT).mT if self.channels_second else self.norm(h)
        h = torch.tanh(h)
        y: Tensor = self.head(h.sum(1) if h.dim() == 3 else h)
        return y


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": partial(nn.LayerNorm, 4),
    "rms_norm": partial(nn.RMSNorm, 4),
    "group_norm": partial(nn.GroupNorm, 2, 4),
    "batch_norm": partial(nn.BatchNorm1d, 4),
}


def normed(kind: str = "layer_norm", zero_scale: bool = False, bias: bool = True, positions: int | None = 3) -> Case:
    """A batch norm comes in train mode; `positions=None` is the plain (n, channels) input."""
    size = (6, 4) if positions is None else (6, positions, 4)
    second = positions is not None and kind in ("group_norm", "batch_norm")
    return build(lambda: Normed(NORMS[kind](), zero_scale, bias, second), *size)


NORM_CASES: dict[str, Callable[[], Case]] = {
    f"{kind}{'_zero_scale' if zero else ''}{'' if bias else '_no_bias'}{'' if positions else '_flat'}": partial(
        normed, kind, zero, bias, positions
    )
    for kind in NORMS
    for zero, bias, positions in ((False, True, 3), (True, True, 3), (False, False, 3), (True, False, 3), (False, True, None))
    if bias or kind != "rms_norm"  # RMSNorm has no shift to leave out
}


# --- odd ones -------------------------------------------------------------------------------------------------------------


class BareScale(nn.Module):
    """A parameter that belongs to no layer type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.head = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 0.5), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.first(x)) * self.scale)
        return y


class Tied(nn.Module):
    """Two layers that share one weight; each has its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


class CalledTwice(nn.Module):
    """One module, two calls in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
        return y


class Unused(nn.Module):
    """A trainable layer that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.first(x)))
        return y


class ScaledNorm(nn.Module):
    """Parameters of no layer before two batch norms, of which one sees a single value of a channel in each example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 2), nn.Linear(4, CLASSES)
        self.scale, self.shift = nn.Parameter(torch.rand(4, 1) + 0.5), nn.Parameter(torch.rand(4))
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
        for norm in self.norms:
            nn.init.normal_(norm.get_parameter("weight"))
            nn.init.normal_(norm.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norms[0](self.conv(x) * self.scale)).mean(-1)
        y: Tensor = self.head(torch.tanh(self.norms[1](h.square() + h * self.shift)))
        return y


class Checkpointed(nn.Module):
    """`use_reentrant` None runs the same network without a checkpoint: the reference, with the same weights."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.body(h) if self.use_reentrant is None else checkpoint(self.body, h, use_reentrant=self.use_reentrant)
        y: Tensor = self.head(torch.tanh(h))
        return y


@dataclass
class Output:
    """What Hugging Face models return, less the mapping."""

    logits: Tensor
    loss: Tensor | None = None


class Structured(nn.Module):
    """`model(x)` gives the logits and `model(x, labels)` the loss too, in a tuple, a dict or a dataclass."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.form = form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.first(x)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.form == "dataclass":
            return Output(logits, loss)
        present = {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
        return present if self.form == "dict" else tuple(present.values())


def logits_of(y: Any) -> Tensor:
    """The logits in any output of `Structured` (a bare tensor is returned as it is)."""
    if isinstance(y, dict):
        return y["logits"]
    if isinstance(y, tuple):
        return y[-1]
    return y.logits if isinstance(y, Output) else y


def loss_of(y: Any) -> Tensor:
    """The loss in an output of `Structured` that was called with labels."""
    if isinstance(y, dict):
        return y["loss"]
    return y[0] if isinstance(y, tuple) else y.loss


def _loss_structured(y: Any, t: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(y), t)


def structured(form: str = "dataclass") -> Case:
    return build(lambda: Structured(form), 5, 4, loss=_loss_structured)


def bare_scale() -> Case:
    return build(BareScale, 5, 4)


def tied() -> Case:
    return build(Tied, 5, 4)


def called_twice() -> Case:
    return build(CalledTwice, 5, 4)


def unused() -> Case:
    return build(Unused, 5, 4)


def checkpointed(use_reentrant: bool | None) -> Case:
    return build(lambda: Checkpointed(use_reentrant), 5, 4)


def weight_norm() -> Case:
    make = lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, CLASSES))  # noqa: E731
    return build(make, 5, 4)


def frozen() -> Case:
    """The middle layer does not require a gradient."""
    layers = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))  # noqa: E731
    case = build(layers, 5, 4)
    case.model.get_submodule("2").requires_grad_(False)
    return case


ZOO: dict[str, Callable[[], Case]] = {
    "linear": linear,
    "mlp": mlp,
    "mlp_no_bias": partial(mlp, bias=False),
    "mlp_gaussian": mlp_gaussian,
    "mlp_bernoulli": mlp_bernoulli,
    "mlp_relu": mlp_relu,
    "mlp_relu_inplace": partial(mlp_relu, inplace=True),
    "deep_linear": deep_linear,
    "deep_linear_positions": partial(deep_linear, 3),
    "deep_linear_pooled": partial(deep_linear, 3, pooled=True),
    **CONV_CASES,
    **TRANSPOSED_CASES,
    "embedding_mean": embedding_mean,
    "embedding_padding": partial(embedding_mean, 0),
    "tagger_torch": tagger,
    "tagger_last": partial(tagger, "last"),
    "tagger_flat": partial(tagger, "flat"),
    "tagger_mixed": partial(tagger, "torch", mix=True),
    "attention": attention,
    **NORM_CASES,
    "bare_scale": bare_scale,
    "tied": tied,
    "called_twice": called_twice,
    "weight_norm": weight_norm,
    "structured_tuple": partial(structured, "tuple"),
    "structured_dict": partial(structured, "dict"),
    "structured_dataclass": partial(structured, "dataclass"),
    "frozen": frozen,
    "unused": unused,
    "checkpoint_none": partial(checkpointed, None),
    "checkpoint_reentrant": partial(checkpointed, True),
    "checkpoint_saved": partial(checkpointed, False),
}
