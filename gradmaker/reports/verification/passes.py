"""One recorded pass of the declared batch: self-checks, evidence, and per-example gradients by autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.capture.vjps import Source, vjps_of
from gradmaker.curvature.evidence import Outer
from gradmaker.curvature.layer_evidence import LayerEvidence, layer_evidence
from gradmaker.curvature.tied import Tied
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from gradmaker.linalg.real_pairs import real_dtype
from gradmaker.loss.head import Head
from gradmaker.loss.recorder import LossRecorder
from gradmaker.passes.batches import terms_of
from gradmaker.representations.roles import PerStep
from gradmaker.self_checks import SelfChecks
from gradmaker.self_checks.checks import WHOLE
from gradmaker.self_checks.examples import Pair, vjp_pair
from gradmaker.self_checks.loss import check_curvature, check_gradient
from gradmaker.self_checks.whole import Whole
from gradmaker.step.protocol import CheckedMaker

__all__ = ["Measured", "measure", "relative"]

DIRECTLY = "by derivatives of the parameter itself, in all of its uses"
APART = "apart, with a pass for each example: they depend on each other in this layer, or have no axis of their own"
RULE = "its outputs keep the examples apart, but the rows that the rule for this type of layer makes of them do not"
HALVES = {torch.float16, torch.bfloat16}
UNSEEN = "it has uses outside of the calls of its layer"
ROWS = 4
"""Gradients at random cotangents: the matrix of products of a curvature that has no rows."""


@dataclass
class Measured:
    """The measurements of one pass."""

    evidence: dict[str, LayerEvidence] = field(default_factory=dict)  # by site, for one random cotangent an example
    errors: dict[str, float] = field(default_factory=dict)  # relative errors of its rows
    half: bool = False  # whether a layer ran in half precision
    rounding: float = 0.0  # the largest unit roundoff that a layer rule declares, whatever the dtype of the model
    uncalled: set[str] = field(default_factory=set)  # sites that were not called
    gradients: dict[nn.Parameter, Tensor | None] = field(default_factory=dict)  # of the loss
    rows: list[dict[nn.Parameter, Tensor | None]] = field(default_factory=list)  # at random cotangents
    failures: dict[str, str] = field(default_factory=dict)  # by site: what a self-check has found
    notes: dict[str, str] = field(default_factory=dict)


def relative(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """``|found - expected| / |expected|``.  least: lower bound of the denominator"""
    difference, size = (found.double() - expected.double()).norm(), max(float(expected.double().norm()), least)
    return float(difference) / size if size > 0 else float(difference)


def measure(maker: CheckedMaker) -> Measured:
    """Record the declared forward pass again, and measure it."""
    tape = maker.new_tape(everything=True)
    with tape.recording():
        with LossRecorder() as recorder:
            output, loss, logits = maker.evaluate()
        tape.end_forward([loss])
        head = Head.of(loss, output, terms_of(recorder, loss, logits, maker.config.likelihood), recorder)
        bare = Head.of(loss, output if logits is None else logits, [], recorder)
        with torch.autocast(loss.device.type, enabled=False):
            return _Pass(maker, tape, head, bare, loss).measure()


class _Pass:
    """A recorded pass."""

    def __init__(self, maker: CheckedMaker, tape: Tape, head: Head, bare: Head, loss: Tensor) -> None:
        self.maker, self.tape, self.head, self.bare, self.loss = maker, tape, head, bare, loss
        recorded = [c for c in maker.plan.curvatures(of_passes=True) if "calls" in c.needs]
        self.sites = [s for c in recorded for s in maker.plan.sites(c) if not s.frozen]
        self.found = Measured()
        self._pair: tuple[Pair, Tensor] | None = None
        self.generator = torch.Generator().manual_seed(maker.config.seed)

    def measure(self) -> Measured:
        dtypes = {call.dtype for calls in self.tape.calls.values() for call in calls} | {z.dtype for z in self.head.outputs}
        self.found.half = bool(dtypes & HALVES)
        rules = [s.rule for b in self.maker.plan.blocks for s in b.sites if s.rule is not None]
        self.found.rounding = max((rule.rounding for rule in rules), default=0.0)
        self._check()
        if self.head.outputs:
            self._capture()
        parameters = list(dict.fromkeys(p for b in self.maker.plan.blocks for s in b.sites for p in s.parameters.values()))
        self.found.gradients = self._vjp([self.loss], [torch.ones_like(self.loss)], parameters)
        if self.head.outputs and any(isinstance(b.triple.representation, PerStep) for b in self.maker.plan.blocks):
            for _ in range(ROWS):
                self.found.rows.append(self._vjp(self.head.outputs, self._cotangents(), parameters))
        return self.found

    def _vjp(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> dict[nn.Parameter, Tensor | None]:
        return dict(zip(parameters, self.tape.vjp_parameters(outputs, cotangents, parameters), strict=True))

    def _cotangents(self) -> list[Tensor]:
        return [torch.randn(z.shape, generator=self.generator, dtype=torch.float64).to(z) for z in self.head.outputs]

    # ---------------------------------------------------------------- self-checks
    def _check(self) -> None:
        """Run the self-checks on a copy of the maker's findings, and arrange the pass as the maker would."""
        own, mode = self.maker.arrangement, self.maker.config.self_check
        scratch = SelfChecks(self.maker.model, "fallback", self.maker.config.seed)
        scratch.arrangement = self.tape.arrangement = replace(
            own,
            orders=dict(own.orders),
            direct=set(own.direct),
            joint=set(own.joint),
            last=set(own.last),
            checked={},
            notes=dict(own.notes),
        )
        scratch.arrange(self.tape, self.head)
        unseen = set(self.maker.unseen)
        if self.sites and self.head.outputs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SelfCheckWarning)
                unseen |= scratch.run(self.tape, self.sites, self.head, None, explained=False, costly=False)
        scratch.arrangement.direct -= unseen - own.direct  # these are still measured through their layers
        self.found.notes = dict(scratch.arrangement.notes)
        self._judge(unseen, mode != "fallback")
        if mode == "off":
            self.tape.arrangement = own
            scratch.arrangement = own
            scratch.arrange(self.tape, self.head)
        self._check_loss()

    def _judge(self, unseen: set[str], strict: bool) -> None:
        """Collect the sites that failed; another way of measuring is a failure only if ``strict``.  unseen: parameters"""
        new = self.tape.arrangement.direct - self.maker.arrangement.direct
        for block in self.maker.plan.blocks:
            for site in block.sites:
                names = [k for k in site.parameters if k in unseen]
                if names:
                    self.found.failures[site.name] = self.found.notes.get(names[0], UNSEEN)
        self.found.failures |= {k: self.found.notes.get(k, UNSEEN) for k in unseen if k in self.maker.plan.plain}
        for site in self.sites:
            if not site.fired(self.tape):
                self.found.uncalled.add(site.name)
                continue
            apart = self.tape.apart(site.modules)
            if apart or site.direct(self.tape):
                text = f"measured {DIRECTLY if site.direct(self.tape) else APART}"
                self.found.notes.setdefault(site.name, text)
                if strict and (apart or new.intersection(site.parameters)):
                    self.found.failures.setdefault(site.name, self.found.notes[site.name])
                elif apart and site.rule is not None and self._keeps_apart(site):
                    self.found.failures.setdefault(site.name, RULE)
        if self.tape.joint and self.tape.batch > 1:
            self.found.notes["batch"] = "its examples depend on each other: it is measured as one example"

    def _keeps_apart(self, site: Site) -> bool:
        """Whether every output of a layer has an axis that keeps the examples apart, although its rule finds none."""
        if self._pair is None:
            self._pair = vjp_pair(self.tape, self.head, self.generator)
        (first, second), c = self._pair
        calls = [(m, j, call) for m in site.modules for j, call in enumerate(self.tape.calls.get(m, ()))]
        return all(_scales(first[m][j][0][0], second[m][j][0][0], c, call.dtype) for m, j, call in calls)

    def _check_loss(self) -> None:
        curvatures = [
            c for c in self.maker.plan.curvatures(of_passes=True) if "calls" in c.needs and "main_backward" not in c.needs
        ]
        mode, declared = self.maker.config.self_check, self.head.declared
        if not self.head.terms:
            declared = mode != "fallback" or self.maker.config.likelihood is not None
        if not curvatures or declared or not self.head.outputs:
            return
        try:
            output_gradients = self.tape.vjp([self.loss], [torch.ones_like(self.loss).unsqueeze(0)])
            self._explain_loss(output_gradients)
        except SelfCheckError as error:
            if mode == "off":  # the user has accepted it
                self.found.notes["loss"] = str(error)
                return
            self.found.failures |= {s.name: f"loss: {error}" for c in curvatures for s in self.maker.plan.sites(c)}

    def _explain_loss(self, output_gradients: OutputGradients) -> None:
        """SelfCheckError if the maker would not measure the whole loss, or only by autograd."""
        config, notes = self.maker.config, self.found.notes
        if config.self_check != "fallback":
            check_gradient(
                self.head,
                self.tape.vjp(self.head.outputs, [s.unsqueeze(0) for s in self.head.loss_gradients]),
                output_gradients,
            )
            unchecked = check_curvature(self.head, self.generator)
        else:
            scratch = SelfChecks(self.maker.model, "fallback", config.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SelfCheckWarning)
                head = Whole(scratch, config.loss_reduction).explain(self.tape, self.head, self.bare, output_gradients, True)
            unchecked = scratch.arrangement.notes.get("loss")
            if head.whole:
                notes["loss"] = scratch.arrangement.notes[WHOLE]
        if unchecked:
            notes["loss"] = f"its curvature is unchecked: {unchecked}"

    # ---------------------------------------------------------------- gradients of examples
    def _capture(self) -> None:
        n, cotangents = self.tape.examples, self._cotangents()
        owners = self.head.owners(n)
        layerwise = {s.name for b in self.maker.plan.blocks if b.triple.curvature.layerwise for s in b.sites}
        sites = [s for s in self.sites if s.name in layerwise and s.fired(self.tape)]
        if not sites:
            return
        sources = [Source(z, c.unsqueeze(0), o) for z, c, o in zip(self.head.outputs, cotangents, owners, strict=True)]
        vjps = vjps_of(self.tape, sites, sources, split=True)
        self.found.evidence = {
            s.name: layer_evidence(s, self.tape, vjps, None, self.maker.config.statistics_dtype() or _dtype(s)) for s in sites
        }
        parameters = list(dict.fromkeys(p for s in sites for p in s.parameters.values()))
        for j in self._chosen(n):
            alone = [torch.where(o == j, c, 0.0) for c, o in zip(cotangents, owners, strict=True)]
            with self.tape.norms.held():
                truth = self._vjp(self.head.outputs, alone, parameters)
            self._compare(sites, truth, j)

    def _chosen(self, n: int) -> list[int]:
        """Indices of the first, the middle, the last, and two more examples."""
        return sorted({0, n // 2, n - 1, *torch.randint(n, (2,), generator=self.generator).tolist()})

    def _compare(self, sites: Sequence[Site], truth: Mapping[nn.Parameter, Tensor | None], j: int) -> None:
        for site in sites:
            row = _row(self.found.evidence[site.name], j)
            error = relative(row.rows()[0], site.lay_out(truth), _size(row))
            self.found.errors[site.name] = max(self.found.errors.get(site.name, 0.0), error)


def _scales(first: Tensor, second: Tensor, c: Tensor, dtype: torch.dtype) -> bool:
    """Whether the gradient of an output scales with the examples on its first or second axis, or the fastest on its first."""
    n, found = len(c), []
    for axis in (0, 1):
        if first.ndim > axis and first.shape[axis] == n:
            found.append(first * c.to(first).view(-1, *[1] * (first.ndim - axis - 1)))
    if first.shape[0] % n == 0:
        found.append((first.unflatten(0, (-1, n)) * c.to(first).view(-1, *[1] * (first.ndim - 1))).flatten(0, 1))
    limit = 0.02 if dtype in HALVES else 1e-5
    return any(bool((second - x).abs().max() <= limit * x.abs().max()) for x in found)


def _row(outer: LayerEvidence, j: int) -> LayerEvidence:
    """One row of the evidence."""
    if isinstance(outer, Tied):
        return outer.of_parts(lambda part: _row_of_layer(part, j))
    return _row_of_layer(outer, j)


def _row_of_layer(outer: Outer, j: int) -> Outer:
    k, e = divmod(j, outer.gradients.shape[2])
    one = slice(e, e + 1)
    inputs = outer.inputs
    cut = OneHot(inputs.index[one], inputs.size, inputs.padding) if isinstance(inputs, OneHot) else inputs[:, one]
    weights = None if outer.weights is None else outer.weights[one]
    return replace(outer, inputs=cut, gradients=outer.gradients[k : k + 1, :, one], weights=weights)


def _size(row: LayerEvidence) -> float:
    """Root of the sum over positions of ``|a|^2 |g|^2``: the size without cancellation between positions."""
    if isinstance(row, Tied):
        return math.hypot(*map(_size, row.parts))
    squares = row.gradients[0].double().square().sum(-1)  # (G, 1, r)
    if isinstance(row.inputs, OneHot):
        return float(squares.sum().sqrt())
    return float((squares * (row.inputs.double().square().sum(-1) + row.bias)).sum().sqrt())


def _dtype(site: Site) -> torch.dtype:
    return real_dtype(next(iter(site.parameters.values())))
