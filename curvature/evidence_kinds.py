"""Kinds of evidence: what curvatures declare to give, and representations to take."""

from __future__ import annotations

from typing import NamedTuple

from gradmaker.curvature.evidence import Evidence

__all__ = ["Kind", "check_kinds", "kinds"]


class Kind(NamedTuple):
    """A class of evidence and a kind of it: what the legality of a triple compares."""

    evidence: type[Evidence]
    kind: str

    def __str__(self) -> str:
        plain = self.kind == self.evidence.kinds[0]
        return self.evidence.__name__ if plain else f"{self.evidence.__name__} ({self.kind.replace('_', ' ')})"


def kinds(*given: type[Evidence] | tuple[type[Evidence], str]) -> frozenset[Kind]:
    """The set of the given classes of evidence, of their plain kind where none is named. ValueError for an unknown kind."""
    found = [Kind(*one) if isinstance(one, tuple) else Kind(one, one.kinds[0]) for one in given]
    for evidence, kind in found:
        if kind not in evidence.kinds:
            legal = ", ".join(evidence.kinds)
            raise ValueError(f"kind={kind!r} of {evidence.__name__}: expected one of {legal}")
    return frozenset(found)


def check_kinds(part: type, name: str) -> None:
    """Check a declaration of evidence. ValueError for a class attribute that `kinds` did not make."""
    given = vars(part).get(name, frozenset())
    if not isinstance(given, frozenset) or not all(isinstance(kind, Kind) for kind in given):
        raise ValueError(f"{part.__name__}.{name}={given!r}: expected what kinds() makes, as in {name} = kinds(Gradient)")
