"""Recurrent layers of torch written out in Linear layers, one call a step, for oracles that look at layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RecurrentByHand", "by_hand"]


class RecurrentByHand(nn.Module):
    """The same parameters, each matrix as a Linear layer (``weight_ih_l0`` as ``ih_l0``), and, unless ``renamed``, by name."""

    def __init__(self, module: Any, renamed: bool = False) -> None:
        super().__init__()
        self.of, self.batch_first = (module,), getattr(module, "batch_first", True)
        for name, p in () if renamed else module.named_parameters():
            self.register_parameter(name, p)
        for name, p in module.named_parameters():
            if name.startswith("weight_"):
                part = name.removeprefix("weight_")
                bias = getattr(module, f"bias_{part}", None)
                layer = nn.Linear(p.shape[1], p.shape[0], bias=bias is not None)
                layer.weight = p
                if bias is not None:
                    layer.bias = bias
                self.add_module(part, layer)

    def step(self, suffix: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        module = self.of[0]
        z, w = self.get_submodule(f"ih{suffix}")(x), self.get_submodule(f"hh{suffix}")(h)
        d = module.hidden_size
        part = [slice(j * d, (j + 1) * d) for j in range(4)]
        if isinstance(module, (nn.LSTM, nn.LSTMCell)):
            i, f, g, o = ((z + w)[..., s] for s in part)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (self.get_submodule(f"hr{suffix}")(h) if getattr(module, "proj_size", 0) else h), c
        if isinstance(module, (nn.GRU, nn.GRUCell)):
            r, u = ((z + w)[..., s].sigmoid() for s in part[:2])
            n = (z[..., part[2]] + r * w[..., part[2]]).tanh()
            return (1 - u) * n + u * h, c
        return (torch.relu(z + w) if getattr(module, "nonlinearity", "tanh") == "relu" else torch.tanh(z + w)), c

    def forward(self, x: Tensor, state: Any = None) -> Any:
        module = self.of[0]
        long = isinstance(module, (nn.LSTM, nn.LSTMCell))
        if isinstance(module, nn.RNNCellBase):
            zero = x.new_zeros(*x.shape[:-1], module.hidden_size)
            h, c = state if long and state is not None else (zero if state is None else state, zero)
            h, c = self.step("", x, h, c)
            return (h, c) if long else h
        batched = x.ndim == 3
        x = x.transpose(0, 1) if batched and module.batch_first else x if batched else x[:, None]
        h0, c0 = state if long and state is not None else (state, None)
        ways, last = ("", "_reverse") if module.bidirectional else ("",), []
        for layer in range(module.num_layers):
            found = []
            for way in ways:
                width = getattr(module, "proj_size", 0) or module.hidden_size
                h = x.new_zeros(x.shape[1], width) if h0 is None else h0.reshape(h0.shape[0], -1, width)[len(last)]
                c = x.new_zeros(x.shape[1], module.hidden_size)
                c = c if c0 is None else c0.reshape(c0.shape[0], -1, module.hidden_size)[len(last)]
                out = {}
                for t in reversed(range(len(x))) if way else range(len(x)):
                    h, c = self.step(f"_l{layer}{way}", x[t], h, c)
                    out[t] = h
                found.append(torch.stack([out[t] for t in range(len(x))]))
                last.append((h, c))
            x = torch.cat(found, -1)
        h, c = (torch.stack([state[j] for state in last]) for j in range(2))
        y = x.transpose(0, 1) if batched and module.batch_first else x if batched else x[:, 0]
        h, c = (v if batched else v[:, 0] for v in (h, c))
        return y, ((h, c) if long else h)


def by_hand(model: nn.Module, renamed: bool = False) -> nn.Module:
    """Replace the recurrent layers of a model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and type(module).__module__.startswith("torch."):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, RecurrentByHand(module, renamed))
    return model
