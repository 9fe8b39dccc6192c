"""`coverage`: which share of the parameters each method of a plan treats, and by which parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.groups import method_name
from gradmaker.linalg.real_pairs import real_shape
from gradmaker.plan import Plan

__all__ = ["PLAIN", "Coverage", "Share", "coverage", "percent"]

PLAIN = "plain gradient"
Diagonal: TypeAlias = Literal["", "one-hot", "long side"]


@dataclass(frozen=True)
class Share:
    """Parameters that one method treats by the same parts; with `PLAIN` as method, those that keep their plain gradient."""

    method: str  # its registered name
    parts: str  # representation x solver, or why the gradient stays plain
    diagonal: Diagonal  # whether a Kronecker factor is a diagonal: that of one-hot inputs, or of a side over ``max_dim``
    sizes: Mapping[str, int]  # entries, by name of the parameter

    @property
    def count(self) -> int:
        """Number of entries."""
        return sum(self.sizes.values())

    def __str__(self) -> str:
        marks = {"": "", "one-hot": ", diagonal factor of one-hot inputs", "long side": ", diagonal factor of a long side"}
        return f"{self.method}: {self.parts}{marks[self.diagonal]}"


@dataclass(frozen=True)
class Coverage:
    """The shares of a plan, in the order of its methods, plain gradients last; prints as one line, `table` as several."""

    shares: list[Share]

    @property
    def count(self) -> int:
        """Number of entries of all trainable parameters; a complex one counts twice."""
        return sum(share.count for share in self.shares)

    @property
    def methods(self) -> dict[str, float]:
        """The share of each method by its registered name, with `PLAIN` last, if any is left to it; they add up to 1."""
        found: dict[str, int] = {}
        for share in self.shares:
            found[share.method] = found.get(share.method, 0) + share.count
        return {method: count / max(self.count, 1) for method, count in found.items()}

    def __str__(self) -> str:
        (first, share), *others = self.methods.items()
        rest = [f"{method} {percent(value)}" for method, value in others]
        return ", ".join([f"{first} treats {percent(share)} of the parameters", *rest])

    def table(self) -> str:
        """The line, and one for each share, with the names of what keeps its plain gradient."""
        lines = [str(self)]
        for share in self.shares:
            names = f": {', '.join(share.sizes)}" if share.method == PLAIN else ""
            lines.append(f"  {percent(share.count / max(self.count, 1))} {share}{names}")
        return "\n".join(lines)


def coverage(plan: Plan) -> Coverage:
    """The shares of a plan, from its shapes alone."""
    sizes = {name: prod(real_shape(p)) for name, p in plan.own.model.named_parameters(remove_duplicate=False)}
    order = {method: j for j, method in enumerate(dict.fromkeys(method_name(c) for c in plan.methods.values()))}
    treated = sorted(_collected(_treated(plan)), key=lambda share: order[share.method])
    plain = (Share(PLAIN, reason, "", {name: sizes[name]}) for name, reason in plan.plain.items())
    return Coverage([*treated, *_collected(plain)])


def percent(share: float) -> str:
    """A share in percent: ``100 %`` is all and ``0 %`` is nothing, whatever the rounding."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if not 0.001 <= share <= 0.999:
        return "under 0.1 %" if share < 0.001 else "over 99.9 %"
    return f"{100 * share:.1f} %"


def _treated(plan: Plan) -> Iterator[Share]:
    """One share for each site of each block."""
    for block in plan.blocks:
        method = method_name(plan.methods[block.options.method])
        parts = f"{type(block.triple.representation).__name__} x {type(block.triple.solver).__name__}"
        for site in block.sites:
            yield Share(method, parts, _diagonal(block, site), dict(_sizes(site)))


def _diagonal(block: Block, site: Site) -> Diagonal:
    if not block.frame.diagonal:
        return ""
    return "one-hot" if site.one_hot_axis in block.frame.diagonal else "long side"


def _sizes(site: Site) -> Iterator[tuple[str, int]]:
    """The entries of each parameter in a site, which may hold a part of it."""
    for name, piece in zip(site.parameters, site.piece_shapes(), strict=True):
        yield name, site.shape[0] * prod(piece)


def _collected(shares: Iterable[Share]) -> list[Share]:
    """Shares of the same method and parts as one, in the order of their first."""
    found: dict[tuple[str, str, Diagonal], dict[str, int]] = {}
    for share in shares:
        own = found.setdefault((share.method, share.parts, share.diagonal), {})
        for name, size in share.sizes.items():
            own[name] = own.get(name, 0) + size
    return [Share(*key, sizes) for key, sizes in found.items()]
