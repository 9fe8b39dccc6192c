"""Dense float64 oracles of the curvature, the factors and the steps. They import nothing of gradmaker.

Conventions. A parameter vector is the concatenation of `parameter.reshape(-1)` (row-major) in the order of `names`;
`names=None` is every trainable parameter in the order of `named_parameters` (a tied weight once). n, r, o, i: examples, sharing
positions, outputs, inputs; M: the loss terms that the reduction divides by (`terms`). `select` picks the logits out of the
model's output; where an oracle goes example by example they must be (n, ..., C): torch's (n, C, r) wants
`select=lambda y: y.mT`. First and second derivatives of a network are rows of torch.autograd.grad, one output at a time: vmap
has no rule for weight norm, refuses checkpoints, and torch.func.hessian (an inner jacrev) is wrong through layer_norm and
batch_norm in torch 2.13. Derivatives of a loss by its logits come from torch.func.
Run an oracle on a model without a maker's hooks: before one is attached, or on a deepcopy. Batch norm in train mode couples
examples: the oracles of the whole batch keep that, those of one example need `frozen_batch_statistics`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.modules.batchnorm import _BatchNorm

Select = Callable[[Any], Tensor]
Columns = Callable[[Tensor, int], Tensor]  # (logits of example n, n) -> the vectors to backpropagate, (K, *logits.shape)


class Factors(NamedTuple):
    """A Kronecker pair: the block of [W b] is B x A, of an embedding's (V, d) weight A x B."""

    A: Tensor
    B: Tensor


def identity(y: Any) -> Tensor:
    """The output as it is."""
    assert isinstance(y, Tensor), f"the model returned {type(y).__name__}: give select="
    return y


# --- parameters and networks ----------------------------------------------------------------------------------------------


def parameter_names(model: nn.Module) -> list[str]:
    """Every trainable parameter, a tied one once."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def parameter_vector(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    named = dict(model.named_parameters(remove_duplicate=False))
    return torch.cat([named[name].detach().reshape(-1) for name in names or parameter_names(model)])


def parameter_slices(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, slice]:
    """Where each parameter lies in the vector."""
    named = dict(model.named_parameters(remove_duplicate=False))
    slices, start = {}, 0
    for name in names or parameter_names(model):
        slices[name] = slice(start, start + named[name].numel())
        start += named[name].numel()
    return slices


def gradient_vector(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    """What lies in `.grad` (zeros where None)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parts = [named[name] for name in names or parameter_names(model)]
    return torch.cat([torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in parts])


def network(
    model: nn.Module, x: Tensor, names: Sequence[str] | None = None, select: Select = identity
) -> Callable[[Tensor], Tensor]:
    """The logits as a function of the parameter vector."""
    named = dict(model.named_parameters(remove_duplicate=False))
    slices = parameter_slices(model, names)

    def output(theta: Tensor) -> Tensor:
        values = {name: theta[where].view_as(named[name]) for name, where in slices.items()}
        return select(functional_call(model, values, (x,)))

    return output


def _rows(y: Tensor, theta: Tensor) -> Tensor:
    """(*y.shape, P): the gradient of each element of y, one backward pass each."""
    rows = [torch.autograd.grad(v, theta, retain_graph=True, materialize_grads=True)[0] for v in y.reshape(-1)]
    return torch.stack(rows).reshape(*y.shape, -1)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@contextmanager
def _swapped(norm: _BatchNorm, training: bool, mean: Tensor | None, var: Tensor | None) -> Iterator[None]:
    before = norm.training, norm.running_mean, norm.running_var, norm.num_batches_tracked
    norm.training, norm.running_mean, norm.running_var, norm.num_batches_tracked = training, mean, var, None
    try:
        yield
    finally:
        norm.training, norm.running_mean, norm.running_var, norm.num_batches_tracked = before


@contextmanager
def quiet_batch_norm(model: nn.Module) -> Iterator[None]:
    """Batch norms in train mode use the batch and leave their running statistics alone."""
    with ExitStack() as stack:
        for norm in _batch_norms(model):
            if norm.training:
                stack.enter_context(_swapped(norm, True, None, None))
        yield


@contextmanager
def frozen_batch_statistics(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Batch norms in train mode hold the mean and (biased) variance of this batch as constants: examples decouple."""
    seen: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

    def record(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm) and norm not in seen, "a batch norm that is called twice has no one statistic"
        rows = args[0].detach().movedim(1, -1).flatten(0, -2)
        seen[norm] = rows.mean(0), rows.var(0, correction=0)

    handles = [norm.register_forward_pre_hook(record) for norm in _batch_norms(model) if norm.training]
    with quiet_batch_norm(model), torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    with ExitStack() as stack:
        for norm, (mean, var) in seen.items():
            stack.enter_context(_swapped(norm, False, mean, var))
        yield


# --- first derivatives ----------------------------------------------------------------------------------------------------


def per_example_gradients(
    model: nn.Module,
    x: Tensor,
    loss_of_output: Callable[[Any, int], Tensor],
    names: Sequence[str] | None = None,
    *,
    frozen_statistics: bool = False,
) -> dict[str, Tensor]:
    """name -> (n, *shape): the gradient of `loss_of_output(model(x[n : n + 1]), n)`, one example at a time.

    `frozen_statistics` is for batch norm in train mode: see `frozen_batch_statistics`.
    """
    slices = parameter_slices(model, names)
    named = dict(model.named_parameters(remove_duplicate=False))
    rows = []
    with frozen_batch_statistics(model, x) if frozen_statistics else quiet_batch_norm(model):
        for n in range(len(x)):
            theta = parameter_vector(model, names).requires_grad_()
            values = {name: theta[where].view_as(named[name]) for name, where in slices.items()}
            loss = loss_of_output(functional_call(model, values, (x[n : n + 1],)), n)
            rows.append(torch.autograd.grad(loss, theta)[0])
    stacked = torch.stack(rows)
    return {name: stacked[:, where].reshape(-1, *named[name].shape) for name, where in slices.items()}


def gradient_rows(gradients: dict[str, Tensor]) -> Tensor:
    """(n, P) from `per_example_gradients`."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def jacobian(model: nn.Module, x: Tensor, names: Sequence[str] | None = None, select: Select = identity) -> Tensor:
    """(n, out..., P), one example at a time."""
    theta = parameter_vector(model, names).requires_grad_()
    with quiet_batch_norm(model):
        return torch.cat([_rows(network(model, x[n : n + 1], names, select)(theta), theta) for n in range(len(x))])


def batch_jacobian(model: nn.Module, x: Tensor, names: Sequence[str] | None = None, select: Select = identity) -> Tensor:
    """(outputs of the whole batch, P), with whatever couples the examples."""
    theta = parameter_vector(model, names).requires_grad_()
    with quiet_batch_norm(model):
        return _rows(network(model, x, names, select)(theta).reshape(-1), theta)


# --- losses ---------------------------------------------------------------------------------------------------------------


def loss_term(kind: str, z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The unscaled loss of one term: z (C,); target () for categorical (or (C,) soft), else (C,).

    categorical: options of F.cross_entropy (weight, label_smoothing, ignore_index). bernoulli: those of
    F.binary_cross_entropy_with_logits (weight, pos_weight); mean over elements is weight = 1/C. gaussian: |z - y|^2 / (2
    variance); variance 1/2 is F.mse_loss(reduction="sum"), and C/2 with M = terms is reduction="mean".
    """
    if kind == "categorical":
        return F.cross_entropy(z[None], target[None], reduction="sum", **options)
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, target.to(z.dtype), reduction="sum", **options)
    if kind == "gaussian":
        variance: float = options.get("variance", 0.5)
        return (z - target).square().sum() / (2 * variance)
    raise ValueError(f"unknown loss {kind!r}; known: categorical, bernoulli, gaussian")


def _term(kind: str, target: Tensor, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def term(z: Tensor) -> Tensor:
        return loss_term(kind, z, target, **options)

    return term


def output_hessian(loss_name: str, z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """(n, C, C): the Hessian of each unscaled term, from logits (n, C); one term at a time."""
    return torch.stack([jacrev(grad(_term(loss_name, t, options)))(row) for row, t in zip(z, target, strict=True)])


def _root(C: Tensor) -> Tensor:
    """S with S S^T = C, for C positive semi-definite."""
    s, Q = torch.linalg.eigh(C)
    S: Tensor = Q * s.clamp(min=0).sqrt()
    return S


def _positions(z: Tensor) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in z.shape[:-1]))


def exact_columns(loss_name: str, target: Tensor, **options: Any) -> Columns:
    """The columns of S, S S^T = Hessian of the term, at each position: K = positions x C."""

    def columns(z: Tensor, n: int) -> Tensor:
        vectors = []
        for position in _positions(z):
            S = _root(output_hessian(loss_name, z[position][None], target[n][position][None], **options)[0])
            for k in range(z.shape[-1]):
                vectors.append(torch.zeros_like(z))
                vectors[-1][position] = S[:, k]
        return torch.stack(vectors)

    return columns


def empirical_columns(loss_name: str, target: Tensor, *, example: str = "token", **options: Any) -> Columns:
    """The gradient of the true term: one vector a position (`token`), or one vector for all of them (`sequence`)."""

    def columns(z: Tensor, n: int) -> Tensor:
        vectors = []
        for position in _positions(z):
            vectors.append(torch.zeros_like(z))
            vectors[-1][position] = grad(_term(loss_name, target[n][position], options))(z[position])
        stacked = torch.stack(vectors)
        return stacked if example == "token" else stacked.sum(0, keepdim=True)

    return columns


# --- curvature matrices ---------------------------------------------------------------------------------------------------


def hessian(
    model: nn.Module,
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    names: Sequence[str] | None = None,
    select: Select = identity,
) -> Tensor:
    """(P, P): Hessian of `loss_fn(select(model(x)))`, backward of backward."""
    theta = parameter_vector(model, names).requires_grad_()
    with quiet_batch_norm(model):
        loss = loss_fn(network(model, x, names, select)(theta))
        return _rows(torch.autograd.grad(loss, theta, create_graph=True)[0], theta)


def hessian_by_differences(
    model: nn.Module,
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    names: Sequence[str] | None = None,
    select: Select = identity,
    step: float = 1e-5,
) -> Tensor:
    """(P, P): central differences of gradients, good to about 1e-8; for what torch cannot differentiate twice (weight norm)."""
    theta = parameter_vector(model, names)
    output = network(model, x, names, select)

    def gradient(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(loss_fn(output(leaf)), leaf)[0]

    with quiet_batch_norm(model):
        columns = [gradient(theta + step * e) - gradient(theta - step * e) for e in torch.eye(len(theta), dtype=theta.dtype)]
    return torch.stack(columns) / (2 * step)


def loss_ggn(
    model: nn.Module,
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    names: Sequence[str] | None = None,
    select: Select = identity,
) -> Tensor:
    """(P, P): J^T H J with J, H of the whole batch: right for any reduction, mask, weights, smoothing, layout, coupling."""
    J = batch_jacobian(model, x, names, select)
    with quiet_batch_norm(model), torch.no_grad():
        z = select(model(x))

    def loss(flat: Tensor) -> Tensor:
        return loss_fn(flat.view_as(z))

    H: Tensor = jacrev(grad(loss))(z.reshape(-1))
    return J.mT @ H @ J


def fisher_from_columns(
    model: nn.Module, x: Tensor, columns: Columns, terms: float, names: Sequence[str] | None = None, select: Select = identity
) -> Tensor:
    """(1/M) sum_{n, k} (J_n^T u_nk)(J_n^T u_nk)^T, one example and one vector at a time."""
    theta = parameter_vector(model, names).requires_grad_()
    C = theta.new_zeros(len(theta), len(theta))
    with quiet_batch_norm(model):
        for n in range(len(x)):
            z = network(model, x[n : n + 1], names, select)(theta)
            for u in columns(z[0].detach(), n):
                (g,) = torch.autograd.grad(z, theta, u[None], retain_graph=True)
                C += torch.outer(g, g)
    return C / terms


def empirical_fisher(
    model: nn.Module,
    x: Tensor,
    loss_of_output: Callable[[Any, int], Tensor],
    terms: float,
    names: Sequence[str] | None = None,
    *,
    frozen_statistics: bool = False,
) -> Tensor:
    """(1/M) sum_n g_n g_n^T; an example is a whole sequence; `loss_of_output(model(x[n : n + 1]), n)` is its unscaled loss."""
    rows = gradient_rows(per_example_gradients(model, x, loss_of_output, names, frozen_statistics=frozen_statistics))
    C = rows.new_zeros(rows.shape[1], rows.shape[1])
    for g in rows:
        C += torch.outer(g, g)
    return C / terms


def empirical_fisher_tokens(
    model: nn.Module,
    x: Tensor,
    loss_of_token: Callable[[Tensor, int, int], Tensor],
    terms: float,
    names: Sequence[str] | None = None,
    select: Select = identity,
) -> Tensor:
    """(1/M) sum_{n, r} g_nr g_nr^T; `loss_of_token(logits (C,), n, r)` is the unscaled loss of one position."""
    theta = parameter_vector(model, names)
    C = theta.new_zeros(len(theta), len(theta))
    with quiet_batch_norm(model):
        for n in range(len(x)):
            for r in range(select(model(x[n : n + 1])).shape[1]):
                leaf = theta.clone().requires_grad_()
                loss = loss_of_token(network(model, x[n : n + 1], names, select)(leaf)[0, r], n, r)
                (g,) = torch.autograd.grad(loss, leaf)
                C += torch.outer(g, g)
    return C / terms


def categorical_fisher(
    model: nn.Module, x: Tensor, terms: float, names: Sequence[str] | None = None, select: Select = identity
) -> Tensor:
    """(1/M) sum_{n, y} p(y) g_ny g_ny^T, g_ny the gradient of -log p(y): the definition, by enumeration; logits (n, C)."""
    theta = parameter_vector(model, names)
    C = theta.new_zeros(len(theta), len(theta))
    for n in range(len(x)):
        leaf = theta.clone().requires_grad_()
        log_p = network(model, x[n : n + 1], names, select)(leaf)[0].log_softmax(-1)
        for y in range(len(log_p)):
            (g,) = torch.autograd.grad(-log_p[y], leaf, retain_graph=True)
            C += log_p[y].exp().detach() * torch.outer(g, g)
    return C / terms


# --- convolution patches --------------------------------------------------------------------------------------------------


def _padding(conv: Any, axis: int) -> tuple[int, int]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return conv.padding[axis], conv.padding[axis]


def _source(p: int, size: int, mode: str) -> int | None:
    """Where padded coordinate p reads an axis of this size; None reads zero."""
    if 0 <= p < size:
        return p
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(p, 0), size - 1)
    if mode == "circular":
        return p % size
    return -p if p < 0 else 2 * (size - 1) - p  # reflect


def _reads(conv: Any, axis: int, size: int) -> list[list[int | None]]:
    """[output position][kernel offset] -> input coordinate on one axis."""
    left, right = _padding(conv, axis)
    stride, dilation, kernel = conv.stride[axis], conv.dilation[axis], conv.kernel_size[axis]
    outputs = (size + left + right - dilation * (kernel - 1) - 1) // stride + 1
    return [[_source(t * stride + k * dilation - left, size, conv.padding_mode) for k in range(kernel)] for t in range(outputs)]


def conv_patches(conv: Any, x: Tensor) -> Tensor:
    """(n, T, G, i) by index loops: what the filters of each group see at each output position (i: channel, then kernel).

    `einsum("goi,ntgi->ntgo", weight.reshape(G, o, i), patches)` is the convolution without its bias.
    """
    axes = [_reads(conv, axis, size) for axis, size in enumerate(x.shape[2:])]
    patches = []
    for position in itertools.product(*axes):
        taps = []
        for source in itertools.product(*position):
            outside = any(p is None for p in source)
            taps.append(x.new_zeros(x.shape[:2]) if outside else x[(slice(None), slice(None), *source)])
        patches.append(torch.stack(taps, 2).reshape(len(x), conv.groups, -1))  # (n, channels, kernel) -> (n, G, i)
    return torch.stack(patches, 1)


# --- Kronecker factors ----------------------------------------------------------------------------------------------------


def layer_tape(
    model: nn.Module, x: Tensor, layer: str, columns: Columns, select: Select = identity
) -> list[tuple[list[Tensor], list[list[Tensor]]]]:
    """Per example: the layer's inputs (one a call), and for each column the gradients of its outputs (one a call)."""
    module = model.get_submodule(layer)
    inputs: list[Tensor] = []
    shifts: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(args[0].detach().clone())
        shifts.append(torch.zeros_like(output, requires_grad=True))
        return output + shifts[-1]  # a leaf of our own: an in-place activation cannot move it

    tape = []
    handle = module.register_forward_hook(record)
    with quiet_batch_norm(model):
        for n in range(len(x)):
            inputs.clear()
            shifts.clear()
            z = select(model(x[n : n + 1]))
            gradients = [list(torch.autograd.grad(z, shifts, u[None], retain_graph=True)) for u in columns(z[0].detach(), n)]
            tape.append((list(inputs), gradients))
    handle.remove()
    return tape


def _input_rows(module: Any, a: Tensor) -> Tensor:
    """(r, G, i) of one example, with the bias column."""
    if isinstance(module, nn.Embedding):
        rows = F.one_hot(a.reshape(-1), module.num_embeddings).to(module.weight.dtype)
        if module.padding_idx is not None:
            rows[:, module.padding_idx] = 0
        return rows[:, None]
    if isinstance(module, nn.Linear):
        rows = a.reshape(-1, 1, a.shape[-1])
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        rows = conv_patches(module, a)[0]
    else:
        raise ValueError(f"no factors for {type(module).__name__}; known: Linear, Conv1d, Conv2d, Conv3d, Embedding")
    return rows if module.bias is None else torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def _output_rows(module: Any, g: Tensor) -> Tensor:
    """(r, G, o) of one example."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return g.reshape(-1, 1, g.shape[-1])
    return g[0].flatten(1).mT.reshape(-1, module.groups, module.out_channels // module.groups)


def kfac_factors(
    model: nn.Module,
    x: Tensor,
    layer: str,
    columns: Columns,
    terms: float,
    *,
    sharing: str = "expand",
    valid: Tensor | None = None,
    select: Select = identity,
) -> list[Factors]:
    """(A, B) of the joint [W b] of a Linear, Conv or Embedding layer, one pair a group.

    expand: A = mean over counted positions of a a^T, B = (1/M) sum_{n, r, k} g g^T.
    reduce: A = mean over examples of m m^T, m = mean_r a; B = (1/M) sum_{n, k} s s^T, s = sum_r g.
    The calls of one module are further positions. valid (n, r): the positions that A counts. padding_idx has a zero row in A
    but counts as a position.
    """
    module = model.get_submodule(layer)
    tape = layer_tape(model, x, layer, columns, select)
    groups = getattr(module, "groups", 1)
    A: list[Any] = [0.0] * groups
    B: list[Any] = [0.0] * groups
    counted = 0
    for n, (inputs, gradients) in enumerate(tape):
        a = torch.cat([_input_rows(module, call) for call in inputs])  # (r, G, i)
        if valid is not None:
            a = a[valid[n].repeat(len(inputs))]
        if sharing == "reduce":
            a = a.mean(0, keepdim=True) if len(a) else a
        counted += len(a)
        for row, group in itertools.product(a, range(groups)):
            A[group] = A[group] + torch.outer(row[group], row[group])
        for per_call in gradients:
            g = torch.cat([_output_rows(module, call) for call in per_call])  # (r, G, o)
            for row, group in itertools.product(g.sum(0, keepdim=True) if sharing == "reduce" else g, range(groups)):
                B[group] = B[group] + torch.outer(row[group], row[group])
    return [Factors(A[group] / counted, B[group] / terms) for group in range(groups)]


# --- dense linear algebra -------------------------------------------------------------------------------------------------


def kron(A: Tensor, B: Tensor) -> Tensor:
    """A x B by its definition: kron(B, A) vec(V) = vec(B V A^T)."""
    return torch.einsum("ab,cd->acbd", A, B).reshape(len(A) * len(B), -1)


def nearest_kronecker(C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """L (rows, rows) and R with the least |C - L x R|: the first singular triple of C with the entries of each block a row."""
    columns = len(C) // rows
    rearranged = C.reshape(rows, columns, rows, columns).transpose(1, 2).reshape(rows**2, columns**2)
    U, s, Vh = torch.linalg.svd(rearranged, full_matrices=False)
    L, R = (s[0] * U[:, 0]).reshape(rows, rows), Vh[0].reshape(columns, columns)
    return (L, R) if float(R.trace()) > 0 else (-L, -R)


def joint_order(o: int, i: int) -> Tensor:
    """Indices that turn [W.reshape(-1), b] (W (o, i)) into [W b].reshape(-1): C[order][:, order] is the joint block.

    i = 1 pairs the scale and the shift of a norm layer, channel by channel.
    """
    weight = torch.arange(o * i).reshape(o, i)
    return torch.cat([weight, torch.arange(o * i, o * i + o)[:, None]], 1).reshape(-1)


def reorder(C: Tensor, order: Tensor) -> Tensor:
    return C[order][:, order]


def layer_block(C: Tensor, slices: Sequence[slice]) -> Tensor:
    """The block of C on these parameters, in the order given (`parameter_slices` gives the slices)."""
    return reorder(C, torch.cat([torch.arange(where.start, where.stop) for where in slices]))


def unit_blocks(C: Tensor, o: int, i: int) -> Tensor:
    """(o, i, i): the diagonal blocks of the rows of an (o, i) parameter."""
    return torch.stack([C[k * i : (k + 1) * i, k * i : (k + 1) * i] for k in range(o)])


def block_diagonal(C: Tensor, slices: Sequence[slice]) -> Tensor:
    """C with everything between different slices set to zero."""
    kept = torch.zeros_like(C)
    for where in slices:
        kept[where, where] = C[where, where]
    return kept


def tikhonov_solve(C: Tensor, lam: float, g: Tensor) -> Tensor:
    """(C + lam I)^{-1} g, by LU."""
    solved: Tensor = torch.linalg.solve(C + lam * torch.eye(len(C), dtype=C.dtype), g.reshape(-1))
    return solved.reshape(g.shape)


def matrix_power(C: Tensor, p: float) -> Tensor:
    """C^p of a symmetric positive matrix."""
    s, Q = torch.linalg.eigh(C)
    powered: Tensor = (Q * s**p) @ Q.mT
    return powered


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm((found - expected).detach()) / torch.linalg.norm(expected.detach()).clamp(min=1e-300))


# --- trajectories ---------------------------------------------------------------------------------------------------------

State = dict[str, Any]  # start with {}; each step function updates it and returns the new parameter


def averaged(state: State, key: str, fresh: Tensor, decay: float | None) -> Tensor:
    """Sum (decay None) or bias-corrected running mean of a statistic, by its whole history."""
    history = state.setdefault(key, [])
    history.append(fresh.clone())
    if decay is None:
        return torch.stack(history).sum(0)
    weights = torch.tensor([decay**age for age in range(len(history) - 1, -1, -1)], dtype=fresh.dtype)
    return torch.einsum("t,t...->...", weights, torch.stack(history)) / weights.sum()


def adam_step(
    w: Tensor, g: Tensor, state: State, *, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Tensor:
    """beta1 = 0 is the preconditioner alone."""
    m, v = averaged(state, "m", g, beta1), averaged(state, "v", g * g, beta2)
    return w - lr * m / (v.sqrt() + eps)


def adagrad_step(w: Tensor, g: Tensor, state: State, *, lr: float, initial: float = 0.0, eps: float = 1e-10) -> Tensor:
    return w - lr * g / ((averaged(state, "s", g * g, None) + initial).sqrt() + eps)


def shampoo_direction(
    g: Tensor,
    state: State,
    *,
    decay: float | None = None,
    eps: float = 1e-6,
    initial: float = 0.0,
    absolute: bool = False,
    exponent: float | None = None,
) -> Tensor:
    """g x_1 H_1^{-1/(2k)} ... x_k H_k^{-1/(2k)}; H_i = `initial` I + sum or running mean of the unfolding's outer product.

    The ridge is eps * lambda_max(H_i) on each factor (eps itself when `absolute`).
    """
    power = -1 / (2 * g.dim()) if exponent is None else exponent
    out = g
    for axis, size in enumerate(g.shape):
        unfolding = g.movedim(axis, 0).reshape(size, -1)
        eye = torch.eye(size, dtype=g.dtype)
        H = averaged(state, f"H{axis}", unfolding @ unfolding.mT, decay) + initial * eye
        ridge = eps if absolute else eps * float(torch.linalg.eigvalsh(H)[-1])
        out = torch.tensordot(matrix_power(H + ridge * eye, power), out, dims=([1], [axis])).movedim(0, axis)
    return out


def shampoo_step(w: Tensor, g: Tensor, state: State, *, lr: float, **options: Any) -> Tensor:
    """Options are those of `shampoo_direction`."""
    return w - lr * shampoo_direction(g, state, **options)


def damping_split(A: Tensor, B: Tensor, damping: float) -> tuple[float, float]:
    """(pi sqrt(lam), sqrt(lam) / pi) for A and B; pi^2 = mean diagonal of A over that of B, 1 if either is not positive."""
    a, b = float(A.diagonal().mean()), float(B.diagonal().mean())
    pi = (a / b) ** 0.5 if a > 0 and b > 0 else 1.0
    return pi * damping**0.5, damping**0.5 / pi


def kfac_direction(g: Tensor, A: Tensor, B: Tensor, *, damping: float, split: str = "pi") -> Tensor:
    """g is (o, i), the joint gradient [W b]. pi: (B + ..)^{-1} g (A + ..)^{-1}; exact: (B x A + lam I)^{-1} vec(g)."""
    if split == "exact":
        return tikhonov_solve(kron(B, A), damping, g)
    of_A, of_B = damping_split(A, B, damping)
    eye_A, eye_B = torch.eye(len(A), dtype=A.dtype), torch.eye(len(B), dtype=B.dtype)
    direction: Tensor = torch.linalg.inv(B + of_B * eye_B) @ g @ torch.linalg.inv(A + of_A * eye_A)
    return direction


def kfac_step(
    w: Tensor,
    g: Tensor,
    factors: Factors,
    state: State,
    *,
    lr: float,
    damping: float,
    decay: float | None = 0.0,
    split: str = "pi",
) -> Tensor:
    """w, g (o, i): joint [W b] of one layer; `factors` those of this step; decay None = sum, 0 = this step alone."""
    A, B = averaged(state, "A", factors.A, decay), averaged(state, "B", factors.B, decay)
    return w - lr * kfac_direction(g, A, B, damping=damping, split=split)
