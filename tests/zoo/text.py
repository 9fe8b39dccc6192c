"""Text: the transformers of Hugging Face, by their own building blocks, and encoders with awkward layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, alone, entry


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, bias: Tensor | None = None) -> Tensor:
    """Attention of (n, t, d) tensors over ``t``, written out: a fused kernel has no second derivatives."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def flat_cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    """Of (n, t, V) logits, one term a token."""
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1))


def language(model: nn.Module, n: int, length: int, vocabulary: int) -> Case:
    """One label a token."""
    x, t = torch.randint(vocabulary, (2, n, length))
    return Case(model, (x,), alone, [lambda z: flat_cross_entropy(z, t)], flat_cross_entropy, (t,))


class Conv1D(nn.Module):
    """The linear layer of GPT-2, which stores its weight transposed."""

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o) / i**0.5), nn.Parameter(0.1 * torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


class GPT2Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(d), Conv1D(3 * d, d), Conv1D(d, d)
        self.ln_2, self.c_fc, self.mlp_proj = nn.LayerNorm(d), Conv1D(6, d), Conv1D(d, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.c_proj(attend(*self.c_attn(self.ln_1(x)).chunk(3, -1), heads=2, causal=True))
        y: Tensor = x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return y


class GPT2(nn.Module):
    """Learned positions ``wpe(arange(T))`` without an axis of examples; the head has the weight of the token table."""

    def __init__(self, vocabulary: int, length: int, d: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.h, self.ln_f = nn.ModuleList([GPT2Block(d)]), nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.h:
            h = block(h)
        y: Tensor = self.lm_head(self.ln_f(h))
        return y


@entry("GPT-2, head tied by assignment", "transformers")
def gpt2() -> Case:
    return language(GPT2(6, 3), 4, 3, 6)


class NanoGPT(nn.Module):
    """As many tokens as examples, and a head that is no module: ``F.linear(h, wte.weight)``."""

    def __init__(self, vocabulary: int, length: int, d: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, d))

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        h = h + self.out(attend(*self.qkv(self.norm(h)).chunk(3, -1), heads=1, causal=True))
        return F.linear(h + self.mlp(h), self.wte.weight)


@entry("GPT, functional head, N = T", "transformers", seen=False)
def nano_gpt() -> Case:
    return language(NanoGPT(5, 4), 4, 4, 5)


class MaskedOutput(NamedTuple):
    loss: Tensor
    logits: Tensor


class Bert(nn.Module):
    """Positions ``(1, T)``, token types, post-norm; the head sees masked positions alone, and the model returns its loss."""

    def __init__(self, vocabulary: int, length: int, d: int = 4) -> None:
        super().__init__()
        self.word, self.position, self.kind = nn.Embedding(vocabulary, d), nn.Embedding(length, d), nn.Embedding(2, d)
        self.register_buffer("position_ids", torch.arange(length).unsqueeze(0))
        self.norm, self.query, self.key, self.value = nn.LayerNorm(d), *(nn.Linear(d, d) for _ in range(3))
        self.dense, self.norm1 = nn.Linear(d, d), nn.LayerNorm(d)
        self.up, self.down, self.norm2 = nn.Linear(d, 5), nn.Linear(5, d), nn.LayerNorm(d)
        self.transform, self.norm3, self.decoder = nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, x: Tensor, labels: Tensor) -> MaskedOutput:
        positions = self.position(self.get_buffer("position_ids")[:, : x.shape[1]])
        h = self.norm(self.word(x) + positions + self.kind(torch.zeros_like(x)))
        h = self.norm1(h + self.dense(attend(self.query(h), self.key(h), self.value(h), heads=2)))
        h = self.norm2(h + self.down(F.gelu(self.up(h))))
        masked = labels >= 0
        logits = self.decoder(self.norm3(F.gelu(self.transform(h[masked]))))
        return MaskedOutput(F.cross_entropy(logits, labels[masked]), logits)


@entry("BERT, masked tokens, returns its loss", "transformers", independent=False)
def bert() -> Case:
    labels = torch.tensor([[2, -1, -1], [-1, 0, 4], [1, 3, -1], [-1, -1, 2]])
    target = labels[labels >= 0]
    return Case(Bert(5, 3), (torch.randint(5, (4, 3)), labels), lambda y: [y.logits], [lambda z: F.cross_entropy(z, target)])


class RootMeanSquare(nn.Module):
    """The RMSNorm of Llama and T5, which is not torch's."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class T5(nn.Module):
    """Relative positions: a table that is looked up at ``(T, T)`` buckets, once for all examples, and added to the scores."""

    def __init__(self, vocabulary: int, d: int = 4) -> None:
        super().__init__()
        self.shared, self.relative = nn.Embedding(vocabulary, d), nn.Embedding(4, 2)
        self.norm1, self.norm2, self.norm3 = (RootMeanSquare(d) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.wi, self.wo = nn.Linear(d, 5, bias=False), nn.Linear(5, d, bias=False)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, positions = self.shared(x), torch.arange(x.shape[1])
        buckets = (positions[:, None] - positions[None]).clamp(-2, 1) + 2
        bias = self.relative(buckets).permute(2, 0, 1).unsqueeze(0)
        y = self.norm1(h)
        h = h + self.o(attend(self.q(y), self.k(y), self.v(y), heads=2, bias=bias))
        h = h + self.wo(F.relu(self.wi(self.norm2(h))))
        z: Tensor = self.head(self.norm3(h) * h.shape[-1] ** -0.5)
        return z.mT


@entry("T5, relative positions", "transformers")
def t5() -> Case:
    x, t = torch.randint(5, (2, 3, 3))
    return Case(T5(5), (x,), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions of (n, t, d)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Llama(nn.Module):
    """Rotary positions, a norm of its own, a gated MLP, no bias."""

    def __init__(self, vocabulary: int, d: int = 4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, d)
        self.input_layernorm, self.post_layernorm, self.norm = (RootMeanSquare(d) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(i, o, bias=False) for i, o in ((d, 5), (d, 5), (5, d)))
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed_tokens(x)
        y = self.input_layernorm(h)
        h = h + self.o_proj(attend(rotated(self.q_proj(y)), rotated(self.k_proj(y)), self.v_proj(y), heads=1, causal=True))
        y = self.post_layernorm(h)
        h = h + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        z: Tensor = self.lm_head(self.norm(h))
        return z


def shifted(z: Tensor, labels: Tensor) -> Tensor:
    """The next token's loss; labels of -100 count for nothing."""
    return F.cross_entropy(z[:, :-1].reshape(-1, z.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)


@entry("Llama, shifted labels", "transformers")
def llama() -> Case:
    x = torch.randint(5, (3, 4))
    labels = x.clone()
    labels[0, :2], labels[2, 3] = -100, -100
    return Case(Llama(5), (x,), alone, [lambda z: shifted(z, labels)], shifted, (labels,))


# ------------------------------------------------------------------ layouts
class TimeFirst(nn.Module):
    """An encoder block on (T, N, d), with as many positions as examples."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.inside, self.qkv, self.out = nn.Linear(3, d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm1, self.norm2, self.head = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 3)
        self.mlp = nn.Sequential(nn.Linear(d, 5), nn.GELU(), nn.Linear(5, d))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x)
        mixed = attend(*(v.transpose(0, 1) for v in self.qkv(h).chunk(3, -1)), heads=2).transpose(0, 1)
        h = self.norm1(h + self.out(mixed))
        h = self.norm2(h + self.mlp(h))
        z: Tensor = self.head(h.mean(0))
        return z


@entry("transformer, time first, N = T", "layouts", independent=False)
def time_first() -> Case:
    x, t = torch.randn(4, 4, 3), torch.randint(3, (4,))
    return Case(TimeFirst(), (x,), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


class Mixing(nn.Module):
    """Positions of an example meet in their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        z: Tensor = self.b(h + h.mean(1, keepdim=True))
        return z


def picked(z: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """The loss of the rows that a mask picks."""
    return F.cross_entropy(z[mask], t[mask])


@entry("mask with unequal rows", "layouts", independent=False)
def masked_rows() -> Case:
    x, t = torch.randn(4, 3, 3), torch.randint(3, (4, 3))
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    return Case(Mixing(), (x,), alone, [lambda z: picked(z, t, mask)], picked, (t, mask))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.bag(x)))
        return z


@entry("embedding bag", "text")
def embedding_bag() -> Case:
    x, t = torch.randint(7, (5, 4)), torch.randint(3, (5,))
    return Case(Bag(), (x,), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))
