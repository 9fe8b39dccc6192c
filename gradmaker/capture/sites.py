"""Sites: the parameters of a model as the blocks of a curvature matrix, each parameter assigned once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradmaker.capture.rules.calls import Kind, LayerRule
from gradmaker.capture.shapes import View
from gradmaker.capture.tape import Tape
from gradmaker.linalg.real_pairs import as_real, real_as, write_real
from gradmaker.options.rules import Path, Rule, names

__all__ = ["Site"]


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
    uses: tuple[Site, ...] = ()  # of a tied table: its lookups and its heads, each as a site
    generic: Site | None = None  # of a tied table: the site without a rule that it is where its uses are not told apart

    @property
    def one_hot_axis(self) -> int | None:
        """The axis whose Kronecker factor is diagonal, as inputs there are one-hot; None if there is none."""
        return 0 if self.kind == "embedding" else None

    @property
    def each_use(self) -> tuple[Site, ...]:
        """The sites of one rule each that it is made of: itself, if it is no tied table."""
        return self.uses or (self,)

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
            found[name] = as_real(torch.zeros(p.shape, dtype=p.dtype, device=p.device) if value is None else value)
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
