"""Fisher matrices of the model's predictive distribution, layer by layer, from output gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.base import NO_DRAWS, NO_REDUCTION, Curvature
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.curvature.likelihood import LIKELIHOODS, Terms
from gradmaker.errors import SelfCheckError
from gradmaker.pulls import Pulled, Source, bytes_of_pull, pull

if TYPE_CHECKING:
    from gradmaker.step import Step

__all__ = ["FisherEmp", "FisherExact", "FisherMC"]


class _Portion(Mapping[str, Evidence]):
    """Evidence by site, made when it is asked for: the patches of one convolution are gone before those of the next are cut."""

    def __init__(self, step: Step, found: Pulled, mask: Tensor | None, fresh: bool) -> None:
        self.step, self.found, self.mask, self.fresh = step, found, mask, fresh
        self.sites = {site.name: site for site in step.active()}

    def __getitem__(self, name: str) -> Evidence:
        step, site = self.step, self.sites[name]
        return site.outer(step.tape, self.found, self.mask, step.statistics_dtype(site), self.fresh)

    def __contains__(self, name: object) -> bool:  # inherited, it would make the evidence to see whether it is there
        return name in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class _Pulled(Curvature):
    """A Fisher whose cotangents at the loss are pulled back in extra passes."""

    gives: ClassVar[tuple[type[Evidence], ...]] = (Outer,)
    idle = NO_REDUCTION

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
                yield _Portion(step, pull(step.tape, step.sites, [source], self.splits(step)), mask, fresh)
                fresh = False


@dataclass(frozen=True, kw_only=True)
class FisherExact(_Pulled):
    """The exact Fisher, which for these likelihoods is the Gauss-Newton matrix: ``C = sum_m w_m J_m^T Lambda_m J_m``.

    One backward pass for each output of an example (for each position and output in sequences), batched in chunks.

    Reference: Martens, 2014, arXiv:1412.1193, section 9; Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662.
    """

    idle = NO_DRAWS | NO_REDUCTION

    chunk: int | None = None
    """Cotangents that are pulled back at once; None takes as many as ``memory`` has room for."""
    memory: int = 2**30
    """Bytes for the output gradients of all layers; the backward passes need up to three times as much while they run."""
    max_columns: int = 1024
    """More output columns than this are refused; `FisherMC` needs one."""

    def __post_init__(self) -> None:
        for name in ("chunk", "memory", "max_columns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected an integer of at least 1")

    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        columns = terms.columns(step.examples)
        if columns > self.max_columns:
            raise ValueError(
                f"FisherExact would need {columns} backward passes for an output of shape {tuple(terms.z.shape)}: "
                f"use FisherMC(samples=1), or raise max_columns (now {self.max_columns})"
            )
        return terms.exact(step.examples, self.chunk or max(1, self.memory // max(1, bytes_of_pull(step.tape, step.sites))))


@dataclass(frozen=True, kw_only=True)
class FisherMC(_Pulled):
    """The Fisher by targets drawn from the model's own distribution: unbiased, one backward pass a sample.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 5.
    """

    samples: int = 1

    def splits(self, step: Step) -> bool:
        """Draws of different examples are independent: their sum is as good, but where all layers are one block."""
        return step.whole

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: expected an integer of at least 1")

    def cotangents(self, step: Step, terms: Terms, index: int) -> Iterator[Tensor]:
        yield terms.sample(self.samples, step.generator(f"loss {index}", terms.z.device))


def _mixed(step: Step) -> bool:
    """Whether no example of a pass has a gradient of its own: they depend on each other, or are not known."""
    return not step.tape.sized or (step.tape.joint and step.tape.batch > 1)


@dataclass(frozen=True, kw_only=True)
class FisherEmp(Curvature):
    """The second moment of the gradients at the observed targets: ``C = M sum_n g_n g_n^T``.

    ``g_n`` is the gradient of the share of example ``n`` in the loss, and ``M = sum omega / sum omega^2`` over the weights
    ``omega_m = dL/dl_m`` of all its terms, whatever their order and spelling: the number of terms that a mean averages over,
    1 for a sum. So ``C`` is that of one loss, and linear in a factor of it, as the other Fisher matrices are. Unequal weights
    in micro-batches: each has the ``M`` of its own. For sequences ``examples`` says what one gradient is: that of a whole
    sequence, which costs no extra pass, or of a single token, one pass for each position. Where the examples of a batch depend
    on each other, as with negatives from the batch, the terms of the loss take their place.

    Reference: Schraudolph, Neural Computation 2002; Kunstner, Balles & Hennig, NeurIPS 2019, arXiv:1905.12558.
    """

    gives: ClassVar[tuple[type[Evidence], ...]] = (Outer,)
    examples: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        if self.examples not in ("sequence", "token"):
            raise ValueError(f"examples={self.examples!r}: expected 'sequence' or 'token'")

    idle = NO_DRAWS

    @property
    def rides(self) -> bool:
        """Gradients of whole sequences come with the ordinary backward pass."""
        return self.examples == "sequence"

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        if not self.rides or (_mixed(step) and step.terms):
            yield from self._tokens(step)
            return
        assert step.ridden is not None
        if _mixed(step):
            raise SelfCheckError(
                f"FisherEmp needs the gradients of {step.tape.batch} examples, which depend on each other in this pass, or "
                "whose part of the outputs is not known: use a recognised loss, whose terms then take their place, or "
                "FisherMC, or say by batch_axis= where the examples are"
            )
        root = self._terms(step).sqrt()
        scaled = {m: [[g * root.to(g) for g in outs] for outs in calls] for m, calls in step.ridden.items()}
        sources: list[Source] = []
        if step.head is not None and any(site.direct(step.tape) or step.tape.apart(site.modules) for site in step.active()):
            parts = zip(step.head.outputs, step.head.slopes, step.head.owners(step.examples), strict=True)
            sources = [Source(z, slope.unsqueeze(0) * root.to(slope), owner) for z, slope, owner in parts]
        found = pull(step.tape, step.sites, sources, True, scaled, frozen=False) if sources else Pulled(scaled)
        yield _Portion(step, found, step.mask(step.terms[0]) if step.terms else None, True)

    def _tokens(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        if not step.terms:
            raise ValueError("FisherEmp(examples='token') needs a recognised loss; examples='sequence' does not")
        for index, (terms, slope) in enumerate(zip(step.terms, step.slopes(), strict=True)):
            vectors = terms.empirical(slope, step.examples)
            source = Source(terms.z, vectors, terms.owners(step.examples))
            yield _Portion(step, pull(step.tape, step.sites, [source], True), step.mask(terms), index == 0)

    def _terms(self, step: Step) -> Tensor:
        """``M``; of an unrecognised loss, by the declared reduction.  # ()"""
        if step.terms:
            return step.terms[0].denominator
        return torch.tensor(float(step.examples) if step.reduction == "mean" else 1.0, dtype=torch.float64)
