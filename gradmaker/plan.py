"""The plan: which parts treat which parameters of a model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from torch import nn

from gradmaker.blocks import Block, Placement, build_blocks
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature
from gradmaker.norms import NORMS
from gradmaker.sites import Site, layer_sites, tensor_sites
from gradmaker.triple import did_you_mean

if TYPE_CHECKING:
    from gradmaker.maker import GradientMaker

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Blocks, and the sites that keep their plain gradient with the reason."""

    blocks: list[Block]
    plain: dict[str, str]  # name of a site: why its gradient is left alone

    def sites(self, curvature: Curvature) -> list[Site]:
        """The sites whose blocks ask for a curvature."""
        return [s for b in self.blocks if b.triple.curvature == curvature for s in b.sites]

    def curvatures(self, layerwise: bool) -> list[Curvature]:
        """The distinct curvatures to be measured."""
        found = dict.fromkeys(b.triple.curvature for b in self.blocks)
        return [c for c in found if c.layerwise == layerwise]


def make_plan(model: nn.Module, config: GradientConfig, methods: dict[str, type[GradientMaker]]) -> Plan:
    """Assign every trainable parameter once: to the method, to its fallback, or to the plain gradient."""
    _check_model(model, config)
    sites = layer_sites(model, config.joint_bias)
    kept = [s for s in sites if not _ignored(model, s, config)]
    plain = {s.name: "ignored" for s in sites if s not in kept}
    placements, rest = _place(kept, config, config)
    if not placements:
        kinds = ", ".join(sorted({type(m).__name__ for s in kept for m in s.modules})) or "none but ignored ones"
        raise ValueError(
            f"{type(config).__name__} covers no parameter of this model (modules with trainable parameters: {kinds}). "
            "Methods for any parameter: adam, adagrad, shampoo, unit_ng"
        )
    fallback = _fallback(config, methods)
    if fallback is not None and rest:
        more, rest = _place(rest, fallback, config)
        placements += more
    plain |= {s.name: f"not covered, fallback {config.fallback!r}" for s in rest}
    return Plan(build_blocks(placements), plain)


def _check_model(model: nn.Module, config: GradientConfig) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: set requires_grad on those to be trained")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) makes sparse gradients: use sparse=False")
    names = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    for rule in config.ignore:
        if isinstance(rule, str) and not any(fnmatch(n, rule) for n in names):
            raise ValueError(f"ignore: {rule!r} matches nothing: {did_you_mean(rule, sorted(n for n in names if n))}")


def _ignored(model: nn.Module, site: Site, config: GradientConfig) -> bool:
    names = [*site.module_names, *site.parameters]
    for rule in config.ignore:
        if isinstance(rule, str):
            hit = any(fnmatch(n, rule) for n in names)
        elif isinstance(rule, type):
            hit = any(isinstance(m, rule) for m in site.modules)
        else:
            inside = set(rule.modules())
            hit = any(m in inside for m in site.modules)
        if hit:
            return True
    return False


def _place(sites: list[Site], method: GradientConfig, common: GradientConfig) -> tuple[list[Placement], list[Site]]:
    """Sites with the parts that a method gives them, and those that it does not cover."""
    placements, rest = [], []
    for site in tensor_sites(sites) if method.per_tensor else sites:
        triple = method.triple(site)
        if triple is None:
            rest.append(site)
            continue
        norm = NORMS[method.norm]
        placements.append(Placement(site, triple, norm, method.momentum, common.max_dim, common.statistics_dtype()))
    return placements, rest


def _fallback(config: GradientConfig, methods: dict[str, type[GradientMaker]]) -> GradientConfig | None:
    if config.fallback not in methods or config.fallback == "custom":
        legal = [m for m in methods if m != "custom"]
        raise ValueError(f"fallback={config.fallback!r}: {did_you_mean(config.fallback, legal)}")
    made: Any = methods[config.fallback].Config()
    return made if isinstance(made, GradientConfig) else None
