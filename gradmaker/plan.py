"""The plan: which parts treat which parameters of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmaker.blocks import Block
from gradmaker.capture.model_checks import check_model, check_parameters, check_watched
from gradmaker.capture.sites import Site, layer_sites, tensor_sites
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature
from gradmaker.curvature.base import Need
from gradmaker.options.registry import Method
from gradmaker.options.rules import names, paths
from gradmaker.options.suggestions import did_you_mean
from gradmaker.own_parameters import OwnParameters
from gradmaker.placement import Placement
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import PerStep
from gradmaker.scale.ranks import refuse_ranks
from gradmaker.schedule import Clocks
from gradmaker.stacking import build_blocks

__all__ = ["Plan", "PlanClocks", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Blocks, and the sites that keep their plain gradient with the reason.

    What is measured at a step is asked for with ``due``, the methods whose turn it is; None means all.
    """

    blocks: list[Block]
    plain: dict[str, str]  # name of a parameter: why its gradient is left alone
    methods: dict[str, GradientConfig]  # what `Block.method` names: "method", and "fallback" if that has blocks
    own: OwnParameters

    def measured(self, due: Collection[str] | None = None) -> list[Block]:
        """The blocks of these methods."""
        return [b for b in self.blocks if due is None or b.options.method in due]

    def sites(
        self, curvature: Curvature, due: Collection[str] | None = None, served: Set[nn.Parameter] | None = None
    ) -> list[Site]:
        """The sites whose blocks ask for a curvature.  due: of these methods; served: of these parameters; None: of all"""
        found = [s for b in self.measured(due) if b.triple.curvature == curvature for s in b.sites]
        return found if served is None else [s for s in found if not served.isdisjoint(s.parameters.values())]

    def curvatures(self, of_passes: bool, due: Collection[str] | None = None) -> list[Curvature]:
        """The distinct curvatures to be measured: with every pass, or once a step."""
        found = dict.fromkeys(b.triple.curvature for b in self.measured(due))
        return [c for c in found if c.of_passes == of_passes]

    @property
    def per_step(self) -> frozenset[Curvature]:
        """Those whose evidence ends with the step: they are measured at every one."""
        return frozenset(b.triple.curvature for b in self.blocks if isinstance(b.triple.representation, PerStep))

    def purposes(self) -> frozenset[str]:
        """What a batch of its own can be declared for."""
        found = {
            "curvature": self.asks("graph") or self.asks("replay"),
            "search": any("search" in b.triple.solver.asks for b in self.blocks),
        }
        return frozenset(purpose for purpose, legal in found.items() if legal)

    def refuse_ranks(self) -> None:
        """RuntimeError where several processes would measure different curvatures."""
        if passes := self.curvatures(of_passes=True):
            refuse_ranks(f"{', '.join(type(c).__name__ for c in passes)} is measured on the passes of each rank alone")

    def asks(self, what: Need, due: Collection[str] | None = None) -> bool:
        """Whether any curvature needs this."""
        return any(what in b.triple.curvature.needs for b in self.measured(due))


class PlanClocks:
    """A pair of clocks for each method of a plan: the intervals of one say nothing to the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.of = {
            name: Clocks(c.curvature_interval, c.preconditioner_interval, c.warmup_steps) for name, c in plan.methods.items()
        }

    def measure(self, step: int) -> frozenset[str]:
        """The methods that are to be measured; to be asked once for each step."""
        ending = {b.options.method for b in self.plan.blocks if isinstance(b.triple.representation, PerStep)}
        return frozenset(name for name, clocks in self.of.items() if clocks.measure.tick(step) | (name in ending))

    def retry(self, due: Collection[str], reached: Collection[str], step: int) -> None:
        """What came to nothing is to be measured at ``step``.  reached: sites that gave evidence"""
        for name in due:
            if not any(s.name in reached for b in self.plan.measured({name}) for s in b.sites):
                self.of[name].measure.retry(step)

    def folds(self, curvature: Curvature, due: Collection[str], step: int, weight: float) -> dict[Block, Fold]:
        """How evidence of a micro-batch enters the statistics of the blocks that ask for it.  weight: its share of the loss"""
        found = {}
        for block in self.plan.measured(due):
            if block.triple.curvature == curvature:
                clocks = self.of[block.options.method]
                clocks.refresh.tick(step)
                found[block] = block.fold(weight, self._is_due(block, clocks, step), clocks.measure.ticks - 1)
        return found

    def _is_due(self, block: Block, clocks: Clocks, step: int) -> bool:
        return clocks.refresh.due(step, block.share if self.plan.methods[block.options.method].stagger else 0.0)

    def refreshes(self, step: int) -> Iterator[tuple[Block, bool]]:
        """Every block, and whether it is to be refreshed; may be asked again for the same step."""
        for name, clocks in self.of.items():
            clocks.refresh.tick(step)
            for block in self.plan.measured({name}):
                yield block, self._is_due(block, clocks, step)

    def dump(self) -> dict[str, dict[str, dict[str, int]]]:
        """Their periods, by method."""
        return {name: clocks.dump() for name, clocks in self.of.items()}

    def load(self, saved: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
        """Go on from `dump`."""
        for name, clocks in self.of.items():
            clocks.load(saved[name])


def make_plan(
    model: nn.Module, config: GradientConfig, methods: Mapping[str, type[Method]], unseen: Set[str] = frozenset()
) -> Plan:
    """Assign every trainable parameter once: to the method, to its fallback, or to the plain gradient.

    unseen: names of parameters with uses that calls of their layers do not show
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
            f"{'; with uses beside the calls of their layers: ' + ', '.join(sorted(unseen)) if unseen else ''}). "
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
    seen = "has uses that its layer does not show" if name in unseen else "not covered"
    return f"{seen}, fallback {config.fallback!r}"


def _matches(model: nn.Module, rule: Any) -> set[nn.Parameter]:
    """The parameters that a rule of ``ignore`` names, or that lie in a module that it names."""
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
    """Sites with the parts that a method gives them, and those that it does not cover.  name: of the method in the plan"""
    placements, rest, options = [], [], method.block_options(name, common)
    for site in tensor_sites(sites, method.shapes) if method.per_tensor else sites:
        triple = method.triple(site)
        if triple is None:
            rest.append(site)
            continue
        placements.append(Placement(site, triple, options))
    return placements, rest


def _fallback(config: GradientConfig, methods: Mapping[str, type[Method]]) -> GradientConfig | None:
    if config.fallback not in methods or config.fallback == "custom":
        legal = [m for m in methods if m != "custom"]
        raise ValueError(f"fallback={config.fallback!r}: {did_you_mean(config.fallback, legal)}")
    made: Any = methods[config.fallback].Config()
    return made if isinstance(made, GradientConfig) else None
