"""Fisher matrices of the model's predictive distribution, layer by layer, from output gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.vjps import Source, VJPs, bytes_of_vjp, vjps_of
from gradmaker.curvature.alone import examples_alone
from gradmaker.curvature.base import NO_DRAWS, NO_REDUCTION, Curvature, Need
from gradmaker.curvature.evidence import Evidence, Kind, Outer, kinds
from gradmaker.curvature.layer_evidence import outer
from gradmaker.curvature.step import Step
from gradmaker.errors import SelfCheckError
from gradmaker.loss.likelihood import LIKELIHOODS
from gradmaker.loss.terms import Terms
from gradmaker.loss.weights import numbers
from gradmaker.options.checks import check_choice, check_count

__all__ = ["FisherEmp", "FisherExact", "FisherMC", "LazyEvidence"]


class LazyEvidence(Mapping[str, Evidence]):
    """Evidence by site, made when it is asked for: the patches of one convolution are gone before those of the next are cut."""

    def __init__(self, step: Step, found: VJPs, mask: Tensor | None, fresh: bool, root: Tensor | None = None) -> None:
        """root: a factor for the gradient of each example.  # (n,)"""
        self.step, self.found, self.mask, self.fresh, self.root = step, found, mask, fresh, root
        self.sites = {site.name: site for site in step.active()}

    def __getitem__(self, name: str) -> Evidence:
        step, site = self.step, self.sites[name]
        made = outer(site, step.tape, self.found, self.mask, step.statistics_dtype(site), self.fresh)
        return made if self.root is None else made.scaled(self.root)

    def __contains__(self, name: object) -> bool:  # inherited, it would make the evidence to see whether it is there
        return name in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class _CotangentFisher(Curvature):
    """A Fisher whose cotangents at the loss are pulled back in extra passes."""

    gives: ClassVar[frozenset[Kind]] = kinds(Outer)
    inapplicable = NO_REDUCTION

    def splits(self, step: Step) -> bool:
        """Whether examples that mix in a layer get passes of their own."""
        return True

    @abstractmethod
    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        """Vectors at ``terms.z`` with every scale folded in, in chunks.  # each (k, *z.shape)"""

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
    """The exact Fisher, which for these likelihoods is the Gauss-Newton matrix: ``C = sum_m w_m J_m^T Lambda_m J_m``.

    One backward pass for each output of an example (for each position and output in sequences), batched in chunks.

    Reference: Martens, 2014, arXiv:1412.1193, section 9; Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662.
    """

    inapplicable = NO_DRAWS | NO_REDUCTION

    chunk: int | None = None
    """Cotangents that are pulled back at once; None takes as many as ``memory`` has room for."""
    memory: int = 2**30
    """Bytes for the output gradients of all layers; the backward passes need up to three times as much while they run."""
    max_columns: int = 1024
    """More output columns than this are refused; `FisherMC` needs one."""

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
    """The Fisher by targets drawn from the model's own distribution: unbiased, one backward pass a sample.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 5.
    """

    samples: int = 1

    def splits(self, step: Step) -> bool:
        """Draws of different examples are independent: their sum is as good, but where all layers are one block."""
        return step.whole

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        yield terms.sample(self.samples, step.generator(f"loss {index}", terms.z.device))


def _mixed(step: Step) -> bool:
    """Whether the rows of no example are known: examples depend on each other, or their part of the outputs is not known."""
    return not step.tape.sized or (step.tape.joint and step.tape.batch > 1)


@dataclass(frozen=True, kw_only=True)
class FisherEmp(Curvature):
    """The second moment of the gradients at the observed targets: ``C = sum_n M_n g_n g_n^T``.

    ``g_n`` is the gradient of the share of example ``n`` in the loss, and ``M_n = sum omega / sum omega^2`` over the weights
    ``omega_m = dL/dl_m`` of its terms, whatever their order and spelling: the number of terms that a mean averages over, 1 for
    a sum. So ``C`` is that of one loss, linear in a factor of it as the other Fisher matrices are, and a sum over examples,
    however they are cut into micro-batches. For sequences ``examples`` says what one gradient is: that of a whole sequence,
    which costs no extra pass, or of a single token, one pass for each position; calls of a loss with as many positions share
    them. Where a pass does not show which rows are whose, the declared calls are evaluated on each example alone, if what they
    give adds up to the gradient of the batch. Where it does not, since examples depend on each other as with negatives from
    the batch, the terms of the loss take their place.

    Reference: Schraudolph, Neural Computation 2002; Kunstner, Balles & Hennig, NeurIPS 2019, arXiv:1905.12558.
    """

    gives: ClassVar[frozenset[Kind]] = kinds(Outer)
    examples: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        check_choice("examples", self.examples, ("sequence", "token"))

    inapplicable = NO_DRAWS

    @property
    def needs(self) -> frozenset[Need]:
        """Gradients of whole sequences come with the ordinary backward pass."""
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
        evidence = examples_alone(step)
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
        """The gradients of positions; of calls with as many positions together."""
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
        """``M_n``; of an unrecognised loss, by the declared reduction.  # (n,)"""
        if step.terms:
            return numbers(step.terms, step.examples)
        return torch.full((step.examples,), float(step.examples) if step.reduction == "mean" else 1.0, dtype=torch.float64)
