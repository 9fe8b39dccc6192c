"""`to_dense` against explicit sums over examples, in float64. Nothing here calls a product of the evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Gradient, Joint, Outer
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold, Frame, Representation
from gradmaker.representations.dense import Dense
from gradmaker.representations.diagonal import Diagonal
from gradmaker.representations.kronecker import Kron, KronDims

G, k, n, r, i, o = 2, 3, 5, 3, 4, 3
ONCE = Fold(beta=0.0, alpha=1.0, mass=1.0)
pytestmark = pytest.mark.usefixtures("double")


def frame(stack: int, *shape: int, diagonal: tuple[int, ...] = ()) -> Frame:
    return Frame(stack, shape, frozenset(diagonal), torch.float64, torch.device("cpu"))


def outer(bias: bool = True, masked: bool = False) -> Outer:
    inputs, gradients = torch.randn(G, n, r, i), torch.randn(k, G, n, r, o)
    if not masked:
        return Outer(inputs, gradients, bias)
    weights = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0.0]])
    return Outer(inputs, gradients * weights[None, None, :, :, None], bias, weights=weights)


def one_hot(transposed: bool) -> Outer:
    index = torch.tensor([[0, 1, 1], [3, 3, 3], [2, 0, 1], [1, 1, 0], [3, 2, 2]])
    return Outer(OneHot(index, i), torch.randn(k, 1, n, r, o), transposed=transposed)


def inputs_of(evidence: Outer) -> Tensor:
    """The inputs with their bias, formed by hand.  # (G, n, r, i)"""
    if isinstance(evidence.inputs, OneHot):
        a = torch.zeros(1, n, r, evidence.inputs.size)
        for x in range(n):
            for y in range(r):
                a[0, x, y, evidence.inputs.index[x, y]] = 1
        return a
    a = evidence.inputs
    return torch.cat([a, torch.ones(*a.shape[:-1], 1)], -1) if evidence.bias else a


def jacobians(evidence: Outer) -> Tensor:
    """``sum_r g a^T`` one example and cotangent at a time.  # (kn, G, o, i)"""
    a, rows = inputs_of(evidence), []
    for c in range(evidence.gradients.shape[0]):
        for x in range(n):
            row = sum(evidence.gradients[c, :, x, y, :, None] * a[:, x, y, None, :] for y in range(r))
            rows.append(row.mT if evidence.transposed else row)
    return torch.stack(rows)


def measured(representation: Representation, space: Frame, *steps: tuple[Outer | Gradient | Joint, Fold]) -> State:
    state = representation.init(space)
    for evidence, fold in steps:
        representation.update(state, evidence, fold)
    return state


def second_moment(rows: Tensor) -> Tensor:
    """# (N, B, P) -> (B, P, P)"""
    return sum(row[:, :, None] * row[:, None, :] for row in rows)


def check_matvec(representation: Representation, state: State, *shape: int) -> None:
    v = torch.randn(shape)
    expected = torch.einsum("bij,bj->bi", representation.to_dense(state), v.reshape(shape[0], -1)).reshape(shape)
    torch.testing.assert_close(representation.matvec(state, v), expected, rtol=1e-10, atol=1e-10)


EVIDENCE = {
    "bias": outer,
    "no bias": lambda: outer(bias=False),
    "masked": lambda: outer(masked=True),
    "one-hot": lambda: one_hot(False),
    "one-hot transposed": lambda: one_hot(True),
}


@pytest.mark.parametrize("kind", EVIDENCE)
def test_dense_layer_and_unit_are_sums_over_rows(kind):
    evidence = EVIDENCE[kind]()
    J = jacobians(evidence)
    stack, rows, columns = J.shape[1:]
    layer = measured(Dense(), frame(stack, rows, columns), (evidence, ONCE))
    torch.testing.assert_close(Dense().to_dense(layer), second_moment(J.flatten(2)))
    unit = Dense(granularity="unit")
    state = measured(unit, frame(stack * rows, columns), (evidence, ONCE))
    torch.testing.assert_close(unit.to_dense(state), second_moment(J.flatten(1, 2)))
    check_matvec(Dense(), layer, stack, rows, columns)
    check_matvec(unit, state, stack * rows, columns)


def test_dense_full_joins_layers():
    first, second = outer(), outer(bias=False)
    parts = tuple(replace(e, inputs=e.inputs[:1], gradients=e.gradients[:, :1]) for e in (first, second))
    rows = torch.cat([jacobians(part).flatten(1) for part in parts], 1).unsqueeze(1)
    full = Dense(granularity="full")
    state = measured(full, frame(1, rows.shape[-1]), (Joint(parts), ONCE))
    torch.testing.assert_close(full.to_dense(state), second_moment(rows))
    assert (full.grain, Dense().grain, Dense(granularity="unit").grain) == ("full", "layer", "unit")


@pytest.mark.parametrize("kind", EVIDENCE)
def test_diagonal_of_examples(kind):
    evidence = EVIDENCE[kind]()
    J = jacobians(evidence)
    representation = Diagonal(granularity="layer")
    state = measured(representation, frame(*J.shape[1:]), (evidence, ONCE))
    torch.testing.assert_close(representation.diagonal(state), (J * J).sum(0))
    expected = torch.diag_embed(second_moment(J.flatten(2)).diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(representation.to_dense(state), expected)
    check_matvec(representation, state, *J.shape[1:])


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 4), (2, 3, 2, 2)])
def test_gradient_of_a_tensor(shape):
    gradient = torch.randn(G, *shape)
    g = gradient.reshape(1, G, -1)
    for representation in (Dense(), Diagonal()):
        state = measured(representation, frame(G, *shape), (Gradient(gradient), ONCE))
        expected = second_moment(g)
        if isinstance(representation, Diagonal):
            expected = torch.diag_embed(expected.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(representation.to_dense(state), expected)
        check_matvec(representation, state, G, *shape)


@pytest.mark.parametrize("diagonal", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", EVIDENCE)
def test_kron_is_the_product_of_explicit_factors(kind, sharing, diagonal):
    evidence = EVIDENCE[kind]()
    hot = isinstance(evidence.inputs, OneHot)
    if hot:  # the input axis of a one-hot layer is always a diagonal
        diagonal = (*diagonal, 0 if evidence.transposed else 1)
    A, B = explicit_factors(evidence, "expand" if hot else sharing)
    left, right = (A, B) if evidence.transposed else (B, A)
    left, right = (
        torch.stack([torch.diag(torch.diag(F)) for F in M]) if axis in diagonal else M for axis, M in enumerate((left, right))
    )
    representation = Kron(sharing=sharing)
    shape = (left.shape[-1], right.shape[-1])
    state = measured(representation, frame(A.shape[0], *shape, diagonal=diagonal), (evidence, ONCE))
    expected = torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)])
    torch.testing.assert_close(representation.to_dense(state), expected)
    check_matvec(representation, state, A.shape[0], *shape)
    assert [F.ndim for F in representation.factors(state)] == [2 if axis in diagonal else 3 for axis in (0, 1)]


def explicit_factors(evidence: Outer, sharing: str) -> tuple[Tensor, Tensor]:
    """Input and gradient factors, by loops.  # (G, i, i), (G, o, o)"""
    a, g = inputs_of(evidence), evidence.gradients
    weights = torch.ones(n, r) if evidence.weights is None else evidence.weights
    A, B, counted = 0, 0, 0
    for x in range(n):
        if sharing == "expand":
            A = A + sum(weights[x, y] * a[:, x, y, :, None] * a[:, x, y, None, :] for y in range(r))
            B = B + sum(v[:, x, y, :, None] * v[:, x, y, None, :] for v in g for y in range(r))
            counted += weights[x].sum()
        elif weights[x].sum() > 0:
            mean = sum(weights[x, y] * a[:, x, y] for y in range(r)) / weights[x].sum()
            A = A + mean[:, :, None] * mean[:, None, :]
            B = B + sum(v[:, x].sum(1)[:, :, None] * v[:, x].sum(1)[:, None, :] for v in g)
            counted += 1
    return A / counted, B


def test_kron_is_exact_for_one_example():
    evidence = outer()
    evidence = replace(evidence, inputs=evidence.inputs[:, :1, :1], gradients=evidence.gradients[:, :, :1, :1])
    kron = measured(Kron(), frame(G, o, i + 1), (evidence, ONCE))
    dense = measured(Dense(), frame(G, o, i + 1), (evidence, ONCE))
    torch.testing.assert_close(Kron().to_dense(kron), Dense().to_dense(dense))


def test_kron_counts_the_inputs_of_a_chunk_once():
    whole = outer()
    first = replace(whole, gradients=whole.gradients[:1])
    rest = replace(whole, gradients=whole.gradients[1:], fresh=False)
    before, step = (outer(), ONCE), Fold(0.9, 0.1, 0.1)
    state = measured(Kron(), frame(G, o, i + 1), before, (first, step), (rest, Fold(1.0, 0.1, 0.0)))
    expected = measured(Kron(), frame(G, o, i + 1), before, (whole, step))
    torch.testing.assert_close(Kron().to_dense(state), Kron().to_dense(expected))


def test_a_sum_adds_gradients_and_averages_inputs():
    """Over the positions that were counted: a piece with a mask weighs less."""
    pieces = [outer(), outer(masked=True), outer()]
    step = Fold(1.0, 1.0, 1.0, summed=True)
    left, right = Kron().factors(measured(Kron(), frame(G, o, i + 1), *((piece, step) for piece in pieces)))
    A, B = zip(*(explicit_factors(piece, "expand") for piece in pieces), strict=True)
    torch.testing.assert_close(left, sum(B))
    counted = [n * r, 8, n * r]
    torch.testing.assert_close(right, sum(c * moment for c, moment in zip(counted, A, strict=True)) / sum(counted))


@pytest.mark.parametrize("diagonal", [(), (0,), (1, 2)])
@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 4)])
def test_kron_dims_is_the_root_of_the_product(shape, diagonal):
    diagonal = tuple(axis for axis in diagonal if axis < max(1, len(shape)))
    gradients = [torch.randn(G, *shape) for _ in range(6)]
    space = frame(G, *shape, diagonal=diagonal)
    state = measured(KronDims(), space, *((Gradient(g), Fold(1.0, 1.0, 1.0, summed=True)) for g in gradients))
    m = max(1, len(shape))
    for b in range(G):
        product = torch.ones(1, 1)
        for axis in range(m):
            unfolded = [
                g[b].reshape(shape or (1,)).movedim(axis, 0).flatten(1) if m > 1 else g[b].reshape(-1, 1) for g in gradients
            ]
            H = sum(x @ x.T for x in unfolded)
            product = torch.kron(product, torch.diag(H.diagonal()) if axis in diagonal else H)
        dense = KronDims().to_dense(state)[b]
        torch.testing.assert_close(torch.linalg.matrix_power(dense, m), product, rtol=1e-9, atol=1e-9)
        assert torch.linalg.eigvalsh(dense).min() > -1e-9
    check_matvec(KronDims(), state, G, *shape)


def test_apply_factors_is_the_kronecker_product():
    factors = [torch.randn(G, 2, 2), torch.randn(G, 3), torch.randn(G, 4, 4)]
    g = torch.randn(G, 2, 3, 4)
    for b in range(G):
        matrix = torch.kron(torch.kron(factors[0][b], torch.diag(factors[1][b])), factors[2][b])
        torch.testing.assert_close(apply_factors(factors, g)[b].reshape(-1), matrix @ g[b].reshape(-1))
        skipped = torch.kron(torch.kron(torch.eye(2), torch.diag(factors[1][b])), factors[2][b])
        torch.testing.assert_close(apply_factors([None, *factors[1:]], g)[b].reshape(-1), skipped @ g[b].reshape(-1))


# ------------------------------------------------------------------ folding
MATRIX = [
    (Dense(), (o, i + 1)),
    (Dense(granularity="unit"), (i + 1,)),
    (Diagonal(granularity="layer"), (o, i + 1)),
    (Kron(), (o, i + 1)),
]


def space_of(representation: Representation, shape: tuple[int, ...]) -> Frame:
    return frame(G * o if representation.grain == "unit" else G, *shape)


@pytest.mark.parametrize(("representation", "shape"), MATRIX)
def test_average_of_a_constant_is_the_constant(representation, shape):
    evidence = outer()
    expected = representation.to_dense(measured(representation, space_of(representation, shape), (evidence, ONCE)))
    state = representation.init(space_of(representation, shape))
    for _ in range(4):
        representation.update(state, evidence, Fold(beta=0.9, alpha=0.1, mass=0.1))
        torch.testing.assert_close(representation.to_dense(state), expected, rtol=1e-12, atol=1e-12)
    newest = outer()
    representation.update(state, newest, ONCE)
    alone = representation.to_dense(measured(representation, space_of(representation, shape), (newest, ONCE)))
    torch.testing.assert_close(representation.to_dense(state), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("representation", [Dense(), Diagonal(), KronDims()])
def test_weighted_average_of_gradients(representation):
    gradients = [torch.randn(G, 3, 2) for _ in range(4)]
    state = measured(representation, frame(G, 3, 2), *((Gradient(g), Fold(0.7, 0.3, 0.3)) for g in gradients))
    weights = [0.3 * 0.7 ** (3 - t) for t in range(4)]
    scaled = [(w / sum(weights)) ** 0.5 * g for w, g in zip(weights, gradients, strict=True)]
    expected = measured(representation, frame(G, 3, 2), *((Gradient(g), Fold(1.0, 1.0, 1.0, True)) for g in scaled))
    torch.testing.assert_close(representation.to_dense(state), representation.to_dense(expected))
    total = measured(representation, frame(G, 3, 2), *((Gradient(g), Fold(1.0, 1.0, 1.0, True)) for g in gradients))
    assert torch.equal(total["mass"], torch.ones(G))
    if isinstance(representation, Dense):
        rows = torch.stack([g.flatten(1) for g in gradients])
        torch.testing.assert_close(representation.to_dense(total), second_moment(rows))


@pytest.mark.parametrize(("representation", "shape"), MATRIX)
def test_uneven_micro_batches_equal_one_batch(representation, shape):
    inputs, gradients = torch.randn(G, 8, r, i), torch.randn(k, G, 8, r, o)
    pieces = [Outer(inputs[:, part], gradients[:, :, part], bias=True) for part in (slice(0, 2), slice(2, 8))]
    space, decay = space_of(representation, shape), 0.9
    split, whole = representation.init(space), representation.init(space)
    for _ in range(2):
        # A micro-batch brings gradients of its own mean loss, and its share of the step as a weight.
        for first, share, piece in zip((True, False), (0.25, 0.75), pieces, strict=True):
            beta, mass = (decay, 1 - decay) if first else (1.0, 0.0)
            fold = Fold(beta, (1 - decay) * share, mass, of_step=1 - decay)
            representation.update(split, rescaled(piece, share**-0.5), fold)
        representation.update(whole, Outer(inputs, gradients, bias=True), Fold(decay, 1 - decay, 1 - decay))
    torch.testing.assert_close(representation.to_dense(split), representation.to_dense(whole), rtol=1e-10, atol=1e-10)


def rescaled(evidence: Outer, scale: float) -> Outer:
    return replace(evidence, gradients=evidence.gradients * scale)


@pytest.mark.parametrize(
    ("representation", "shape"), [*MATRIX, (KronDims(), (3, 2)), (KronDims(), ()), (Diagonal(), (2,)), (Dense(), (2,))]
)
def test_nothing_seen_is_the_zero_matrix(representation, shape):
    state = representation.init(frame(2, *shape))
    assert all(x.shape[0] == 2 for x in state.values())
    assert not representation.to_dense(state).any()
    assert not representation.matvec(state, torch.ones(2, *shape)).any()


def test_update_works_on_a_slice_of_the_stack():
    evidence = outer()
    for representation, shape in MATRIX:
        stack = G * o if representation.grain == "unit" else G
        state = representation.init(frame(stack + 3, *shape))
        representation.update({name: x[2 : 2 + stack] for name, x in state.items()}, evidence, ONCE)
        expected = representation.to_dense(measured(representation, frame(stack, *shape), (evidence, ONCE)))
        torch.testing.assert_close(representation.to_dense(state)[2 : 2 + stack], expected)
        assert not representation.to_dense(state)[[0, 1, stack + 2]].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(granularity="row"), "granularity='row'"),
        (lambda: Diagonal(granularity="full"), "granularity='full'"),
        (lambda: Kron(sharing="sum"), "sharing='sum'"),
    ],
)
def test_unknown_words_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("representation", [Dense(), Diagonal(granularity="layer"), Kron(), Kron(sharing="reduce")])
def test_an_update_reads_nothing_from_the_device(representation):
    evidence = outer(masked=True)
    weights = None if evidence.weights is None else evidence.weights.to("meta")
    away = replace(evidence, inputs=evidence.inputs.to("meta"), gradients=evidence.gradients.to("meta"), weights=weights)
    space = Frame(G, (o, i + 1), frozenset(), torch.float64, torch.device("meta"))
    measured(representation, space, (away, ONCE), (away, Fold(0.9, 0.1, 0.1)))


def test_a_gradient_update_reads_nothing_from_the_device():
    space = Frame(G, (3, 2), frozenset((1,)), torch.float64, torch.device("meta"))
    for representation in (Dense(), Diagonal(), KronDims()):
        measured(representation, space, (Gradient(torch.empty(G, 3, 2, device="meta")), Fold(0.9, 0.1, 0.1)))
