"""The curvature of a whole loss at its outputs, for losses with other terms than the recognised ones, or none of these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmaker.capture.arrangement import Structure
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.errors import SelfCheckError
from gradmaker.loss.autograd_terms import Output, autograd_terms
from gradmaker.loss.head import Head
from gradmaker.passes.graph import Graph
from gradmaker.self_checks.checks import WHOLE, SelfChecks
from gradmaker.self_checks.loss import ADVICE, check_curvature, check_gradient, ends, gradient_error, half

__all__ = ["Whole"]

NONE = "no recognised loss was called"
CONVEX = "setup_logits_repr names what the loss is a convex function of"
COST = "one product with the Hessian of the loss, without the model, for each entry of an output that others depend on"


class Whole:
    """Gives a pass the head that explains its whole loss, and keeps for each structure which outputs these are."""

    def __init__(self, checks: SelfChecks, reduction: str) -> None:
        """reduction: of a loss that is not recognised"""
        self.checks, self.reduction = checks, reduction
        self._runs = 0

    def explain(self, tape: Tape, head: Head, bare: Head, output_gradients: OutputGradients, checked: bool) -> Head:
        """The given head, or one of the whole loss. SelfCheckError if that cannot be formed.

        bare: without the recognised terms. output_gradients: of the whole loss. checked: whether to check this pass
        """
        structure = tape.structure(head.outputs)
        known = self.checks.arrangement.whole.get(structure)
        if known is not None:
            return self._autograd_head(tape, bare if known == "outputs" else head)
        reason = NONE if not head.terms else self._missing(tape, head, output_gradients) if checked else None
        return head if reason is None else self._explaining_head(tape, head, bare, output_gradients, structure, reason)

    def is_partial(self, tape: Tape, head: Head, output_gradients: OutputGradients | None) -> bool:
        """Whether the recognised terms are not all of the loss, as far as is known: their weights are not those of examples.

        output_gradients: of the whole loss, for a pass that is to be checked
        """
        structure, own = tape.structure(head.outputs), self.checks.arrangement
        if head.terms and output_gradients is not None and structure not in own.partial:
            found = tape.vjp(head.outputs, [s.unsqueeze(0) for s in head.loss_gradients])
            error, limit = gradient_error(found, output_gradients)
            if error > limit:
                own.partial.add(structure)
        return structure in own.partial or structure in own.whole

    def products(self, tape: Tape, graph: Graph, bare: Head) -> None:
        """Require that products with an unrecognised loss can be formed at the outputs of the model. SelfCheckError if not."""
        try:
            found = self._autograd_head(tape, bare)
        except SelfCheckError as error:
            raise SelfCheckError(f"{NONE}, and {error}; {CONVEX}") from error
        assert found.known is not None
        left = graph.take(found.terms, found.known)
        if left > (5e-2 if half(found.outputs) else 1e-3):
            raise SelfCheckError(f"{NONE}, and {left:.1e} of its gradient does not go through the model's outputs; {CONVEX}")
        self._say(NONE, found)

    def _missing(self, tape: Tape, head: Head, output_gradients: OutputGradients) -> str | None:
        """What the recognised terms miss of the loss; None if nothing."""
        generator = self._generator()
        try:
            check_gradient(head, tape.vjp(head.outputs, [s.unsqueeze(0) for s in head.loss_gradients]), output_gradients)
            unchecked = check_curvature(head, generator)
        except SelfCheckError as error:
            return str(error).removesuffix(f": {ADVICE}")
        if unchecked:
            self.checks.arrangement.notes["loss"] = unchecked
        return None

    def _explaining_head(
        self, tape: Tape, head: Head, bare: Head, output_gradients: OutputGradients, structure: Structure, reason: str
    ) -> Head:
        """The head of the whole loss at the outputs of the recognised terms, or else at those of the model."""
        failures = []
        for name, source in (("terms", head), ("outputs", bare)):
            if not source.outputs or (name == "terms" and not head.terms):
                continue
            try:
                found = self._autograd_head(tape, source)
                _prove(tape, found, output_gradients)
            except SelfCheckError as error:
                failures.append(str(error))
                continue
            self.checks.arrangement.whole[structure] = name
            self._say(reason, found)
            return found
        tried = "; ".join(dict.fromkeys(failures)) or "the model returns no output that it could be a function of"
        raise SelfCheckError(f"{reason}. No other outputs serve, since {tried}: {ADVICE}")

    def _autograd_head(self, tape: Tape, source: Head) -> Head:
        """A head with the terms of the whole loss at the outputs of another."""
        assert source.loss is not None
        axes: dict[int, list[int]] = {}
        for t in source.terms:
            axes.setdefault(id(t.z), []).extend(() if t.axis is None else (t.axis,))
        outputs = [
            Output(z, tuple(dict.fromkeys((*axes.get(id(z), ()), z.ndim - 1, min(1, z.ndim - 1)))))
            for z in _ends_of(source.loss, list({id(z): z for z in source.outputs}.values()))
        ]
        if not outputs:
            raise SelfCheckError("the loss does not depend on an output of the model")
        n = max(tape.batch, 1)
        M = source.terms[0].denominator if source.terms else outputs[0].z.new_tensor(self._count(n), dtype=torch.float64)
        terms, loss_gradients = autograd_terms(source.loss, outputs, n, M, self._generator())
        return Head([o.z for o in outputs], terms, source.loss, source.recorder, loss_gradients, whole=True)

    def _count(self, n: int) -> float:
        return float(n) if self.reduction == "mean" else 1.0

    def _generator(self) -> torch.Generator:
        self._runs += 1
        return torch.Generator().manual_seed((self.checks.seed * 1000003 + self._runs) % 2**63)

    def _say(self, reason: str, found: Head) -> None:
        shapes = ", ".join(str(tuple(z.shape)) for z in found.outputs)
        text = f"{reason}; the Hessian of the whole loss in outputs of shape {shapes} is taken instead: it costs {COST}"
        self.checks.say(WHOLE, text)


def _ends_of(loss: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs on which the loss depends other than through further outputs."""
    if not outputs:
        return []
    loss_gradients = torch.autograd.grad(loss, list(outputs), retain_graph=True, allow_unused=True)
    return ends([z for z, s in zip(outputs, loss_gradients, strict=True) if s is not None])


@torch.no_grad()
def _prove(tape: Tape, head: Head, output_gradients: OutputGradients) -> None:
    """SelfCheckError unless the loss acts on the layers only through these outputs, and has a curvature in them."""
    error, limit = gradient_error(tape.vjp(head.outputs, [s.unsqueeze(0) for s in head.loss_gradients]), output_gradients)
    if error > limit:
        shapes = ", ".join(str(tuple(z.shape)) for z in head.outputs)
        raise SelfCheckError(
            f"{error:.1e} of the gradient in the layers does not come through the output of shape {shapes}, as where an "
            "activation inside of the model is penalised"
        )
    drawn = torch.Generator().manual_seed(0)
    if not any(bool(t.multiply(torch.randn(t.z.shape, generator=drawn).to(t.z)).any()) for t in head.terms):
        raise SelfCheckError("the loss has no curvature at its outputs, of which it is linear or piecewise linear")
