"""Attention: `nn.MultiheadAttention` as its four linear maps.

The module multiplies by its weights without calling a layer, so hooks see nothing of them. While a pass is recorded, torch's
own code for it runs with its calls of linear maps replaced: the same calls, which also tell what went in and what came out.
Values and random numbers are those of an ordinary pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradmaker.capture.rules.calls import Call, LayerRule, Layout, batch_first

__all__ = ["Listener", "Projection", "ProjectionRule", "projections"]

Tell: TypeAlias = Callable[[str, Tensor, Tensor], None]
"""What to do with (name of the projection, its input, its output)."""


class Projection(nn.Module):
    """One linear map inside of an attention module: never called, it stands for the map where others have a layer."""

    def __init__(self, attention: nn.MultiheadAttention, part: str, width: int, rows: dict[str, slice | None]) -> None:
        super().__init__()
        self.part = part  # query, key, value or out
        self.attention = (attention,)  # in a tuple, as it is no submodule
        self.width = width
        self.rows = rows  # by parameter of the attention: the rows that belong to this map, None for all

    def __eq__(self, other: object) -> bool:
        """The same map, of whatever plan: a tape that was made for one plan is read by the next."""
        return isinstance(other, Projection) and self.attention[0] is other.attention[0] and self.part == other.part

    def __hash__(self) -> int:
        return hash((id(self.attention[0]), self.part))


def projections(attention: nn.MultiheadAttention) -> Iterator[Projection]:
    """The maps of queries, keys, values and of the heads' outputs."""
    d = attention.embed_dim
    packed = attention.in_proj_weight is not None
    widths = {"query": d, "key": attention.kdim, "value": attention.vdim}
    for j, (part, width) in enumerate(widths.items()):
        rows = slice(j * d, (j + 1) * d)
        weight = {"in_proj_weight": rows} if packed else {f"{part[0]}_proj_weight": None}
        yield Projection(attention, part, width, {**weight, "in_proj_bias": rows})
    yield Projection(attention, "out", d, {"out_proj.weight": None, "out_proj.bias": None})


class ProjectionRule(LayerRule):
    """Linear maps of tokens that lie as (position, batch), as inside of `F.multi_head_attention_forward`."""

    types = (Projection,)

    def shape(self, module: Projection) -> tuple[int, int, int]:
        return 1, module.attention[0].embed_dim, module.width

    def inputs(self, module: Projection, call: Call, layout: Layout) -> Tensor:
        return batch_first(call.input.transpose(0, 1), layout, axes=1).unsqueeze(0)

    def gradients(self, module: Projection, call: Call, g: Tensor, layout: Layout) -> Tensor:
        tokens = g.reshape(len(g), *call.input.shape[:2], -1).transpose(1, 2)
        return batch_first(tokens, layout, axes=1, lead=1).unsqueeze(1)


# ------------------------------------------------------------------ listening to a call
class Listener:
    """Hooks on an attention module, between which its projections are recorded."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._modes: list[_Overhearing] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the call."""
        self._modes.append(_Overhearing(self.tell))
        self._modes[-1].__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the call, also after one that raised."""
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Overhearing(TorchFunctionMode):
    """Runs `F.multi_head_attention_forward` with projections that tell."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            func = _telling(self.tell)
        return func(*args, **(kwargs or {}))


def _telling(tell: Tell) -> Any:
    """torch's function with other globals: whatever it computes, masks, biases and dropout included, is torch's."""
    batch = 1  # of the call under way; the last map sees positions and batch as one axis

    def project(call: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        nonlocal batch
        inputs, outputs = args[:3], call(*args)
        batch = inputs[0].shape[1]
        for part, x, y in zip(("query", "key", "value"), inputs, outputs, strict=True):
            tell(part, x, y)
        return outputs

    def out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        tell("out", x.unflatten(0, (-1, batch)), y)
        return y

    functional: Any = F
    original = functional.multi_head_attention_forward
    names = {
        **vars(F),
        "_in_projection_packed": partial(project, functional._in_projection_packed),
        "_in_projection": partial(project, functional._in_projection),
        "linear": out,
        "has_torch_function": lambda tensors: False,  # that question was asked and led here
    }
    made = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made
