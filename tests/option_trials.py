"""Trials of options: a method with one option away from its default, where that has something to say, and without.

An option has an effect if it changes the weights after some steps. What is refused changes nothing: neither these, nor the
types of the parts, nor the bytes that are held.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.config import GradientConfig
from gradmaker.curvature import (
    Categorical,
    Curvature,
    FisherEmp,
    FisherExact,
    FisherMC,
    FisherRecursive,
    GaussNewton,
    Hessian,
)
from gradmaker.representations import Diagonal, KronDims
from gradmaker.solvers import CG
from gradmaker.solvers.levenberg_marquardt import AdaptiveDamping
from tests import models, oracles
from tests.models import Case
from tests.registry import suited

STEPS = 7
ROUNDING = 1e-8
"""What a refused option may still do: a statistic at another weight is rounded otherwise, and steps enlarge that."""
NAMED = [name for name in METHODS if name != "gradient"]  # which has no options
EVERY: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0}
THIRD = EVERY | {"curvature_interval": 3, "preconditioner_interval": 3}

COMMON: dict[str, list[Any]] = {
    "damping": [0.37],
    "decay": [0.5, 0.0, None],
    "beta1": [0.6],
    "nesterov_average": [True, False],
    "curvature_interval": [3],
    "preconditioner_interval": [3],
    "warmup_steps": [4],
    "start_step": [3],
    "stagger": [False, True],
    "ignore": [("head*",)],
    "fallback": ["adam"],
    "grafting": ["keep", "none"],
    "grafting_decay": [0.5],
    "max_dim": [3],
    "dtype": ["float64"],
    "seed": [5],
    "likelihood": [Categorical(reduction="sum")],
    "loss_reduction": ["sum"],
}
OWN: dict[tuple[str, str], list[Any]] = {
    ("", "clip"): [1e-6],
    ("", "clip_learning_rate"): [10.0],
    ("", "block_size"): [3],
    ("", "root_dtype"): ["float32"],
    ("", "apply_dtype"): ["bfloat16"],
    ("", "max_rows"): [2],
    ("", "window"): [2],
    ("", "pairs"): [1],
    ("", "rank"): [1],
    ("", "memory"): [1],
    ("", "iterations"): [2],
    ("", "dimension"): [2],
    ("", "acceptance"): [10.0],
    ("", "tolerance"): [0.9],
    ("", "elementwise"): [("head*",)],
    ("", "max_skew"): [1.0],
    ("", "scale"): [9.0],
    ("muon", "half"): [True],  # trials are in float64, in which None is False
    ("soap", "skip_first"): [False],
    ("muon", "scale"): ["rms", "nuclear", "none"],
    ("shampoo", "exponent"): [0.5],
    ("caspr", "root"): ["newton", "higher_order", "newton_schulz", "denman_beavers"],  # svd is another rounding: test_caspr.py
    ("seng", "positions"): [1],
    ("seng", "coordinates"): [300],
    ("", "adaptive_damping"): [AdaptiveDamping(interval=1, low=0.99, high=1.01)],
    ("", "curvature_examples"): [2],
    ("", "floor"): [0.5],
    ("", "merge"): ["none", "to_2d"],  # others need weights with an axis for heads: tests/capture/test_shapes.py
    ("one_sided", "merge"): ["greedy"],
    ("psgd_whiten", "grafting"): ["keep", "adam"],  # its bound is not reached here: tests/methods/test_psgd_whiten.py
    ("psgd_whiten", "merge"): ["none"],  # with to_2d the shapes are those of its default here
    ("", "split"): [(("head", 2),)],
    ("", "self_check"): ["off"],
    ("", "batch_axis"): [1],
    ("psgd_whiten", "max_skew"): [None],
    ("caspr_adaptive", "start"): [1.0],
    ("kradagrad", "preconditioner_interval"): [4],
    ("neumann_practical", "alpha"): [1e3],
    ("neumann_practical", "period"): [2],
    ("neumann_practical", "beta"): [0.5],
    ("skfac", "positions"): [2],
    ("newton", "granularity"): ["layer", "diagonal"],
    ("curveball", "rho"): [0.5],
    ("curveball", "beta"): [0.3],
    ("psgd_kf", "geometry"): ["QEP"],
    ("psgd_whiten", "geometry"): ["EQ"],
    ("custom", "curvature"): [FisherEmp()],
    ("custom", "representation"): [KronDims()],
    ("custom", "solver"): [CG()],
}
"""Values of options that are a method's own; by the type of the default where nothing is said. ``""`` is every method."""
PROBES = ("psgd", "psgd_kf", "adahessian", "esgd", "saddle_free_diagonal")
KFAC_FAMILY = [name for name in NAMED if hasattr(METHODS[name].Config, "embeddings")]
ELSEWHERE: dict[tuple[str, str], str] = {
    ("neumann_practical", "rate"): "it is for the weights of `undisplaced` alone: tests/methods/test_options.py",
    **{(method, "mode"): "the same product in another way: tests/methods/test_probes.py" for method in PROBES},
    **{(method, "failures_allowed"): "of what does not happen here: tests/test_failures.py" for method in NAMED},
    **{(method, "embeddings"): "of other models: tests/methods/test_embeddings.py" for method in KFAC_FAMILY},
    **{(method, "groups"): "of several methods: tests/test_method_groups.py" for method in NAMED},
    **{
        (method, name): "of other models and inputs: tests/self_checks/test_structures.py"
        for method in NAMED
        for name in ("self_check", "batch_axis")
        if name not in METHODS[method].Config().inapplicable_options()
    },
}
"""Options that no trial of some steps can show, with the reason and the test that shows them."""
OTHER_PARTS = {
    (method, "root"): "another algorithm for the same root: tests/solvers/test_matrix_roots.py"
    for method in ("shampoo", "one_sided")
}
"""Options that choose another part which gives the same result."""
BESIDE: dict[str, dict[str, Any]] = {
    "decay": EVERY,
    "nesterov_average": {"beta1": 0.5},
    "grafting_decay": {"grafting": "adam"},
    "curvature_interval": EVERY,
    "preconditioner_interval": EVERY,
    "warmup_steps": THIRD,
    "stagger": THIRD | {"curvature_interval": 1},
    "loss_reduction": {"fisher": FisherEmp()},
}
"""Other options that have to be set for one to matter; those that a method does not have or refuses are left out."""
OWN_BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    **{(method, "clip"): {"clip_learning_rate": 1.0} for method in METHODS},
    **{(method, "clip_learning_rate"): {"clip": 1e-6} for method in METHODS},
    **{(method, "rank"): {"window": 3} for method in METHODS},
    ("tonga", "window"): {"rank": 1},
    ("tonga_unit", "window"): {"rank": 1},
    ("skfac", "positions"): {"reduction": "subsample"},
    ("shampoo", "balanced"): {"exponent": 0.5, "grafting": "none"},
    ("seng", "coordinates"): {"coordinates": 1001},
    ("seng", "official"): {"coordinates": 300},
    ("hessian_free", "line_search"): {"damping": 1e-6, "backtrack": False, "adapt": False},
    ("hessian_free", "factor_damping"): {"factors": True, "damping": 1e-6},
    ("ksd", "floor"): {"search": "model"},
    **{(method, "wide_sides"): {"max_dim": 3} for method in METHODS},
    ("full_adagrad", "merge"): {"block_size": 3},
    **{(method, "averaging"): {"grafting": "none", "decay": 0.9} for method in ("shampoo", "one_sided", "caspr")},
    ("curveball", "rho"): {"beta": 0.1},
    ("curveball", "adapt"): {"damping": 10.0},  # so that the model predicts too little
    ("custom", "curvature"): {"representation": Diagonal(granularity="layer")},
    ("custom", "representation"): {"solver": CG()},
}


class Mixed(nn.Module):
    """A convolution, a norm, matrices that are wide and tall, and a parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4)
        self.hidden, self.head = nn.Linear(16, 5), nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))).flatten(1)
        y: Tensor = self.head(torch.tanh(self.hidden(h)) * self.scale)
        return y


def mixed() -> Case:
    return models.build(Mixed, 6, 2, 3, 3)


def chain() -> Case:
    layers = lambda: nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))  # noqa: E731
    return models.build(layers, 6, 9)


def wide() -> Case:
    """More than a million weights, where coordinates are drawn."""
    return models.build(lambda: nn.Linear(1001, 1000), 6, 1001)


def case_of(method: str, config: Any) -> Case:
    if getattr(config, "coordinates", None):
        return wide()
    return chain() if isinstance(getattr(config, "curvature", None), FisherRecursive) else suited(method, mixed, chain)


def attaches(method: str, config: GradientConfig) -> bool:
    """Whether it rides a loop of which it does not see the loss."""
    case = case_of(method, config)
    maker: Any = METHODS[method](case.model, config)
    try:
        maker.attach(torch.optim.SGD(case.model.parameters(), 0.1))
    except ValueError:
        return False
    maker.remove()
    return True


def unknown(y: Tensor, t: Tensor) -> Tensor:
    """A loss that is not recognised."""
    return -y.log_softmax(-1)[torch.arange(len(t)), t].mean()


class Seen(NamedTuple):
    """What a method did; a sentence if it refused."""

    weights: Tensor | None
    parts: tuple[str, ...] = ()
    size: int = 0
    sentence: str = ""

    def same(self, other: Seen, tolerance: float) -> bool:
        if self.weights is None or other.weights is None:
            return self[1:] == other[1:] and self.weights is other.weights
        return self[1:] == other[1:] and oracles.relative_error(self.weights, other.weights) <= tolerance

    def differs(self, other: Seen, tolerance: float) -> bool:
        """Whether the result does: other parts or other bytes that give the same weights are no effect."""
        if self.weights is None or other.weights is None:
            return self.weights is not other.weights or self.sentence != other.sentence
        return oracles.relative_error(self.weights, other.weights) > tolerance


def observe(method: str, config: GradientConfig, loss: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> Seen:
    case = case_of(method, config)
    model, x = case.model.to(dtype), case.x.to(dtype)
    try:
        maker: Any = METHODS[method](model, config)
        for k in range(STEPS):
            model.zero_grad()
            y = maker.setup_model_call(model, x[k % 3 :])
            maker.setup_loss_call(loss, y, case.t.roll(k)[k % 3 :])
            maker.setup_logits_repr(y)
            maker.forward_and_backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=1e-2)
    except ValueError as error:
        return Seen(None, sentence=str(error))
    triples = [block.triple for block in maker.plan.blocks]
    parts = tuple(type(part).__name__ for t in triples for part in (t.curvature, t.representation, t.solver))
    weights = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    return Seen(weights, parts, maker.summary().bytes)


remembered = lru_cache(maxsize=None)(observe)


class Trial(NamedTuple):
    """One option at one value, beside those that it needs."""

    method: str
    fixed: dict[str, Any]  # the triple of `custom`
    option: str
    value: Any

    def base(self) -> dict[str, Any]:
        wanted = {
            k: v
            for k, v in ({"preconditioner_interval": 1, "start_step": 0} | BESIDE.get(self.option, {})).items()
            if k != self.option
        }
        wanted |= OWN_BESIDE.get((self.method, self.option), {})  # maybe with another start for the option itself
        config = METHODS[self.method].Config
        chosen = dict(self.fixed)
        for name, value in wanted.items():
            if name in config.__dataclass_fields__ and accepts(config, {**chosen, name: value}):
                chosen[name] = value
        return chosen

    def run(self) -> None:
        """AssertionError unless the option changes something, or is refused and would change nothing."""
        config: Any = METHODS[self.method].Config
        loss = unknown if self.option in ("likelihood", "loss_reduction") else F.cross_entropy
        dtype, tolerance = (torch.float32, 1e-10) if self.option == "dtype" else (torch.float64, 1e-9)
        base = config(**self.base())
        before = remembered(self.method, base, loss, dtype)
        try:
            other = config(**{**self.base(), self.option: self.value})
        except ValueError as error:
            self.check_refusal(base, before, str(error), loss, dtype)
            return
        after = observe(self.method, other, loss, dtype)
        if self.option == "likelihood" and before.same(after, tolerance):
            assert not attaches(self.method, base) and attaches(self.method, other), f"{self}: accepted and ignored"
            return
        other_parts = (self.method, self.option) in OTHER_PARTS and before.parts != after.parts
        assert other_parts or before.differs(after, tolerance), f"{self}: accepted and ignored"
        assert after.weights is not None or self.option in after.sentence or "that fit" in after.sentence, after.sentence

    def check_refusal(self, base: Any, before: Seen, sentence: str, *rest: Any) -> None:
        assert self.option in sentence.lower() or "that fit" in sentence
        if "would have no effect" not in sentence:
            return  # another reason, with its own test
        assert re.fullmatch(rf"{self.option}=.* would have no effect: .{{20,}}", sentence)
        forced = copy.copy(base)
        object.__setattr__(forced, self.option, self.value)
        assert before.same(observe(self.method, forced, *rest), ROUNDING), f"{self}: refused, but it has an effect"


def accepts(config: type[GradientConfig], options: dict[str, Any]) -> bool:
    try:
        config(**options)
    except ValueError:
        return False
    return True


def values(method: str, name: str) -> list[Any]:
    """Values other than the default."""
    if (method, name) in ELSEWHERE:
        return []
    config = METHODS[method].Config
    default, hint = getattr(config(), name), get_type_hints(config)[name]
    given = OWN.get((method, name)) or COMMON.get(name) or OWN.get(("", name)) or derived(default, hint)
    return [value for value in given if value != default]


def derived(default: Any, hint: Any) -> list[Any]:
    literals = [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]
    if isinstance(default, bool):
        return [not default]
    if literals:
        return literals
    if isinstance(default, int):
        return [max(1, default // 2) if default > 1 else default + 1]
    if isinstance(default, float):
        return [default / 2 if default else 0.25]
    return [FisherEmp(), FisherMC(), FisherExact(), Hessian(), GaussNewton()] if isinstance(default, Curvature) else []


def trials(method: str) -> Iterator[Trial]:
    for name in (f.name for f in fields(METHODS[method].Config)):
        yield from (Trial(method, {}, name, value) for value in values(method, name))


TRIALS = [trial for method in NAMED for trial in trials(method)]


def few(found: list[Trial]) -> list[Trial]:
    """Every option once, with its first value, of methods in turn."""
    chosen: dict[str, Trial] = {}
    for trial in sorted(found, key=lambda t: (t.option, NAMED.index(t.method))):
        mine = [t for t in found if t.option == trial.option and t.value == trial.value]
        chosen.setdefault(trial.option, mine[len(chosen) % len(mine)])
    return list(chosen.values())
