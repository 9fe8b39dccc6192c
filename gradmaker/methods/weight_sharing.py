"""Option of K-FAC-expand or K-FAC-reduce for weight-sharing positions: for all layers, or layer by layer."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from gradmaker.capture.sites import Site
from gradmaker.methods.kfac_family import KroneckerGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.rules import Rule, check_rule
from gradmaker.options.suggestions import did_you_mean

__all__ = ["Sharing", "SharingGradientConfig"]


Sharing: TypeAlias = Literal["expand", "reduce"]


@dataclass(frozen=True, kw_only=True)
class SharingGradientConfig(KroneckerGradientConfig, ABC):
    """K-FAC-expand and K-FAC-reduce (Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636), for all layers, or layer by layer."""

    sharing: Sharing | Mapping[Rule, Sharing] | tuple[tuple[Rule, Sharing], ...] = "expand"
    """expand, reduce, or a mapping from layers, named as in ``ignore``, to these: the first rule decides, the rest expand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sharing", _read(self.sharing))

    def check_sites(self, sites: Sequence[Site]) -> None:
        super().check_sites(sites)
        layers = [s for s in sites if self._shares(s)]
        for rule, _ in self._pairs():
            if not any(s.named_by(rule) for s in layers):
                hint = did_you_mean(getattr(rule, "__name__", rule), [s.name for s in layers])
                raise ValueError(f"sharing: {rule!r} names no layer with an input and an output factor: {hint}")

    def _shares(self, site: Site) -> bool:
        """Whether the choice has an effect on a site: one-hot inputs are always expanded."""
        return not self.unit_wise(site) and site.kind not in ("generic", "embedding")

    def sharing_of(self, site: Site) -> Sharing:
        """The choice for a layer."""
        if isinstance(self.sharing, str):
            return self.sharing
        return next((how for rule, how in self._pairs() if site.named_by(rule)), "expand")

    def _pairs(self) -> tuple[tuple[Rule, Sharing], ...]:
        """Pairs of a rule and a choice; empty where all layers have the same."""
        return self.sharing if isinstance(self.sharing, tuple) else ()


def _read(given: Any) -> Sharing | tuple[tuple[Rule, Sharing], ...]:
    """The option as a word, or as a tuple of pairs, which is hashable. ValueError where it is neither."""
    legal = list(get_args(Sharing))
    if isinstance(given, str):
        if given not in legal:
            raise ValueError(f"sharing={given!r}: {did_you_mean(given, legal, ', or a mapping from layers to these')}")
        return given  # type: ignore[return-value]
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        read = tuple((rule, how) for rule, how in pairs)
    except (TypeError, ValueError):
        read = ()
    if not read:
        raise ValueError(f"sharing={given!r}: expected {', '.join(legal)}, or a mapping as in {{'head.*': 'reduce'}}")
    for rule, how in read:
        check_rule("sharing", rule)
        check_choice(f"sharing[{rule!r}]", how, legal)
    return read
