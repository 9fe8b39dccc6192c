"""Layer rule of embeddings with a ``forward`` of their own: scaled tables of words, tables of positions with an offset.

They are ``y = s W[index]`` for each position. Neither scale nor index is read from the layer's code: they are what its
``forward`` returns for a table of ones, and for one of the row numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.capture.exchange import exchanged, with_storage
from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.rules.calls import Call, LayerRule, Layout, check_lookup, to_examples

__all__ = ["LookupRule"]


class LookupRule(LayerRule):
    """Subclasses of `nn.Embedding` in libraries (BART, Gemma, OPT, Whisper, ...), if random tables prove the form above."""

    types = ()
    kind = "embedding"
    transposed = True

    def knows(self, module: nn.Module) -> bool:
        own = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
        return own and "forward" not in vars(module)

    def accepts(self, module: Any) -> bool:
        p = dict(module.named_parameters()).get("weight")
        if p is None or len(list(module.parameters())) > 1 or p.ndim != 2 or not p.is_floating_point() or module.max_norm:
            return False
        given: Any = with_storage(module)
        with given.weight.device:  # whatever the default device is
            found = [_proven(given, sample) for sample in _samples(len(p), module.padding_idx)]
        return True in found and False not in found

    def shape(self, module: Any) -> tuple[int, int, int]:
        return 1, *module.weight.shape

    def inputs(self, module: Any, call: Call, layout: Layout) -> OneHot:
        check_lookup(module)
        index = _index(module, call.args, call.kwargs)
        return OneHot(to_examples(index, layout, axes=0), len(module.weight), module.padding_idx)

    def gradients(self, module: Any, call: Call, g: Tensor, layout: Layout) -> Tensor:
        g = g * _looked_up(module, torch.ones_like(module.weight[:, :1]), call.args, call.kwargs)
        if module.padding_idx is not None:  # the padding row has no gradient
            g = g * (_index(module, call.args, call.kwargs) != module.padding_idx).unsqueeze(-1)
        return to_examples(g, layout, axes=1, lead=1).unsqueeze(1)


@torch.no_grad()
def _looked_up(module: Any, table: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output for another table, by the module's ``forward``, so that no hook runs.  table: (V, d) -> (*index, d)"""
    with exchanged(module, {module.weight: table}):
        out: Tensor = module.forward(*args, **kwargs)
    return out


def _index(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The rows that a call looks up; row 0 where its scale is zero.  # (*index)"""
    V, device = len(module.weight), module.weight.device
    numbers = torch.arange(V, dtype=torch.float64, device=device).unsqueeze(-1)
    scale, scaled = (_looked_up(module, table, args, kwargs) for table in (torch.ones_like(numbers), numbers))
    return (scaled / scale).nan_to_num(0.0).round().long().squeeze(-1)


def _samples(V: int, padding: int | None) -> Iterator[Tensor]:
    """Arguments that a layer may take: rows, its padding among them, a mask of positions, and weights of all rows."""
    rows = torch.randint(V, (2, 3), generator=torch.Generator().manual_seed(0), device="cpu")
    if padding is None:
        yield torch.ones_like(rows)
    else:
        rows[0, 0] = padding
    yield rows
    yield torch.rand(2, 3, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")


def _proven(module: Any, sample: Tensor) -> bool | None:
    """Whether random tables give ``s W[index]`` with a constant ``s``, and no gradient for padding; None if the call fails."""
    (V, d), given = module.weight.shape, sample.to(module.weight.device)
    numbers = torch.randn(V + d - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    W = numbers.to(given.device).as_strided((V, d), (1, 1))  # all of its rows are different, without the memory of a table
    try:
        scale, found = (_looked_up(module, table, (given,), {}) for table in (torch.ones_like(W[:, :1]), W))
    except Exception:  # of the module's own code: its forward takes something else
        return None
    index = _index(module, (given,), {})
    inside = bool(((index >= 0) & (index < V)).all())
    if not inside or found.shape != (*index.shape, d) or not torch.allclose(found, scale * W[index], rtol=1e-6, atol=0):
        return False
    constant = bool((scale == scale.reshape(-1)[0]).all()) and bool(scale.any())
    return constant and (module.padding_idx is None or _pads(module, given, index))


def _pads(module: Any, given: Tensor, index: Tensor) -> bool:
    """Whether the call looks up what it was given, its padding row without a gradient."""
    table = torch.ones(len(module.weight), 1, dtype=torch.float64, device=given.device, requires_grad=True)
    with exchanged(module, {module.weight: table}), torch.enable_grad():
        (gradient,) = torch.autograd.grad(module.forward(given).sum(), table)
    return torch.equal(index, given) and not bool(gradient[module.padding_idx].any())
