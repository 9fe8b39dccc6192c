"""Runs by random rows and products, where no matrix of the whole model fits into memory."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from gradmaker.fidelity.approximations import DAMPING, Measured
from gradmaker.fidelity.catalogue import BLOCKS, EXACT
from gradmaker.fidelity.dense import of_directions
from gradmaker.fidelity.lanczos import Krylov, krylov
from gradmaker.fidelity.layers import WHOLE, Layer
from gradmaker.fidelity.meter import Meter
from gradmaker.fidelity.references import Reference
from gradmaker.fidelity.represented import HeldCurvature
from gradmaker.fidelity.run import Options, Run, searched
from gradmaker.fidelity.samples import Estimate, ProductSamples, RowSamples, Samples, combined

__all__ = ["ProbeRuns"]

ROWS = 4
"""Random rows for each probe: a row is one backward pass, a product with a matrix several."""
UNFINISHED = 0.1
"""Relative residual above which a solve is told to be unfinished."""
ROW_BYTES = 1 << 30
"""Of all rows at most, as long as there are two for each probe."""


class ProbeRuns:
    """The reference of a batch by its products, what they tell of the blocks of its layers, and the measures against it."""

    def __init__(self, reference: Reference, options: Options, bar: Meter) -> None:
        self.reference, self.options, self.bar = reference, options, bar
        self.layers, self.gradient = reference.layers, reference.gradient
        self.generator = torch.Generator(self.layers.device).manual_seed(options.seed)
        bar.expect(self._units())
        self.samples = self._sampled()
        self.step = krylov(reference.product, self.gradient, options.iterations, lambda: bar.advance("steps", 1))
        self.solves = {layer.name: self._solved(layer) for layer in self.layers.chosen} if options.layerwise else {}
        reference.release()

    def _units(self) -> float:
        """Products of the whole matrix, of which a product of a layer is about a third."""
        own = len(self.layers.chosen) * self._layer_steps / 3 if self.options.layerwise else 0
        return 2 * self.options.iterations + own + self._rows / 3

    @property
    def _layer_steps(self) -> int:
        return max(1, self.options.iterations // 2)

    @property
    def _rows(self) -> int:
        probes = self.options.probes
        return max(2 * probes, min(ROWS * probes, ROW_BYTES // (4 * self.layers.size)))

    def _sampled(self) -> Samples:
        rows = self.reference.rows(self._rows, self.generator)
        if rows is not None:
            self.bar.advance("rows", self._rows / 3)
            return RowSamples(*rows)
        signs = torch.stack([self._signs() for _ in range(self.options.probes)])
        whole = torch.stack([self.reference.product(v) for v in signs])
        parts = torch.zeros_like(whole)
        for layer in self.layers.layers:
            for k, v in enumerate(signs):
                parts[k, layer.index] = self.reference.layer_product(layer, v[layer.index])
        self.bar.advance("products", self._rows / 3)
        return ProductSamples(signs, whole, parts)

    def _signs(self) -> Tensor:
        drawn = torch.randint(0, 2, (self.layers.size,), generator=self.generator, device=self.layers.device)
        return (drawn * 2 - 1).to(self.gradient)

    def _solved(self, layer: Layer) -> Krylov:
        """The Krylov space of a layer's gradient with its block, for steps of any damping."""
        return krylov(
            lambda v: self.reference.layer_product(layer, v),
            self.gradient[layer.index],
            self._layer_steps,
            lambda: self.bar.advance(layer.name, 1 / 3),
        )

    # ---------------------------------------------------------------- the reference
    def of_reference(self, run: Run, damping: float | None) -> None:
        """The reference itself: norms, the spectrum, exact steps, and what is left out without the blocks between layers."""
        own = DAMPING if damping is None else damping
        for name, index in self._targets():
            trace, norm = self.samples.trace(index), self.samples.norm(index)
            rank = combined(lambda t, n: t.square() / n.clamp(min=1e-300), trace, norm)
            self._add(run, EXACT, name, {"trace": trace, "effective_rank": rank})
            if name in self.solves:
                run.add(EXACT, name, self._ends(self.solves[name], own))
        density = krylov(self.reference.product, self._signs(), self.options.iterations, lambda: self.bar.advance("spectrum"))
        nodes, weights = density.density()
        run.add_spectrum(EXACT, WHOLE, nodes, weights)
        ends = [self._ends(space, own) for space in (self.step, density)]
        run.add(EXACT, WHOLE, max(ends, key=lambda e: e["largest"]))
        self._between(run)
        exact, residual = self.step.solve(own, -1.0, self.reference.definite)
        self._decreases(run, EXACT, exact)
        self._of_blocks(run, exact, own)
        self._tell(run, residual, own)

    def _ends(self, space: Krylov, damping: float) -> dict[str, float]:
        s = space.pairs[0]
        low = 0.0 if self.reference.definite else float(s[0])  # there are more parameters than outputs
        top, bottom = float(s[-1]), low + damping
        return {"largest": top, "condition": (top + damping) / bottom if bottom > 0 else float("inf")}

    def _between(self, run: Run) -> None:
        parts = [self.samples.norm(layer.index) for layer in self.layers.layers]
        left = combined(lambda whole, *own: 1 - sum(own) / whole.clamp(min=1e-300), self.samples.norm(None), *parts)
        self._add(run, EXACT, WHOLE, {"off_diagonal": left})
        self._add(run, BLOCKS, WHOLE, {"error": combined(lambda x: x.clamp(min=0).sqrt(), left)})
        run.coupling = [
            [self._coupling(a, b, x.value, y.value) for b, y in zip(self.layers.layers, parts, strict=True)]
            for a, x in zip(self.layers.layers, parts, strict=True)
        ]

    def _coupling(self, a: Layer, b: Layer, x: float, y: float) -> float:
        found = self.samples.coupling(a.index, b.index)
        if found is None or x <= 0 or y <= 0:
            return float("nan")
        return sqrt(max(0.0, found) / sqrt(x * y))

    def _of_blocks(self, run: Run, exact: Tensor, damping: float) -> None:
        """The steps with the blocks of layers, where all of them are solved."""
        if len(self.solves) < len(self.layers.layers):
            return
        d = torch.zeros_like(self.gradient)
        for layer in self.layers.layers:
            d[layer.index] = self.solves[layer.name].solve(damping, -1.0, self.reference.definite)[0]
        run.add(BLOCKS, WHOLE, of_directions(d.double(), exact.double()))
        self._decreases(run, BLOCKS, d)

    def _tell(self, run: Run, residual: float, damping: float) -> None:
        steps = f"exact steps of the whole model are {len(self.step.T)} iterations of CG, to a relative residual of"
        run.notes.append(f"{steps} {residual:.0e} at damping {damping:g}; iterations= takes more")
        if self.solves:
            found = [space.solve(damping, -1.0, self.reference.definite)[1] for space in self.solves.values()]
            run.notes.append(f"those of single layers are {self._layer_steps} iterations, to {max(found):.0e} at most")
            residual = max(residual, *found)
        if residual > UNFINISHED:
            run.notes.append("some solves are unfinished: cosines and lengths are with these, not with the exact steps")

    # ---------------------------------------------------------------- approximations
    def of_approximation(self, run: Run, label: str, measured: Measured) -> None:
        """The measures of an approximation."""
        own = self.options.damping if measured.damping is None or self.options.damping is not None else measured.damping
        own = DAMPING if own is None else own
        if measured.held.matrix_known:
            self._matrices(run, label, measured.held, own)
            if measured.power == -1.0:
                self._residual(run, label, measured.held, own)
        exact = self.step.solve(own, measured.power, self.reference.definite)[0]
        run.add(label, WHOLE, of_directions(measured.direction, exact.double()))
        self._decreases(run, label, measured.direction.to(self.gradient))
        for layer in self.layers.chosen:
            if layer.name in self.solves:
                exact = self.solves[layer.name].solve(own, measured.power, self.reference.definite)[0]
                run.add(label, layer.name, of_directions(measured.direction[layer.index], exact.double()))

    def _matrices(self, run: Run, label: str, held: HeldCurvature, damping: float) -> None:
        products = torch.stack([held.product(v).to(self.gradient) for v in self.samples.vectors])
        scale = 1.0
        for name, index in self._targets():
            size = held.square_norm(index)
            if size is None or (index is not None and not bool(held.covered[index].any())):
                continue
            norm, inner = self.samples.norm(index), self.samples.inner(index, products)
            self._add(run, label, name, _errors(norm, inner, size))
            scale = inner.value / size if size > 0 else 1.0
            self._spectrum(run, label, name, held, index, damping)
        self.bar.expect(self._layer_steps)
        difference = krylov(
            lambda v: scale * held.product(v).to(v) - self.reference.product(v),
            self._signs(),
            self._layer_steps,
            lambda: self.bar.advance(label),
        )
        top = max(float(self.step.pairs[0].abs().max()), 1e-300)
        run.add(label, WHOLE, {"spectral_scaled": float(difference.pairs[0].abs().max()) / top})

    def _spectrum(self, run: Run, label: str, name: str, held: HeldCurvature, index: Tensor | None, damping: float) -> None:
        trace, squares = held.trace(index), held.square_norm(index)
        if trace is not None and squares:
            run.add(label, name, {"trace": trace, "effective_rank": trace**2 / squares})
        if index is not None:
            return
        s = held.eigenvalues(index)
        if s is None:
            space = krylov(lambda v: held.product(v).to(v), self._signs(), self.options.iterations)
            nodes, weights = space.density()
            run.add_spectrum(label, name, nodes, weights)
            run.add(label, name, {"largest": float(nodes.max()), "condition": float(nodes.max()) / damping + 1})
            return
        run.add_spectrum(label, name, s)
        run.add(label, name, {"largest": float(s.max()), "condition": float((s.max() + damping) / (s.min() + damping))})

    def _residual(self, run: Run, label: str, held: HeldCurvature, damping: float) -> None:
        """``|(C + damping) P v - v| / |v|`` in the mean of squares over random signs."""
        self.bar.expect(self.options.probes)
        found = []
        for _ in range(self.options.probes):
            v = self._signs()
            x = held.inverse_product(v).to(v)
            found.append((self.reference.product(x) + damping * x - v).double().square().sum() / len(v))
            self.bar.advance(label)
        values = torch.stack(found).cpu()
        without = (values.sum() - values) / (len(values) - 1)
        self._add(run, label, WHOLE, {"residual": Estimate(float(values.mean().sqrt()), without.sqrt())})

    def _decreases(self, run: Run, label: str, d: Tensor) -> None:
        curvature = float(d.double() @ self.reference.product(d).double())
        slope = float(self.gradient.double() @ d.double())
        run.decreases(label, WHOLE, d, slope, curvature, searched(self.options, WHOLE))

    # ---------------------------------------------------------------- parts
    def _targets(self) -> list[tuple[str, Tensor | None]]:
        return [*((layer.name, layer.index) for layer in self.layers.chosen), (WHOLE, None)]

    def _add(self, run: Run, label: str, name: str, found: dict[str, Estimate]) -> None:
        run.add(label, name, {k: e.value for k, e in found.items()}, {k: e.error for k, e in found.items()})


def _errors(norm: Estimate, inner: Estimate, size: float) -> dict[str, Estimate]:
    """The measures in the Frobenius norm.  size: ``|Ĉ|_F^2``"""

    def as_it_is(n: Tensor, x: Tensor) -> Tensor:
        return ((n - 2 * x + size).clamp(min=0) / n.clamp(min=1e-300)).sqrt()

    def cosine(n: Tensor, x: Tensor) -> Tensor:
        return x / (n * size).clamp(min=1e-300).sqrt()

    if size <= 0:
        return {}
    return {
        "error": combined(as_it_is, norm, inner),
        "error_scaled": _sine(combined(cosine, norm, inner)),
        "scale": combined(lambda x: x / size, inner),
    }


def _sine(cosine: Estimate) -> Estimate:
    """``(1 - c^2)^(1/2)``, whose slope is zero at ``c = 0`` and infinite at 1: its error is its change over that of ``c``."""

    def of(c: Tensor) -> Tensor:
        return (1 - c.square()).clamp(min=0).sqrt()

    found = combined(of, cosine)
    ends = of(torch.tensor([cosine.value - cosine.error, cosine.value + cosine.error], dtype=torch.float64))
    return replace(found, least=float((ends - found.value).abs().max()))
