"""What operations take on this machine: seconds per FLOP, per byte and per call, measured when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import cycle
from statistics import median
from time import perf_counter, thread_time

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.costs.counting import CONVOLUTIONS, Key, Work

__all__ = ["Rates", "rates"]

LEAST = 1e-3  # seconds of one timing
ROUNDS = 3
CALL = 4.0
"""Seconds of a call in the library over those of the same call in a loop: Python between the operators."""
LARGEST = {"product": 9, "convolution": 8, "decomposition": 9, "stream": 24}
SMALLEST = {"product": 3, "convolution": 1, "decomposition": 3, "stream": 12}
ELEMENTWISE: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "stream": (2, Tensor.neg),
    "strided": (2, lambda x: torch.empty_like(x).copy_(x.mT)),
    "math": (2, Tensor.exp),
    "division": (3, lambda x: x / x),
    "random": (1, Tensor.normal_),
    "reduction": (1, Tensor.sum),
}
"""Operands of a call of each kind, the result included, and the call on a square matrix."""
FRESH = 2**26
"""Bytes of an allocation that no allocator of the host keeps."""
POOL = 2**25
"""Bytes of the matrices on which calls alternate."""


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median of some rounds, each of which has a least duration."""
    clock = thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else perf_counter

    def timed(count: int) -> float:
        _wait(device)
        start = clock()
        for _ in range(count):
            run()
        _wait(device)
        return clock() - start

    one = timed(1)
    if one > 20 * LEAST:  # too long for another one, and long enough to be no start of a library
        return one
    count = max(1, min(200, round(LEAST / max(timed(1), 1e-7))))
    return median(timed(count) / count for _ in range(ROUNDS))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _definite(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A positive definite matrix with a spread spectrum, the same in every process.  # (d, d)"""
    x = torch.linspace(0, 1, d, dtype=dtype, device=device)
    return (-(x.unsqueeze(0) - x.unsqueeze(1)).abs() * 8).exp() + 0.1 * torch.eye(d, dtype=dtype, device=device)


DECOMPOSED: dict[str, Callable[[Tensor], object]] = {
    "_linalg_eigh": torch.linalg.eigh,
    "_linalg_svd": torch.linalg.svd,
    "linalg_qr": torch.linalg.qr,
    "geqrf": torch.geqrf,
    "linalg_cholesky_ex": torch.linalg.cholesky_ex,
    "cholesky_inverse": torch.cholesky_inverse,
    "linalg_inv_ex": torch.linalg.inv_ex,
    "linalg_lu_factor_ex": torch.linalg.lu_factor_ex,
    "_linalg_solve_ex": lambda A: torch.linalg.solve(A, A),
    "linalg_solve_triangular": lambda A: torch.linalg.solve_triangular(A, A, upper=False),
    "triangular_solve": lambda A: torch.linalg.solve_triangular(A, A, upper=False),
    "cholesky_solve": lambda A: torch.cholesky_solve(A, A),
}
"""A call of each decomposition on a square matrix; what is not named here takes the time of `torch.linalg.inv_ex`."""
FLOPS_OF = {
    "_linalg_eigh": 9,
    "_linalg_svd": 22,
    "linalg_qr": 8 / 3,
    "geqrf": 4 / 3,
    "linalg_cholesky_ex": 1 / 3,
    "cholesky_inverse": 2 / 3,
    "linalg_lu_factor_ex": 2 / 3,
    "_linalg_solve_ex": 2 / 3,
    "linalg_solve_triangular": 1,
    "triangular_solve": 1,
}
"""FLOPs of these calls over ``d^3``, as `gradmaker.costs.flops` counts them; 2 for the others."""


class Rates:
    """Rates of one device with its present number of threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[Key, float] = {}

    @property
    def call(self) -> float:
        """Seconds of an operator on a few numbers, with the Python around it."""
        return CALL * self._measured(Key("call", torch.float32, 0))

    @property
    def view(self) -> float:
        """Seconds of a view."""
        return CALL * self._measured(Key("view", torch.float32, 0))

    def seconds(self, work: Work) -> float:
        """Seconds of some work. An accelerator computes while the host calls."""
        calls = sum(n * self._call(key.kind) for key, n in work.calls.items())
        own = sum(self._own(key, work) for key in work.calls)
        return calls + own if self.device.type == "cpu" else max(calls, own)

    def _call(self, kind: str) -> float:
        return self.view if kind == "view" else 0.0 if kind == "fresh" else self.call

    def _own(self, key: Key, work: Work) -> float:
        """Seconds of the computation itself: by bytes if it has no FLOPs, or if its operands are long and thin."""
        if not work.bytes[key]:
            return 0.0
        if key.kind == "fresh":
            return work.bytes[key] * self._measured(key)
        streamed = work.bytes[key] * self.rate(Key("stream", key.dtype, _log(work.bytes[key] / work.calls[key])))
        if not work.flops[key]:
            return work.bytes[key] * self.rate(key)
        return max(work.flops[key] * self.rate(key), streamed)

    def rate(self, key: Key) -> float:
        """Seconds per FLOP, or per byte of element-wise work."""
        group = key.kind if key.kind == "product" else "convolution" if key.kind in CONVOLUTIONS else "decomposition"
        group = "stream" if key.kind in ELEMENTWISE else group
        size = min(max(key.size, SMALLEST[group]), LARGEST[group])
        if group == "stream":
            size -= size % 2
        return self._measured(Key(key.kind, key.dtype, size))

    @torch.no_grad()
    def _measured(self, key: Key) -> float:
        if key not in self._known:
            self._known[key] = self._time(key)
        return self._known[key]

    def _time(self, key: Key) -> float:
        dtype = key.dtype if key.dtype.is_floating_point else torch.float32
        if key.kind in ("call", "view"):
            x = torch.ones(4, dtype=dtype, device=self.device)
            return _seconds(x.detach if key.kind == "view" else lambda: x.add(x), self.device)
        if key.kind == "fresh":
            return self._fresh()
        if key.kind in ELEMENTWISE:
            run, size = self._elementwise(key.kind, dtype, 2**key.size)
            spent = _seconds(run, self.device)
            return max(spent - self._measured(Key("call", torch.float32, 0)), 0.1 * spent) / size
        if key.kind in CONVOLUTIONS:
            return self._convolution(key.kind, dtype, 2**key.size)
        A = _definite(2**key.size, dtype, self.device)
        run = (lambda: A @ A) if key.kind == "product" else (lambda: DECOMPOSED.get(key.kind, torch.linalg.inv_ex)(A))
        spent = _seconds(run, self.device)
        spent = max(spent - self._measured(Key("call", torch.float32, 0)), 0.1 * spent)
        return spent / (FLOPS_OF.get(key.kind, 2) * len(A) ** 3)

    def _convolution(self, kind: str, dtype: torch.dtype, channels: int) -> float:
        """Seconds per FLOP of a 3 x 3 convolution, or of its derivatives."""
        side = max(8, min(32, 512 // channels))
        x = torch.full((8, channels, side, side), 0.5, dtype=dtype, device=self.device)
        w = torch.full((channels, channels, 3, 3), 0.1, dtype=dtype, device=self.device)
        flops = 2 * x.numel() * w[0].numel()
        if kind == "convolution":
            return _seconds(lambda: F.conv2d(x, w, padding=1), self.device) / flops
        options = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
        run = partial(torch.ops.aten.convolution_backward, x, x, w, *options)
        return _seconds(run, self.device) / (2 * flops)

    def _fresh(self) -> float:
        """Seconds per byte of memory that the process has to get from the system first."""
        x = torch.empty(FRESH, dtype=torch.uint8, device=self.device)
        again = _seconds(x.zero_, self.device)
        first = _seconds(lambda: torch.empty_like(x).zero_(), self.device)
        return max(0.0, first - again) / FRESH

    def _elementwise(self, kind: str, dtype: torch.dtype, size: int) -> tuple[Callable[[], object], int]:
        """A call of a kind, and its bytes: about ``size``. The operands are not in a cache, as in a step of a large model."""
        operands, apply = ELEMENTWISE[kind]
        width = torch.empty(0, dtype=dtype).element_size()
        n = max(1, round((size / width / operands) ** 0.5))
        count = max(1, min(POOL // max(size, 1), 200))
        pool = cycle([torch.full((n, n), 0.5, dtype=dtype, device=self.device) for _ in range(count)])
        return (lambda: apply(next(pool))), operands * n * n * width


def _log(size: float) -> int:
    return max(0, round(size).bit_length() - 1)


def rates(device: torch.device) -> Rates:
    """The rates of a device, kept for the process and the number of threads."""
    return _rates(device, torch.get_num_threads())


@cache
def _rates(device: torch.device, threads: int) -> Rates:
    return Rates(device)
