"""Conversion of vectors over sites to tensors of parameters and back, many vectors at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from gradmaker.capture.sites import Site
from gradmaker.linalg.real_pairs import as_real, write_real

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Layout of a vector: sites one after another, each row-major. ``k`` vectors are the rows of a matrix."""

    sites: Sequence[Site]

    @property
    def size(self) -> int:
        """Length ``P`` of a vector."""
        return sum(prod(site.shape) for site in self.sites)

    def spread(self, vectors: Tensor) -> dict[nn.Parameter, Tensor]:
        """Vectors as tensors of parameters; entries in no site are zero.  # (k, P) -> each (k, *parameter)"""
        k = len(vectors)
        parameters = dict.fromkeys(p for site in self.sites for p in site.parameters.values())
        out = {p: torch.zeros(k, *p.shape, dtype=p.dtype, device=p.device) for p in parameters}
        pieces = vectors.reshape(k, -1).split([prod(site.shape) for site in self.sites], 1)
        for site, piece in zip(self.sites, pieces, strict=True):
            _write_site(site, piece.reshape(k, *site.shape), out)
        return out

    def gather(self, values: Mapping[nn.Parameter, Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors of parameters as vectors.  # each (k, *parameter) -> (k, P)"""
        return torch.cat([_read_site(site, values).to(dtype) for site in self.sites], 1)


def _write_site(site: Site, value: Tensor, out: dict[nn.Parameter, Tensor]) -> None:
    """Write the blocks of a site into tensors of parameters.  value: (k, G, o, i) or (k, parts, *tensor)"""
    sizes = [piece[-1] for piece in site.piece_shapes()] if len(site.parameters) > 1 else None
    pieces = value.split(sizes, -1) if sizes else (value,)
    for (name, p), piece in zip(site.parameters.items(), pieces, strict=True):
        if site.view is not None:
            for row, block in zip(out[p], piece, strict=True):
                site.view.write(as_real(row), block.to(p.dtype.to_real()))
        else:
            write_real(site.part(name, out[p], lead=1), piece)


def _read_site(site: Site, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """The site's part of every vector.  # (k, P_site)"""
    if site.view is not None:
        (p,) = site.parameters.values()
        return torch.stack([site.view.read(as_real(row)).reshape(-1) for row in values[p]])
    k = len(next(iter(values.values())))
    pieces = [
        as_real(site.part(name, values[p], lead=1)).reshape(k, site.shape[0], *piece)
        for (name, p), piece in zip(site.parameters.items(), site.piece_shapes(), strict=True)
    ]
    return torch.cat(pieces, -1).reshape(k, -1)
