"""The plan: the parts for each parameter of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmaker.blocks import Block
from gradmaker.capture.finding import layer_sites, tensor_sites
from gradmaker.capture.model_checks import check_model, check_parameters, check_watched
from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature
from gradmaker.curvature.base import Need
from gradmaker.options.registry import Method
from gradmaker.options.rules import names, paths
from gradmaker.options.suggestions import did_you_mean
from gradmaker.own_parameters import OwnParameters
from gradmaker.placement import Placement
from gradmaker.representations.roles import PerStep
from gradmaker.scale.ranks import refuse_ranks
from gradmaker.stacking import build_blocks

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The blocks of a model, and the parameters that keep their plain gradient, with the reason.

    due, of its methods: names of the methods that measure in a step; None means all.
    """

    blocks: list[Block]
    plain: dict[str, str]  # name of a parameter: why it keeps its plain gradient
    methods: dict[str, GradientConfig]  # what `Block.method` names: "method", and "fallback" if that has blocks
    own: OwnParameters

    def measured(self, due: Collection[str] | None = None) -> list[Block]:
        """The blocks of these methods."""
        return [b for b in self.blocks if due is None or b.options.method in due]

    def sites(
        self, curvature: Curvature, due: Collection[str] | None = None, served: Set[nn.Parameter] | None = None
    ) -> list[Site]:
        """The sites whose blocks use a curvature.  due: of these methods; served: with these parameters; None: all"""
        found = [s for b in self.measured(due) if b.triple.curvature == curvature for s in b.sites]
        return found if served is None else [s for s in found if not served.isdisjoint(s.parameters.values())]

    def curvatures(self, of_passes: bool, due: Collection[str] | None = None) -> list[Curvature]:
        """The distinct curvatures that are measured with every pass, or once a step."""
        found = dict.fromkeys(b.triple.curvature for b in self.measured(due))
        return [c for c in found if c.of_passes == of_passes]

    @property
    def per_step(self) -> frozenset[Curvature]:
        """Curvatures whose evidence is valid in its step alone: they are measured at every step."""
        return frozenset(b.triple.curvature for b in self.blocks if isinstance(b.triple.representation, PerStep))

    def purposes(self) -> frozenset[str]:
        """Purposes for which a separate batch can be declared."""
        found = {
            "curvature": self.asks("graph") or self.asks("replay"),
            "search": any("search" in b.triple.solver.asks for b in self.blocks),
        }
        return frozenset(purpose for purpose, legal in found.items() if legal)

    def refuse_ranks(self) -> None:
        """RuntimeError for curvatures that several processes would measure differently."""
        if passes := self.curvatures(of_passes=True):
            refuse_ranks(f"{', '.join(type(c).__name__ for c in passes)} is measured on the passes of each rank alone")

    def asks(self, what: Need, due: Collection[str] | None = None) -> bool:
        """Whether any curvature has this need."""
        return any(what in b.triple.curvature.needs for b in self.measured(due))


def make_plan(
    model: nn.Module, config: GradientConfig, methods: Mapping[str, type[Method]], unseen: Set[str] = frozenset()
) -> Plan:
    """Assign every trainable parameter once: to the method, its fallback, or the plain gradient. ValueError if none is covered.

    unseen: names of parameters with uses outside of the calls of their layers
    """
    check_model(model)
    ignored = {p for rule in config.ignore for p in _matches(model, rule)}
    check_parameters(model, ignored)
    empty = {p for p in model.parameters() if p not in ignored and not p.numel()}
    ignored |= empty
    hidden = {p for k, p in model.named_parameters() if k in unseen}
    sites = layer_sites(model, config.joint_bias, ignored, hidden)
    config.check_sites(sites)
    left = {k: p for k, p in model.named_parameters() if p in ignored and p.requires_grad}
    plain = {k: "empty" if p in empty else "ignored" for k, p in left.items()}
    used = {"method": config}
    placements, rest = _place(sites, "method", config, config)
    if not placements:
        kinds = ", ".join(sorted({type(m).__name__ for s in sites for m in s.modules})) or "none but ignored ones"
        raise ValueError(
            f"{type(config).__name__} covers no parameter of this model (modules with trainable parameters: {kinds}"
            f"{'; with uses outside of the calls of their layers: ' + ', '.join(sorted(unseen)) if unseen else ''}). "
            "Methods for any parameter: adam, adagrad, shampoo, unit_ng"
        )
    fallback = _fallback(config, methods)
    if fallback is not None and rest:
        more, rest = _place(rest, "fallback", fallback, config)
        if more and (reason := methods[config.fallback].refuse(model)):
            raise ValueError(f"fallback={config.fallback!r}: {reason}")
        placements += more
        used |= {"fallback": fallback} if more else {}
    plain |= {k: _reason(k, unseen, config) for s in rest for k in s.parameters}
    check_watched(p.site for p in placements if "calls" in p.triple.curvature.needs)
    blocks = build_blocks(placements)
    kept = ignored | {p for s in rest for p in s.parameters.values()}
    own = OwnParameters(model, blocks, {k for k, p in model.named_parameters(remove_duplicate=False) if p in kept})
    return Plan(blocks, plain, used, own)


def _reason(name: str, unseen: Set[str], config: GradientConfig) -> str:
    seen = "has uses outside of its layer's calls" if name in unseen else "not covered"
    return f"{seen}, fallback {config.fallback!r}"


def _matches(model: nn.Module, rule: Any) -> set[nn.Parameter]:
    """The parameters that a rule of ``ignore`` matches, by name or by a module that holds them. ValueError if none does."""
    own: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        own.setdefault(p, []).append(name)
    found = {p for p, path in paths(model).items() if names(rule, path, own[p])}
    if not found:
        modules = dict(model.named_modules())
        legal = {type(m).__name__ for m in modules.values()}
        if not isinstance(rule, type):
            legal = {*modules, *(name for each in own.values() for name in each)}
        hint = did_you_mean(getattr(rule, "__name__", rule), sorted(legal - {""}))
        raise ValueError(f"ignore: {rule!r} matches no parameter: {hint}")
    return found


def _place(sites: list[Site], name: str, method: GradientConfig, common: GradientConfig) -> tuple[list[Placement], list[Site]]:
    """Placements of the sites that a method covers, and the other sites.  name: of the method in the plan"""
    placements, rest, options = [], [], method.block_options(name, common)
    for site in tensor_sites(sites, method.shapes) if method.per_tensor else sites:
        own, triple = site, method.triple(site)
        if site.generic is not None and (triple is None or not triple.holds_ties):
            own, triple = site.generic, method.triple(site.generic)
        if triple is None:
            rest.append(own)
        else:
            placements.append(Placement(own, triple, options))
    return placements, rest


def _fallback(config: GradientConfig, methods: Mapping[str, type[Method]]) -> GradientConfig | None:
    if config.fallback not in methods or config.fallback == "custom":
        legal = [m for m in methods if m != "custom"]
        raise ValueError(f"fallback={config.fallback!r}: {did_you_mean(config.fallback, legal)}")
    made: Any = methods[config.fallback].Config()
    return made if isinstance(made, GradientConfig) else None
