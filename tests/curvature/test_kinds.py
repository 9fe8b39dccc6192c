"""Classes of evidence and their kinds: what is declared is what is given, and legality compares both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gradmaker import from_config
from gradmaker.blocks import Block
from gradmaker.curvature import CURVATURES, Curvature, FisherForward, GradientProbe, HessianProbe, LayerSecant, Secant
from gradmaker.curvature.evidence import Evidence, Gradient, Joint, Outer, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.products import Factors, Moments, Product
from gradmaker.curvature.roles import OfProducts, OfSecants, Pooled, Watching
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.curvature.tied import Tied
from gradmaker.representations import Dense, KronPairs, KronQ, Pairs, ProbeDiagonal, Representation
from gradmaker.solvers import SOLVERS
from gradmaker.triple import Triple, TripleError
from tests import models
from tests.test_triples import LEGAL, mapping, step


def test_the_set_is_closed() -> None:
    assert set(Evidence.__subclasses__()) == {Outer, Joint, Gradient, RowGradient, Pair, Product, Factors, Moments, Tied}
    assert not any(found.__subclasses__() for found in Evidence.__subclasses__())
    assert all(len(set(found.kinds)) == len(found.kinds) > 0 for found in Evidence.__subclasses__())


def test_a_class_alone_means_its_plain_kind() -> None:
    v = torch.zeros(1, 2)
    plain: list[Evidence] = [Outer(v, v), Joint(()), Gradient(v), Pair(v, v), Product(torch.neg), Factors(v, v), Tied(())]
    for evidence in plain:
        (found,) = kinds(type(evidence))
        assert found == Kind(type(evidence), evidence.kind) and str(found) == type(evidence).__name__
    assert {str(k) for k in kinds(Pair, (Pair, "noise_and_gradient"))} == {"Pair", "Pair (noise and gradient)"}


def test_a_kind_that_a_class_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='secant' of Outer: expected one of rows, inputs, with_secants"):
        kinds((Outer, "secant"))


@pytest.mark.parametrize("declared", [(Gradient,), frozenset({Gradient}), Gradient])
def test_a_declaration_of_another_form_is_refused(declared: Any) -> None:
    for base, name in ((Curvature, "gives"), (Representation, "takes")):
        with pytest.raises(
            ValueError, match=rf"Mine\.{name}=.*: expected what kinds\(\) makes, as in {name} = kinds\(Gradient\)"
        ):
            type("Mine", (base,), {name: declared})


@pytest.mark.parametrize("name", CURVATURES)
def test_what_is_given_is_what_is_declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No less and no more, over three steps."""
    row = next(row for row in LEGAL if row[0] == name)
    seen: set[Kind] = set()
    update = Block.update

    def watch(self: Block, held: Any, chunk: Any, *rest: Any) -> None:
        seen.update(Kind(type(chunk[key]), chunk[key].kind) for key in chunk)
        update(self, held, chunk, *rest)

    monkeypatch.setattr(Block, "update", watch)
    case = models.mlp()
    maker: Any = from_config(case.model, mapping(*row))
    optimizer = torch.optim.SGD(case.model.parameters(), 1e-3)
    for _ in range(3):
        step(maker, case)
        optimizer.step()
    assert seen == CURVATURES[name].gives


SWAPPED = {
    "probe for a secant": (HessianProbe(), Pairs(), "Pairs is built from Gradient (initial scaling), Pair (secant), but"),
    "secant for a probe": (Secant(), ProbeDiagonal(), "but Secant gives Gradient (initial scaling), Pair (secant)"),
    "secant of a layer for one of all": (
        LayerSecant(),
        Pairs(),
        "but LayerSecant gives Outer (with secants), Pair (output",
    ),
    "secant of all for one of a layer": (
        Secant(),
        KronPairs(),
        "from Outer (with secants), Pair (output secant), but",
    ),
    "noise for a probe": (GradientProbe(), ProbeDiagonal(), "but GradientProbe gives Pair (noise and gradient)"),
    "secant for noise": (Secant(), KronQ(), "KronQ is built from Pair, Pair (noise and gradient), but"),
    "inputs for rows": (FisherForward(), Dense(), "but FisherForward gives Outer (inputs)"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_another_kind_is_refused(name: str) -> None:
    """By a sentence that names it, with what would fit."""
    curvature, representation, said = SWAPPED[name]
    with pytest.raises(TripleError) as refused:
        Triple(curvature, representation, next(solvers_of(representation)))
    assert said in str(refused.value) and "Curvatures that fit" in str(refused.value)


def solvers_of(representation: Representation) -> Iterator[Any]:
    name = type(representation).__name__
    return (SOLVERS[s]() for _, label, s in LEGAL if label.split("(")[0] == name)


# --- the base class -------------------------------------------------------------------------------------------------------
def test_a_new_curvature_knows_nine_names() -> None:
    names = {n for n in (*vars(Curvature), *Curvature.__annotations__) if not n.startswith("_")}
    assert names == {"gives", "definite", "layerwise", "inapplicable", "needs", "of_passes", "measure", "by_rows", "by_parts"}


@pytest.mark.parametrize("name", CURVATURES)
def test_roles_and_needs_agree(name: str) -> None:
    curvature = CURVATURES[name]()
    assert isinstance(curvature, OfSecants) == ("previous" in curvature.needs)
    assert isinstance(curvature, OfProducts) == (kinds(Product) <= curvature.gives)
    assert not isinstance(curvature, Pooled) or all(k.evidence is Pair for k in curvature.gives)
    assert not isinstance(curvature, Watching) or "calls" in curvature.needs
    assert "calls" in curvature.needs or not curvature.layerwise
    assert "main_backward" not in curvature.needs or "calls" in curvature.needs


def test_an_empty_secant_is_like_a_secant() -> None:
    """What a state holds in the place of a pair that is not known yet is of the declared kind."""
    case = models.mlp()
    for curvature, method in ((Secant(), "lbfgs"), (LayerSecant(), "kbfgs")):
        maker: Any = from_config(case.model, {"method": method})
        for block in maker.plan.blocks:
            for site in block.sites:
                pair = curvature.empty_secant(site, block.frame.dtype, block.frame.device)
                assert Kind(Pair, pair.kind) in curvature.gives and not pair.v.any() and pair.v.shape == pair.cv.shape
