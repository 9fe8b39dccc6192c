"""Per-example gradients of any parameter by `torch.func`: the fallback for layers without a rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradmaker.capture.batch_norms import batch_moments, mixes
from gradmaker.capture.exchange import call_with, copies, exchanged
from gradmaker.capture.rules.calls import Call, check_lookup, example_axis
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.trees import tensors

if TYPE_CHECKING:
    from gradmaker.capture.sites import Site

__all__ = ["per_example_rows"]


def per_example_rows(site: Site, tape: Tape, gradients: OutputGradients) -> Tensor:
    """Per-example gradients ``J_kn`` of a parameter: its module's call repeated for single examples, by vmap where possible.

    Modules that draw random numbers in that call, as dropout, draw new ones. Batch norms in training mode use the statistics
    of the batch, as in their own rule. ValueError where the examples of a call cannot be told apart.  # (k, n, P)
    """
    (module,) = site.modules
    total: Tensor | None = None
    for call, outputs in zip(tape.calls[module], gradients[module], strict=True):
        device = next(iter(site.parameters.values())).device
        cast = torch.autocast(device.type, call.autocast, enabled=call.autocast is not None, cache_enabled=False)
        with tape.paused(), cast, _held_spectra(module), _own_random_state(device), _held_statistics(module, call):
            rows = _rows_of_call(site, module, call, outputs, tape)
        total = rows if total is None else total + rows
    assert total is not None
    return total


@contextmanager
def _held_spectra(module: nn.Module) -> Iterator[None]:
    """Context in which spectral norms keep their singular vectors, which each use in training mode would update."""
    moving = [m for m in module.modules() if isinstance(m, _SpectralNorm) and m.training]
    for m in moving:
        m.eval()
    try:
        yield
    finally:
        for m in moving:
            m.train()


@contextmanager
def _held_statistics(module: nn.Module, call: Call) -> Iterator[None]:
    """Context in which batch norms use the mean and variance of the whole batch, as constants."""
    norms = [m for m in module.modules() if mixes(m)]
    if not norms:
        yield
        return
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {m: [] for m in norms}
    turn: dict[nn.Module, int] = {}  # index of the current call of each norm

    def observe(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        mean, variance = batch_moments(args[0])
        seen[norm].append((mean.to(args[0].dtype), variance.to(args[0].dtype)))

    def normalise(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        turn[norm] = turn.get(norm, -1) + 1
        mean, variance = seen[norm][turn[norm] % len(seen[norm])]
        return F.batch_norm(args[0], mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(observe).remove)
        with torch.enable_grad():  # without gradients a reentrant checkpoint would warn
            call_with(module, copies(module), call.args, call.kwargs)
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(lambda *_: turn.clear()).remove)
        for norm in norms:
            stack.callback(norm.register_forward_hook(normalise).remove)
            stack.callback(norm.train, norm.training)
            norm.eval()  # in training mode it raises for a single value per channel
        yield


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Context that restores the random state afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _rows_of_call(site: Site, module: nn.Module, call: Call, outputs: list[Tensor], tape: Tape) -> Tensor:
    ((name, parameter),), n = site.parameters.items(), tape.examples
    check_lookup(module)
    if isinstance(module, nn.EmbeddingBag) and call.input.ndim == 1:
        raise ValueError(
            "EmbeddingBag was called with all bags in one axis, in which examples cannot be told apart: give indices with one "
            "row a bag, or leave the layer out with ignore="
        )
    leaves, spec = tree_flatten((call.args, call.kwargs))
    axes = [example_axis(call, v, n, j == 0) for j, v in enumerate(leaves)]
    g_axes = [example_axis(call, g[0], n, j == 0) for j, g in enumerate(outputs)]
    if any(axis is None and g[0].ndim for axis, g in zip(g_axes, outputs, strict=True)):
        shapes = ", ".join(str(tuple(g.shape[1:])) for g in outputs)
        raise ValueError(
            f"cannot find {n} examples in what {type(module).__name__} returned, of shape {shapes}, to tell the gradients of "
            f"{name} apart by example: give the batch axis first, or leave the parameter out with ignore="
        )
    frozen: dict[Tensor, Tensor] = {p: p.detach() for p in module.parameters()}

    def given(values: tuple[Any, ...]) -> tuple[Any, Any, list[Any]]:
        mapped = iter(values[: len(leaves)])
        args, kwargs = tree_unflatten([_batch_of_one(v, a) for v, a in zip(mapped, axes, strict=True)], spec)
        return args, kwargs, [_batch_of_one(c, a) for c, a in zip(values[len(leaves) :], g_axes, strict=True)]

    def one_example(*values: Any) -> Tensor:
        args, kwargs, cotangents = given(values)

        def outputs_of(p: Tensor) -> list[Tensor]:
            return _floating(call_with(module, {**frozen, **copies(module), parameter: p}, args, kwargs), len(outputs))

        gradient: Tensor = vjp(outputs_of, parameter.detach())[1](cotangents)[0]
        return gradient.reshape(-1)

    def by_backward(*values: Any) -> Tensor:
        args, kwargs, cotangents = given(values)
        with tape.gradients_apart(), exchanged(module, copies(module)), torch.enable_grad():
            torch.autograd.backward(_floating(module(*args, **kwargs), len(outputs)), cotangents)
            return torch.zeros_like(parameter).reshape(-1) if parameter.grad is None else parameter.grad.reshape(-1)

    detached = [v.detach() if isinstance(v, Tensor) else v for v in leaves]
    ways = one_example, by_backward
    rows = [_over_examples(ways, [*detached, *(g[j] for g in outputs)], [*axes, *g_axes], n) for j in range(len(outputs[0]))]
    return torch.stack(rows)


def _floating(out: Any, count: int) -> list[Tensor]:
    return [v for v in tensors(out) if v.is_floating_point()][:count]


def _over_examples(ways: tuple[Any, Any], values: list[Any], axes: list[int | None], n: int) -> Tensor:
    """Rows of all examples by vmap, else in a loop, else by a backward pass for each: torch.func rejects checkpoints."""
    function, by_backward = ways
    try:
        mapped: Tensor = vmap(function, in_dims=tuple(axes), randomness="different")(*values)
        return mapped
    except (RuntimeError, ValueError, NotImplementedError):  # an operation that vmap cannot map: example by example
        chosen = [[v if a is None else v.select(a, j) for v, a in zip(values, axes, strict=True)] for j in range(n)]
        try:
            return torch.stack([function(*each) for each in chosen])
        except RuntimeError:
            return torch.stack([by_backward(*each) for each in chosen])


def _batch_of_one(value: Any, axis: int | None) -> Any:
    return value if axis is None else value.unsqueeze(axis)
