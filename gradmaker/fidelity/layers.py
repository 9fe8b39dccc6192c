"""The layers of a model as slices of the flat vector of its trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from gradmaker.capture.model_checks import check_model, check_parameters

__all__ = ["WHOLE", "Layer", "Layers"]

WHOLE = "(all)"
"""Name of the whole model among its layers."""


@dataclass(frozen=True)
class Layer:
    """The parameters that one module holds itself."""

    name: str
    kind: str  # of the module
    positions: tuple[int, ...]  # of its parameters among those of the model
    index: Tensor  # (p,) of its entries in the flat vector

    @property
    def size(self) -> int:
        """The number of its parameters' entries."""
        return len(self.index)


class Layers:
    """The trainable parameters of a model as one flat vector, in their order in the model, and the layers that hold them.

    ValueError for parameters that no method supports, and for complex ones.
    """

    def __init__(self, model: nn.Module, only: Sequence[str] = ()) -> None:
        check_model(model)
        check_parameters(model)
        named = {k: p for k, p in model.named_parameters() if p.requires_grad}
        if found := next((k for k, p in named.items() if p.is_complex()), None):
            raise ValueError(f"{found} is complex: fidelity measures real parameters; hold it as view_as_real")
        self.model = model
        self.names, self.parameters = list(named), list(named.values())
        self.sizes = [p.numel() for p in self.parameters]
        self.size = sum(self.sizes)
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self.slices = [slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True)]
        holders: dict[str, list[int]] = {}
        for k, name in enumerate(self.names):
            holders.setdefault(name.rpartition(".")[0], []).append(k)
        self.layers = [self._layer(name, held) for name, held in holders.items()]
        self.chosen = self.layers if not only else self._chosen(only)

    def _layer(self, name: str, held: list[int]) -> Layer:
        index = torch.cat([torch.arange(self.slices[k].start, self.slices[k].stop) for k in held])
        module = self.model.get_submodule(name)
        return Layer(name or "(model)", type(module).__name__, tuple(held), index)

    def _chosen(self, only: Sequence[str]) -> list[Layer]:
        found = [layer for layer in self.layers if any(fnmatch(layer.name, pattern) for pattern in only)]
        if not found:
            raise ValueError(f"layers={only!r} names none of {', '.join(layer.name for layer in self.layers)}")
        return found

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.parameters[0].device

    def flat(self, values: Sequence[Tensor | None]) -> Tensor:
        """Tensors in the shapes of the parameters as one vector; zeros for None.  # (P,)"""
        pairs = zip(self.parameters, values, strict=True)
        return torch.cat([(torch.zeros_like(p) if v is None else v).detach().reshape(-1) for p, v in pairs])

    def split(self, v: Tensor) -> list[Tensor]:
        """A vector as tensors in the shapes of the parameters.  # (P,)"""
        return [x.view_as(p) for x, p in zip(v.split(self.sizes), self.parameters, strict=True)]
