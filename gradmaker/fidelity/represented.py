"""What the blocks of a maker represent, in the order of the flat vector of all parameters: ``C``, ``P`` and their spectra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.fidelity.layers import Layers
from gradmaker.linalg.factors import dense
from gradmaker.representations.base import Representation
from gradmaker.representations.capabilities import Elementwise, Factored, LowRank, Rotated
from gradmaker.representations.roles import PerStep
from gradmaker.step.protocol import MakerOfSteps

__all__ = ["HeldBlock", "HeldCurvature"]

LARGEST = 2048
"""Side of the largest matrix of which eigenvalues are computed."""


class HeldBlock:
    """A block, with the place of each entry of its members in the flat vector."""

    def __init__(self, block: Block, layers: Layers, double: bool) -> None:
        self.block = block
        self.held = replace(block.held, cache=dict(block.held.cache))  # a later step may release the block's own
        # entries of frozen parameters lie behind the end of the flat vector
        places = {p: torch.arange(s.start, s.stop).view_as(p).double() for p, s in _slices(layers)}
        behind = {
            p: torch.full_like(p, layers.size, dtype=torch.float64) for site in block.sites for p in site.parameters.values()
        }
        found = [site.lay_out({p: places.get(p, behind[p]) for p in site.parameters.values()}) for site in block.sites]
        side = prod(block.frame.shape)
        flat = torch.cat([x.reshape(-1) if block.full else x.reshape(-1, side) for x in found])
        self.index = flat.reshape(-1, side).long().to(layers.device)  # (B, p)
        self.representation: Representation = block.triple.representation
        wide = {k: v.double() if double and v.is_floating_point() else v for k, v in self.held.state.items()}
        self.dtype, self.state = torch.float64 if double else block.frame.dtype, wide

    @property
    def side(self) -> int:
        """The number of entries of one member."""
        return self.index.shape[1]

    def curvature(self) -> Tensor:
        """``C``, in float64.  # (B, p, p)"""
        return self.representation.to_dense(self.state)

    def operator(self) -> Tensor:
        """``P`` by the definition of the solver, in float64.  # (B, p, p)"""
        return self.block.triple.solver.operator(self.representation, self.state)

    def product(self, v: Tensor) -> Tensor:
        """``C v``.  # (P,) -> (B, p), at `index`"""
        own = _padded(v.to(self.dtype))[self.index].reshape(-1, *self.block.frame.shape)
        return self.representation.matvec(self.state, own).reshape(self.index.shape).double()

    def inverse_product(self, v: Tensor) -> Tensor:
        """``P v``, as the step applies it.  # (P,) -> (B, p), at `index`"""
        frame = self.block.frame
        held = self.block.explicit(self.held)
        own = _padded(v)[self.index].to(frame.dtype).reshape(-1, *frame.shape)
        return self.block.applied(held.cache, own).reshape(self.index.shape).double()

    def eigenvalues(self) -> Tensor | None:
        """The eigenvalues of ``C`` of each member; None where a matrix is too large to know them.  # (B, p)"""
        representation, state, B = self.representation, self.state, len(self.index)
        if isinstance(representation, Elementwise):
            return representation.diagonal(state).reshape(B, -1)
        if isinstance(representation, Rotated):
            return representation.spectrum(state).reshape(B, -1)
        if isinstance(representation, LowRank):
            gram = _eigenvalues(representation.gram(state))
            rest = gram.new_zeros(B, max(0, self.side - gram.shape[1]))
            return torch.cat([gram[:, -min(self.side, gram.shape[1]) :], rest], 1)
        if isinstance(representation, Factored):
            return self._of_factors(representation)
        return _eigenvalues(self.curvature()) if self.side <= LARGEST else None

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """``tr C`` and ``|C|_F^2`` of each member; None where they are not known.  # (B,), (B,)"""
        representation = self.representation
        if isinstance(representation, Factored) and not isinstance(representation, (Elementwise, Rotated, LowRank)):
            factors = representation.factors(self.state)
            if representation.order(len(factors)) == 1:
                return self._of_product(factors)
        s = self.eigenvalues()
        return None if s is None else (s.double().sum(1), s.double().square().sum(1))

    def _of_product(self, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Traces and squared norms of a Kronecker product from those of its factors."""
        traces = squares = torch.ones(len(self.index), dtype=torch.float64, device=self.index.device)
        sides = 1
        for F in factors:
            full = F if F.ndim == 2 else dense(F)
            diagonal = full if F.ndim == 2 else full.diagonal(dim1=-2, dim2=-1)
            traces = traces * diagonal.double().sum(1)
            squares = squares * full.double().flatten(1).square().sum(1)
            sides *= full.shape[1]
        return traces * (self.side // sides), squares * (self.side // sides)

    def _of_factors(self, representation: Factored) -> Tensor | None:
        factors = representation.factors(self.state)
        if any(F.ndim > 2 and F.shape[1] > LARGEST for F in factors):
            return None
        found = torch.ones(len(self.index), 1, dtype=torch.float64, device=self.index.device)
        for F in factors:
            s = F if F.ndim == 2 else _eigenvalues(dense(F))
            found = (found.unsqueeze(-1) * s.clamp(min=0).unsqueeze(1)).reshape(len(found), -1)
        found = found ** (1 / representation.order(len(factors)))
        return found.repeat_interleave(self.side // found.shape[1], 1)  # the identity along axes without a factor


def _eigenvalues(A: Tensor) -> Tensor:
    """In float64: in float32 LAPACK may not converge on factors with many equal eigenvalues, as those of rare words.

    # (B, d, d) -> (B, d)
    """
    found: Tensor = torch.linalg.eigvalsh(A.double())
    return found.to(A)


class HeldCurvature:
    """The curvature that all blocks of a maker hold, and the parameters that they leave out."""

    def __init__(self, maker: MakerOfSteps, layers: Layers, double: bool = True) -> None:
        self.layers = layers
        measured = maker.step_state.now.measured
        held = [block for block in maker.plan.blocks if any(s.name in measured for s in block.sites)]
        self.blocks = [HeldBlock(b, layers, double) for b in held if not isinstance(b.triple.representation, PerStep)]
        self.matrix_known = 0 < len(self.blocks) == len(held)
        """Whether ``C`` is held at all: a matrix-free method has products of its own step alone."""
        covered = torch.zeros(layers.size + 1, dtype=torch.bool, device=layers.device)
        for own in self.blocks:
            covered[own.index.reshape(-1)] = True
        self.covered = covered[:-1]

    def release(self) -> None:
        """Drop the tensors."""
        self.blocks = []

    def matrix(self) -> Tensor:
        """``C``, zero for parameters that are left out.  # (P, P)"""
        return self._placed((own, own.curvature()) for own in self.blocks)

    def operator(self) -> Tensor:
        """``P``, the identity for parameters that are left out.  # (P, P)"""
        P = self._placed((own, own.operator()) for own in self.blocks)
        P.diagonal()[~self.covered] = 1.0
        return P

    def _placed(self, parts: Iterable[tuple[HeldBlock, Tensor]]) -> Tensor:
        side = self.layers.size + 1
        out = torch.zeros(side, side, dtype=torch.float64, device=self.layers.device)
        for own, matrices in parts:
            for index, M in zip(own.index, matrices, strict=True):
                out[index.unsqueeze(1), index] = M
        return out[:-1, :-1]

    def product(self, v: Tensor) -> Tensor:
        """``C v``.  # (P,)"""
        out = torch.zeros(self.layers.size + 1, dtype=torch.float64, device=self.layers.device)
        for own in self.blocks:
            out[own.index] = own.product(v)
        return out[:-1]

    def inverse_product(self, v: Tensor) -> Tensor:
        """``P v``.  # (P,)"""
        out = _padded(v.double())
        for own in self.blocks:
            out[own.index] = own.inverse_product(v)
        return out[:-1]

    def eigenvalues(self, index: Tensor | None = None) -> Tensor | None:
        """Eigenvalues of a layer's block, or of the whole matrix, zeros for what is left out.  # (p,)

        None where a block is too large to know them, or spreads over other layers
        """
        found = []
        for own, alone in self._inside(index):
            if alone is None or (s := own.eigenvalues()) is None:
                return None
            found.append(s[alone].reshape(-1).double())
        known = torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=self.covered.device)
        missing = (self.layers.size if index is None else len(index)) - len(known)
        return torch.cat([known, known.new_zeros(missing)])

    def trace(self, index: Tensor | None = None) -> float | None:
        """``tr C`` of a layer's block, or of the whole matrix; None where it is not known."""
        return self._moment(index, 0)

    def square_norm(self, index: Tensor | None = None) -> float | None:
        """``|C|_F^2``, in the same way."""
        return self._moment(index, 1)

    def _moment(self, index: Tensor | None, which: int) -> float | None:
        total = 0.0
        for own, alone in self._inside(index):
            if alone is None or (found := own.moments()) is None:
                return None
            total += float(found[which][alone].sum())
        return total

    def _inside(self, index: Tensor | None) -> Iterator[tuple[HeldBlock, Tensor | None]]:
        """The blocks with entries in a layer, and which members lie in it; None if some lie partly outside.  # , (B,)"""
        inside = _padded(torch.ones_like(self.covered) if index is None else _chosen(self.covered, index))
        for own in self.blocks:
            members = inside[own.index]
            if bool(members.any()):
                alone = members.all(1)
                yield own, None if bool((members.any(1) & ~alone).any()) else alone


def _slices(layers: Layers) -> Iterable[tuple[Tensor, slice]]:
    return zip(layers.parameters, layers.slices, strict=True)


def _padded(v: Tensor) -> Tensor:
    """A vector with a zero behind its end."""
    return torch.cat([v, v.new_zeros(1)])


def _chosen(like: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill_(0, index, True)
