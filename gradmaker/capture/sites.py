"""Sites: the parameters of a model as the blocks of a curvature matrix, each parameter assigned once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn

from gradmaker.capture.rules.attention import projections
from gradmaker.capture.rules.calls import Kind, LayerRule
from gradmaker.capture.rules.layers import OPAQUE, attends, rule_for
from gradmaker.capture.rules.parts import natural_parts
from gradmaker.capture.shapes import ShapePolicy, View
from gradmaker.capture.tape import Tape
from gradmaker.linalg.real_pairs import as_real, real_as, real_shape, write_real
from gradmaker.options.rules import Path, Rule, names, paths

__all__ = ["Site", "layer_sites", "tensor_sites"]

CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)
"""Modules that are never called."""


@dataclass(frozen=True, eq=False)
class Site:
    """Parameters that form one block: a layer's weight and bias as ``G`` matrices (o, i), or one tensor in its own shape."""

    name: str
    kind: Kind
    parameters: dict[str, nn.Parameter]  # by full name, weight first
    shape: tuple[int, ...]  # (G, o, i) with the bias column, or (1, *tensor)
    modules: tuple[nn.Module, ...] = ()  # whose calls use these parameters
    rule: LayerRule | None = None
    weighted: bool = True  # False: the block is that of a bias alone
    bias: bool = False  # the last column is a bias
    module_names: tuple[str, ...] = field(default=())
    rows: Mapping[str, slice] = field(default_factory=dict)  # of parameters that lie only partly in this block
    view: View | None = None  # the part of its one parameter that lies in this site; None: all of it
    path: Path = field(default_factory=dict)  # the modules that contain its parameters, by name

    @property
    def one_hot_axis(self) -> int | None:
        """The axis whose Kronecker factor is diagonal, as inputs there are one-hot; None if there is none."""
        return 0 if self.kind == "embedding" else None

    @property
    def frozen(self) -> bool:
        """Whether none of its parameters requires a gradient at present."""
        return not any(p.requires_grad for p in self.parameters.values())

    def named_by(self, rule: Rule) -> bool:
        """Whether a rule, as of ``ignore``, names this site or a module that contains it."""
        return names(rule, self.path, (self.name, *self.parameters))

    # ---------------------------------------------------------------- gradients
    def read(self) -> Tensor | None:
        """The gradient as blocks; None if no backward pass has reached these parameters.  # (G, o, i) or (1, *tensor)"""
        return self.lay_out(self._gradients()) if self.has_gradient else None

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has reached any of these parameters."""
        return any(g is not None for g in self._gradients().values())

    def pieces(self) -> list[Tensor]:
        """The gradient of each parameter in the blocks, zeros where there is none.  # (G, o, i), (G, o, 1); or (1, *tensor)"""
        return self._lay_out_each(self._gradients())

    def _gradients(self) -> dict[nn.Parameter, Tensor | None]:
        return {p: p.grad if p.requires_grad else None for p in self.parameters.values()}

    def lay_out(self, values: Mapping[nn.Parameter, Tensor | None]) -> Tensor:
        """Tensors in the shapes of the parameters, laid out as blocks; zeros for None.  # (G, o, i) or (1, *tensor)"""
        pieces = self._lay_out_each(values)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def _lay_out_each(self, values: Mapping[nn.Parameter, Tensor | None]) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            value = values[p]
            found[name] = as_real(torch.zeros_like(p) if value is None else value)
        if self.view is not None:
            return [self.view.read(next(iter(found.values())))]
        parts = zip(found.items(), self.piece_shapes(), strict=True)
        return [self.part(k, g).reshape(self.shape[0], *piece) for (k, g), piece in parts]

    def assign(self, value: Tensor, into: dict[nn.Parameter, Tensor]) -> None:
        """Write blocks into the new gradients of the parameters, except frozen ones, whose ``.grad`` belongs to no step.

        into: new gradients of all sites; where a parameter lies only partly in this site, the other entries are kept: those of
        other sites, or of ``.grad``
        """
        sizes = [piece[-1] for piece in self.piece_shapes()] if len(self.parameters) > 1 else None
        pieces = value.split(sizes, -1) if sizes else (value,)
        for (name, p), piece in zip(self.parameters.items(), pieces, strict=True):
            if p.grad is None or not p.requires_grad:
                continue
            if name not in self.rows and (self.view is None or self.view.whole):
                into[p] = self._as_gradient(name, p.grad, piece)
                continue
            if p not in into:
                into[p] = p.grad.resolve_conj().clone()
            if self.view is not None:
                self.view.write(as_real(into[p]), piece)
            else:
                write_real(self.part(name, into[p]), piece)

    def _as_gradient(self, name: str, like: Tensor, piece: Tensor) -> Tensor:
        """The whole gradient of a parameter, from its piece of the blocks."""
        if self.view is not None:
            return real_as(like, self.view.turned(piece))
        return self._turned(real_as(self.part(name, like), piece))

    def part(self, name: str, value: Tensor, lead: int = 0) -> Tensor:
        """The part in this block of a tensor in a parameter's shape, outputs first: a view.  # (*lead, *parameter)"""
        return self._turned(value[(*[slice(None)] * lead, self.rows.get(name, ...))], lead)

    def _turned(self, value: Tensor, lead: int = 0) -> Tensor:
        """A weight with its outputs first, from one that the layer stores with its inputs first, and the reverse."""
        return value.mT if self.rule is not None and self.rule.inputs_first and value.ndim == lead + 2 else value

    def piece_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each parameter inside of one block."""
        if len(self.parameters) == 1:
            return [self.shape[1:]]
        return [(*self.shape[1:-1], self.shape[-1] - 1), (*self.shape[1:-1], 1)]

    # ---------------------------------------------------------------- passes
    def fired(self, tape: Tape) -> bool:
        """Whether the pass used this site, as far as is known."""
        return self.direct(tape) or any(tape.fired(m) for m in self.modules)

    def direct(self, tape: Tape) -> bool:
        """Whether its parameters are measured by their own derivatives, not by calls of a layer."""
        if any(name in tape.arrangement.direct for name in self.parameters):
            return True  # calls may be recorded all the same: those of the projections of an attention module
        return self.rule is None and (tape.examples == 1 or not self.modules or tape.apart(self.modules))


# ------------------------------------------------------------------ finding sites
def layer_sites(
    model: nn.Module,
    joint_bias: bool = True,
    ignored: Set[nn.Parameter] = frozenset(),
    unseen: Set[nn.Parameter] = frozenset(),
) -> list[Site]:
    """The sites of all trainable parameters: one for each layer that a rule knows, and one for each other parameter.

    unseen: parameters with uses outside of their layers' calls, which get sites of their own
    """
    claimed: dict[nn.Parameter, str] = {}
    owners = _owners(model)
    sites: list[Site] = []
    for name, module in model.named_modules():
        if attends(module):
            inside = list(_attention_sites(name, module, owners, joint_bias, {*ignored, *unseen}))
            claimed.update({p: k for s in inside for k, p in s.parameters.items()})
            sites += inside
        rule = rule_for(module)
        if rule is None or _inside_opaque(model, name):
            continue
        own = {_join_name(name, k): p for k, p in module.named_parameters(recurse=False) if k in (rule.weight_name, "bias")}
        own = {k: p for k, p in own.items() if p.requires_grad and p not in ignored and p not in unseen and not p.is_complex()}
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
    placed = [replace(s, path={k: m for p in s.parameters.values() for k, m in held[p].items()}) for s in sites]
    return sorted(placed, key=lambda s: order[next(iter(s.parameters))])


def tensor_sites(sites: list[Site], policy: ShapePolicy | None = None) -> list[Site]:
    """The same parameters with one site for each tensor in its own shape, or for each block of a shape policy."""
    if policy is not None:
        wholes = tensor_sites(sites)
        _check_rules(wholes, policy)
        return [site for whole in wholes for site in _cut(whole, policy)]
    users: dict[str, dict[nn.Module, None]] = {}
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
