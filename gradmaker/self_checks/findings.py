"""The findings of the self-checks, and their errors and warnings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import nn

from gradmaker.capture.arrangement import Key
from gradmaker.capture.rules.calls import Order
from gradmaker.errors import SelfCheckError, SelfCheckWarning

__all__ = ["Findings", "report"]


@dataclass
class Findings:
    """The findings of one run of the checks."""

    orders: dict[Key, Order | None] = field(default_factory=dict)  # None: examples mix in this call, or have no axis
    unseen: dict[str, str] = field(
        default_factory=dict
    )  # parameters with uses outside of the calls of their layers, and what was found
    direct: dict[str, str] = field(default_factory=dict)  # parameters without a rule whose repeated call gives another gradient
    without_gradient: set[str] = field(default_factory=set)  # in this pass, which proves nothing of these
    notes: dict[str, str] = field(default_factory=dict)
    undivided: int = 0  # the number of examples, if the outputs do not fall into as many equal parts
    ungrouped: bool = False  # whether the rows of an example in the calls are not those of an example of the inputs

    @property
    def joint(self) -> bool:
        """Whether examples mix in every call."""
        return bool(self.orders) and all(order is None for order in self.orders.values())

    def grouped(self, right: bool | None, strict: bool) -> None:
        """Record whether rows are grouped like the examples of the inputs; None: unchecked. SelfCheckError if ``strict``."""
        if right is None:
            self.notes["groups"] = "which rows are those of one example could not be checked against the inputs"
        self.ungrouped = right is False
        if self.ungrouped and strict:
            raise SelfCheckError(
                "the rows that would count as one example are not computed from one example of the inputs, as where "
                "positions or views are laid out before the examples: lay the outputs and the layers out with the examples "
                "first (or all time first), say by batch_axis= where they are in the inputs, or choose sharing='expand', "
                "which does not group rows"
            )


def report(findings: Findings, names: dict[nn.Module, str], costly: bool, strict: bool, said: set[str]) -> None:
    """Report findings: an error if ``strict``, else a warning, once, if they cost time or change how a parameter is measured.

    names: of modules. costly: whether examples that mix are measured with a pass for each. said: earlier lines; extended here
    """
    apart = sorted({names.get(key[0], type(key[0]).__name__) for key, order in findings.orders.items() if order is None})
    lines = [f"{name}: {found}" for name, found in {**findings.unseen, **findings.direct}.items()]
    if apart and findings.joint:
        lines.append("in every layer the examples of the batch depend on each other: the batch is measured as one example")
    if findings.ungrouped:
        lines.append("the rows of examples could not be found: each example is evaluated alone")
    elif apart and not findings.joint:
        lines += [f"{name}: no axis of its outputs holds the examples, or they depend on each other" for name in apart]
    if findings.undivided:
        lines.append(
            f"the outputs that enter the loss do not fall into {findings.undivided} equal parts, one for each example: the "
            "batch is measured as one example"
        )
    if not lines:
        return
    text = "; ".join(lines)
    if strict:
        raise SelfCheckError(
            f"{text}. With self_check='fallback' such parameters are measured by derivatives of their own, with one backward "
            "pass for each example and output; ignore= leaves them out; batch_axis= says where the examples are"
        )
    fresh = [line for line in lines if line not in said]
    said.update(lines)
    if fresh and (costly or findings.unseen):
        cost = "; this takes a backward pass for each example and each column of the output" if costly else ""
        warnings.warn(f"self-check: {'; '.join(fresh)}{cost}", SelfCheckWarning, stacklevel=2)
