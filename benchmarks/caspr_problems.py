"""Sequences of gradients of one matrix for `caspr_error.py`: drawn, or recorded while a small network is trained."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Iterator[tuple[Tensor, Tensor]]
ROWS, COLUMNS, SPREAD = 12, 10, 1.5


class Recorded(NamedTuple):
    """Gradients of one weight, and the mean loss of the first and the last tenth where a network was trained."""

    gradients: list[Tensor]
    losses: tuple[float, float] | None = None


# ------------------------------------------------------------------ drawn
def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def axis(d: int, generator: torch.Generator) -> Tensor:
    """``Q D W`` with a random rotation, ``D`` from 1 to 10^-1.5 and a Gaussian ``W``."""
    Q, _ = torch.linalg.qr(normal(d, d, generator=generator))
    return Q * torch.logspace(0, -SPREAD, d, dtype=torch.float64) @ normal(d, d, generator=generator) / d**0.5


def kron(seed: int, count: int) -> Recorded:
    generator = torch.Generator().manual_seed(seed)
    A, B = axis(ROWS, generator), axis(COLUMNS, generator)
    return Recorded([A @ normal(ROWS, COLUMNS, generator=generator) @ B for _ in range(count)])


def lowrank(seed: int, count: int) -> Recorded:
    generator = torch.Generator().manual_seed(seed)
    A, B = axis(ROWS, generator), axis(COLUMNS, generator)
    draws = ((normal(ROWS, 1, generator=generator), normal(1, COLUMNS, generator=generator)) for _ in range(count))
    return Recorded([A @ u @ v @ B for u, v in draws])


def added(seed: int, count: int) -> Recorded:
    generator = torch.Generator().manual_seed(seed)
    A, B = axis(ROWS, generator), axis(COLUMNS, generator)
    draws = ((normal(ROWS, COLUMNS, generator=generator), normal(ROWS, COLUMNS, generator=generator)) for _ in range(count))
    return Recorded([A @ Z + other @ B for Z, other in draws])


# ------------------------------------------------------------------ recorded
def record(
    model: nn.Module, batches: Batches, count: int, step: Callable[[nn.Module], torch.optim.Optimizer], *weights: str
) -> dict[str, Recorded]:
    """The gradients of some weights over ``count`` steps of a training: logits (..., C) against labels (...)."""
    optimizer, losses = step(model), []
    found: dict[str, list[Tensor]] = {weight: [] for weight in weights}
    for _ in range(count):
        x, t = next(batches)
        loss = F.cross_entropy(model(x).flatten(0, -2), t.flatten())
        optimizer.zero_grad()
        loss.backward()
        for weight, gradients in found.items():
            gradient = model.get_parameter(weight).grad
            assert gradient is not None
            gradients.append(gradient.clone())
        losses.append(float(loss.detach()))
        optimizer.step()
    tenth = max(1, count // 10)
    ends = (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)
    return {weight: Recorded(gradients, ends) for weight, gradients in found.items()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 3e-3)


def mlp(seed: int, count: int) -> Recorded:
    """10-12-6, tanh, batches of 16; inputs ``z B``, labels drawn from the softmax of a linear teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Tanh(), nn.Linear(ROWS, 6)).double()
        B, teacher = axis(COLUMNS, generator), 3 * normal(COLUMNS, 6, generator=generator)

        def batches() -> Batches:
            while True:
                x = normal(16, COLUMNS, generator=generator) @ B
                yield x, torch.multinomial((x @ teacher).softmax(1), 1, generator=generator)[:, 0]

        return record(model, batches(), count, sgd, "0.weight")["0.weight"]


def digits(seed: int, count: int) -> Recorded:
    """The hidden layer of 64-10-16-10, tanh, on scikit-learn's digits, batches of 32."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, t = torch.tensor(data.data, dtype=torch.float64) / 16, torch.tensor(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 10)]

        def batches() -> Batches:
            while True:
                rows = torch.randint(len(x), (32,))
                yield x[rows], t[rows]

        return record(nn.Sequential(*layers).double(), batches(), count, sgd, "2.weight")["2.weight"]


class Block(nn.Module):
    """Causal attention with two heads, and a two-layer network; norms before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (part(h).unflatten(-1, (2, -1)).movedim(-2, -3) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).movedim(-3, -2).flatten(-2))
        y: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return y


class Transformer(nn.Module):
    """Two blocks on characters: each position guesses the next."""

    def __init__(self, characters: int, length: int, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(characters, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks, self.norm = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.embedding(x) + self.place)))
        return y


@lru_cache
def corpus(text: Path | None) -> tuple[Tensor, int]:
    """The text as numbers, and how many different characters it has; Python's own reference manual where none is given."""
    if text is None:
        import pydoc_data

        source = Path(pydoc_data.__path__[0], "topics.py").read_text(encoding="utf-8")
        found = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        content = "\n".join(sorted(s for s in found if len(s) > 500))
    else:
        content = text.read_text(encoding="utf-8")
    known = {c: k for k, c in enumerate(sorted(set(content)))}
    return torch.tensor([known[c] for c in content]), len(known)


@lru_cache(maxsize=1)
def transformer(seed: int, count: int, text: Path | None, length: int = 32) -> dict[str, Recorded]:
    """Two layers of width 16, batches of 16 windows of 32 characters."""
    tokens, characters = corpus(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(characters, length).double()

        def batches() -> Batches:
            while True:
                rows = torch.randint(len(tokens) - length, (16, 1)) + torch.arange(length + 1)
                yield tokens[rows[:, :-1]], tokens[rows[:, 1:]]

        return record(model, batches(), count, adam, QUERY, UP)


QUERY, UP = "blocks.1.q.weight", "blocks.1.up.weight"


def problems(text: Path | None) -> dict[str, Callable[[int, int], Recorded]]:
    """By name: a function of the seed and the number of gradients."""
    return {
        "kron": kron,
        "lowrank": lowrank,
        "sum": added,
        "mlp": mlp,
        "digits": digits,
        "query": lambda seed, count: transformer(seed, count, text)[QUERY],
        "up": lambda seed, count: transformer(seed, count, text)[UP],
    }
