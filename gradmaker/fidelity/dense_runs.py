"""Runs by dense matrices of the whole model."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.fidelity.approximations import DAMPING, Measured
from gradmaker.fidelity.catalogue import BLOCKS, EXACT
from gradmaker.fidelity.dense import Decomposed, of_directions, of_matrices, of_spectrum
from gradmaker.fidelity.layers import WHOLE, Layer
from gradmaker.fidelity.references import Reference
from gradmaker.fidelity.run import Options, Run, searched

__all__ = ["DenseRuns"]


class DenseRuns:
    """The reference of a batch as a matrix, with the blocks of its layers, and the measures against it."""

    def __init__(self, reference: Reference, options: Options) -> None:
        self.layers, self.options, self.definite = reference.layers, options, reference.definite
        self.gradient = reference.gradient.double()
        C = reference.matrix()
        self.whole = Decomposed(C)
        self.blocks = {layer.name: Decomposed(C[layer.index][:, layer.index]) for layer in self.layers.layers}

    def of_reference(self, run: Run, damping: float | None) -> None:
        """The reference itself: spectra, exact steps, and what is left out without the blocks between layers."""
        own = DAMPING if damping is None else damping
        run.coupling = self._coupling()
        for name, target, index in self._targets():
            s = target.pairs[0]
            run.add(EXACT, name, of_spectrum(s, own))
            run.add_spectrum(EXACT, name, s)
            exact = self._embedded(index, target.solve(own, -1.0, self.gradient[index], self.definite))
            self._decreases(run, EXACT, name, exact)
        diagonal, P = torch.zeros_like(self.whole.C), torch.zeros_like(self.whole.C)
        for layer in self.layers.layers:
            at = (layer.index.unsqueeze(1), layer.index)
            diagonal[at], P[at] = self.blocks[layer.name].C, self.blocks[layer.name].power(own, -1.0, self.definite)
        run.add(EXACT, WHOLE, {"off_diagonal": 1 - float(diagonal.square().sum() / self.whole.C.square().sum())})
        self._matrices(run, BLOCKS, WHOLE, self.whole, diagonal, own)
        self._inverse(run, BLOCKS, WHOLE, self.whole, P, own, -1.0)
        self._direction(run, BLOCKS, WHOLE, P @ self.gradient, own, -1.0)

    def of_approximation(self, run: Run, label: str, measured: Measured) -> None:
        """The measures of an approximation."""
        own = self.options.damping if measured.damping is None or self.options.damping is not None else measured.damping
        own = DAMPING if own is None else own
        known = measured.held.matrix_known
        C, P = (measured.held.matrix(), measured.held.operator()) if known else (None, None)
        for name, target, index in self._targets():
            if C is not None and P is not None and bool(measured.held.covered[index].any()):
                part, inverse = C[index][:, index], P[index][:, index]
                self._matrices(run, label, name, target, part, own, measured.held.eigenvalues(index))
                self._inverse(run, label, name, target, inverse, own, measured.power)
            d = self._embedded(index, measured.direction[index])
            self._direction(run, label, name, d, own, measured.power)

    # ---------------------------------------------------------------- parts
    def _targets(self) -> list[tuple[str, Decomposed, Tensor]]:
        own: list[Layer] = self.layers.chosen
        every = torch.arange(self.layers.size, device=self.gradient.device)
        return [(layer.name, self.blocks[layer.name], layer.index) for layer in own] + [(WHOLE, self.whole, every)]

    def _embedded(self, index: Tensor, part: Tensor) -> Tensor:
        return torch.zeros_like(self.gradient).index_copy(0, index, part)

    def _matrices(
        self, run: Run, label: str, name: str, target: Decomposed, C: Tensor, damping: float, known: Tensor | None = None
    ) -> None:
        """known: the eigenvalues of ``C``, where they are"""
        run.add(label, name, of_matrices(target.C, C, float(target.pairs[0].abs().max())))
        s = torch.linalg.eigvalsh(C) if known is None else known
        run.add(label, name, of_spectrum(s, damping))
        run.add_spectrum(label, name, s)

    def _inverse(self, run: Run, label: str, name: str, target: Decomposed, P: Tensor, damping: float, power: float) -> None:
        exact = target.power(damping, power, self.definite)
        run.add(label, name, {"inverse": float((P - exact).norm() / exact.norm())})

    def _direction(self, run: Run, label: str, name: str, d: Tensor, damping: float, power: float) -> None:
        index = self._index(name)
        target = self.whole if name == WHOLE else self.blocks[name]
        exact = target.solve(damping, power, self.gradient[index], self.definite)
        run.add(label, name, of_directions(d[index], exact))
        self._decreases(run, label, name, d)

    def _decreases(self, run: Run, label: str, name: str, d: Tensor) -> None:
        curvature = float(d @ (self.whole.C @ d))
        run.decreases(label, name, d, float(self.gradient @ d), curvature, searched(self.options, name))

    def _index(self, name: str) -> Tensor:
        every = torch.arange(self.layers.size, device=self.gradient.device)
        return every if name == WHOLE else next(layer.index for layer in self.layers.layers if layer.name == name)

    def _coupling(self) -> list[list[float]]:
        own = self.layers.layers
        sizes = [float(self.blocks[a.name].C.norm()) for a in own]
        return [
            [
                float(self.whole.C[a.index][:, b.index].norm()) / max((x * y) ** 0.5, 1e-300)
                for b, y in zip(own, sizes, strict=True)
            ]
            for a, x in zip(own, sizes, strict=True)
        ]
