"""What a reader of a result would otherwise trip over, beside what the makers say themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradmaker.curvature import FisherForward, FisherMC
from gradmaker.fidelity.approximations import Approximation, Measured
from gradmaker.fidelity.references import ReferenceName
from gradmaker.representations import Eigenbasis
from gradmaker.triple import Triple

__all__ = ["notes_of"]


def notes_of(
    reference: ReferenceName, given: Sequence[Approximation], measured: Mapping[str, Measured], batches: int, repeats: int
) -> list[str]:
    """Notes on these approximations against this reference."""
    notes = []
    for a in given:
        m = measured[a.label]
        found = [note for triple in m.triples for note in _of_triple(triple, batches * repeats)]
        if m.damping is None:
            found.append("its damping is not in units of the curvature: the exact inverse is that at damping=, or at 1e-3")
        if m.power != -1.0:
            found.append(f"P approximates C^({m.power:g}), and so is the exact direction that it is compared with")
        if not m.held.matrix_known:
            found.append("it holds products of its own step alone: no matrix is measured, only what it does to the gradient")
        if reference == "second_moment" and batches > 1 and a.config.decay is not None:
            found.append(f"decay={a.config.decay:g} weighs the batches unequally, and the reference equally: decay=None sums")
        notes += [f"{a.label}: {note}" for note in dict.fromkeys([*found, *m.notes])]
    return notes


def _of_triple(triple: Triple, steps: int) -> Iterator[str]:
    curvature, representation = triple.curvature, triple.representation
    if isinstance(curvature, FisherForward):
        yield "FisherForward has the scale of the layer's inputs, not of the loss: read the errors after the best scalar"
    if isinstance(curvature, FisherMC):
        yield (
            f"targets are sampled, {curvature.samples} for each loss term: part of its error is sampling, which falls as one "
            "over the root of samples=; FisherExact has none"
        )
    if isinstance(representation, Eigenbasis) and steps == 1:
        yield (
            "after one measurement its moments are those that its factors predict: it equals K-FAC (with FisherExact, KFLR); "
            "repeats=2 measures each batch again, in its basis"
        )
