"""Examples are where they are believed to be and keep apart, or those that mix have passes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Case
from tests.self_checks.planted import (
    BLOCKS,
    Planted,
    build,
    falls_back,
    is_an_error,
    is_right,
    is_right_in_silence,
    is_wrong_without,
    labels,
    maker_of,
    step,
)

Use = Callable[["Net", Tensor], Tensor]
LAYER = "body: no axis of its outputs holds the examples|the batch is measured as one example"


class Net(nn.Module):
    """Two layers; what happens between them is given."""

    def __init__(self, use: Use, width: int = 3) -> None:
        super().__init__()
        self.use, self.body, self.head = use, nn.Linear(3, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def net(use: Use, *size: int, t: Tensor | None = None, loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy) -> Case:
    size = size or (6, 3)
    return build(lambda: Net(use), *size, loss=loss, t=labels(size[0]) if t is None else t)


# --- examples that mix, or lie elsewhere ----------------------------------------------------------------------------------
def swapped(m: Net, x: Tensor) -> Tensor:
    """The first two examples change places inside of the model."""
    h = torch.tanh(m.body(x))
    return m.head(h[[1, 0, *range(2, len(x))]])


def centred(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.body(x))
    return m.head(h - h.mean(0))


def contrast(m: Net, x: Tensor) -> Tensor:
    """Logits of in-batch negatives."""
    h = m.head(torch.tanh(m.body(x)))
    return h @ h.t()


def across(m: Net, x: Tensor) -> Tensor:
    """Attention over the batch."""
    h = m.body(x)
    return m.head((h @ h.t()).softmax(-1) @ torch.tanh(h))


def deviation(m: Net, x: Tensor) -> Tensor:
    """The deviation of the batch as a further input."""
    h = torch.tanh(m.body(x))
    return m.head(torch.cat([h[:, :2], h.std(0)[:1].expand(len(h), 1)], 1))


def by_hand(m: Net, x: Tensor) -> Tensor:
    """A batch norm that is written out."""
    h = m.body(x)
    return m.head(torch.tanh((h - h.mean(0)) * (h.var(0, correction=0) + 1e-5).rsqrt()))


def neighbours(m: Net, x: Tensor) -> Tensor:
    """Messages along a ring of nodes."""
    h = torch.tanh(m.body(x))
    to = torch.arange(1, len(x) + 1) % len(x)
    return m.head(torch.zeros_like(h).index_add(0, to, h) + h)


def shifted(m: Net, x: Tensor) -> Tensor:
    """Every example sees the one before it."""
    h = torch.tanh(m.body(x))
    return m.head(h + 0.01 * h.roll(1, 0))


def masked(m: Net, x: Tensor) -> Tensor:
    """Of six rows of tokens 1, 3, 1, 3, 1, 3 remain: twelve, which six divides."""
    keep = torch.arange(4) < torch.tensor([1, 3] * 3).unsqueeze(1)
    return m.head(torch.tanh(m.body(x))[keep])


def windows(m: Net, x: Tensor) -> Tensor:
    """Windows over the batch, as many as there are examples."""
    h = torch.tanh(m.body(x))
    return m.head(torch.cat([h, h[:1]]).unfold(0, 2, 1).mean(-1))


def pooled(m: Net, x: Tensor) -> Tensor:
    """Half the outputs are those of pairs: rows divide, examples do not."""
    h = torch.tanh(m.body(x))
    return torch.cat([m.head(h.view(3, 2, 3).mean(1)), m.head(h.view(3, 2, 3).prod(1))])


PLANTED = {
    "swapped of 2": Planted(lambda: net(swapped, 2, 3), LAYER, ("full",)),
    "swapped of 3": Planted(lambda: net(swapped, 3, 3), LAYER, ("full",)),
    "swapped of 64": Planted(lambda: net(swapped, 64, 3), LAYER, ("full",)),
    "centred": Planted(lambda: net(centred), LAYER),
    "in-batch negatives": Planted(lambda: net(contrast, 6, 3, t=torch.arange(6)), LAYER),
    "attention over the batch": Planted(lambda: net(across), LAYER),
    "deviation": Planted(lambda: net(deviation), LAYER),
    "normalised by hand": Planted(lambda: net(by_hand), LAYER),
    "nodes": Planted(lambda: net(neighbours), LAYER),
    "neighbour": Planted(lambda: net(shifted), LAYER),
    "masked logits": Planted(lambda: net(masked, 6, 4, 3, t=labels(12)), LAYER, ()),
    "windows": Planted(lambda: net(windows), LAYER),
    "pairs": Planted(lambda: net(pooled), LAYER, ()),
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", PLANTED)
def test_examples_that_mix_have_passes_of_their_own(name: str, blocks: str) -> None:
    falls_back(PLANTED[name], blocks)


@pytest.mark.parametrize("name", PLANTED)
def test_examples_that_mix_are_an_error_on_demand(name: str) -> None:
    is_an_error(PLANTED[name])


@pytest.mark.parametrize("name", [name for name, planted in PLANTED.items() if planted.blocks])
def test_without_the_check_they_are_wrong(name: str) -> None:
    is_wrong_without(PLANTED[name])


# --- right models in unusual layouts --------------------------------------------------------------------------------------
def plain(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x)))


def time_first(m: Net, x: Tensor) -> Tensor:
    """(batch, time) outside, (time, batch) inside of the layers."""
    return m.head(torch.tanh(m.body(x.transpose(0, 1)))).transpose(0, 1).reshape(-1, 3)


def time_first_flat(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x.transpose(0, 1).flatten(0, 1)))).view(x.shape[1], -1, 3).transpose(0, 1).reshape(-1, 3)


def views(m: Net, x: Tensor) -> Tensor:
    """Two views side by side, from the body on."""
    h = torch.tanh(m.body(torch.cat([x, x.cos()])))
    a, b = m.head(h).chunk(2)
    return a * b


def picked(m: Net, x: Tensor) -> Tensor:
    """The layers see only what is kept: rows are grouped otherwise than examples, in layers and loss alike."""
    keep = torch.arange(4) < torch.tensor([1, 3] * 3).unsqueeze(1)
    return m.head(torch.tanh(m.body(x[keep])))


def transposed_logits(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x))).transpose(1, 2)


LAYOUTS: dict[str, Callable[[], Case]] = {
    "plain": lambda: net(plain),
    "one example": lambda: net(plain, 1, 3),
    "time first inside, N = T": lambda: net(time_first, 4, 4, 3, t=labels(16)),
    "time first inside": lambda: net(time_first, 4, 3, 3, t=labels(12)),
    "flat, time first, N = T": lambda: net(time_first_flat, 4, 4, 3, t=labels(16)),
    "flat, time first": lambda: net(time_first_flat, 4, 6, 3, t=labels(24)),
    "views": lambda: net(views),
    "masked inputs": lambda: net(picked, 6, 4, 3, t=labels(12)),
    "(n, C, r)": lambda: net(transposed_logits, 4, 3, 3, t=labels(12).view(4, 3)),
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_axis_of_examples_is_found(name: str, blocks: str) -> None:
    is_right_in_silence(LAYOUTS[name](), blocks)


@pytest.mark.parametrize("name", ["time first inside, N = T", "flat, time first, N = T", "flat, time first", "views"])
def test_sizes_alone_would_take_positions_for_examples(name: str) -> None:
    case = LAYOUTS[name]()
    maker = maker_of(case, "full", self_check="off")
    step(maker, case)
    assert not is_right(maker, case)
