"""Layer rules of recurrent layers and cells: each of their matrices is a linear map whose positions are the time steps.

Torch's kernels show no pre-activations. They are recomputed: the recorded call is repeated step by step in its linear maps, and
the gradients at its outputs are taken back to the pre-activations of every step (backpropagation through time). The recorded
pass is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradmaker.capture.rules.calls import Call, LayerRule, Layout, batch_first
from gradmaker.capture.tape import vector_jacobian

__all__ = ["RecurrentRule", "recurrent_rules", "recurs"]

LAYERS: tuple[type[nn.Module], ...] = (nn.RNN, nn.LSTM, nn.GRU)
CELLS: tuple[type[nn.Module], ...] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
LONG = (nn.LSTM, nn.LSTMCell)
GATED = (nn.GRU, nn.GRUCell)

Maps: TypeAlias = dict[str, Tensor]
"""By the name of a map, as ``ih_l0``: a tensor of all its time steps.  # (T, N, ...)"""


def recurs(module: nn.Module) -> TypeGuard[nn.RNNBase | nn.RNNCellBase]:
    """Whether a module is one of torch's recurrent layers or cells; a subclass with its own ``forward`` is not."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (*LAYERS, *CELLS))


def recurrent_rules(module: nn.RNNBase | nn.RNNCellBase) -> Iterator[RecurrentRule]:
    """A rule for each of its matrices."""
    for suffix in _suffixes(module):
        for part in ("ih", "hh", "hr"):
            if hasattr(module, f"weight_{part}{suffix}"):
                yield RecurrentRule(part + suffix)


class RecurrentRule(LayerRule):
    """One matrix of a recurrent layer: of a step's inputs (``ih``), of its state (``hh``), or an LSTM's projection (``hr``).

    ``a`` is what the matrix multiplies and ``g`` the gradient at the product. Both biases of a step are the last columns of the
    two matrices. Gates share their input, and are the rows of one matrix.

    Reference: Martens, Ba & Johnson, ICLR 2018, "Kronecker-factored curvature approximations for recurrent neural networks",
    section 3 (the factors of a step); its steps as further positions: Eschenhagen et al., 2023, arXiv:2311.00636 (expand).
    """

    types = ()
    repeats = True

    def __init__(self, part: str) -> None:
        """part: name of the matrix, as ``ih_l0_reverse``"""
        self.part = part

    @property
    def weight(self) -> str:
        """Name of the weight in its module."""
        return f"weight_{self.part}"

    @property
    def bias(self) -> str:
        """Name of the bias, which the module may lack."""
        return f"bias_{self.part}"

    def shape(self, module: Any) -> tuple[int, int, int]:
        o, i = getattr(module, self.weight).shape
        return 1, o, i

    def refuses(self, call: Call) -> str | None:
        module: Any = call.module
        if any(isinstance(v, PackedSequence) for v in (*call.args, *call.kwargs.values())):
            return "a packed sequence has no axis of examples"
        if call.training and getattr(module, "dropout", False) and module.num_layers > 1:
            return "the dropout between its layers cannot be repeated"
        return None

    def inputs(self, module: Any, call: Call, layout: Layout) -> Tensor:
        a = self._unrolled(call).inputs[self.part]
        return batch_first(a.detach().transpose(0, 1), layout, axes=1).unsqueeze(0)

    def gradients(self, module: Any, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return self.of_outputs(module, call, [g], layout)

    def of_outputs(self, module: Any, call: Call, gradients: list[Tensor], layout: Layout) -> Tensor:
        made = self._unrolled(call)
        leaf = made.shifts[self.part]
        outputs = made.outputs[: len(gradients)]
        with torch.enable_grad():
            cotangents = [g.to(leaf.dtype) for g in gradients]
            (found,) = vector_jacobian(outputs, [leaf], cotangents)
        rows = leaf.new_zeros(len(gradients[0]), *leaf.shape) if found is None else found
        return batch_first(rows.transpose(1, 2), layout, axes=1, lead=1).unsqueeze(1)

    def _unrolled(self, call: Call) -> Unrolled:
        if (reason := self.refuses(call)) is not None:
            raise ValueError(f"{type(call.module).__name__}: {reason}; use self_check='fallback', or leave it out with ignore=")
        if not isinstance(call.repeated, Unrolled):
            call.repeated = unroll(call)
        return call.repeated


# ------------------------------------------------------------------ the repeated call
@dataclass
class Unrolled:
    """A call repeated in its linear maps: what goes into each, zeros that were added to their results, and the outputs."""

    inputs: Maps = field(default_factory=dict)
    shifts: Maps = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def shift(self, part: str, like: Tensor) -> Tensor:
        """Zeros at which the gradient of a result is taken."""
        self.shifts[part] = torch.zeros_like(like, requires_grad=True)
        return self.shifts[part]


@torch.enable_grad()
def unroll(call: Call) -> Unrolled:
    """Repeat a call. Its outputs have the shapes of the recorded ones."""
    module: Any = call.module
    given = [*call.args, *call.kwargs.values()]
    state = call.kwargs.get("hx", next((v for v in given if v is not call.input), None))
    made = Unrolled()
    with torch.autocast(call.input.device.type, enabled=False):
        run = _Cell(call, made) if isinstance(module, nn.RNNCellBase) else _Layer(call, made)
        made.outputs = run.outputs(state)
    return made


class _Steps:
    """The steps of a call.  T, N: time steps, examples"""

    def __init__(self, call: Call, made: Unrolled) -> None:
        self.module: Any = call.module
        self.call, self.made = call, made
        weight: Tensor = getattr(self.module, "weight_hh" + _suffixes(self.module)[0])
        self.dtype = torch.promote_types(weight.dtype, torch.float32)

    def tensor(self, name: str) -> Tensor | None:
        """A weight or bias, as a constant."""
        found: Tensor | None = getattr(self.module, name, None)
        return None if found is None else found.detach().to(self.dtype)

    def linear(self, part: str, x: Tensor) -> Tensor:
        """The product of a map, with its bias if there is one."""
        weight = self.tensor(f"weight_{part}")
        assert weight is not None
        return F.linear(x, weight, self.tensor(f"bias_{part}") if self.module.bias else None)

    def start(self, state: Any, width: int, like: Tensor) -> Tensor:
        """An initial state, zeros where none was given.  like: (T, N, i) -> (N, width)"""
        return like.new_zeros(like.shape[1], width) if state is None else state.detach().to(self.dtype)

    def through_time(self, suffix: str, x: Tensor, h: Tensor, c: Tensor | None, whole: bool = True) -> list[Tensor]:
        """One layer in one direction: the outputs of all steps, and the last states.  # (T, N, i) -> (T, N, H), (N, H), ...

        whole: whether the path from the cell state to the output is in the output's gradient, not in that of the state
        """
        made, T = self.made, len(x)
        made.inputs[f"ih{suffix}"] = x
        z = self.linear(f"ih{suffix}", x)
        z = z + made.shift(f"ih{suffix}", z)
        hidden = made.shift(f"hh{suffix}", z).unbind(0)
        projects = bool(getattr(self.module, "proj_size", 0))
        projected = made.shift(f"hr{suffix}", x.new_zeros(*x.shape[:2], h.shape[-1])).unbind(0) if projects else ()
        before, inner, out = ([x] * T for _ in range(3))
        for t in range(T)[:: -1 if suffix.endswith("_reverse") else 1]:
            before[t] = h
            inner[t], c = self.step(z[t], self.linear(f"hh{suffix}", h) + hidden[t], h, c, whole)
            h = out[t] = self.linear_projection(suffix, inner[t]) + projected[t] if projects else inner[t]
        made.inputs[f"hh{suffix}"] = torch.stack(before)
        if projects:
            made.inputs[f"hr{suffix}"] = torch.stack(inner)
        return [torch.stack(out), h, *([] if c is None else [c])]

    def linear_projection(self, suffix: str, x: Tensor) -> Tensor:
        """The projection of an LSTM's output, which has no bias."""
        weight = self.tensor(f"weight_hr{suffix}")
        assert weight is not None
        return F.linear(x, weight)

    def step(self, z: Tensor, w: Tensor, h: Tensor, c: Tensor | None, whole: bool) -> tuple[Tensor, Tensor | None]:
        """One step from the products of the input and of the state.  # (N, gates H) twice, (N, H) -> (N, H)"""
        if c is not None:
            i, f, g, o = (z + w).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c if whole else c.detach()), c
        if isinstance(self.module, GATED):
            (r, u, n), (r_h, u_h, n_h) = z.chunk(3, -1), w.chunk(3, -1)
            n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
            return n + torch.sigmoid(u + u_h) * (h - n), None
        kind = getattr(self.module, "nonlinearity", "tanh")
        return torch.relu(z + w) if kind == "relu" else torch.tanh(z + w), None


class _Cell(_Steps):
    """The one step of a cell."""

    def outputs(self, state: Any) -> list[Tensor]:
        x = self.call.input.detach().to(self.dtype)
        x, H = x.reshape(1, -1, x.shape[-1]), self.module.hidden_size
        h, c = state if isinstance(state, (tuple, list)) else (state, None)
        if isinstance(self.module, LONG):
            c = self.start(c, H, x).reshape(-1, H)
        _, *last = self.through_time("", x, self.start(h, H, x).reshape(-1, H), c, whole=self._fused())
        return [v.reshape(shape) for v, shape in zip(last, self.call.shapes, strict=False)]

    def _fused(self) -> bool:
        """Whether one node of the graph makes both outputs of an LSTM cell: else one of them is made of the other."""
        edges = self.call.edges
        return len(edges) < 2 or edges[0].node is edges[1].node


class _Layer(_Steps):
    """All steps of a layer of one or two directions, or of several such layers."""

    def outputs(self, state: Any) -> list[Tensor]:
        x, module = self.call.input.detach().to(self.dtype), self.module
        batched = x.ndim == 3
        x = x.transpose(0, 1) if batched and module.batch_first else x if batched else x.unsqueeze(1)
        h, c = state if isinstance(state, (tuple, list)) else (state, None)
        h, c = (v if v is None or batched else v.unsqueeze(1) for v in (h, c))
        H, width = module.hidden_size, getattr(module, "proj_size", 0) or module.hidden_size
        last: list[list[Tensor]] = []
        for layer in range(module.num_layers):
            found = []
            for suffix in _suffixes(module, layer):
                own = [None if v is None else v[len(last)] for v in (h, c)]
                cell = self.start(own[1], H, x) if isinstance(module, LONG) else None
                y, *states = self.through_time(suffix, x, self.start(own[0], width, x), cell)
                found.append(y)
                last.append(states)
            x = torch.cat(found, -1)
        y = x.transpose(0, 1) if batched and module.batch_first else x if batched else x.squeeze(1)
        finals = [torch.stack(list(same)) for same in zip(*last, strict=True)]
        return [y, *(v if batched else v.squeeze(1) for v in finals)]


def _suffixes(module: Any, layer: int | None = None) -> list[str]:
    """Ends of the names of its parameters, of one layer or of all: none for a cell."""
    if isinstance(module, nn.RNNCellBase):
        return [""]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    layers = range(module.num_layers) if layer is None else (layer,)
    return [f"_l{j}{way}" for j in layers for way in ways]
