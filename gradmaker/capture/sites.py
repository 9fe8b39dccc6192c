"""Sites: the parameters of a model, each claimed exactly once, in the form in which curvature sees them."""

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
    """Parameters that form one block: a layer's weight and bias as ``G`` matrices (o, i), or one tensor as it is."""

    name: str
    kind: Kind
    parameters: dict[str, nn.Parameter]  # by full name, weight first
    shape: tuple[int, ...]  # (G, o, i) with the bias column, or (1, *tensor)
    modules: tuple[nn.Module, ...] = ()  # that are called with these parameters
    rule: LayerRule | None = None
    weighted: bool = True  # False: only a bias is trained here
    bias: bool = False  # the last column is a bias
    module_names: tuple[str, ...] = field(default=())
    rows: Mapping[str, slice] = field(default_factory=dict)  # of parameters that are only in part in this block
    view: View | None = None  # the part of the one parameter that this site is; None: all of it
    path: Path = field(default_factory=dict)  # the modules that hold its parameters

    @property
    def one_hot_axis(self) -> int | None:
        """The axis of a block whose factor is diagonal by nature."""
        return 0 if self.kind == "embedding" else None

    @property
    def frozen(self) -> bool:
        """Whether nothing of it trains at present."""
        return not any(p.requires_grad for p in self.parameters.values())

    def named_by(self, rule: Rule) -> bool:
        """Whether a rule, as of ``ignore``, names this site or a module that it lies in."""
        return names(rule, self.path, (self.name, *self.parameters))

    # ---------------------------------------------------------------- gradients
    def read(self) -> Tensor | None:
        """The gradient as blocks; None if no backward pass reached these parameters.  # (G, o, i) or (1, *tensor)"""
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
        """Tensors in the shapes of the parameters, as blocks; zeros for None.  # (G, o, i) or (1, *tensor)"""
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
        """What ``.grad`` will be, by parameter, with these blocks in it; unless they are frozen: theirs belongs to no step.

        into: for all sites; a parameter that is only in part in a site keeps what is there of others, or of its gradient
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
        """All of a parameter's gradient, from its piece of the blocks."""
        if self.view is not None:
            return real_as(like, self.view.turned(piece))
        return self._turned(real_as(self.part(name, like), piece))

    def part(self, name: str, value: Tensor, lead: int = 0) -> Tensor:
        """What of a tensor in a parameter's shape lies in this block, outputs first: a view.  # (*lead, *parameter)"""
        return self._turned(value[(*[slice(None)] * lead, self.rows.get(name, ...))], lead)

    def _turned(self, value: Tensor, lead: int = 0) -> Tensor:
        """A matrix with its outputs first, from one that its layer holds with its inputs first, and back."""
        return value.mT if self.rule is not None and self.rule.inputs_first and value.ndim == lead + 2 else value

    def piece_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters inside one block."""
        if len(self.parameters) == 1:
            return [self.shape[1:]]
        return [(*self.shape[1:-1], self.shape[-1] - 1), (*self.shape[1:-1], 1)]

    # ---------------------------------------------------------------- passes
    def fired(self, tape: Tape) -> bool:
        """Whether this site took part in the pass, as far as is known."""
        return self.direct(tape) or any(tape.fired(m) for m in self.modules)

    def direct(self, tape: Tape) -> bool:
        """Whether its parameters are measured by their own derivatives, whatever call they are used in."""
        if any(name in tape.arrangement.direct for name in self.parameters):
            return True  # whatever was recorded: the parts of an attention module may have been, and not the module
        return self.rule is None and (tape.examples == 1 or not self.modules or tape.apart(self.modules))


# ------------------------------------------------------------------ finding sites
def layer_sites(
    model: nn.Module,
    joint_bias: bool = True,
    ignored: Set[nn.Parameter] = frozenset(),
    unseen: Set[nn.Parameter] = frozenset(),
) -> list[Site]:
    """Every trainable parameter of a model, once: as part of a layer that a rule knows, else on its own.

    unseen: parameters with uses that calls of their layers do not show, which are on their own
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
    """The same parameters, each tensor on its own and in its own shape, or cut into blocks by a policy."""
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
    """The blocks of a tensor: each chunk is a site of its own, with a block for each part."""
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
    """A layer's blocks.  base: all that they have in common"""
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
        alone = replace(base, rule=own, weighted=False, bias=True)
        yield replace(alone, name=_join_name(name, "bias"), parameters=bias, shape=(G, o, 1))


def _attention_sites(
    name: str,
    attention: nn.MultiheadAttention,
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]],
    joint_bias: bool,
    ignored: Set[nn.Parameter],
) -> Iterator[Site]:
    """The linear maps inside of an attention module; weights that it shares with others are left to the generic path."""
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
    """A parameter that no rule knows, seen through the smallest module whose call contains all of its uses."""
    paths = [_calling_path(model, path).split(".") for path, _ in owners[parameter]]
    shared = paths[0]
    for path in paths[1:]:
        common = [a for a, b in zip(shared, path, strict=False) if a == b]
        shared = shared[: len(common)]
    owner = ".".join(shared)
    shape = 1, prod(real_shape(parameter)), 1
    return Site(name, "generic", {name: parameter}, shape, (model.get_submodule(owner),), module_names=(owner,))


def _calling_path(model: nn.Module, path: str) -> str:
    """The module whose call uses a parameter at ``path``: no parametrization, container, or child of an opaque module."""
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
