"""The linear layers of GPT-2 store their weights transposed, and its table is that of the head: rows under both protocols."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from tests.factored.counting import all_formed, counted
from tests.factored.test_declared import EVERY_OTHER, close

transformers = pytest.importorskip("transformers")

LAYERS = 4  # of a block: two of the attention, two behind it


class Logits(nn.Module):
    """A small GPT-2, whose result is its logits."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
        )
        self.gpt = transformers.GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.gpt(tokens).logits
        return out


def loss(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, 1), t.flatten())


def gradients(method: str, attached: bool) -> tuple[list[list[Tensor]], int]:
    torch.manual_seed(0)
    model = Logits().double()
    tokens = torch.randint(17, (1, 6))
    maker: Any = from_config(model, {"method": method, **EVERY_OTHER, "fallback": "gradient"})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    if attached:
        maker.attach(optimizer, "categorical")
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        with counted() as taken:
            if attached:
                loss(model(tokens), tokens).backward()
                optimizer.step()
            else:
                maker.setup_loss_call(loss, maker.setup_model_call(model, tokens), tokens)
                maker.forward_and_backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return found, taken.solved


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("method", ["kfac", "shampoo"])
def test_rows_of_a_transformer(method: str, attached: bool) -> None:
    found, taken = gradients(method, attached)
    with all_formed():
        expected, none = gradients(method, attached)
    close(found, expected, 1e-11)
    assert (taken, none) == (LAYERS, 0)
