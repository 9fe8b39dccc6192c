"""Finding the sites of a model: each parameter is assigned once, to a layer that a rule knows or to a site of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from math import prod

from torch import nn

from gradmaker.capture.rules.attention import projections
from gradmaker.capture.rules.calls import LayerRule
from gradmaker.capture.rules.layers import OPAQUE, attends, rule_for
from gradmaker.capture.rules.parts import natural_parts
from gradmaker.capture.rules.recurrent import recurrent_rules, recurs
from gradmaker.capture.shapes import ShapePolicy
from gradmaker.capture.sites import Site
from gradmaker.linalg.real_pairs import real_shape
from gradmaker.options.rules import Path, paths

__all__ = ["layer_sites", "tensor_sites"]

CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)
"""Modules that are never called."""


def layer_sites(
    model: nn.Module,
    joint_bias: bool = True,
    ignored: Set[nn.Parameter] = frozenset(),
    unseen: Set[nn.Parameter] = frozenset(),
) -> list[Site]:
    """The sites of all trainable parameters: one for each layer that a rule knows, and one for each other parameter.

    unseen: parameters with uses outside of their layers' calls, which get sites of their own
    """
    owners = _owners(model)
    free = {p: k for k, p in model.named_parameters() if p.requires_grad and p not in ignored and p not in unseen}
    sites = [site for p, k in free.items() if (site := _tied_site(model, k, p, owners))]
    claimed: dict[nn.Parameter, str] = {p: k for s in sites for k, p in s.parameters.items()}
    tied = set(claimed)
    for name, module in model.named_modules():
        if attends(module):
            inside = list(_attention_sites(name, module, owners, joint_bias, {*ignored, *unseen}))
            claimed.update({p: k for s in inside for k, p in s.parameters.items()})
            sites += inside
        if recurs(module):
            inside = list(_recurrent_sites(name, module, owners, joint_bias, free))
            claimed.update({p: k for s in inside for k, p in s.parameters.items()})
            sites += inside
        rule = rule_for(module)
        if rule is None or _inside_opaque(model, name):
            continue
        own = {_join_name(name, k): p for k, p in module.named_parameters(recurse=False) if k in (rule.weight_name, "bias")}
        own = {k: p for k, p in own.items() if p in free and p not in tied and not p.is_complex()}
        if not own or any(p in claimed for p in own.values()):
            continue
        modules = _sharers(own, owners, rule)
        if modules is None:
            continue
        weight, bias = ({k: p for k, p in own.items() if k.rsplit(".", 1)[-1] == end} for end in (rule.weight_name, "bias"))
        sites += _sites_of(Site(name, rule.kind, {}, (), modules, rule, module_names=(name,)), weight, bias, joint_bias)
        claimed.update({p: k for k, p in own.items()})
    rest = {k: p for k, p in model.named_parameters() if p.requires_grad and p not in claimed and p not in ignored}
    sites += [_generic_site(model, k, p, owners) for k, p in rest.items()]
    order = {k: j for j, (k, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    held = paths(model)
    placed = [_placed(s, {k: m for p in s.parameters.values() for k, m in held[p].items()}) for s in sites]
    return sorted(placed, key=lambda s: order[next(iter(s.parameters))])


def _placed(site: Site, path: Path) -> Site:
    return replace(site, path=path, generic=site.generic and replace(site.generic, path=path))


def tensor_sites(sites: list[Site], policy: ShapePolicy | None = None) -> list[Site]:
    """The same parameters with one site for each tensor in its own shape, or for each block of a shape policy."""
    if policy is not None:
        wholes = tensor_sites(sites)
        _check_rules(wholes, policy)
        return [site for whole in wholes for site in _cut(whole, policy)]
    users: dict[str, dict[nn.Module, None]] = {}
    sites = [s.generic or s for s in sites]
    for s in sites:
        for k in s.parameters:
            users.setdefault(k, {}).update(dict.fromkeys(s.modules))
    whole = {k: (s, p) for s in sites for k, p in s.parameters.items()}
    return [
        Site(k, "tensor", {k: p}, (1, *real_shape(p)), tuple(users[k]), module_names=s.module_names, path=s.path)
        for k, (s, p) in whole.items()
    ]


def _cut(site: Site, policy: ShapePolicy) -> list[Site]:
    """The sites of a tensor under a policy, one for each chunk, with a block for each part. ValueError for unequal parts."""
    try:
        views = policy.views(site.shape[1:], _parts(site, policy))
    except ValueError as error:
        raise ValueError(f"split: {site.name}: {error}") from None
    return [replace(site, name=site.name + v.label, shape=v.shape, view=v) for v in views]


def _parts(site: Site, policy: ShapePolicy) -> int:
    if policy.split == "layers":
        return natural_parts(site.path, next(iter(site.parameters.values())))
    return next((parts for rule, parts in policy.split if site.named_by(rule)), 1)


def _check_rules(sites: list[Site], policy: ShapePolicy) -> None:
    """ValueError for a rule that names no tensor."""
    for rule, _ in () if policy.split == "layers" else policy.split:
        if not any(site.named_by(rule) for site in sites):
            raise ValueError(f"split: {rule!r} matches none of {', '.join(site.name for site in sites)}")


def _join_name(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module]]]:
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append((name, module))
    return owners


def _inside_opaque(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:j])), OPAQUE) for j in range(len(parts)))


def _sharers(
    own: dict[str, nn.Parameter], owners: dict[nn.Parameter, list[tuple[str, nn.Module]]], rule: LayerRule
) -> tuple[nn.Module, ...] | None:
    """The modules that share these parameters, or None if they do not share all of them under one rule."""
    groups = [tuple(m for _, m in owners[p]) for p in own.values()]
    same = all(group == groups[0] for group in groups)
    return groups[0] if same and all(rule_for(m) is rule for m in groups[0]) else None


def _sites_of(base: Site, weight: dict[str, nn.Parameter], bias: dict[str, nn.Parameter], joint_bias: bool) -> Iterator[Site]:
    """The sites of a layer.  base: the fields that they have in common"""
    module, rule, name = base.modules[0], base.rule, base.name
    assert rule is not None
    G, o, i = rule.shape(module)
    if weight and bias and joint_bias and rule.bias_rule is None:
        yield replace(base, name=name or "(model)", parameters=weight | bias, shape=(G, o, i + 1), bias=True)
        return
    if weight:
        yield replace(base, name=_join_name(name, rule.weight_name), parameters=weight, shape=(G, o, i))
    if bias:
        own = rule.bias_rule or rule
        G, o, _ = own.shape(module)
        bias_site = replace(base, rule=own, weighted=False, bias=True)
        yield replace(bias_site, name=_join_name(name, "bias"), parameters=bias, shape=(G, o, 1))


def _attention_sites(
    name: str,
    attention: nn.MultiheadAttention,
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]],
    joint_bias: bool,
    ignored: Set[nn.Parameter],
) -> Iterator[Site]:
    """The sites of an attention module's linear maps; weights that it shares with other modules get generic sites."""
    named = dict(attention.named_parameters())
    free = {k: p for k, p in named.items() if p.requires_grad and p not in ignored and len(owners[p]) == 1}
    for projection in projections(attention):
        own = {k: free[k] for k in projection.rows if k in free}
        rows = {_join_name(name, k): r for k, r in projection.rows.items() if r is not None}
        rule = rule_for(projection)
        base = Site(_join_name(name, projection.part), "matrix", {}, (), (projection,), rule, module_names=(name,), rows=rows)
        weight, bias = ({_join_name(name, k): p for k, p in own.items() if k.endswith(end)} for end in ("weight", "bias"))
        yield from _sites_of(base, weight, bias, joint_bias)


def _recurrent_sites(
    name: str,
    module: nn.RNNBase | nn.RNNCellBase,
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]],
    joint_bias: bool,
    free: Mapping[nn.Parameter, str],
) -> Iterator[Site]:
    """The sites of the matrices of a recurrent layer; weights that it shares with other modules get generic sites."""
    named = dict(module.named_parameters(recurse=False))
    for rule in recurrent_rules(module):
        weight, bias = (
            {_join_name(name, k): named[k] for k in (key,) if k in named and named[k] in free and len(owners[named[k]]) == 1}
            for key in (rule.weight, rule.bias)
        )
        base = Site(_join_name(name, rule.part), "matrix", {}, (), (module,), rule, module_names=(name,))
        yield from _sites_of(base, weight, bias, joint_bias)


def _tied_site(
    model: nn.Module, name: str, parameter: nn.Parameter, owners: dict[nn.Parameter, list[tuple[str, nn.Module]]]
) -> Site | None:
    """The site of a table (V, d) that embeddings look up and linear layers multiply by; None for any other parameter."""
    shared = owners[parameter]
    if len(shared) < 2 or parameter.ndim != 2 or any(_inside_opaque(model, path) for path, _ in shared):
        return None
    rules = {m: rule_for(m) for _, m in shared}
    uses: dict[str, dict[nn.Module, LayerRule]] = {"embedding": {}, "matrix": {}}
    for module, rule in rules.items():
        if rule is None or rule.kind not in uses or not _whole_weight(module, rule, parameter):
            return None
        uses[rule.kind][module] = rule
    if any(len(set(found.values())) != 1 for found in uses.values()):
        return None
    names = tuple(path for path, _ in shared)
    lookups, heads = (
        Site(name, rule.kind, {name: parameter}, (1, *parameter.shape), tuple(found), rule, module_names=names)
        for found in uses.values()
        for rule in set(found.values())
    )
    generic = _generic_site(model, name, parameter, owners)
    return replace(lookups, kind="tied", modules=tuple(rules), uses=(lookups, heads), generic=generic)


def _whole_weight(module: nn.Module, rule: LayerRule, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the weight of a layer, and its one matrix: of outputs by inputs, or of tokens by features."""
    held = dict(module.named_parameters(recurse=False)).get(rule.weight_name)  # no attribute, which may be computed
    laid_out = not rule.inputs_first and rule.transposed == (rule.kind == "embedding")
    return held is parameter and laid_out and not parameter.is_complex() and rule.shape(module) == (1, *parameter.shape)


def _generic_site(
    model: nn.Module, name: str, parameter: nn.Parameter, owners: dict[nn.Parameter, list[tuple[str, nn.Module]]]
) -> Site:
    """The site of a parameter without a rule, measured at the smallest module whose call contains all of its uses."""
    paths = [_calling_path(model, path).split(".") for path, _ in owners[parameter]]
    shared = paths[0]
    for path in paths[1:]:
        common = [a for a, b in zip(shared, path, strict=False) if a == b]
        shared = shared[: len(common)]
    owner = ".".join(shared)
    shape = 1, prod(real_shape(parameter)), 1
    return Site(name, "generic", {name: parameter}, shape, (model.get_submodule(owner),), module_names=(owner,))


def _calling_path(model: nn.Module, path: str) -> str:
    """Name of the module whose call uses a parameter: no parametrization, container, or child of an opaque module.

    path: name of the module that holds the parameter
    """
    path = path.split(".parametrizations")[0] if ".parametrizations" in path else path
    path = "" if path.startswith("parametrizations") else path
    parts = path.split(".") if path else []
    for j in range(len(parts)):
        prefix = ".".join(parts[:j])
        if isinstance(model.get_submodule(prefix), OPAQUE):
            return prefix
    while parts and isinstance(model.get_submodule(".".join(parts)), CONTAINERS):
        parts.pop()
    return ".".join(parts)
