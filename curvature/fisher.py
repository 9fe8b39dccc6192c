"""Fisher matrices of the model's predictive distribution, from the inputs and output gradients of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.vjps import Source, VJPs, bytes_of_vjp, vjps_of
from gradmaker.curvature.alone import examples_alone
from gradmaker.curvature.base import NO_DRAWS, NO_REDUCTION, Curvature, Need
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.layer_evidence import layer_evidence
from gradmaker.curvature.step import Step
from gradmaker.errors import SelfCheckError
from gradmaker.loss.likelihood import LIKELIHOODS
from gradmaker.loss.terms import Terms
from gradmaker.loss.weights import numbers
from gradmaker.options.checks import check_choice, check_count

__all__ = ["FisherEmp", "FisherExact", "FisherMC", "LazyEvidence"]


class LazyEvidence(Mapping[str, Evidence]):
    """Evidence by site, formed on access: the patches of one convolution are freed before those of the next are formed."""

    def __init__(self, step: Step, found: VJPs, mask: Tensor | None, fresh: bool, root: Tensor | None = None) -> None:
        """root: a factor for the gradient of each example, where these are of the pass of the step itself.  # (n,)"""
        self.step, self.found, self.mask, self.fresh, self.root = step, found, mask, fresh, root
        self.own = None if root is None else root.reciprocal()
        self.sites = {site.name: site for site in step.active()}

    def __getitem__(self, name: str) -> Evidence:
        step, site = self.step, self.sites[name]
        made = layer_evidence(site, step.tape, self.found, self.mask, step.statistics_dtype(site), self.fresh)
        if self.root is None:
            return made
        scaled = made.scaled(self.root)
        if not isinstance(scaled, Outer) or site.direct(step.tape) or step.tape.apart(site.modules):
            return scaled
        return replace(scaled, own=self.own)

    def __contains__(self, name: object) -> bool:  # the inherited one would form the evidence
        return name in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class _CotangentFisher(Curvature):
    """A Fisher matrix whose cotangents at the loss go through vector-Jacobian products, in passes of their own."""

    gives: ClassVar[frozenset[Kind]] = kinds(Outer)
    by_parts: ClassVar[bool] = True
    inapplicable = NO_REDUCTION

    def splits(self, step: Step) -> bool:
        """Whether examples that mix in a layer get separate passes."""
        return True

    @abstractmethod
    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        """Yields vectors at ``terms.z`` that carry every scale of the loss, in chunks.  # each (k, *z.shape)"""

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        if not step.terms:
            raise ValueError(
                f"{type(self).__name__} needs the likelihood behind the loss, and no recognised loss was called: use "
                "F.cross_entropy, F.nll_loss, F.mse_loss or F.binary_cross_entropy_with_logits (as functions or modules), "
                f"or set likelihood= to one of {', '.join(LIKELIHOODS)}, or choose FisherEmp"
            )
        fresh = True
        for index, terms in enumerate(step.terms):
            mask = step.mask(terms)
            for chunk in self.cotangents(step, terms, index):
                source = Source(terms.z, chunk, terms.owners(step.examples))
                yield LazyEvidence(step, vjps_of(step.tape, step.sites, [source], self.splits(step)), mask, fresh)
                fresh = False


@dataclass(frozen=True, kw_only=True)
class FisherExact(_CotangentFisher):
    """The exact Fisher matrix, equal to the Gauss-Newton matrix for these likelihoods: ``C = sum_m w_m J_m^T Lambda_m J_m``.

    One backward pass for each output of an example (for sequences: of each position), batched in chunks.

    Reference: Martens, 2014, arXiv:1412.1193, section 9; Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662.
    """

    inapplicable = NO_DRAWS | NO_REDUCTION

    chunk: int | None = None
    """Cotangents of one batched vector-Jacobian product; None takes as many as ``memory`` has room for."""
    memory: int = 2**30
    """Bytes for the output gradients of all layers; the backward passes take up to three times as much while they run."""
    max_columns: int = 1024
    """More output columns than this are refused; `FisherMC` needs one a sample."""

    def __post_init__(self) -> None:
        for name in ("chunk", "memory", "max_columns"):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, 1)

    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        columns = terms.columns(step.examples)
        if columns > self.max_columns:
            raise ValueError(
                f"FisherExact would need {columns} backward passes for an output of shape {tuple(terms.z.shape)}: "
                f"use FisherMC(samples=1), or raise max_columns (now {self.max_columns})"
            )
        return terms.exact(step.examples, self.chunk or max(1, self.memory // max(1, bytes_of_vjp(step.tape, step.sites))))


@dataclass(frozen=True, kw_only=True)
class FisherMC(_CotangentFisher):
    """The Fisher matrix by targets sampled from the model's distribution: unbiased, one backward pass for each sample.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 5.
    """

    samples: int = 1

    def splits(self, step: Step) -> bool:
        """Only where all layers are one block: elsewhere independent samples allow the sum over the examples instead."""
        return step.whole

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        yield terms.sample(self.samples, step.generator(f"loss {index}", terms.z.device), step.place(terms, index))


def _mixed(step: Step) -> bool:
    """Whether no example's rows are known: examples depend on each other, or their share of the outputs is unknown."""
    return not step.tape.sized or (step.tape.joint and step.tape.batch > 1)


@dataclass(frozen=True, kw_only=True)
class FisherEmp(Curvature):
    """The empirical Fisher matrix, the second moment of gradients at the observed targets: ``C = sum_n M_n g_n g_n^T``.

    ``g_n`` is the gradient of the share of example ``n`` in the loss, and ``M_n = sum omega / sum omega^2`` over the weights
    ``omega_m = dL/dl_m`` of its terms: the number of terms that a mean averages over, 1 for a sum. The result does not depend
    on the order of the terms, it is linear in a factor of the loss, as the other Fisher matrices are, and it is a sum over
    examples, however they are cut into micro-batches. For sequences ``examples`` chooses the gradient: ``sequence``, of a whole
    sequence, costs no extra pass; ``token``, of a single token, one pass for each position, which losses of equally many
    positions share. Where a pass does not separate the examples, the declared calls are evaluated on each example alone, if
    these gradients add up to that of the batch. Where they do not, because examples depend on each other (negatives from the
    batch), each term of the loss counts as an example.

    Reference: Schraudolph, Neural Computation 2002; Kunstner, Balles & Hennig, NeurIPS 2019, arXiv:1905.12558.
    """

    gives: ClassVar[frozenset[Kind]] = kinds(Outer)
    by_parts: ClassVar[bool] = True
    examples: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        check_choice("examples", self.examples, ("sequence", "token"))

    inapplicable = NO_DRAWS

    @property
    def needs(self) -> frozenset[Need]:
        """Gradients of whole sequences need no backward pass but the ordinary one."""
        return frozenset({"calls", "main_backward", "examples"} if self.examples == "sequence" else {"calls"})

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        if self.examples == "token":
            yield from self._tokens(step)
            return
        if _mixed(step):
            yield from self._mixed_examples(step)
            return
        assert step.output_gradients is not None
        sources: list[Source] = []
        own = [s.name for s in step.active() if s.direct(step.tape) or step.tape.apart(s.modules)]
        if own and step.head is None:
            raise SelfCheckError(
                f"FisherEmp: {', '.join(own)} need a pass for each example, and a loop's backward pass is over when it is "
                "measured: declare the calls instead of attaching, choose FisherMC or FisherExact, or leave them out by ignore="
            )
        if own and step.head is not None:
            parts = zip(step.head.outputs, step.head.loss_gradients, step.head.owners(step.examples), strict=True)
            sources = [Source(z, loss_gradient.unsqueeze(0), owner) for z, loss_gradient, owner in parts]
        together = step.output_gradients
        found = vjps_of(step.tape, step.sites, sources, True, together, frozen=False) if sources else VJPs(together)
        mask = step.mask(step.terms[0]) if step.terms else None
        yield LazyEvidence(step, found, mask, True, self._numbers(step).sqrt())

    def _mixed_examples(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        evidence = examples_alone(step) if step.share is None else None  # each rank alone: the others would wait
        if evidence is not None:
            yield evidence
        elif step.terms and step.head is not None and not step.tape.ungrouped:
            yield from self._tokens(step)
        else:
            raise SelfCheckError(
                f"FisherEmp needs the gradients of {step.tape.batch} examples, which depend on each other in this pass, or "
                "whose part of the outputs is not known, and the declared calls on each example alone do not add up to the "
                "gradient of the batch: give the examples on one axis, the first or that of batch_axis=, and declare all data "
                "as arguments of the calls; or use a recognised loss and FisherMC"
            )

    def _tokens(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        """Gradients of single positions; losses of equally many share passes. ValueError where no loss is recognised."""
        if not step.terms:
            raise ValueError("FisherEmp(examples='token') needs a recognised loss; examples='sequence' does not")
        n, fresh = step.examples, True
        groups: dict[int, list[tuple[Terms, Tensor]]] = {}
        for terms, loss_gradient in zip(step.terms, step.loss_gradients(), strict=True):
            groups.setdefault(terms.positions(n), []).append((terms, loss_gradient))
        for R, calls in groups.items():
            root = numbers([t for t, _ in calls], n, R).sqrt().reshape(n, R)
            sources = [Source(t.z, t.empirical(loss_gradient, n, root), t.owners(n)) for t, loss_gradient in calls]
            yield LazyEvidence(step, vjps_of(step.tape, step.sites, sources, True), step.mask(calls[0][0]), fresh)
            fresh = False

    def _numbers(self, step: Step) -> Tensor:
        """``M_n``; for an unrecognised loss, by the declared reduction.  # (n,)"""
        if step.terms:
            return numbers(step.terms, step.examples)
        total = float(step.examples_of_all if step.reduction == "mean" else 1)
        return torch.full((step.examples,), total, dtype=torch.float64)
