"""Per-example gradients of any parameter by `torch.func`: the fallback for layers without a rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from gradmaker.calls import Call, check_lookup, example_axis
from gradmaker.capture import OutputGradients, Tape

if TYPE_CHECKING:
    from gradmaker.sites import Site

__all__ = ["per_example_rows"]


def per_example_rows(site: Site, tape: Tape, gradients: OutputGradients) -> Tensor:
    """``J_kn`` of a parameter, by repeating its module's call one example at a time (vmapped where possible).

    Modules that draw random numbers or couple examples (dropout, batch norm in training mode) inside that call are repeated
    with fresh draws and single-example statistics.  # (k, n, P)
    """
    (module,) = site.modules
    total: Tensor | None = None
    for call, outputs in zip(tape.calls[module], gradients[module], strict=True):
        with tape.paused(), _held_spectra(module), _own_random_state(next(iter(site.parameters.values())).device):
            rows = _rows_of_call(site, module, call, outputs, tape.examples)
        total = rows if total is None else total + rows
    assert total is not None
    return total


@contextmanager
def _held_spectra(module: nn.Module) -> Iterator[None]:
    """A spectral norm in training mode moves its singular vectors at every use: a repeated call is to keep them."""
    moving = [m for m in module.modules() if isinstance(m, _SpectralNorm) and m.training]
    for m in moving:
        m.eval()
    try:
        yield
    finally:
        for m in moving:
            m.train()


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers that are drawn inside are not missed outside."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _rows_of_call(site: Site, module: nn.Module, call: Call, outputs: list[Tensor], n: int) -> Tensor:
    ((name, parameter),) = site.parameters.items()
    check_lookup(module, call)
    local = _local_name(module, parameter)
    leaves, spec = tree_flatten((call.args, call.kwargs))
    axes = [example_axis(call, v, n, j == 0) for j, v in enumerate(leaves)]
    g_axes = [example_axis(call, g[0], n, j == 0) for j, g in enumerate(outputs)]
    if any(axis is None and g[0].ndim for axis, g in zip(g_axes, outputs, strict=True)):
        shapes = ", ".join(str(tuple(g.shape[1:])) for g in outputs)
        raise ValueError(
            f"cannot find {n} examples in what {type(module).__name__} returned, of shape {shapes}, to tell the gradients of "
            f"{name} apart by example: give the batch axis first, or leave the parameter out with ignore="
        )
    frozen = {k: v.detach() for k, v in module.named_parameters()}

    def one_example(*values: Any) -> Tensor:
        mapped = iter(values[: len(leaves)])
        cotangents = values[len(leaves) :]
        args, kwargs = tree_unflatten([_batch_of_one(v, a) for v, a in zip(mapped, axes, strict=True)], spec)

        def outputs_of(p: Tensor) -> list[Tensor]:
            buffers = {k: v.clone() for k, v in module.named_buffers()}  # that the call may change
            out = functional_call(module, {**frozen, **buffers, local: p}, args, kwargs)
            return [v for v in tree_leaves(out) if isinstance(v, Tensor) and v.is_floating_point()][: len(outputs)]

        pull = vjp(outputs_of, parameter.detach())[1]
        shaped = [_batch_of_one(c, a) for c, a in zip(cotangents, g_axes, strict=True)]
        gradient: Tensor = pull(shaped)[0]
        return gradient.reshape(-1)

    detached = [v.detach() if isinstance(v, Tensor) else v for v in leaves]
    rows = [
        _over_examples(one_example, [*detached, *(g[j] for g in outputs)], [*axes, *g_axes], n) for j in range(len(outputs[0]))
    ]
    return torch.stack(rows)


def _over_examples(function: Any, values: list[Any], axes: list[int | None], n: int) -> Tensor:
    try:
        mapped: Tensor = vmap(function, in_dims=tuple(axes), randomness="different")(*values)
        return mapped
    except (RuntimeError, ValueError, NotImplementedError):  # an operation that vmap cannot map: example by example
        rows = []
        for j in range(n):
            chosen = [v if a is None else v.select(a, j) for v, a in zip(values, axes, strict=True)]
            rows.append(function(*chosen))
        return torch.stack(rows)


def _batch_of_one(value: Any, axis: int | None) -> Any:
    return value if axis is None else value.unsqueeze(axis)


def _local_name(module: nn.Module, parameter: nn.Parameter) -> str:
    return next(k for k, p in module.named_parameters() if p is parameter)
