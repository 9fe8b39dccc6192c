"""Configuration of a method: a frozen dataclass, which a mapping or a YAML file can spell."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from gradmaker.block_options import RARE, BlockOptions
from gradmaker.capture.shapes import ShapePolicy
from gradmaker.capture.sites import Site
from gradmaker.curvature import CURVATURES, LIKELIHOODS, Curvature, Likelihood
from gradmaker.grafting import GRAFTINGS, Grafting
from gradmaker.groups import Group, read_groups, read_method
from gradmaker.options.checks import check_choice, check_count, check_interval, check_kind
from gradmaker.options.deprecations import RENAMED_OPTIONS, RenamedOptions, current_name, warn_of
from gradmaker.options.rules import Rule, check_rule
from gradmaker.options.suggestions import did_you_mean
from gradmaker.options.yaml_text import parse_yaml
from gradmaker.precision import Precision
from gradmaker.presets import Presets, expanded
from gradmaker.representations import REPRESENTATIONS, Representation
from gradmaker.schedule import FAR, SCHEDULES, Schedule, as_schedule
from gradmaker.solvers import SOLVERS, AdaptiveDamping, Solver
from gradmaker.triple import Triple
from gradmaker.usage import Usage

if TYPE_CHECKING:
    from gradmaker.trust_region.policy import TrustRegion

__all__ = ["COVERS_ALL", "ONE_BLOCK", "GradientConfig", "build", "read_mapping"]

COVERS_ALL = {"fallback": "every parameter is covered; leave some out with ignore="}
ONE_BLOCK = {"stagger": "all parameters are one block, refreshed at once; preconditioner_interval says how often"}
INTERVALS = ("curvature_interval", "preconditioner_interval", "warmup_steps", "stagger")
OF_A_FALLBACK = ("damping", "decay", "beta1", "nesterov_average", "grafting", "grafting_decay", *INTERVALS)
"""Options for which a fallback keeps its own values; it shares all others with the method."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class GradientConfig(metaclass=RenamedOptions):
    """Options that every method has; a method adds its own fields, and chooses the parts for a site by `triple`."""

    damping: float | None = 1e-3
    """Tikhonov damping in units of the curvature, or the ridge or epsilon of the method's formula."""
    decay: float | None = 0.95
    """Weight of the OLD statistic in the running average; 0 keeps the current batch only, None sums."""
    beta1: float = 0.0
    """Decay of a bias-corrected average of gradients, preconditioned in their place: ``m <- beta1 m + (1 - beta1) g``."""
    nesterov_average: bool = False
    """Whether the newest gradient enters that average twice (Nesterov)."""
    curvature_interval: int | Schedule = 1
    """Steps between measurements of the curvature."""
    preconditioner_interval: int | Schedule = 1
    """Steps between refreshes of the preconditioner."""
    warmup_steps: int = 0
    """Before this step, every step measures the curvature and refreshes the preconditioner."""
    start_step: int = 0
    """Before this step statistics accumulate, and ``.grad`` keeps the plain gradient, or gets the step of a grafted method."""
    stagger: bool = True
    """Whether the refreshes of different blocks are staggered over the interval, instead of all at one step."""
    ignore: tuple[Rule, ...] = ()
    """Modules, classes and name patterns (``'head.*'``) that keep their plain gradient."""
    fallback: str | Mapping[str, Any] | GradientConfig = "gradient"
    """Method for parameters that this one does not cover: a name, a mapping with a method and its options, or a config."""
    groups: Mapping[Rule | tuple[Rule, ...], Any] | tuple[Group, ...] = ()
    """Methods by name pattern, as ``{"*.embed*": "adam", "*": "soap"}``: the first match decides, none is an error."""
    grafting: str = "none"
    """Length of each block's result: none (unchanged), keep (the gradient's), or a name of `GRAFTINGS` (grafting)."""
    grafting_decay: float = 0.999
    """Weight of the OLD second moment of a grafted Adam or RMSProp (Google and Meta: 0.999, but 0.99 for Meta's RMSProp)."""
    max_dim: int = 8192
    """Axes longer than this get a diagonal factor; a dense block larger than this is refused."""
    dtype: str | torch.dtype | None = None
    """dtype of statistics and solves: float32 or float64; None: that of the parameters, at least float32."""
    failures_allowed: int | None = 3
    """How many refreshes of a block may fail in a row before an error, each keeping the last good root; None: any number."""
    seed: int = 0
    """Seed of sampled targets and probes."""
    likelihood: Likelihood | None = None
    """Likelihood of the model's outputs, for a loss that is not recognised."""
    loss_reduction: str = "mean"
    """How an unrecognised loss reduces over examples: mean or sum (needed by the empirical Fisher)."""

    batch_axis: int = 0
    """The axis of the model's first tensor argument that holds the examples: 0, or 1 where time comes first."""
    self_check: str = "fallback"
    """On a layer that fails a self-check: fallback (measure it correctly, more slowly), error, or off (no checks)."""

    per_tensor: ClassVar[bool] = False
    """Whether the method preconditions each parameter tensor alone, instead of layers."""
    joint_bias: ClassVar[bool] = True
    averaging: ClassVar[str] = "corrected"
    """Form of the running averages of statistics; an option of `RootedGradientConfig`."""
    refreshes_in_warmup: ClassVar[bool] = True
    """Whether every step before `warmup_steps` is a refresh; else the warm-up is one of measurements alone."""
    of_the_maker: ClassVar[tuple[str, ...]] = (
        *("ignore", "fallback", "groups", "max_dim", "dtype", "failures_allowed", "seed", "likelihood", "loss_reduction"),
        *("batch_axis", "self_check", "start_step"),
    )
    """Options that act on all groups alike, so that the config of a group leaves them at their defaults."""
    usage: ClassVar[Usage] = Usage()
    """Defaults of `gradmaker.optimizer`; a property where options decide."""
    presets: ClassVar[Presets] = {}
    """Named options, for ``preset=`` in mappings, YAML and `gradmaker.optimizer`; options that are given override them."""
    slow_part: ClassVar[bool] = False
    """Whether `preconditioner_interval` is for a slow part of statistics; blocks without one refresh at every measurement."""
    shapes: ClassVar[ShapePolicy | None] = None
    """How `per_tensor` methods cut tensors into blocks; None leaves them whole."""
    renamed_options: ClassVar[dict[str, str]] = {}
    """Earlier names of options of this method, with their present names, beside those of all methods."""
    inapplicable: ClassVar[dict[str, str]] = {}
    """Options without effect in this method, with the reason and a way out: only their defaults are accepted."""
    only_with: ClassVar[dict[str, dict[str, Any]]] = {}
    """Options with an effect only beside one value of another, or one of several, or, with ``bool``, where it is set."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name in PARTS):
            object.__setattr__(self, name, _part(name, getattr(self, name)))
        if self.damping is not None or type(self).damping is not None:
            check_interval("damping", self.damping, 0, math.inf, closed=True)
        if self.decay is not None:
            check_interval("decay", self.decay, 0, 1, closed=True, hint=", or None to sum")
        check_interval("beta1", self.beta1, 0, 1, closed=True)
        check_interval("grafting_decay", self.grafting_decay, 0, 1, closed=True)
        if self.failures_allowed is not None:
            check_count("failures_allowed", self.failures_allowed, 0)
        as_schedule("curvature_interval", self.curvature_interval)
        as_schedule("preconditioner_interval", self.preconditioner_interval)
        for name, least in (("warmup_steps", 0), ("start_step", 0), ("max_dim", 1)):
            check_count(name, getattr(self, name), least)
        check_choice("grafting", self.grafting, ["none", *GRAFTINGS])
        check_choice("loss_reduction", self.loss_reduction, ["mean", "sum"])
        check_choice("self_check", self.self_check, ["fallback", "error", "off"])
        check_count("batch_axis", self.batch_axis, 0)
        for name, kind in (("stagger", bool), ("nesterov_average", bool), ("seed", int)):
            check_kind(name, getattr(self, name), kind)
        self.statistics_dtype()
        object.__setattr__(self, "ignore", _rules(self.ignore))
        if isinstance(self.fallback, (Mapping, GradientConfig)):
            object.__setattr__(self, "fallback", read_method("fallback", self.fallback, self, build))
        object.__setattr__(self, "groups", read_groups(self.groups, self, build) if self.groups else ())
        self._refuse_inapplicable()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old in inspect.get_annotations(cls):
            if (new := RENAMED_OPTIONS.get(old)) is not None and hasattr(cls, new):
                raise TypeError(f"{cls.__name__}.{old}: this option is {new!r} now; set {new}")

    if not TYPE_CHECKING:  # a type checker should report wrong names

        def __getattr__(self, name: str) -> Any:
            """An option by its earlier name. AttributeError for any other name."""
            if (new := current_name(type(self), name)) == name:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            warn_of(name, new)
            return getattr(self, new)

    @property
    def steps_of_refresh(self) -> int | None:
        """Number of steps that one refresh serves; None where it changes."""
        interval = self.preconditioner_interval
        return None if isinstance(interval, Schedule) else interval

    def grafting_rule(self) -> Grafting | None:
        """The grafting rule that `grafting` names, with `grafting_decay`."""
        return None if self.grafting == "none" else GRAFTINGS[self.grafting].decaying(self.grafting_decay)

    def block_options(self, method: str, common: GradientConfig) -> BlockOptions:
        """The options that its blocks read.  method: its name in the plan; common: the config whose options fallbacks share"""
        return BlockOptions(
            method=method,
            decay=self.decay,
            averaging=self.averaging,
            beta1=self.beta1,
            nesterov_average=self.nesterov_average,
            grafting=self.grafting_rule(),
            max_dim=common.max_dim,
            dtype=common.statistics_dtype(),
            precision=self.precision(),
            slow_part=self.slow_part,
            turns_average=as_schedule("preconditioner_interval", self.preconditioner_interval).interval(FAR) >= RARE,
        )

    @abstractmethod
    def triple(self, site: Site) -> Triple | None:
        """The triple for a site; None if the method does not cover it."""

    def inapplicable_options(self) -> dict[str, str]:
        """Options without effect, with the reason: those of the method and those of the parts that it was given."""
        parts = [getattr(self, f.name) for f in fields(self) if f.name in ("curvature", "fisher", "representation", "solver")]
        found = {name: reason for part in (self, *parts) for name, reason in part.inapplicable.items()}
        if self.nesterov_average and not self.beta1:
            found["nesterov_average"] = "there is no average of gradients; set beta1"
        if self.grafting_decay != type(self).grafting_decay and not ((rule := self.grafting_rule()) and rule.decays):
            found["grafting_decay"] = (
                f"grafting={self.grafting!r} has no second moment that decays; those of adam and rmsprop do"
            )
        for name, others in self.only_with.items():
            for other, wanted in others.items():
                value = getattr(self, other)
                if wanted is bool and not value:
                    found[name] = f"set {other} as well"
                elif wanted is not bool and value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                    found[name] = f"it goes with {other}={wanted!r}"
        return found

    def _refuse_inapplicable(self) -> None:
        """ValueError for an option that was given and would have no effect."""
        defaults = {f.name: f.default for f in fields(self)}
        plain = self.fallback == defaults["fallback"] and not self.groups
        for name, reason in self.inapplicable_options().items():
            value = getattr(self, name)
            of_all = name == "fallback" and bool(self.groups)
            if value != defaults[name] and not of_all and (plain or name in OF_A_FALLBACK or name == "fallback"):
                raise ValueError(f"{name}={value!r} would have no effect: {reason}")

    def check_sites(self, sites: Sequence[Site]) -> None:
        """ValueError for an option about layers that the model does not have."""

    def statistics_dtype(self) -> torch.dtype | None:
        """`dtype` as a torch.dtype."""
        return as_dtype("dtype", self.dtype, DTYPES)

    @property
    def first_step(self) -> int:
        """The first step whose ``.grad`` becomes ``P g``."""
        return self.start_step

    def precision(self) -> Precision:
        """dtypes of the refresh and of the application, where they differ from that of the statistic."""
        return Precision()

    def trust_region(self, model: nn.Module) -> TrustRegion | None:
        """The trust region of a maker of this model; None for methods without options of one."""
        return None


def _rules(ignore: Any) -> tuple[Any, ...]:
    """The rules of ``ignore`` as a tuple. ValueError for what is not a sequence of rules."""
    if not isinstance(ignore, (tuple, list)):
        raise ValueError(f"ignore={ignore!r}: expected a sequence, as in ignore=({ignore!r},)")
    for rule in ignore:
        check_rule("ignore", rule)
    return tuple(ignore)


def as_dtype(name: str, value: str | torch.dtype | None, legal: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """A torch.dtype from its name or itself. ValueError for one that is not in the mapping."""
    if value is None or value in legal.values():
        return value  # type: ignore[return-value]
    if value not in legal:
        raise ValueError(f"{name}={value!r}: {did_you_mean(value, legal, ', or None')}")
    return legal[value]  # type: ignore[index]


# ------------------------------------------------------------------ mappings and YAML
PARTS: dict[str, tuple[Mapping[str, Any], Any]] = {
    "curvature": (CURVATURES, Curvature),
    "fisher": (CURVATURES, Curvature),
    "representation": (REPRESENTATIONS, Representation),
    "solver": (SOLVERS, Solver),
    "likelihood": (LIKELIHOODS, (Likelihood, NoneType)),
    "adaptive_damping": ({"AdaptiveDamping": AdaptiveDamping}, (AdaptiveDamping, NoneType)),
    "curvature_interval": (SCHEDULES, (Schedule, int)),
    "preconditioner_interval": (SCHEDULES, (Schedule, int)),
}
"""Config keys whose value is a part, or names one: ``FisherMC(samples=2)``, ``{FisherMC: {samples: 2}}``, ``FisherMC``."""


def build(make: Any, given: Mapping[str, Any], what: str) -> Any:
    """Make a dataclass from a mapping. ValueError for an unknown key, with the closest match and all legal keys."""
    given, legal = expanded(make, given, what), [f.name for f in fields(make)]
    for key in given:
        if current_name(make, key) not in legal:
            raise ValueError(f"{what} has no option {key!r}: {did_you_mean(key, legal)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return make(**values)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def _part(key: str, value: Any) -> Any:
    """A part from an instance, its name, or its name with options. ValueError for an unknown name or option."""
    registry, kind = PARTS[key]
    if isinstance(value, kind):
        return value
    given = {value: {}} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or len(given) != 1 or not isinstance(next(iter(given.values())) or {}, Mapping):
        example = next(iter(registry))
        raise ValueError(f"{key}={value!r}: expected one name with its options, as in {key}: {{{example}: {{...}}}}")
    ((name, options),) = given.items()
    if name not in registry:
        raise ValueError(f"{key}: {name!r} is unknown: {did_you_mean(name, registry)}")
    return build(registry[name], options or {}, name)


def read_mapping(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A mapping from a mapping or a YAML file. FileNotFoundError, or ValueError for a file that holds none."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a YAML file, or a mapping like {{'method': 'kfac'}}")
    loaded = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping with the key 'method', got {type(loaded).__name__}")
    return loaded
