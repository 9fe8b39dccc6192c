"""The sampled gradient of projections that share one parameter, against the same projections as layers of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config

WIDTH, HEADS = 6, 2


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return y


class Separate(nn.Module):
    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)
        attention = fused.attention
        for k, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data = attention.in_proj_weight.data[WIDTH * k : WIDTH * (k + 1)].clone()
            layer.bias.data = attention.in_proj_bias.data[WIDTH * k : WIDTH * (k + 1)].clone()
        self.out.load_state_dict(attention.out_proj.state_dict())
        self.head.load_state_dict(fused.head.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = self.head(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))
        return y


def gradients(model: nn.Module, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    maker = from_config(model, {"method": "tnt", "damping": 1e-3})
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
    maker.forward_and_backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_projections_of_attention() -> None:
    """Each projection has the statistic and the step that it has as a layer of its own."""
    torch.manual_seed(0)
    fused = Fused().double()
    nn.init.normal_(fused.attention.in_proj_bias)
    separate = Separate(fused).double()
    x, t = torch.randn(5, 4, WIDTH, dtype=torch.float64), torch.randint(3, (5,))
    one, other = gradients(fused, x, t), gradients(separate, x, t)
    for kind in ("weight", "bias"):
        expected = torch.cat([other[f"{name}.{kind}"] for name in "qkv"])
        torch.testing.assert_close(one[f"attention.in_proj_{kind}"], expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(one[f"head.{kind}"], other[f"head.{kind}"], rtol=1e-8, atol=1e-8)
