"""The products of an `Outer` against its rows, formed by loops over examples and positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature import evidence as module
from gradmaker.curvature.evidence import Gradient, Joint, Outer

EXACT = 1e-12
pytestmark = pytest.mark.usefixtures("double")


@dataclass(frozen=True)
class Shape:
    k: int = 3
    G: int = 2
    n: int = 4
    r: int = 3
    i: int = 3
    o: int = 2
    bias: bool = True
    masked: bool = False
    one_hot: bool = False
    transposed: bool = False
    padding: int | None = None


SHAPES = {
    "usual": Shape(),
    "one_of_all": Shape(k=1, G=1, n=1, r=1, i=1, o=1),
    "one_position": Shape(r=1),
    "one_position_transposed": Shape(r=1, transposed=True),
    "no_bias": Shape(bias=False),
    "transposed": Shape(transposed=True),
    "only_bias": Shape(i=0),
    "masked": Shape(masked=True),
    "masked_no_bias": Shape(masked=True, bias=False),
    "one_hot": Shape(G=1, i=5, r=4, bias=False, one_hot=True),
    "one_hot_transposed": Shape(G=1, i=5, r=4, bias=False, one_hot=True, transposed=True),
    "one_hot_masked": Shape(G=1, i=5, r=4, bias=False, one_hot=True, transposed=True, masked=True),
    "one_hot_padding": Shape(G=1, i=5, r=4, bias=False, one_hot=True, transposed=True, padding=1),
}


def draw(s: Shape) -> tuple[Outer, Tensor]:
    """Random evidence, and its inputs with the bias formed.  # (G, n, r, i)"""
    weights = (torch.rand(s.n, s.r) < 0.6).double() if s.masked else None
    gradients = torch.randn(s.k, s.G, s.n, s.r, s.o)
    if weights is not None:
        weights[0], weights[1] = 0, 1
        gradients = gradients * weights[:, :, None]
    if not s.one_hot:
        a = torch.randn(s.G, s.n, s.r, s.i)
        full = torch.cat([a, torch.ones(s.G, s.n, s.r, 1)], -1) if s.bias else a
        return Outer(a, gradients, s.bias, s.transposed, weights), full
    index = torch.randint(s.i, (s.n, s.r))
    if s.padding is not None:
        index[0, :2] = s.padding
        gradients = gradients * (index != s.padding)[:, :, None]
    dense = torch.eye(s.i)[index][None]
    if s.padding is not None:
        dense[..., s.padding] = 0
    return Outer(OneHot(index, s.i, s.padding), gradients, s.bias, s.transposed, weights), dense


def formed(s: Shape, evidence: Outer, a: Tensor) -> Tensor:
    """``J``, row by row.  # (N, G, o, i), or (N, G, i, o)"""
    J = torch.zeros(s.k * s.n, s.G, s.o, a.shape[-1])
    for c, x, y, G in product(range(s.k), range(s.n), range(s.r), range(s.G)):
        J[c * s.n + x, G] += torch.outer(evidence.gradients[c, G, x, y], a[G, x, y])
    return J.mT if s.transposed else J


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", SHAPES)
def test_products(name: str) -> None:
    s = SHAPES[name]
    evidence, a = draw(s)
    J = formed(s, evidence, a)
    v, z = torch.randn(J.shape[1:]), torch.randn(len(J))
    assert evidence.count == len(J)
    close(evidence.rows(), J)
    close(evidence.squares(), J.square().sum(0))
    close(evidence.project(v), (J * v).flatten(2).sum(2).mT)
    close(evidence.combine(z[None]), torch.einsum("n,n...->...", z, J))
    each = torch.randn(J.shape[1], len(J))
    close(evidence.combine(each), torch.einsum("gn,ngoi->goi", each, J))
    close(evidence.gram(evidence), torch.einsum("ngoi,mgoi->gnm", J, J))


@pytest.mark.parametrize("name", SHAPES)
def test_gram_of_two(name: str) -> None:
    """Of other examples, which are more."""
    s = SHAPES[name]
    more = replace(s, n=s.n + 2)
    (one, a), (two, b) = draw(s), draw(more)
    close(one.gram(two), torch.einsum("ngoi,mgoi->gnm", formed(s, one, a), formed(more, two, b)))


@pytest.mark.parametrize("name", [name for name, s in SHAPES.items() if not s.one_hot])
@pytest.mark.parametrize("most", [1, 30, 100, 10**6])
def test_pieces_are_the_rows(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of a bounded size, in which every row occurs once."""
    s = SHAPES[name]
    evidence, a = draw(s)
    monkeypatch.setattr(module, "PIECE", most)
    parts = [part.rows() for part in evidence.pieces()]
    J = formed(s, evidence, a)
    assert all(part.numel() <= max(most, J[0].numel()) for part in parts)
    found = torch.cat(parts).flatten(1)
    assert len(found) == len(J) and (torch.cdist(found, J.flatten(1)).amin(0) < EXACT).all()
    close(evidence.squares(), J.square().sum(0))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "diagonal"])
def test_moments(name: str, diagonal: bool) -> None:
    """``beta out + alpha moment``: the sum over counted positions of ``a a^T``, the sum of ``g g^T``."""
    s, beta, alpha = SHAPES[name], 0.7, 0.3
    evidence, a = draw(s)
    count = evidence.weights if evidence.weights is not None else torch.ones(s.n, s.r)
    if isinstance(evidence.inputs, OneHot) and s.padding is not None:
        count = count * (evidence.inputs.index != s.padding)
    moments = torch.einsum("gnri,gnrj,nr->gij", a, a, count)
    assert float(evidence.counted) == float(count.sum())
    outers = torch.einsum("kgnro,kgnrp->gop", evidence.gradients, evidence.gradients)
    calls = ((evidence.add_input_moment_, moments, diagonal or s.one_hot), (evidence.add_gradient_moment_, outers, diagonal))
    for add, moment, flat in calls:
        fresh = moment.diagonal(dim1=1, dim2=2) if flat else moment
        start = torch.randn(fresh.shape)
        out = start if flat else start + start.mT
        expected = beta * out + alpha * fresh
        add(out, beta, alpha)
        close(out, expected)


@pytest.mark.parametrize("name", [name for name, s in SHAPES.items() if not s.one_hot and s.i])
def test_reduced(name: str) -> None:
    """One position an example: the mean of the counted inputs, the sum of the gradients."""
    s = SHAPES[name]
    evidence, a = draw(s)
    reduced = evidence.reduced()
    count = evidence.weights if evidence.weights is not None else torch.ones(s.n, s.r)
    assert isinstance(reduced.inputs, Tensor)
    for x in range(s.n):
        rows = [y for y in range(s.r) if count[x, y]]
        if rows:
            close(reduced.inputs[:, x, 0], a[:, x, rows, : s.i].mean(1))
        else:
            assert reduced.weights is not None and reduced.weights[x] == 0
    close(reduced.gradients[:, :, :, 0], evidence.gradients.sum(3))
    assert reduced.bias == evidence.bias and reduced.transposed == evidence.transposed


def test_gram_has_the_spectrum_of_the_curvature() -> None:
    s = SHAPES["usual"]
    evidence, a = draw(s)
    J = formed(s, evidence, a).flatten(1)
    large, small = torch.linalg.eigvalsh(J.mT @ J), torch.linalg.eigvalsh(evidence.gram(evidence).sum(0))
    torch.testing.assert_close(small, large[-len(small) :], rtol=1e-9, atol=1e-9)
    assert large[: -len(small)].abs().max() < 1e-9


def test_joint_rows() -> None:
    names = ("usual", "no_bias", "transposed")
    parts = [draw(SHAPES[name]) for name in names]
    J = torch.cat(
        [formed(SHAPES[name], *part).flatten(1) for name, part in zip(names, parts, strict=True)],
        1,
    )
    joint = Joint(tuple(evidence for evidence, _ in parts))
    close(joint.rows()[:, 0], J)


def test_gradient_is_one_row() -> None:
    g = torch.randn(2, 3, 4)
    close(Gradient(g).rows(), g[None])


def test_one_hot_products_stay_small() -> None:
    """With a vocabulary of 10^7 a dense row of inputs would be 100 times the limit."""
    index, V = torch.randint(10**7, (2, 3)), 10**7
    evidence = Outer(OneHot(index, V), torch.randn(1, 1, 2, 3, 1), transposed=True)
    out = torch.zeros(1, V)
    evidence.add_input_moment_(out, 0.0, 1.0)
    close(out.sum(), torch.tensor(6.0))
    assert evidence.gram(evidence).shape == (1, 2, 2)
