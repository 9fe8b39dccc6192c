"""What each method should put into `.grad` for a model of the zoo. Nothing here comes from gradmaker.

The curvature is taken off the whole batch at once, one backward pass for each number that goes into a loss: whatever couples
examples, leaves rows out, or uses a weight where no layer is called is in it.

**Gauss-Newton.** The loss is a function of the logits of its calls, `L = l(z)` with `z` all of them as one vector;
`C = J^T Lambda J`, `J = dz/dtheta`, `Lambda` the Hessian of `l`. `full_ng` and `hessian_free` solve `(C + lambda I) x = g`.

**Units.** The rows of a layer's weight with its bias: outputs of a linear map or of a filter (each group's own), tokens of a
table, input channels of a transposed convolution, whose bias is apart; scale and bias of a norm layer's channel. Parameters of
no such layer are units of one number each.

**K-FAC.** A layer is a module of a type in `watch.LAYERS` of which all uses of its parameters are calls: the products of what
it was given and of the gradients at its outputs, `sum_r g_r a_r^T`, add up to the gradient of its weight and bias. For any
other (a weight that is also used as a function, tied to another table, differentiated by the input) there is no input and no
output that belong to the weight, and its parameters keep their gradient, as those of no layer do. For a layer

    A = (1 / R) sum_r a_r a_r^T            over the positions r of all of its calls, the bias as one more input
    B = sum_k sum_r g_kr g_kr^T            g_kr = sum_z S_zk dz / dy_r,  Lambda = S S^T

with the positions as the layer sees them: rows of its input, output pixels of a convolution, input pixels of a transposed one,
edges, gathered rows; a position table that is called once for all examples has its T rows. A column of `S` belongs to one loss
term, and where its term depends on many examples, the gradients of all of their positions are in that one column. `B` does not
depend on which root of `Lambda` is taken: it is `sum_r J_r^T Lambda J_r`, `J_r = dz / dy_r`. Norm layers have exact blocks.

A table (V, d) that is the weight of an embedding and of a linear layer, and nothing else, has the two products of these uses,
`A_1 (x) B_1` of the lookups and `B_2 (x) A_2` of the head; it gets the Kronecker product that is nearest to their sum.

**EKFAC** has the eigenbases of these factors; see `ekfac_direction`. It leaves such a table as it is.

Recurrent layers are written out in linear layers, step by step: each matrix is one, whose positions are the steps.

Batch norms in training mode: `held=True` takes the mean and the variance of the batch as constants in the curvature, never in
the gradient, which is the documented convention for methods that see examples one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn.modules.batchnorm import _BatchNorm

from tests import oracles
from tests.by_hand import by_hand
from tests.zoo.case import Case, Entry
from tests.zoo.watch import NORMS, Watched, held_statistics, is_layer, watching

Vectors = dict[str, Tensor]  # by parameter
Solve = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # gradient (o, i), A, B, gradients of the columns (k, o, i)


def couples(case: Case) -> bool:
    """Whether there is a batch norm in training mode."""
    return any(isinstance(m, _BatchNorm) and m.training for m in case.model.modules())


def plain_gradient(case: Case) -> Vectors:
    """Of the loss, by plain autograd."""
    named = case.parameters()
    found = torch.autograd.grad(case.value(case.output()), list(named.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


class Oracle:
    """Everything about one model, formed once."""

    def __init__(self, entry: Entry, held: bool = False) -> None:
        self.case = entry.make()
        by_hand(self.case.model)
        self.named = self.case.parameters()
        with watching(self.case.model) as self.layers, held_statistics(self.case.model, held):
            self._differentiate()
        self.gradient = plain_gradient(entry.make())

    def _differentiate(self) -> None:
        """`J` by the parameters, and by the outputs of all calls."""
        output = self.case.output()
        logits = self.case.logits(output)
        z = torch.cat([v.reshape(-1) for v in logits])
        shifts = [s for layer in self.layers for s in layer.shifts]
        leaves = [*self.named.values(), *shifts]
        rows = [torch.autograd.grad(v, leaves, retain_graph=True, materialize_grads=True, allow_unused=True) for v in z]
        columns = [torch.stack(same) for same in zip(*rows, strict=True)]
        self.jacobian = dict(zip(self.named, columns, strict=False))
        self.at_outputs = dict(zip(shifts, columns[len(self.named) :], strict=True))
        loss = self.case.value(output)
        found = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        self._seen = dict(zip(shifts, found[len(self.named) :], strict=True))
        self._whole = dict(zip(self.named, found, strict=False))
        self.hessian = torch.block_diag(*(_hessian(t, v) for t, v in zip(self.case.terms, logits, strict=True)))
        assert torch.allclose(loss, torch.stack([t(v) for t, v in zip(self.case.terms, logits, strict=True)]).sum())

    # ---------------------------------------------------------------- the matrix
    @cached_property
    def matrix(self) -> Tensor:
        """`C` of all parameters."""
        J = torch.cat([rows.flatten(1) for rows in self.jacobian.values()], 1)
        return J.mT @ self.hessian @ J

    @cached_property
    def where(self) -> dict[str, Tensor]:
        """Where each parameter's numbers lie in the vector of all, in its shape."""
        found, start = {}, 0
        for name, p in self.named.items():
            found[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
            start += p.numel()
        return found

    def split(self, vector: Tensor) -> Vectors:
        return {name: vector[index] for name, index in self.where.items()}

    @cached_property
    def flat_gradient(self) -> Tensor:
        return torch.cat([g.reshape(-1) for g in self.gradient.values()])

    # ---------------------------------------------------------------- methods of the whole matrix
    def full(self, damping: float) -> Vectors:
        return self.split(oracles.tikhonov_solve(self.matrix, damping, self.flat_gradient))

    def in_units(self, damping: float) -> Iterator[Vectors]:
        """`(C_u + lambda I)^-1 g_u` for every unit. Irregular layers have rows or are no layers: both."""
        regular = [layer for layer in self.layers if self.regular(layer)]
        irregular = [layer for layer in self.layers if layer not in regular and layer.own(self.case)]
        for chosen in product((True, False), repeat=len(irregular)):
            layers = [*regular, *(layer for layer, rows in zip(irregular, chosen, strict=True) if rows)]
            units = [block for layer in layers for block in self._rows(layer.module, layer.own(self.case))]
            yield self._solved_in(
                [*units, *self.norm_units()], self.flat_gradient / (self.matrix.diagonal() + damping), damping
            )

    def _solved_in(self, blocks: Iterable[Tensor], start: Tensor, damping: float) -> Vectors:
        """Units of several numbers solved, everything else as it is in ``start``."""
        for block in blocks:
            for unit in block:
                start[unit] = oracles.tikhonov_solve(self.matrix[unit][:, unit], damping, self.flat_gradient[unit])
        return self.split(start)

    def norm_units(self) -> Iterator[Tensor]:
        for name, module in self.case.model.named_modules():
            if is_layer(module, NORMS):
                own = Watched(name, module).own(self.case)
                if own:
                    yield torch.stack([self.where[full].reshape(-1) for full in own.values()], 1)
            elif type(module).__name__ == "LayerScale":  # a norm layer's scale, of a channel that is not normalised
                yield self.where[f"{name}.gamma"].reshape(-1, 1)

    def _rows(self, module: Any, own: dict[str, str]) -> Iterator[Tensor]:
        if "weight" in own:
            weight = self.where[own["weight"]].flatten(1)
            joint = "bias" in own and not isinstance(module, nn.ConvTranspose2d)
            yield torch.cat([weight, self.where[own["bias"]][:, None]], 1) if joint else weight

    # ---------------------------------------------------------------- Kronecker factors
    def regular(self, layer: Watched) -> bool:
        """Whether its calls are all uses of its parameters: their products add up to its gradient."""
        own = layer.own(self.case)
        if not own or not layer.inputs:
            return False
        summed = {"weight": self.products(layer)}
        if "bias" in own:
            summed["bias"] = _bias_rows(layer, [self._seen[s] for s in layer.shifts]).sum(0)
        scale = max(float(torch.linalg.norm(self._whole[full])) for full in own.values())
        return all(
            float(torch.linalg.norm(summed[k].reshape(-1) - self._whole[full].reshape(-1))) <= 1e-9 * max(scale, 1e-12)
            for k, full in own.items()
        )

    def products(self, layer: Watched) -> Tensor:
        """The sum of the products of its inputs and output gradients, in the layout of its weight."""
        a, g = layer.input_rows(False), layer.output_rows([self._seen[s] for s in layer.shifts])
        return _as_weight(layer.module, g.mT @ a)

    def tables(self) -> Iterator[tuple[str, Watched, Watched]]:
        """A weight that an embedding and a linear layer share, and that has no other uses."""
        for lookup, head in product(self.layers, repeat=2):
            name, other = (layer.own(self.case).get("weight") for layer in (lookup, head))
            if name is None or name != other or not isinstance(lookup.module, nn.Embedding):
                continue
            if isinstance(head.module, nn.Linear) and lookup.inputs and head.inputs:
                whole = self._whole[name]
                missing = self.products(lookup) + self.products(head) - whole
                if float(torch.linalg.norm(missing)) <= 1e-9 * float(torch.linalg.norm(whole)):
                    yield name, lookup, head

    def _solve_table(self, name: str, lookup: Watched, head: Watched, solve: Solve) -> Tensor:
        """By the Kronecker product that is nearest to the sum of those of the two uses, from an SVD of the whole matrix."""
        C = torch.zeros(())
        for layer in (lookup, head):
            a = layer.input_rows(False)[0]
            g = torch.cat([layer.output_rows(list(k))[0] for k in self._columns(layer)])
            pair = a.mT @ a / len(a), g.mT @ g
            C = C + oracles.kron(*(pair if layer is lookup else pair[::-1]))
        G = self.gradient[name]
        L, R = oracles.nearest_kronecker(C, len(G))
        return solve(G, R, L, G.new_empty(0))

    def kronecker(self, solve: Solve, damping: float, tied: bool = False) -> Vectors:
        """Layer by layer by ``solve(g, A, B, columns)``; norm layers by their blocks, the rest as it is.

        tied: tables that are embedding and head too
        """
        found = dict(self.gradient)
        for layer in self.layers:
            if self.regular(layer):
                found |= self.solve_layer(layer, solve)
        for name, *uses in self.tables() if tied else ():
            found[name] = self._solve_table(name, *uses, solve)
        return self._solved_in(self.norm_units(), torch.cat([g.reshape(-1) for g in found.values()]), damping)

    def solve_layer(self, layer: Watched, solve: Solve) -> Vectors:
        """One layer: its groups, its bias joined or apart."""
        own = layer.own(self.case)
        apart = isinstance(layer.module, nn.ConvTranspose2d) or "weight" not in own
        bias = "bias" in own and not apart
        found: Vectors = {}
        if "weight" in own:
            a, g = layer.input_rows(bias), torch.stack([layer.output_rows(list(k)) for k in self._columns(layer)], 1)
            solved = torch.stack(
                [_solve_one(solve, *parts) for parts in zip(self._matrices(layer, own, bias), a, g, strict=True)]
            )
            found[own["weight"]] = _as_weight(layer.module, solved[..., :-1] if bias else solved)
            if bias:
                found[own["bias"]] = solved[..., -1].reshape(-1)
        if "bias" in own and apart:
            g = torch.stack([_bias_rows(layer, list(k)) for k in self._columns(layer)])
            found[own["bias"]] = _solve_one(solve, self.gradient[own["bias"]][:, None], g.new_ones(g.shape[1], 1), g)[:, 0]
        return found

    def _columns(self, layer: Watched) -> Iterator[tuple[Tensor, ...]]:
        """For each column of a root of `Lambda`: the gradients at the outputs of all calls."""
        return zip(*(torch.tensordot(self.root.mT, self.at_outputs[s], 1) for s in layer.shifts), strict=True)

    @cached_property
    def root(self) -> Tensor:
        """`S` with `S S^T = Lambda`."""
        s, Q = torch.linalg.eigh(self.hessian)
        return Q * s.clamp(min=0).sqrt()

    def _matrices(self, layer: Watched, own: dict[str, str], bias: bool) -> Tensor:
        """The gradient as (G, o, i), the bias as the last column."""
        g = self.gradient[own["weight"]]
        if isinstance(layer.module, (nn.Embedding, nn.ConvTranspose2d)):
            return g.flatten(1).mT.unsqueeze(0)
        groups = getattr(layer.module, "groups", 1)
        matrices = g.reshape(groups, len(g) // groups, -1)
        return torch.cat([matrices, self.gradient[own["bias"]].reshape(groups, -1, 1)], -1) if bias else matrices


def _solve_one(solve: Solve, G: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """G (o, i), a (r, i), g (k, r, o)."""
    A, B = a.mT @ a / max(len(a), 1), torch.einsum("kro,krp->op", g, g)
    return solve(G, A, B, torch.einsum("kro,ri->koi", g, a))


def _as_weight(module: Any, matrices: Tensor) -> Tensor:
    """(G, o, i) in the layout of the weight."""
    if isinstance(module, (nn.Embedding, nn.ConvTranspose2d)):
        return matrices[0].mT.reshape(module.weight.shape)
    return matrices.reshape(module.weight.shape)


def _bias_rows(layer: Watched, gradients: list[Tensor]) -> Tensor:
    """(r, o): gradients at output positions."""
    if isinstance(layer.module, (nn.Linear, nn.Embedding)):
        return torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients])
    return torch.cat([g.movedim(1, -1).reshape(-1, g.shape[1]) for g in gradients])


def _hessian(term: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Of a loss call by its logits as one vector."""

    def flat(v: Tensor) -> Tensor:
        return term(v.reshape(z.shape))

    found: Tensor = jacrev(grad(flat))(z.detach().reshape(-1))
    return found


# ---------------------------------------------------------------- solvers of a layer
def kfac_direction(damping: float) -> Solve:
    """`(B + sqrt(lambda) / pi)^-1 G (A + pi sqrt(lambda))^-1`, `pi^2` the ratio of the mean eigenvalues of A and B."""

    def solve(G: Tensor, A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
        return oracles.kfac_direction(G, A, B, damping=damping)

    return solve


def ekfac_direction(damping: float) -> Solve:
    """`Q_B [(Q_B^T G Q_A) / (D + lambda)] Q_A^T` in the eigenbases of A and B.

    At the first step, whose `D` is `b a^T` of their eigenvalues.
    """

    def solve(G: Tensor, A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
        (a, Q_A), (b, Q_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
        D = torch.outer(b.clamp(min=0), a.clamp(min=0))
        return Q_B @ ((Q_B.mT @ G @ Q_A) / (D + damping)) @ Q_A.mT

    return solve
