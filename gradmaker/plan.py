"""The plan: the parts for each parameter of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from gradmaker.blocks import Block
from gradmaker.capture.finding import layer_sites, tensor_sites
from gradmaker.capture.model_checks import check_model, check_of_shards, check_parameters, check_watched
from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig, build
from gradmaker.curvature import Curvature
from gradmaker.curvature.base import Need
from gradmaker.groups import OWN, claims, matches, method_name, read_groups
from gradmaker.options.registry import Method
from gradmaker.options.suggestions import did_you_mean
from gradmaker.own_parameters import OwnParameters
from gradmaker.placement import Placement
from gradmaker.scale.ranks import refuse_ranks
from gradmaker.stacking import build_blocks

__all__ = ["FALLBACK", "Plan", "make_plan"]

T = TypeVar("T")

FALLBACK = "fallback"
"""Name in a plan of the method of parameters that no other covers."""


@dataclass(frozen=True)
class Plan:
    """The blocks of a model, and the parameters that keep their plain gradient, with the reason.

    due, of its methods: names of the methods that measure in a step; None means all.
    """

    blocks: list[Block]
    plain: dict[str, str]  # name of a parameter: why it keeps its plain gradient
    methods: dict[str, GradientConfig]  # by what `Block.options.method` names: `OWN`, groups, `FALLBACK`
    own: OwnParameters
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What depends on the plan and the key alone, computed once: not to be changed by who gets it."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def measured(self, due: Collection[str] | None = None) -> list[Block]:
        """The blocks of these methods."""
        if due is None:
            return self.blocks
        return self._once(("measured", frozenset(due)), lambda: [b for b in self.blocks if b.options.method in due])

    def sites(
        self, curvature: Curvature, due: Collection[str] | None = None, served: Set[nn.Parameter] | None = None
    ) -> list[Site]:
        """The sites whose blocks use a curvature.  due: of these methods; served: with these parameters; None: all"""

        def find() -> list[Site]:
            found = [s for b in self.measured(due) if b.triple.curvature == curvature for s in b.sites]
            return found if served is None else [s for s in found if not served.isdisjoint(s.parameters.values())]

        return self._once(
            ("sites", curvature, *(given if given is None else frozenset(given) for given in (due, served))), find
        )

    def curvatures(self, of_passes: bool, due: Collection[str] | None = None) -> list[Curvature]:
        """The distinct curvatures that are measured with every pass, or once a step."""

        def find() -> list[Curvature]:
            return [c for c in dict.fromkeys(b.triple.curvature for b in self.measured(due)) if c.of_passes == of_passes]

        return self._once(("curvatures", of_passes, None if due is None else frozenset(due)), find)

    @property
    def per_step(self) -> frozenset[Curvature]:
        """Curvatures whose evidence is valid in its step alone: they are measured at every step."""
        return self._once(("per_step",), lambda: frozenset(b.triple.curvature for b in self.blocks if b.per_step))

    @property
    def averages(self) -> bool:
        """Whether every step adds its gradient to a running average or to the state of a grafting rule."""
        return self._once(("averages",), lambda: any(b.options.beta1 or b.grafting_state for b in self.blocks))

    def purposes(self) -> frozenset[str]:
        """Purposes for which a separate batch can be declared."""
        found = {
            "curvature": self.asks("graph") or self.asks("replay"),
            "search": any("search" in b.triple.solver.asks for b in self.blocks),
        }
        return frozenset(purpose for purpose, legal in found.items() if legal)

    def refuse_ranks(self) -> None:
        """RefusedError for curvatures that several processes would measure differently."""
        if passes := [c for c in self.curvatures(of_passes=True) if not c.by_parts]:
            refuse_ranks(f"{', '.join(type(c).__name__ for c in passes)} is measured on the passes of each rank alone")

    def asks(self, what: Need, due: Collection[str] | None = None) -> bool:
        """Whether any curvature has this need."""
        key = ("asks", what, None if due is None else frozenset(due))
        return self._once(key, lambda: any(what in b.triple.curvature.needs for b in self.measured(due)))


def make_plan(
    model: nn.Module, config: GradientConfig, methods: Mapping[str, type[Method]], unseen: Set[str] = frozenset()
) -> Plan:
    """Assign every trainable parameter once: to a method, the fallback, or the plain gradient. ValueError if none is covered.

    unseen: names of parameters with uses outside of the calls of their layers
    """
    check_model(model)
    ignored = {p for rule in config.ignore for p in matches(model, rule, "ignore")}
    check_parameters(model, ignored)
    empty = {p for p in model.parameters() if p not in ignored and not p.numel()}
    ignored |= empty
    left = {k: p for k, p in model.named_parameters() if p in ignored and p.requires_grad}
    plain = {k: "empty" if p in empty else "ignored" for k, p in left.items()}
    used, placements, rest, kept = dict[str, GradientConfig](), list[Placement](), list[Site](), set(ignored)
    for share in _shares(model, config, ignored):
        if share.config is None:
            plain |= {k: f"{share.label}: gradient" for k, p in model.named_parameters() if p in share.parameters}
            kept |= share.parameters
            continue
        placed, more = _placed(model, share, config, unseen)
        placements, rest = placements + placed, rest + more
        used[share.name] = share.config
        if placed and share.name != OWN and (reason := methods[share.method].refuse(model)):
            raise ValueError(f"{share.label}: {reason}")
    fallback = _fallback(config, methods)
    if fallback is not None and rest:
        more_placed, rest = _place(rest, FALLBACK, fallback, config)
        if more_placed and (reason := methods[method_name(fallback)].refuse(model)):
            raise ValueError(f"fallback={method_name(fallback)!r}: {reason}")
        placements += more_placed
        used |= {FALLBACK: fallback} if more_placed else {}
    plain |= {k: _reason(k, unseen, config) for s in rest for k in s.parameters}
    check_watched(p.site for p in placements if "calls" in p.triple.curvature.needs)
    curvatures = dict.fromkeys(p.triple.curvature for p in placements)
    check_of_shards(model, [type(c).__name__ for c in curvatures if _reads_weights(c)])
    blocks = build_blocks(placements)
    kept |= {p for s in rest for p in s.parameters.values()}
    own = OwnParameters(model, blocks, {k for k, p in model.named_parameters(remove_duplicate=False) if p in kept})
    return Plan(blocks, plain, used, own)


def _reads_weights(curvature: Curvature) -> bool:
    """Whether a curvature reads weights, differentiates by them, or repeats the loss at others."""
    return bool(curvature.needs & {"graph", "replay", "previous"}) or any(kind.kind == "located" for kind in curvature.gives)


@dataclass(frozen=True)
class _Share:
    """Parameters with one method."""

    name: str  # in the plan
    label: str  # in errors
    method: str
    config: GradientConfig | None  # None: the plain gradient
    parameters: set[nn.Parameter]


def _shares(model: nn.Module, config: GradientConfig, ignored: set[nn.Parameter]) -> list[_Share]:
    """The method of each parameter that is not ignored: that of the maker, or those of its groups."""
    trained = {p for p in model.parameters() if p.requires_grad and p not in ignored}
    if not config.groups:
        return [_Share(OWN, type(config).__name__, "", config, trained)]
    found = dict[str, _Share]()
    for group, parameters in claims(model, read_groups(config.groups, config, build), ignored):
        name, made = (OWN, config) if group.own else (str(group), group.config)
        if group.own and OWN in found:
            found[OWN].parameters.update(parameters)
        elif parameters:
            name = name if name not in found else f"{name}, {len(found)}"
            found[name] = _Share(name, f"groups[{str(group)!r}]", group.method, made, set(parameters))
    if not any(s.config for s in found.values()):
        raise ValueError("groups: no group has a method but the plain gradient: name one, as in '*': 'kfac'")
    return list(found.values())


def _placed(model: nn.Module, share: _Share, common: GradientConfig, unseen: Set[str]) -> tuple[list[Placement], list[Site]]:
    """Placements of the parameters of a share, and the sites that its method does not cover. ValueError if it covers none."""
    assert share.config is not None
    others = {p for p in model.parameters() if p.requires_grad and p not in share.parameters}
    hidden = {p for k, p in model.named_parameters() if k in unseen}
    sites = layer_sites(model, share.config.joint_bias, others, hidden)
    share.config.check_sites(sites)
    placements, rest = _place(sites, share.name, share.config, common)
    if not placements:
        kinds = ", ".join(sorted({type(m).__name__ for s in sites for m in s.modules})) or "none but ignored ones"
        raise ValueError(
            f"{share.label} covers no parameter of this model (modules with trainable parameters: {kinds}"
            f"{'; with uses outside of the calls of their layers: ' + ', '.join(sorted(unseen)) if unseen else ''}). "
            "Methods for any parameter: adam, adagrad, shampoo, unit_ng"
        )
    return placements, rest


def _reason(name: str, unseen: Set[str], config: GradientConfig) -> str:
    seen = "has uses outside of its layer's calls" if name in unseen else "not covered"
    return f"{seen}, fallback {config.fallback!r}"


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
    if isinstance(config.fallback, GradientConfig):
        return config.fallback
    if config.fallback not in methods or config.fallback == "custom":
        legal = [m for m in methods if m != "custom"]
        raise ValueError(f"fallback={config.fallback!r}: {did_you_mean(config.fallback, legal)}")
    made: Any = methods[str(config.fallback)].Config()
    return made if isinstance(made, GradientConfig) else None
