"""When the self-checks run, on which passes, and what follows from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from gradmaker.capture.arrangement import Arrangement, Key, Structure
from gradmaker.capture.rules.calls import Order
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.errors import SelfCheckWarning
from gradmaker.loss.head import Head
from gradmaker.reentrant import nodes
from gradmaker.self_checks.examples import check_examples, vjp_pair
from gradmaker.self_checks.findings import Findings, report
from gradmaker.self_checks.groups import Inputs, check_groups
from gradmaker.self_checks.loss import check_curvature, check_gradient
from gradmaker.self_checks.rest import check_rest
from gradmaker.self_checks.uses import check_uses

__all__ = ["OUTSIDE", "WHOLE", "SelfChecks"]

WHOLE, OUTSIDE = "loss by autograd", "outside of the curvature"
"""Keys of notes about the loss."""

TRIES = 3
"""Passes of one structure that are checked while some layers have no gradient, as behind weights that are zero."""
PROVEN = TRIES + 1
PIECE = 2**16
"""Entries of a tensor that are compared at a time."""
SELECTING = (
    "IndexBackward",
    "MaskedSelect",
    "IndexSelect",
    "IndexAdd",
    "IndexPut",
    "ScatterAdd",
    "ScatterBackward",
    "TakeBackward",
)
"""Autograd nodes that move rows by data: behind them, equal sizes prove nothing for the next batch."""


class SelfChecks:
    """The self-checks of one maker, and the arrangement of examples that they prove."""

    def __init__(self, model: nn.Module, mode: str, seed: int) -> None:
        """mode: ``fallback``, ``error`` or ``off``"""
        self.model, self.mode, self.seed = model, mode, seed
        self.arrangement = Arrangement()
        self._runs = 0
        self._reported: set[str] = set()

    def arrange(self, tape: Tape, head: Head) -> Structure:
        """Apply what is known of passes of this structure to a tape and a head. Returns the structure."""
        structure = tape.structure(head.outputs)
        if (structure in self.arrangement.last) != (head.order == "last"):
            head.turn()
        tape.ungrouped = structure in self.arrangement.ungrouped
        mixed = tape.ungrouped or structure in self.arrangement.joint
        tape.joint = mixed or (tape.batch > 1 and not head.divides(tape.batch))
        return structure

    def proven(self, modules: Sequence[nn.Module]) -> bool:
        """Whether some of these modules were in a pass that is checked completely, or in a call whose examples were found."""
        own = self.arrangement
        done = [key for structure, tries in own.checked.items() if tries >= PROVEN for key in structure]
        return any(isinstance(key, tuple) and key[0] == m for key in (*own.orders, *done) for m in modules)

    def due(self, structure: Structure, head: Head) -> bool:
        """Whether passes of this structure are to be checked."""
        if self.mode == "off" or not head.outputs:
            return False
        return self.arrangement.checked.get(structure, 0) < TRIES or _selects(head.outputs)

    def say(self, key: str, text: str) -> None:
        """Warn once for each key, and keep the text for the summary."""
        if key not in self._reported:
            self._reported.add(key)
            warnings.warn(f"self-check: {text}", SelfCheckWarning, stacklevel=2)
        self.arrangement.notes[key] = text

    def run(
        self,
        tape: Tape,
        sites: Sequence[Site],
        head: Head,
        output_gradients: OutputGradients | None,
        explained: bool,
        costly: bool,
        inputs: Inputs | None = None,
        written: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> set[str]:
        """Check a pass. Returns the names of parameters with uses outside of the calls of their layers.

        output_gradients: of the whole loss, if known. explained: whether the terms have to make up the whole loss.
        costly: whether examples that mix are measured with a pass for each. inputs: the model's call, where something that is
        measured groups the rows of examples. written: gradients of the whole loss, where its terms have to explain them
        """
        structure, found = tape.structure(head.outputs), Findings()
        self._runs += 1
        generator = torch.Generator().manual_seed((self.seed * 1000003 + self._runs) % 2**63)
        first = self.arrangement.checked.get(structure, 0) < TRIES
        if tape.batch > 1 and head.divides(tape.batch):
            tape.joint = False
            self._check_examples(tape, sites, head, inputs if first else None, generator, found)
        elif tape.batch > 1:
            found.undivided = tape.batch
        if first:
            self._check_uses(tape, sites, head, output_gradients, explained, generator, found, written)
        self._record(tape, head, structure, found, costly)
        return set(found.unseen)

    def _check_examples(
        self, tape: Tape, sites: Sequence[Site], head: Head, inputs: Inputs | None, generator: torch.Generator, found: Findings
    ) -> None:
        """Find the examples in every call, the order of the rows of outputs that fits the layers, and that of the inputs."""

        def orders() -> dict[Key, Order | None]:
            made = Findings()
            pair, c = vjp_pair(tape, head, generator)
            check_examples(tape, sites, pair, c, made)
            return made.orders

        found.orders = orders()
        several = head.repeats(tape.batch)
        if several and _mixed_calls(found.orders):
            found.orders = self._better_order(head, orders, found.orders)
        if inputs is None or not several or not found.orders or found.joint:
            return
        right = self._are_grouped(tape, sites, inputs, found.orders, generator)
        if right is False:
            before = found.orders
            head.turn()
            other = orders()
            if _mixed_calls(other) <= _mixed_calls(before) and self._are_grouped(tape, sites, inputs, other, generator):
                found.orders, right = other, True
            else:
                head.turn()
        found.grouped(right, inputs.strict)

    def _better_order(
        self, head: Head, orders: Callable[[], dict[Key, Order | None]], before: dict[Key, Order | None]
    ) -> dict[Key, Order | None]:
        """The other order of rows, if it keeps the examples apart in more calls."""
        head.turn()
        other = orders()
        if _mixed_calls(other) < _mixed_calls(before):
            return other
        head.turn()
        return before

    def _are_grouped(
        self,
        tape: Tape,
        sites: Sequence[Site],
        inputs: Inputs,
        orders: dict[Key, Order | None],
        generator: torch.Generator,
    ) -> bool | None:
        with self.arrangement.supposing(orders):
            return check_groups(tape, sites, inputs, generator)

    def _check_uses(
        self,
        tape: Tape,
        sites: Sequence[Site],
        head: Head,
        output_gradients: OutputGradients | None,
        explained: bool,
        generator: torch.Generator,
        found: Findings,
        written: Mapping[nn.Parameter, Tensor] | None,
    ) -> None:
        loss_gradients = head.probes(generator)
        cotangents = [s.unsqueeze(0) for s in loss_gradients]
        vjps = plain = tape.vjp(head.outputs, cotangents)
        if explained and output_gradients is not None:
            check_gradient(head, vjps, output_gradients)
            unchecked = check_curvature(head, generator)
            if unchecked:
                found.notes["loss"] = unchecked
        parameters = list(dict.fromkeys(p for s in sites for p in s.parameters.values()))
        with tape.norms.held():
            vjps = tape.vjp(head.outputs, cotangents) if tape.norms.seen else vjps
            derived = tape.vjp_parameters(head.outputs, loss_gradients, parameters)
        truth: dict[nn.Parameter, Tensor] = dict(zip(parameters, derived, strict=True))
        if written is not None:
            own = tape.vjp_parameters(head.outputs, loss_gradients, parameters) if tape.norms.seen else derived
            _note_outside(sites, dict(zip(parameters, own, strict=True)), written, found)
            del own
        del derived  # `check_uses` releases each when it has compared it
        with self.arrangement.supposing(found.orders):
            check_uses(tape, sites, vjps, truth, found)
            if not explained and output_gradients is not None:
                check_rest(tape, sites, head, plain, output_gradients, found)

    def _record(self, tape: Tape, head: Head, structure: Structure, found: Findings, costly: bool) -> None:
        """Keep the findings in the maker's arrangement."""
        names = {m: name for name, m in self.model.named_modules()}
        report(found, names, costly, self.mode == "error", self._reported)
        own = self.arrangement
        (own.last.add if head.order == "last" else own.last.discard)(structure)
        if found.ungrouped:
            own.ungrouped.add(structure)
        tape.ungrouped = structure in own.ungrouped
        if found.joint or tape.ungrouped:
            own.joint.add(structure)
            tape.joint = True
        else:
            own.joint.discard(structure)
            own.orders.update(found.orders)
        own.direct.update(found.direct, found.unseen)
        own.notes.update(found.direct | found.unseen | found.notes)
        own.checked[structure] = own.checked.get(structure, 0) + 1 if found.without_gradient else PROVEN


def _mixed_calls(orders: dict[Key, Order | None]) -> int:
    """The number of kinds of calls in which examples mix."""
    return sum(order is None for order in orders.values())


def _note_outside(
    sites: Sequence[Site], through: Mapping[nn.Parameter, Tensor], written: Mapping[nn.Parameter, Tensor], found: Findings
) -> None:
    """Note a part of the loss that depends on weights without its outputs, as a penalty: only the gradient shows it."""
    named = {p: name for site in sites for name, p in site.parameters.items()}
    size = max((_norm(written[p]) for p in named if p in written), default=0.0)
    limits = {p: _rounding(p) * max(size, 1e-300) for p in named if p in written}
    apart = [named[p] for p, limit in limits.items() if _norm(written[p], through[p]) > limit]
    if apart:
        found.notes[OUTSIDE] = (
            f"a part of the loss depends on {', '.join(apart)} without going through its outputs, as a penalty of weights "
            "does: it is in the gradient, and outside of the curvature"
        )


def _norm(x: Tensor, y: Tensor | None = None) -> float:
    """``|x - y|`` in float64, by pieces: the copies of a whole gradient would be the most that a first step holds."""
    pieces = x.reshape(-1).split(PIECE)
    differences = pieces if y is None else (a - b for a, b in zip(pieces, y.reshape(-1).split(PIECE), strict=True))
    return sqrt(sum(float(each.abs().double().square().sum()) for each in differences))


def _rounding(p: Tensor) -> float:
    return 5e-2 if p.dtype in (torch.float16, torch.bfloat16) else 1e-8 if p.dtype == torch.float64 else 1e-3


def _selects(outputs: Sequence[Tensor]) -> bool:
    """Whether rows were selected or added up by data in the graph of some outputs."""
    for node in nodes(outputs):
        if node.name().startswith(SELECTING):
            sources = [f for f, _ in node.next_functions if f is not None]
            if any(not f.name().startswith("torch::autograd::AccumulateGrad") for f in sources):
                return True
    return False
