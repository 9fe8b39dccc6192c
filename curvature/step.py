"""`Step`: what a curvature may know of the step that it measures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.curvature.evidence import Evidence
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.real_pairs import real_dtype
from gradmaker.loss.head import Head
from gradmaker.loss.share import Share
from gradmaker.loss.terms import Place, Terms
from gradmaker.passes.batches import Batch, Batches
from gradmaker.passes.graph import Graph
from gradmaker.passes.replay import Replay

__all__ = ["NOTHING", "Extra", "LayerSums", "Pass", "Previous", "Step", "scaled"]


class LayerSums(NamedTuple):
    """Sums over a layer's outputs and output gradients in a pass, kept for its secant over the step."""

    outputs: Tensor  # (G, o) over the positions that count, less a bias that is not trained
    gradients: Tensor  # (G, o) over examples, of the mean over positions
    counted: int | Tensor  # positions
    weights: Tensor | None = None  # as in `Outer`, of the first evaluation


@dataclass
class Pass:
    """The pass of a micro-batch, which can be evaluated again."""

    replay: Replay
    weight: float  # of its loss in that of the step
    notes: dict[str, LayerSums]  # by site, for the secants of layers


@dataclass
class Previous:
    """The last measured step, with its weights and gradient; completed, it holds only its pairs."""

    passes: list[Pass]
    weights: dict[nn.Parameter, Tensor]
    gradients: dict[nn.Parameter, Tensor]  # of its loss, ``sum_j weight_j L_j``, for the parameters that it reaches
    index: int
    pairs: dict[str, Evidence] | None = None  # by site, once they are known
    older: dict[str, Evidence] = field(default_factory=dict)  # pairs of methods that were not measured in this step


@dataclass(frozen=True)
class Extra:
    """What curvatures may ask for besides the tape."""

    graph: Graph | None = None
    batches: Batches | None = None
    previous: Previous | None = None
    notes: dict[str, LayerSums] = field(default_factory=dict)
    own: Callable[[], Batch] | None = None  # the declared calls, to be evaluated on some of the examples
    share: Share | None = None  # as in `Step`


NOTHING = Extra()


@dataclass(frozen=True)
class Step:
    """A recorded forward and backward pass; or, without a tape, what is known at the end of a step."""

    index: int
    seed: int
    sites: list[Site]  # that have this curvature
    dtype: torch.dtype | None  # of statistics; None: that of the parameters, at least float32
    tape: Tape
    terms: list[Terms] = field(default_factory=list)  # of the loss; empty when the loss was not recognised
    head: Head | None = None  # the outputs that the loss is a function of
    whole: bool = False  # whether some block of this curvature holds all layers as one
    output_gradients: OutputGradients | None = None  # of the backward pass that has run
    reduction: str = "mean"  # of a loss that was not recognised
    masked: bool = False  # whether the loss left out some of its terms
    part: int = 0  # index of the micro-batch in the step
    graph: Graph | None = None  # of the loss, for curvatures that need it
    batches: Batches | None = None  # of this pass, to be evaluated again
    previous: Previous | None = None  # the last step that was measured
    notes: dict[str, LayerSums] = field(default_factory=dict)  # by site, kept for the secants of the next step
    own: Callable[[], Batch] | None = None  # the declared calls, to be evaluated on some of the examples
    rows: Mapping[str, FactoredGradient] = field(default_factory=dict)  # by site: gradients that are not in ``.grad``
    share: Share | None = None  # of this pass in that of all ranks; None: there is one process

    def loss_gradients(self) -> list[Tensor]:
        """``dL/dz`` of each of `terms`."""
        return [] if self.head is None else self.head.loss_gradients

    @property
    def examples(self) -> int:
        """Batch size, or 1 where no layer separates the examples."""
        return self.tape.examples

    @property
    def examples_of_all(self) -> float:
        """The number of examples that a mean is taken over, those of the other ranks included."""
        return self.examples if self.share is None else self.examples / self.share.factor

    def place(self, terms: Terms, index: int) -> Place | None:
        """The rows of terms in the batch of all ranks; None in a single process.  index: of the call of the loss"""
        return None if self.share is None else self.share.place(terms, index)

    def earlier(self) -> dict[nn.Parameter, Tensor]:
        """Gradients of the earlier micro-batches of this step, times their weights; empty where none were kept."""
        before = self.previous
        return before.gradients if before is not None and self.part and before.index == self.index else {}

    def active(self) -> list[Site]:
        """The sites whose layers were called, on a batch that is not empty."""
        return [site for site in self.sites if site.fired(self.tape)] if self.tape.batch or not self.tape.sized else []

    def check_calls(self) -> None:
        """RuntimeError for a pass in which no layer was called."""
        if not any(site.fired(self.tape) for site in self.sites):
            raise RuntimeError(
                "no layer of this model was called in the forward pass, so no curvature could be measured: declare a call of "
                "the very model that the maker was made for (compile it after making the maker, not before)"
            )

    def mask(self, terms: Terms) -> Tensor | None:
        """Positions where any term of the loss counts, by example; None where all do.

        The terms of other losses of the pass count too, so that the order of the losses does not matter.  # (n, R)
        """
        if not self.masked:
            return None
        n = self.examples
        own = [t.by_example(t.valid(), n) for t in (terms, *self.terms) if not t.omega.numel() % n]
        finest = max(m.shape[1] for m in own)
        placed = [m if m.shape[1] == finest else m.any(1, keepdim=True).expand(-1, finest) for m in own]
        return torch.stack(placed).any(0)

    def statistics_dtype(self, site: Site) -> torch.dtype:
        """The dtype of a site's statistics: float32 or better, whatever the dtype of the model."""
        return self.dtype or real_dtype(next(iter(site.parameters.values())))

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """A generator that depends on (seed, name, step, micro-batch) alone; global generators are not touched."""
        key = hashlib.blake2b(f"{self.seed}/{name}/{self.index}/{self.part}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(key, "little"))


def scaled(gradients: OutputGradients, factor: float) -> OutputGradients:
    """Output gradients of the loss multiplied by a factor."""
    if factor == 1.0:
        return gradients
    return {m: [[g * factor for g in outs] for outs in calls] for m, calls in gradients.items()}
