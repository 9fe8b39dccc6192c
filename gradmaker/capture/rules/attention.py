"""Layer rule of `nn.MultiheadAttention`, as its four linear maps.

The module multiplies by its weights without calling a layer, so that module hooks do not see these products. While a pass is
recorded, torch's own implementation runs with its linear maps replaced by the same maps that also record their inputs and
outputs. Values and random numbers are those of an ordinary pass, bit for bit.
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

__all__ = ["Projection", "ProjectionHooks", "ProjectionRule", "projections"]

Record: TypeAlias = Callable[[str, Tensor, Tensor], None]
"""Function of (name of a projection, its input, its output) that records the call."""


class Projection(nn.Module):
    """One linear map inside of an attention module; takes the place of a layer, and is never called."""

    def __init__(self, attention: nn.MultiheadAttention, part: str, width: int, rows: dict[str, slice | None]) -> None:
        super().__init__()
        self.part = part  # query, key, value or out
        self.attention = (attention,)  # in a tuple, as it is no submodule
        self.width = width
        self.rows = rows  # by parameter of the attention: the rows that belong to this map, None for all

    def __eq__(self, other: object) -> bool:
        """The same map, also of another plan: a tape that was made for one plan is read by the next."""
        return isinstance(other, Projection) and self.attention[0] is other.attention[0] and self.part == other.part

    def __hash__(self) -> int:
        return hash((id(self.attention[0]), self.part))


def projections(attention: nn.MultiheadAttention) -> Iterator[Projection]:
    """The linear maps of queries, keys, values and of the concatenated heads."""
    d = attention.embed_dim
    packed = attention.in_proj_weight is not None
    widths = {"query": d, "key": attention.kdim, "value": attention.vdim}
    for j, (part, width) in enumerate(widths.items()):
        rows = slice(j * d, (j + 1) * d)
        weight = {"in_proj_weight": rows} if packed else {f"{part[0]}_proj_weight": None}
        yield Projection(attention, part, width, {**weight, "in_proj_bias": rows})
    yield Projection(attention, "out", d, {"out_proj.weight": None, "out_proj.bias": None})


class ProjectionRule(LayerRule):
    """Rule of these linear maps, whose tokens lie as (position, batch) inside of `F.multi_head_attention_forward`."""

    types = (Projection,)

    def shape(self, module: Projection) -> tuple[int, int, int]:
        return 1, module.attention[0].embed_dim, module.width

    def inputs(self, module: Projection, call: Call, layout: Layout) -> Tensor:
        return batch_first(call.input.transpose(0, 1), layout, axes=1).unsqueeze(0)

    def gradients(self, module: Projection, call: Call, g: Tensor, layout: Layout) -> Tensor:
        tokens = g.reshape(len(g), *call.input.shape[:2], -1).transpose(1, 2)
        return batch_first(tokens, layout, axes=1, lead=1).unsqueeze(1)


# ------------------------------------------------------------------ recording a call
class ProjectionHooks:
    """Hooks before and after the call of an attention module, between which its linear maps are recorded."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._modes: list[_RecordingMode] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        self._modes.append(_RecordingMode(self.record))
        self._modes[-1].__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called also after an exception."""
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _RecordingMode(TorchFunctionMode):
    """Runs `F.multi_head_attention_forward` with linear maps that are recorded."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            func = _recording_attention(self.record)
        return func(*args, **(kwargs or {}))


def _recording_attention(record: Record) -> Any:
    """torch's function with other globals: all that it computes, with masks, biases and dropout, stays torch's."""
    batch = 1  # of the current call; the last map gets positions and batch as one axis

    def project(call: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        nonlocal batch
        inputs, outputs = args[:3], call(*args)
        batch = inputs[0].shape[1]
        for part, x, y in zip(("query", "key", "value"), inputs, outputs, strict=True):
            record(part, x, y)
        return outputs

    def out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        record("out", x.unflatten(0, (-1, batch)), y)
        return y

    functional: Any = F
    original = functional.multi_head_attention_forward
    names = {
        **vars(F),
        "_in_projection_packed": partial(project, functional._in_projection_packed),
        "_in_projection": partial(project, functional._in_projection),
        "linear": out,
        "has_torch_function": lambda tensors: False,  # its answer led to this function already
    }
    made = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made
