"""Records of operations: kind, FLOPs and bytes of each, and the bytes of tensors that live at the same time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import inf, log2
from time import thread_time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradmaker.costs.flops import DECOMPOSITIONS, FLOPS

__all__ = ["CONVOLUTIONS", "Key", "Recorder", "Work"]

aten = torch.ops.aten
CONVOLUTIONS = ("convolution", "convolution_backward")
MATH = frozenset(
    "exp exp_ expm1 log log_ log1p tanh tanh_ sigmoid gelu gelu_backward erf erfinv pow pow_ sin cos _softmax _log_softmax "
    "_softmax_backward_data _log_softmax_backward_data silu native_layer_norm native_layer_norm_backward native_group_norm "
    "_foreach_pow _foreach_exp hypot atan2 max_pool2d_with_indices max_pool2d_with_indices_backward im2col col2im".split()
)
DIVISION = frozenset("div div_ sqrt sqrt_ rsqrt rsqrt_ reciprocal addcdiv addcdiv_ _foreach_div _foreach_sqrt".split())
RANDOM = frozenset(
    "normal_ uniform_ bernoulli_ bernoulli exponential_ multinomial randn rand randint random_ randperm randn_like rand_like "
    "cauchy_ geometric_ poisson native_dropout".split()
)
REDUCTIONS = frozenset(
    "sum mean amax amin max min any all norm linalg_vector_norm var std prod cumsum argmax argmin trace nansum "
    "native_batch_norm native_batch_norm_backward _foreach_norm sort topk".split()
)


@dataclass(frozen=True, order=True)
class Key:
    """Operations of equal price.

    kind: a decomposition by name, ``product``, ``convolution``, or ``stream``, ``math``, ``random``, ``reduction``, ``strided``
    for element-wise work by its kernel, ``view``, ``python`` for work of the host alone, ``fresh`` for memory that is new.
    """

    kind: str
    dtype: torch.dtype = field(compare=False, hash=True)
    size: int
    """log2 of the side of a matrix, or of the bytes of an operand."""


@dataclass
class Work:
    """What some operations amount to: calls, FLOPs and bytes by `Key`."""

    calls: Counter[Key] = field(default_factory=Counter)
    flops: Counter[Key] = field(default_factory=Counter)
    bytes: Counter[Key] = field(default_factory=Counter)

    def add(self, key: Key, calls: int, flops: float, size: float) -> None:
        """Add operations."""
        self.calls[key] += calls
        self.flops[key] += flops  # type: ignore[assignment]
        self.bytes[key] += size  # type: ignore[assignment]

    @property
    def total_flops(self) -> float:
        return float(sum(self.flops.values()))


@cache
def _is_view(func: Any) -> bool:
    """Whether an operator returns a view of an argument."""
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


@cache
def _kind(func: Any) -> str:
    packet = func.overloadpacket
    name = str(packet).rpartition(".")[2]
    if _is_view(func):
        return "view"
    if packet in DECOMPOSITIONS:
        return str(name)
    if packet in FLOPS:
        return str(name) if name in CONVOLUTIONS else "product"
    for kind, names in (("math", MATH), ("division", DIVISION), ("random", RANDOM), ("reduction", REDUCTIONS)):
        if name in names:
            return kind
    return "stream"


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, and in their lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _bytes(t: Tensor) -> int:
    """Bytes of the elements that are read or written: an expanded axis counts once."""
    count = 1
    for n, stride in zip(t.shape, t.stride(), strict=True):
        count *= n if stride else 1
    return count * t.element_size()


def _side(flops: float, inputs: list[Tensor], kind: str) -> float:
    """The side of a square matrix with the same number of operations in a product, or that of a decomposed matrix.

    Of a convolution the mean number of its channels.
    """
    if kind in CONVOLUTIONS:
        o, i, *_ = inputs[-2 if inputs[-1].ndim == 1 else -1].shape  # the weights come after the inputs, before the bias
        return float((o * i) ** 0.5)
    if kind == "product":
        batch = inputs[-1].shape[0] if inputs[-1].ndim == 3 else 1
        return float(max(1.0, (flops / 2 / max(batch, 1)) ** (1 / 3)))
    return float(max(inputs[0].shape[-2:], default=1))


class Recorder(TorchDispatchMode):
    """Records the operations of a block of code on fake tensors, and answers what the code reads on the host.

    A value that is read is True, 1.0, or the index 0, and no two tensors are equal. Code that reads on the host asks whether
    all is as usual (finite, without failures), so that this is the usual step; an iteration that asks whether to go on makes
    all of its turns.
    """

    def __init__(self, deadline: float = inf) -> None:
        """deadline: seconds of this thread after which it raises a TimeoutError"""
        super().__init__()  # type: ignore[no-untyped-call]
        self.until = thread_time() + deadline
        self.work = Work()
        self.live = self.peak = 0
        self._fresh: dict[int, int] = {}  # bytes of storages since `start`
        self._known: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """Forget what was recorded; the peak is counted from what is live now."""
        self.work, self.peak = Work(), self.live
        self._fresh.clear()

    @property
    def kept(self) -> int:
        """Bytes of tensors that were made since `start` and are live."""
        return sum(self._fresh.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # attributes of fake tensors, which are no operations
            return func(*args, **kwargs)
        if thread_time() > self.until:
            raise TimeoutError("the trial takes too long")
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            self._count(func, args, kwargs, ())
            return _read(args[0].dtype)
        if packet is aten.equal:
            return False
        if packet is aten.nonzero:  # as many as there may be
            x = args[0]
            return x.new_zeros(x.numel(), x.ndim, dtype=torch.long)
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        if not _is_view(func):
            self._hold(out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        inputs, outputs, kind = _tensors((*args, *kwargs.values())), _tensors((out,)), _kind(func)
        every = inputs + [t for t in outputs if all(t is not i for i in inputs)]
        if kind == "view" or not every:
            self.work.add(Key("view", torch.float32, 0), 1, 0, 0)
            return
        formula = FLOPS.get(func.overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
        size = sum(_bytes(t) for t in every)
        dtype = next((t.dtype for t in every if t.is_floating_point()), torch.float32)
        calls = max(1, len(args[0])) if args and isinstance(args[0], (list, tuple)) and "_foreach" in func.name() else 1
        if formula:
            key = Key(kind, dtype, round(log2(max(_side(flops, inputs, kind), 1))))
        else:
            if kind == "stream" and any(not t.is_contiguous() and t.stride() and min(t.stride()) > 0 for t in every):
                kind = "strided"
            key = Key(kind, dtype, round(log2(max(size / calls, 1))))
        self.work.add(key, calls, flops, size)

    def _hold(self, out: Any) -> None:
        """Count the bytes of new storages until they are freed."""
        for t in _tensors((out,)):
            storage = t.untyped_storage()
            known = self._known.get(id(storage))
            if known is not None and known() is storage:
                continue
            size, key = storage.nbytes(), id(storage)
            self._known[key] = weakref.ref(storage)
            self._fresh[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._fresh.pop(key, None)


def _read(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 0
