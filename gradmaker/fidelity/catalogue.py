"""The measures, with their formulas, and the labels of rows that are no approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BLOCKS", "EXACT", "MEASURES", "Measure"]

EXACT = "reference"
"""Label of the reference itself."""
BLOCKS = "layer blocks"
"""Label of the reference without the blocks between layers."""


@dataclass(frozen=True)
class Measure:
    """A measure, with its formula in the words of the page."""

    name: str
    title: str
    formula: str
    best: float | None  # the value of a perfect approximation; None: that of the reference

    @property
    def better(self) -> Literal["", "low", "high"]:
        """Whether smaller or larger values are better, where that is plain."""
        if self.name in ("cosine", "quadratic", "decrease"):
            return "high"
        return "low" if self.best == 0.0 else ""


MEASURES = {
    m.name: m
    for m in (
        Measure("error", "error", "|Ĉ - C|_F / |C|_F", 0.0),
        Measure("error_scaled", "error, scaled", "min_s |s Ĉ - C|_F / |C|_F", 0.0),
        Measure("scale", "best scalar", "s = <C, Ĉ> / |Ĉ|_F²", 1.0),
        Measure("spectral", "spectral error", "|Ĉ - C|_2 / |C|_2", 0.0),
        Measure("spectral_scaled", "spectral, scaled", "|s Ĉ - C|_2 / |C|_2", 0.0),
        Measure("inverse", "inverse error", "|P - (C + λ)^p|_F / |(C + λ)^p|_F", 0.0),
        Measure("residual", "inverse residual", "E |(C + λ) P v - v| / |v|", 0.0),
        Measure("cosine", "cosine of P g", "cos(P g, (C + λ)^p g)", 1.0),
        Measure("length", "length of P g", "|P g| / |(C + λ)^p g|", 1.0),
        Measure("quadratic", "quadratic decrease", "max_η η gᵀd - η² dᵀC d / 2,  d = P g", None),
        Measure("decrease", "loss decrease", "L(θ) - min_η L(θ - η d),  d = P g", None),
        Measure("trace", "trace", "tr Ĉ", None),
        Measure("effective_rank", "effective rank", "(tr Ĉ)² / |Ĉ|_F²", None),
        Measure("condition", "condition", "(max s + λ) / (min s + λ),  s eigenvalues of Ĉ", None),
        Measure("largest", "largest eigenvalue", "max s", None),
        Measure("off_diagonal", "between layers", "1 - Σ_l |C_ll|_F² / |C|_F²", 0.0),
    )
}
