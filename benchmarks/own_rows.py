"""Rows of this library in the comparison: methods with their options, and explicit intervals for each kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from workloads import Case

from gradmaker import METHODS
from gradmaker.curvature import FisherEmp, FisherMC

KINDS = ("plain", "stat", "T1", "T10")
"""Steps that neither measure nor refresh, that measure, that do both, and of which every tenth does both."""
NEVER = 10**9
RATE = 1e-4  # of timed steps, small so that they do not diverge

Step = Callable[[], None]
Make = Callable[[Case, str, float], Step]


@dataclass(frozen=True)
class Row:
    """What is compared: `make(case, kind, learning rate)` is a function that makes one step of training."""

    name: str
    family: str
    library: str
    make: Make
    kinds: tuple[str, ...] = KINDS
    note: str = ""


def intervals(kind: str, refresh: bool = True) -> dict[str, int]:
    """Both intervals of a kind of step. refresh: whether the method has one of its preconditioner"""
    measure, own = {"plain": (NEVER, NEVER), "stat": (1, NEVER), "T1": (1, 1), "T10": (10, 10)}[kind]
    return {"curvature_interval": measure} | ({"preconditioner_interval": own} if refresh else {})


@dataclass(frozen=True)
class Own:
    """A method with its options; the intervals come from the kind of step."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    clocks: str = "both"  # both intervals, only that of measurements, or none: everything at every step
    momentum: float = 0.9  # of SGD on top: for methods without an average of their own

    def config(self, kind: str) -> Any:
        """Its config with explicit intervals."""
        given = {} if self.clocks == "none" else intervals(kind, self.clocks == "both")
        return METHODS[self.method].Config(**{**self.options, **given})

    def maker(self, case: Case, kind: str) -> Any:
        return METHODS[self.method](case.model, self.config(kind))

    def __call__(self, case: Case, kind: str, rate: float) -> Step:
        """A step of the protocol with SGD on top."""
        maker = self.maker(case, kind)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=rate, momentum=self.momentum)

        def step() -> None:
            optimizer.zero_grad()
            declare(maker, case)
            maker.forward_and_backward()
            optimizer.step()

        return step


def declare(maker: Any, case: Case) -> None:
    """Declare the passes of a step."""
    y = maker.setup_model_call(case.model, case.x)
    if case.tokens:
        maker.setup_loss_call(F.cross_entropy, y.flatten(0, 1), case.t.flatten())
    else:
        maker.setup_loss_call(F.cross_entropy, y, case.t)


def sgd(case: Case, kind: str, rate: float) -> Step:
    """The reference: SGD with momentum."""
    return of_torch(lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9))(case, kind, rate)


def of_torch(make: Callable[[Any, float], torch.optim.Optimizer]) -> Make:
    """Steps of an optimizer alone, made of parameters and a learning rate."""

    def made(case: Case, kind: str, rate: float) -> Step:
        optimizer = make(list(case.model.parameters()), rate)

        def step() -> None:
            optimizer.zero_grad()
            case.loss(case.model(case.x)).backward()
            optimizer.step()

        return step

    return made


def _own(name: str, family: str, method: str, kinds: tuple[str, ...] = KINDS, **given: Any) -> Row:
    made = {key: given.pop(key) for key in ("clocks", "momentum") if key in given}
    return Row(name, family, "gradmaker", Own(method, given, **made), kinds)


MC, EMP = FisherMC(samples=1), FisherEmp()
EVERY = ("T1",)
OWN = (
    _own("kfac", "kfac", "kfac", fisher=MC, warmup_steps=0),
    _own("kfac-emp", "kfac", "kfac", fisher=EMP, warmup_steps=0),
    _own("kfac-decay0", "kfac0", "kfac", fisher=MC, decay=0.0, warmup_steps=0),
    _own("kfac-emp-decay0", "kfac0", "kfac", fisher=EMP, decay=0.0, warmup_steps=0),
    _own("skfac", "kfac0", "skfac", ("plain", "T1", "T10"), fisher=MC, warmup_steps=0),
    _own("ekfac", "ekfac", "ekfac", fisher=MC, warmup_steps=0),
    _own("shampoo", "shampoo", "shampoo", warmup_steps=0),
    _own("soap", "soap", "soap", momentum=0.0),
    _own("caspr", "caspr", "caspr", momentum=0.0, warmup_steps=0),
    _own("kl_shampoo", "kl_shampoo", "kl_shampoo", momentum=0.0),
    _own("kradagrad_star", "kradagrad", "kradagrad_star", warmup_steps=0),
    _own("psgd_whiten", "psgd_whiten", "psgd_whiten", ("plain", "T1", "T10"), geometry="QUAD"),
    _own("psgd_kf", "psgd_kf", "psgd_kf", ("plain", "T1", "T10")),
    _own("kbfgs", "kbfgs", "kbfgs", ("plain", "T1", "T10"), momentum=0.0),
    _own("seng", "seng", "seng", ("plain", "T1", "T10")),
    _own("smw_ng", "smw_ng", "smw_ng", EVERY, clocks="none"),
    _own("muon", "muon", "muon", EVERY, clocks="none", momentum=0.0),
    _own("muon-bf16", "muon", "muon", EVERY, clocks="none", momentum=0.0, half=True, iteration="polar_express"),
    _own("adam", "adam", "adam", EVERY, clocks="none", momentum=0.0),
    _own("adagrad", "adagrad", "adagrad", EVERY, clocks="none", momentum=0.0),
)
