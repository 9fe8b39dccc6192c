"""Graphs, recurrence, experts, adapters: models whose layers see rows that are not simply the examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.case import Case, alone, entry
from tests.zoo.vision import classified


# ------------------------------------------------------------------ message passing
class GCN(nn.Module):
    """Two convolutions on a graph: a linear map, then sums over the edges that arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.lin1(x)
        h = torch.relu(h + torch.zeros_like(h).index_add(0, target, h[source]))
        z: Tensor = self.lin2(h)
        return z + torch.zeros_like(z).index_add(0, target, z[source])


EDGES = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 6], [1, 0, 1, 3, 2, 5, 6, 4]])


@entry("message passing, loss a node", "message passing", independent=False)
def nodes() -> Case:
    x, t = torch.randn(7, 3), torch.randint(3, (7,))
    return Case(GCN(), (x, EDGES), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


class EdgeNetwork(nn.Module):
    """Messages by a layer on the edges, sums over nodes, then over the graphs of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.node, self.head = nn.Linear(6, 4), nn.Linear(7, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        source, target = edges
        m = torch.tanh(self.message(torch.cat([x[target], x[source]], 1)))
        h = torch.tanh(self.node(torch.cat([x, m.new_zeros(len(x), m.shape[1]).index_add(0, target, m)], 1)))
        z: Tensor = self.head(h.new_zeros(3, h.shape[1]).index_add(0, batch, h))
        return z


@entry("message passing, loss a graph", "message passing", independent=False)
def graphs() -> Case:
    x, t, batch = torch.randn(7, 3), torch.randint(2, (3,)), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 0, 3, 4, 2, 6, 5]])
    return Case(EdgeNetwork(), (x, edges, batch), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


# ------------------------------------------------------------------ PEFT
class LoRALinear(nn.Module):
    """A frozen layer and a trained product of two thin ones beside it."""

    def __init__(self, i: int, o: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(i, o).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))
        return y


@entry("LoRA beside frozen layers", "PEFT")
def lora() -> Case:
    head = nn.Linear(6, 3).requires_grad_(False)
    return classified(nn.Sequential(LoRALinear(4, 5, 2), nn.Tanh(), LoRALinear(5, 6, 2), nn.Tanh(), head), torch.randn(6, 4))


class Adapted(nn.Module):
    """A frozen layer, a trained bottleneck around it, and a trained scale of its activations (IA3)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(d, d).requires_grad_(False), nn.LayerNorm(d)
        self.down, self.up = nn.Linear(d, 2), nn.Linear(2, d)
        self.ia3 = nn.Parameter(1 + 0.2 * torch.randn(1, d))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.layer(self.norm(x))) * self.ia3
        y: Tensor = x + h + self.up(torch.relu(self.down(h)))
        return y


@entry("adapters and IA3 scales", "PEFT")
def adapters() -> Case:
    return classified(nn.Sequential(Adapted(4), Adapted(4), nn.Linear(4, 3)), torch.randn(6, 4))


class Prompted(nn.Module):
    """Trained vectors before the tokens of a frozen encoder."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, d).requires_grad_(False)
        self.mix = nn.Linear(d, d).requires_grad_(False)
        self.prompt, self.head = nn.Parameter(torch.randn(2, d)), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.prompt.expand(len(x), -1, -1), self.embedding(x)], 1)
        scores = (self.mix(h) @ h.mT).softmax(-1)
        z: Tensor = self.head(torch.tanh(scores @ h).mean(1))
        return z


@entry("prompt tuning", "PEFT")
def prompt() -> Case:
    return classified(Prompted(), torch.randint(5, (5, 3)))


# ------------------------------------------------------------------ recurrence
class Recurrent(nn.Module):
    """A recurrent layer and a head on the last state, or on the mean over time."""

    def __init__(self, layer: nn.Module, width: int, time: int) -> None:
        super().__init__()
        self.rnn, self.head, self.time = layer, nn.Linear(width, 3), time

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        z: Tensor = self.head(y.mean(self.time))
        return z


@entry("LSTM", "recurrent")
def lstm() -> Case:
    return classified(Recurrent(nn.LSTM(2, 3, batch_first=True), 3, 1), torch.randn(4, 3, 2))


@entry("LSTM, time first", "recurrent", independent=False)
def lstm_time_first() -> Case:
    x, t = torch.randn(3, 5, 2), torch.randint(3, (5,))
    model = Recurrent(nn.LSTM(2, 3), 3, 0)
    return Case(model, (x,), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


@entry("GRU, bidirectional", "recurrent")
def gru() -> Case:
    return classified(Recurrent(nn.GRU(2, 2, batch_first=True, bidirectional=True), 4, 1), torch.randn(4, 3, 2))


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            h = self.cell(step, h)
        z: Tensor = self.head(h)
        return z


@entry("GRU cell in a loop", "recurrent")
def gru_cell() -> Case:
    return classified(CellLoop(), torch.randn(4, 3, 2))


class TwoOutputs(nn.Module):
    """LSTM cells, whose two outputs are made of each other; logits and features, of which the loss takes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2, 3)
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = x.new_zeros(len(x), 3), x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        features = torch.tanh(state[0] + state[1])
        return features @ self.weight, features


def of_first(y: tuple[Tensor, ...], t: Tensor) -> Tensor:
    return F.cross_entropy(y[0], t)


@entry("two outputs, one made of the other", "recurrent")
def two_outputs() -> Case:
    x, t = torch.randn(4, 2, 2), torch.randint(3, (4,))
    return Case(TwoOutputs(), (x,), lambda y: [y[0]], [lambda z: F.cross_entropy(z, t)], of_first, (t,))


# ------------------------------------------------------------------ experts, made weights
class Experts(nn.Module):
    """Every row goes to one expert, which sees the gathered rows alone; no row goes to the last one."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(d, 3), nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.head = nn.Linear(d, 3)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([0.0, 0.0, -30.0]))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for j, expert in enumerate(self.experts):
            rows = (chosen == j).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, share[rows, None] * expert(x[rows]))
        z: Tensor = self.head(torch.tanh(x + out))
        return z


@entry("mixture of experts, top 1", "mixture of experts", independent=False)
def experts() -> Case:
    return classified(Experts(), torch.randn(7, 3))


class Hypernetwork(nn.Module):
    """A layer that makes the weight of another one from a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.randn(1, 3))
        self.maker, self.head = nn.Linear(3, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(self.get_buffer("code")).view(4, 2)
        z: Tensor = self.head(torch.tanh(F.linear(x, weight)))
        return z


@entry("hypernetwork", "hypernetwork")
def hypernetwork() -> Case:
    return classified(Hypernetwork(), torch.randn(5, 2))


# ------------------------------------------------------------------ ways to hold and use parameters
class Listed(nn.Module):
    """Weights in lists that are never called."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 5), (5, 4), (4, 3))
        self.weights = nn.ParameterList(torch.randn(i, o) / i**0.5 for i, o in sizes)
        self.biases = nn.ParameterList(0.1 * torch.randn(o) for _, o in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for w, b in zip(self.weights, self.biases, strict=True):
            x = torch.sin(x @ w + b)
        return x


@entry("ParameterList", "structures")
def parameter_list() -> Case:
    return classified(Listed(), torch.randn(6, 3))


class Step(nn.Module):
    """A layer and a bare scale."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(d, d), nn.Parameter(1 + 0.2 * torch.randn(d))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(h) * self.scale + x)


class Looped(nn.Module):
    """One module under three names, in a loop into which the input goes again and again; it starts at a bare parameter."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.inside, self.steps, self.head = nn.Linear(3, d), nn.ModuleList([Step(d)] * 3), nn.Linear(d, 3)
        self.start = nn.Parameter(torch.randn(1, d))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        h = self.start.expand_as(x)
        for step in self.steps:
            h = step(h, x)
        z: Tensor = self.head(h)
        return z


@entry("one module under three names", "structures")
def looped() -> Case:
    return classified(Looped(), torch.randn(5, 3))


class Beside(nn.Module):
    """A layer that is called, and whose weight is used once more by hand; another one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.b.weight, self.b.bias))
        h = torch.tanh(self.a(h) + F.linear(x, self.a.weight))
        z: Tensor = self.head(h)
        return z


@entry("a weight used beside its module", "structures", seen=False)
def beside() -> Case:
    return classified(Beside(), torch.randn(6, 4))


@entry("weight norm", "structures")
def weight_norm() -> Case:
    first, last = parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)
    return classified(nn.Sequential(first, nn.Tanh(), last), torch.randn(6, 4))
