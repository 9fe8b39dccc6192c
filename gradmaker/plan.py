"""The plan: which parts treat which parameters of a model."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gradmaker.blocks import Block, Placement, build_blocks
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature
from gradmaker.ranks import refuse_ranks
from gradmaker.rules import names, paths
from gradmaker.sites import Site, layer_sites, tensor_sites
from gradmaker.triple import did_you_mean

if TYPE_CHECKING:
    from gradmaker.maker import GradientMaker

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Blocks, and the sites that keep their plain gradient with the reason."""

    blocks: list[Block]
    plain: dict[str, str]  # name of a parameter: why its gradient is left alone

    def sites(self, curvature: Curvature, served: Set[nn.Parameter] | None = None) -> list[Site]:
        """The sites whose blocks ask for a curvature.  served: of these parameters alone; None: of all"""
        found = [s for b in self.blocks if b.triple.curvature == curvature for s in b.sites]
        return found if served is None else [s for s in found if not served.isdisjoint(s.parameters.values())]

    def curvatures(self, of_passes: bool) -> list[Curvature]:
        """The distinct curvatures to be measured: with every pass, or once a step."""
        found = dict.fromkeys(b.triple.curvature for b in self.blocks)
        return [c for c in found if c.of_passes == of_passes]

    @property
    def fleeting(self) -> frozenset[Curvature]:
        """Those whose evidence ends with the step: they are measured at every one."""
        return frozenset(b.triple.curvature for b in self.blocks if b.triple.representation.fleeting)

    def purposes(self) -> frozenset[str]:
        """What a batch of its own can be declared for."""
        found = {
            "curvature": self.asks("graph") or self.asks("replay"),
            "search": any(b.triple.solver.searches for b in self.blocks),
        }
        return frozenset(purpose for purpose, legal in found.items() if legal)

    def refuse_ranks(self) -> None:
        """RuntimeError where several processes would measure different curvatures."""
        if passes := self.curvatures(of_passes=True):
            refuse_ranks(f"{', '.join(type(c).__name__ for c in passes)} is measured on the passes of each rank alone")

    def asks(self, what: str) -> bool:
        """Whether any curvature asks for ``graph``, ``replay`` or ``previous``."""
        return any(what in b.triple.curvature.asks for b in self.blocks)


def make_plan(model: nn.Module, config: GradientConfig, methods: dict[str, type[GradientMaker]]) -> Plan:
    """Assign every trainable parameter once: to the method, to its fallback, or to the plain gradient."""
    _check_model(model)
    ignored = {p for rule in config.ignore for p in _matches(model, rule)}
    sites = layer_sites(model, config.joint_bias, ignored)
    config.check_sites(sites)
    plain = {k: "ignored" for k, p in model.named_parameters() if p.requires_grad and p in ignored}
    placements, rest = _place(sites, config, config)
    if not placements:
        kinds = ", ".join(sorted({type(m).__name__ for s in sites for m in s.modules})) or "none but ignored ones"
        raise ValueError(
            f"{type(config).__name__} covers no parameter of this model (modules with trainable parameters: {kinds}). "
            "Methods for any parameter: adam, adagrad, shampoo, unit_ng"
        )
    fallback = _fallback(config, methods)
    if fallback is not None and rest:
        more, rest = _place(rest, fallback, config)
        if more and (reason := methods[config.fallback].refuse(model)):
            raise ValueError(f"fallback={config.fallback!r}: {reason}")
        placements += more
    plain |= {k: f"not covered, fallback {config.fallback!r}" for s in rest for k in s.parameters}
    return Plan(build_blocks(placements), plain)


def _check_model(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: set requires_grad on those to be trained")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) makes sparse gradients: use sparse=False")


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


def _place(sites: list[Site], method: GradientConfig, common: GradientConfig) -> tuple[list[Placement], list[Site]]:
    """Sites with the parts that a method gives them, and those that it does not cover."""
    placements, rest = [], []
    for site in tensor_sites(sites, method.shapes) if method.per_tensor else sites:
        triple = method.triple(site)
        if triple is None:
            rest.append(site)
            continue
        norm = method.norm_rule()
        dtype = common.statistics_dtype()
        rest_of = (method.nesterov, method.decay, method.averaging, method.precision())
        placements.append(Placement(site, triple, norm, method.momentum, common.max_dim, dtype, *rest_of))
    return placements, rest


def _fallback(config: GradientConfig, methods: dict[str, type[GradientMaker]]) -> GradientConfig | None:
    if config.fallback not in methods or config.fallback == "custom":
        legal = [m for m in methods if m != "custom"]
        raise ValueError(f"fallback={config.fallback!r}: {did_you_mean(config.fallback, legal)}")
    made: Any = methods[config.fallback].Config()
    return made if isinstance(made, GradientConfig) else None
