"""FANG against dense matrices and closed forms, the forward-only curvature against inputs by hand, and the RBM example."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, Triple, TripleError
from gradmaker.capture.tape import Tape
from gradmaker.curvature import FisherEmp, FisherExact, FisherForward, OneHot, Outer
from gradmaker.linalg.state import State
from gradmaker.representations import Dense, Eigenbasis, GaussianGraph, Kron, KronRows
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import CG, Cholesky, Eigh, FactorWoodbury, LocalRegression, Rotate
from tests import models, oracles
from tests.models import Case
from tests.test_triples import FISHERS, MODELS, custom, direction, fisher_and_gradient, step

SIZE = 7
ONCE = Fold(0.0, 1.0, 1.0)


# --- the four identities --------------------------------------------------------------------------------------------------
def held(C: Tensor, graph: GaussianGraph) -> State:
    """A state fed by rows whose second moment is C."""
    L = torch.linalg.cholesky(C)
    state = graph.init(Frame(1, (1, len(C)), frozenset(), torch.float64, C.device))
    inputs, bias = L.mT[None, :, None, :-1], torch.ones(1, 1, len(C), 1, 1, dtype=C.dtype)
    if graph.structure != "bias":
        inputs, bias = L.new_zeros(1, len(C), 1, 0), L.mT[None, None, :, None]
        state = graph.init(Frame(1, (len(C), 1), frozenset(), torch.float64, C.device))
        graph.update(state, Outer(inputs, bias, bias=True), ONCE)
        return state
    last = L.mT[:, -1]  # a row is g [a 1]: scaled by its last entry
    graph.update(state, Outer(inputs / last[None, :, None, None], last[None, None, :, None, None] * bias, bias=True), ONCE)
    return state


def precision(C: Tensor, structure: Any, damping: float) -> Tensor:
    """P of a solver, column by column, and its own operator."""
    graph, solver = GaussianGraph(structure), LocalRegression(damping=damping)
    state = held(C, graph)
    shape = (1, len(C)) if structure == "bias" else (len(C), 1)
    cache = solver.prepare(graph, state, None)
    eye = torch.eye(len(C), dtype=C.dtype)
    P = torch.stack([solver.solve(graph, cache, e.reshape(1, *shape)).reshape(-1) for e in eye], 1)
    assert oracles.relative_error(solver.operator(graph, state)[0], P) < 1e-12
    return P


def covariance(seed: int = 0, size: int = SIZE) -> Tensor:
    X = torch.randn(4 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    X[:, -1] += 3  # rows divide by it
    return X.mT @ X / len(X)


NONE: tuple[tuple[int, ...], ...] = ((),) * SIZE
CHAIN = ((), *((i,) for i in range(SIZE - 1)))
SPARSE = ((), (0,), (0, 1), (1,), (0, 2, 3), (), (4, 5))
REVERSED = (*(tuple(range(i + 1, SIZE)) for i in range(SIZE)),)  # parents with larger indices: any acyclic order is one


@pytest.mark.parametrize("structure", ["full", REVERSED], ids=["full", "reversed"])
def test_all_parents_are_the_dense_inverse(structure: Any) -> None:
    C = covariance()
    expected = torch.linalg.inv(C + 0.1 * torch.eye(SIZE, dtype=C.dtype))
    assert oracles.relative_error(precision(C, structure, 0.1), expected) < 1e-12


def test_no_parents_are_the_diagonal() -> None:
    C = covariance()
    assert oracles.relative_error(precision(C, NONE, 0.1), torch.diag(1 / (C.diagonal() + 0.1))) < 1e-12


def test_a_chain_is_exact_for_a_chain() -> None:
    main, side = torch.linspace(2, 3, SIZE, dtype=torch.float64), torch.linspace(0.5, 0.9, SIZE - 1, dtype=torch.float64)
    K = torch.diag(main) + torch.diag(side, 1) + torch.diag(side, -1)
    assert oracles.relative_error(precision(torch.linalg.inv(K), CHAIN, 0.0), K) < 1e-12
    assert oracles.relative_error(precision(covariance(), CHAIN, 0.0), torch.linalg.inv(covariance())) > 1e-2  # not in general


@pytest.mark.parametrize("structure", [NONE, CHAIN, SPARSE, "full", "bias"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_trace_of_the_product_is_the_size(structure: Any, damping: float) -> None:
    C = covariance(1)
    damped = C + damping * torch.eye(SIZE, dtype=C.dtype)
    P = precision(C, structure, damping)
    assert abs(float((P @ damped).trace()) - SIZE) < 1e-11
    assert torch.linalg.eigvalsh(P)[0] > 0


def test_sparse_parents_by_hand() -> None:
    """Every regression solved on its own."""
    C = covariance(2) + 0.2 * torch.eye(SIZE, dtype=torch.float64)
    S, d = torch.zeros_like(C), C.diagonal().clone()
    for i, own in enumerate(SPARSE):
        if own:
            beta = torch.linalg.solve(C[list(own)][:, list(own)], C[list(own), i])
            S[i, list(own)], d[i] = beta, C[i, i] - C[i, list(own)] @ beta
    root = torch.eye(SIZE, dtype=C.dtype) - S
    P = precision(covariance(2), SPARSE, 0.2)
    assert oracles.relative_error(P, root.mT @ torch.diag(1 / d) @ root) < 1e-12
    assert all(P[i, j] == 0 for i, j in [(3, 5), (1, 6), (0, 5)])  # no common family


def quasi_diagonal(C: Tensor, v: Tensor, bias: int | None) -> Tensor:
    """Ollivier's closed form for one unit; C damped."""
    if bias is None:
        return v / C.diagonal()
    rest = [i for i in range(len(v)) if i != bias]
    b = C[bias, rest] / C[bias, bias]
    e = (v[rest] - b * v[bias]) / (C.diagonal()[rest] - C[bias, rest].square() / C[bias, bias])
    out = torch.empty_like(v)
    out[rest], out[bias] = e, v[bias] / C[bias, bias] - b @ e
    return out


def test_bias_is_the_closed_form() -> None:
    C, v = covariance(3), torch.randn(SIZE, dtype=torch.float64)
    damped = C + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    assert oracles.relative_error(precision(C, "bias", 0.1) @ v, quasi_diagonal(damped, v, SIZE - 1)) < 1e-12


@pytest.mark.parametrize("structure", [NONE, CHAIN, SPARSE, "full", "bias"])
def test_the_matrix_and_its_products(structure: Any) -> None:
    graph = GaussianGraph(structure)
    state = held(covariance(4), graph)
    C = graph.to_dense(state)[0]
    S, d = graph.regressions(state, 0.0)
    root = torch.eye(SIZE, dtype=C.dtype) - S[0]
    assert oracles.relative_error(torch.linalg.inv(C), root.mT @ torch.diag(1 / d[0]) @ root) < 1e-10
    v = torch.randn(1, *((1, SIZE) if structure == "bias" else (SIZE, 1)), dtype=torch.float64)
    assert oracles.relative_error(graph.matvec(state, v).reshape(-1), C @ v.reshape(-1)) < 1e-12
    for i, own in enumerate([(SIZE - 1,)] * (SIZE - 1) if structure == "bias" else []):
        assert oracles.relative_error(C[i, own[0]], covariance(4)[i, own[0]]) < 1e-10  # families are matched


# --- whole directions -----------------------------------------------------------------------------------------------------
def units(model: nn.Module) -> list[tuple[Tensor, int | None]]:
    """Every unit as indices into the parameter vector, and where among them its bias is."""
    where = {k: torch.arange(s.start, s.stop) for k, s in oracles.parameter_slices(model).items()}
    found: list[tuple[Tensor, int | None]] = []
    for prefix, module in model.named_modules():
        own = [k for k, _ in module.named_parameters(prefix, recurse=False)]
        biased = len(own) == 2 and own[1].endswith("bias")
        for group in [own] if biased else [[k] for k in own]:
            rows = torch.cat([where[k].reshape(model.get_parameter(k).shape[0], -1) for k in group], 1)
            found += [(row, len(row) - 1 if biased else None) for row in rows]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_fang_is_the_quasi_diagonal_natural_gradient(name: str, fisher: str) -> None:
    make, curvature = MODELS[name], FISHERS[fisher]
    C, g = fisher_and_gradient(make(), curvature, 3, 0.8)
    expected = torch.zeros_like(g)
    for index, bias in units(make().model):
        damped = oracles.reorder(C, index) + 0.05 * torch.eye(len(index), dtype=C.dtype)
        expected[index] = quasi_diagonal(damped, g[index], bias)
    config = METHODS["fang"].Config(fisher=curvature, damping=0.05, decay=0.8)
    assert oracles.relative_error(direction(make, config, "fang", 3), expected) < 1e-9


@pytest.mark.parametrize(
    "name, whole",
    [("mlp", False), ("sequences", False), *((name, True) for name in ("mlp", "convolution", "sequences", "layer_norm"))],
)
def test_full_is_the_dense_inverse(name: str, whole: bool) -> None:
    """Of layers where they have one group: a graph has a block for each, the dense matrix one for all."""
    dense = Dense(granularity="full" if whole else "layer")
    parts = (GaussianGraph("full", whole=whole), LocalRegression(damping=0.05)), (dense, Cholesky(damping=0.05))
    found = [direction(MODELS[name], custom(FisherExact(), r, s), steps=2) for r, s in parts]
    assert oracles.relative_error(*found) < 1e-9


@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_norm_layers_are_unit_wise(kind: str) -> None:
    make = partial(models.normed, kind)
    case = make()
    found = [
        direction(make, METHODS[m].Config(fisher=FisherExact(), damping=0.05), m)[where]
        for m in ("fang", "unit_ng")
        for k, where in oracles.parameter_slices(case.model).items()
        if k.startswith("norm.")
    ]
    half = len(found) // 2
    assert half == 2
    assert oracles.relative_error(torch.cat(found[:half]), torch.cat(found[half:])) < 1e-10


def softmax_regression() -> Case:
    return models.build(lambda: nn.Linear(3, models.CLASSES), 30, 3)


def alone(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """No parents."""
    return [()] * prod(shape)


@pytest.mark.parametrize("structure, invariant", [("bias", True), (alone, False)])
def test_affine_invariance(structure: Any, invariant: bool) -> None:
    """Inputs ``(a + c) s`` with weights that undo it: without damping the outputs move alike."""
    c, s = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([3.0, 0.2, 1.5])
    case, twin = softmax_regression(), softmax_regression()
    W, b = twin.model.weight.data, twin.model.bias.data
    W.div_(s), b.sub_((W * s) @ c.double())
    twin = twin._replace(x=(twin.x + c) * s)
    assert oracles.relative_error(twin.model(twin.x), case.model(case.x)) < 1e-12
    moves = []
    for one in (case, twin):
        config = METHODS["fang"].Config(fisher=FisherExact(), damping=0.0, structure=structure)
        step(METHODS["fang"](one.model, config), one)
        moves.append(F.linear(one.x, one.model.weight.grad, one.model.bias.grad))
    assert (oracles.relative_error(moves[1], moves[0]) < 1e-10) == invariant


def test_parents_as_a_function_as_a_tuple_and_in_a_mapping() -> None:
    def chain(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(i - 1,) if i else () for i in range(shape[0] * shape[1])]

    make: Callable[[], Case] = softmax_regression
    listed = [list(own) for own in chain((3, 4))]
    found = [direction(make, METHODS["fang"].Config(structure=s, fisher=FisherEmp()), "fang") for s in (chain, listed, "bias")]
    assert torch.equal(found[0], found[1])
    assert oracles.relative_error(found[0], found[2]) > 1e-3


@pytest.mark.parametrize(
    "structure, sentence",
    [
        ("star", "expected bias, full, parents"),
        ((*[()] * 11, (11,)), "entry 11 is an ancestor of itself"),
        ((*[()] * 10, (11,), (10,)), "entry 10 is an ancestor of itself"),
        ((*[()] * 11, (12,)), "the parents of entry 11"),
        ((*[()] * 11, (1, 1)), "the parents of entry 11"),
        (((),) * 11, "expected the parents of the 12 entries of a block \\(3, 4\\), got those of 11"),
    ],
)
def test_wrong_parents_are_refused(structure: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        METHODS["fang"](softmax_regression().model, METHODS["fang"].Config(structure=structure))


def test_blocks_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="expected whole=False"):
        GaussianGraph("bias", whole=True)
    with pytest.raises(ValueError, match="name fewer parents"):
        GaussianGraph("full").init(Frame(1, (1000, 1), frozenset(), torch.float32, torch.device("cpu")))
    wide = nn.Linear(9000, 1)  # the star is as small as a diagonal
    assert METHODS["fang"](wide).plan.blocks[0].state["cross"].shape == (1, 1, 9001)


@pytest.mark.parametrize("structure", ["bias", "full"])
def test_a_failed_block_keeps_its_past(structure: Any) -> None:
    graph, solver = GaussianGraph(structure), LocalRegression(damping=0.1)
    good = held(covariance(), graph)
    bad = {k: v * float("nan") if k in ("diagonal", "matrix") else v for k, v in good.items()}
    before = solver.prepare(graph, good, None)
    kept, first = solver.prepare(graph, bad, before), solver.prepare(graph, bad, None)
    g = torch.randn(1, *((1, SIZE) if structure == "bias" else (SIZE, 1)), dtype=torch.float64)
    assert torch.equal(solver.solve(graph, kept, g), solver.solve(graph, before, g)) and int(kept["failures"]) == 1
    assert oracles.relative_error(solver.solve(graph, first, g), g / 0.1) < 1e-12 and int(first["failures"]) == 1


def test_positions_are_summed_before_squares() -> None:
    """One example with several positions is not several examples."""
    make = partial(models.tagger, mix=True)
    config = METHODS["fang"].Config(fisher=FisherEmp(), damping=1e-3)
    assert (
        oracles.relative_error(
            direction(make, config, "fang"), direction(make, METHODS["diag_ng"].Config(fisher=FisherEmp()), "diag_ng")
        )
        > 1e-3
    )
    a, g = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(2, 1, 2, 3, 5, dtype=torch.float64)
    graph = GaussianGraph()
    state = graph.init(Frame(1, (5, 5), frozenset(), torch.float64, a.device))
    graph.update(state, Outer(a, g, bias=True), ONCE)
    J = torch.einsum("kgnro,gnri->kngoi", g, F.pad(a, (0, 1), value=1.0)).flatten(0, 1)
    assert oracles.relative_error(state["diagonal"], J.square().sum(0)) < 1e-12
    assert oracles.relative_error(state["cross"][..., :-1], (J * J[..., -1:]).sum(0)[..., :-1]) < 1e-12
    assert state["cross"][..., -1].abs().max() == 0


# --- the forward-only curvature -------------------------------------------------------------------------------------------
def forward_direction(make: Callable[[], Case], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of kfac with FisherForward and exact damping, and the plain ones."""
    case, plain = make(), make()
    step(METHODS["kfac"](case.model, METHODS["kfac"].Config(fisher=FisherForward(), split="exact", **options)), case)
    plain.run().backward()
    return tuple({k: p.grad for k, p in c.model.named_parameters() if p.grad is not None} for c in (case, plain))  # type: ignore[return-value]


def solved(gradients: dict[str, Tensor], layer: str, rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``G (A + damping I)^-1`` with ``A`` the mean over rows ``[a 1]``, as weight and bias."""
    a = F.pad(rows, (0, 1), value=1.0)
    G = torch.cat([gradients[f"{layer}.weight"].flatten(1), gradients[f"{layer}.bias"].unsqueeze(1)], 1)
    P = torch.linalg.solve(a.mT @ a / len(a) + damping * torch.eye(a.shape[1], dtype=a.dtype), G.mT).mT
    return P[:, :-1], P[:, -1]


def test_forward_only_of_linear_layers() -> None:
    found, plain = forward_direction(models.mlp, damping=0.05)
    case = models.mlp()
    a = case.x
    for name, module in case.model.named_children():
        if isinstance(module, nn.Linear):
            weight, bias = solved(plain, name, a, 0.05)
            assert oracles.relative_error(found[f"{name}.weight"], weight) < 1e-10
            assert oracles.relative_error(found[f"{name}.bias"], bias) < 1e-10
        a = module(a).detach()


def test_forward_only_of_convolutions_and_norms() -> None:
    make = partial(models.convolution, 2)
    found, plain = forward_direction(make, damping=0.05)
    case = make()
    conv: Any = case.model.get_submodule("convolution")
    patches = oracles.conv_patches(conv, case.x).flatten(0, -2)
    weight, bias = solved(plain, "convolution", patches, 0.05)
    assert oracles.relative_error(found["convolution.weight"].flatten(1), weight) < 1e-10
    assert oracles.relative_error(found["convolution.bias"], bias) < 1e-10

    found, plain = forward_direction(models.normed, damping=0.05)
    seen: list[Tensor] = []
    case = models.normed()
    norm: Any = case.model.get_submodule("norm")
    norm.register_forward_hook(lambda m, args, out: seen.append((out.detach() - m.bias) / m.weight))
    case.run()
    for channel, x in enumerate(seen[0].reshape(-1, len(norm.weight)).detach().unbind(1)):
        A = F.pad(x[:, None], (0, 1), value=1.0)
        g = torch.stack([plain["norm.weight"][channel], plain["norm.bias"][channel]])
        expected = oracles.tikhonov_solve(A.mT @ A / len(A), 0.05, g)
        assert abs(float(found["norm.weight"][channel] - expected[0])) < 1e-9 * float(expected.norm())


def test_forward_only_of_tokens() -> None:
    """An embedding divides each row by the frequency of its token."""
    found, plain = forward_direction(models.embedding_mean, damping=0.05)
    case = models.embedding_mean()
    (name,) = (k for k, m in case.model.named_modules() if isinstance(m, nn.Embedding))
    counts = F.one_hot(case.x, plain[f"{name}.weight"].shape[0]).double().mean((0, 1))
    expected = plain[f"{name}.weight"] / (counts + 0.05).unsqueeze(1)
    assert oracles.relative_error(found[f"{name}.weight"], expected) < 1e-10


def test_forward_only_needs_no_likelihood_and_no_further_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a further backward pass")

    monkeypatch.setattr(Tape, "vjp", refuse)
    case = models.mlp()._replace(loss=lambda y, t: (y.cos() * (1 + t[:, None])).mean())
    config = METHODS["kfac"].Config(fisher=FisherForward(), self_check="off")
    maker = METHODS["kfac"](case.model, config)
    step(maker, case)
    first = oracles.gradient_vector(case.model)
    scaled = models.mlp()._replace(loss=lambda y, t: 10 * (y.cos() * (1 + t[:, None])).mean())
    step(METHODS["kfac"](scaled.model, config), scaled)
    assert oracles.relative_error(oracles.gradient_vector(scaled.model), 10 * first) < 1e-12  # C is not of the loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("decay", [0.9, None])
def test_forward_only_of_micro_batches(reduction: str, decay: float | None) -> None:
    case = models.mlp()
    loss = partial(F.cross_entropy, reduction=reduction)
    config = METHODS["kfac"].Config(fisher=FisherForward(), decay=decay)
    found = []
    for parts in ([slice(None)], [slice(0, 2), slice(2, None)]):
        twin = models.mlp()
        maker = METHODS["kfac"](twin.model, config)
        for _ in range(2):
            twin.model.zero_grad(set_to_none=True)
            for k, part in enumerate(parts):
                maker.setup_loss_call(loss, maker.setup_model_call(twin.model, case.x[part]), case.t[part])
                weight = len(case.x[part]) / len(case.x) if reduction == "mean" else 1.0
                (maker.forward_and_backward if k == len(parts) - 1 else maker.accumulate)(weight)
        found.append(oracles.gradient_vector(twin.model))
    if reduction == "mean":  # micro-batches of a sum have no shares: their means count alike
        assert oracles.relative_error(found[1], found[0]) < 1e-12
    B = maker.plan.blocks[0]
    left = B.triple.representation.factors(B.state)[0]  # type: ignore[attr-defined]
    assert oracles.relative_error(left, torch.eye(left.shape[-1], dtype=left.dtype).expand_as(left)) < 1e-12


def test_ignored_tokens_are_no_inputs() -> None:
    def make(t: Tensor | None = None) -> Case:
        case = models.tagger()
        return case if t is None else case._replace(t=t)

    masked = make().t.clone()
    masked[0] = -100
    maker = METHODS["kfac"]((case := make(masked)).model, METHODS["kfac"].Config(fisher=FisherForward()))
    step(maker, case)
    twin = make()
    twin = twin._replace(x=twin.x[1:], t=twin.t[1:])
    other = METHODS["kfac"](twin.model, METHODS["kfac"].Config(fisher=FisherForward()))
    step(other, twin)
    assert oracles.relative_error(oracles.gradient_vector(case.model), oracles.gradient_vector(twin.model)) < 1e-10


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_inputs_are_the_kronecker_product(transposed: bool, masked: bool) -> None:
    a: Any = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    size = 3
    if transposed:
        a, size = OneHot(torch.randint(5, (4, 3)), 5), 5
    weights = torch.tensor([[1.0, 1, 0]] * 3 + [[0, 0, 0]], dtype=torch.float64) if masked else None
    evidence = Outer(a, torch.empty(0, 1, 4, 3, 2, dtype=torch.float64), not transposed, transposed, weights, kind="inputs")
    shape = (size, 2) if transposed else (2, size)
    kron, state = Kron(), Kron().init(Frame(1, shape, frozenset({0} if transposed else ()), torch.float64, torch.device("cpu")))
    kron.update(state, evidence, ONCE)
    J = evidence.rows().flatten(1)
    assert oracles.relative_error(J.mT @ J, kron.to_dense(state)[0]) < 1e-12


FORWARD: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "few": lambda: (c := models.mlp())._replace(x=c.x[:2], t=c.t[:2]),
    "no_bias": partial(models.mlp, bias=False),
    "grouped": partial(models.convolution, 2, groups=2),
    "transposed": partial(models.convolution, 2, transposed=True),
    "norm": models.normed,
    "bag": models.embedding_mean,
    "tagger": partial(models.tagger, mix=True),
}


def run_of(method: str, make: Callable[[], Case], parts: int = 1, **options: Any) -> tuple[Tensor, Any]:
    """The third direction with FisherForward, on other inputs in every step, maybe in micro-batches; and the maker."""
    case = make()
    config = {"fisher": FisherForward(), "damping": 0.05, "curvature_interval": 1, "preconditioner_interval": 1, **options}
    maker: Any = METHODS[method](case.model, METHODS[method].Config(**config))
    for k in range(3):
        case.model.zero_grad()
        x, n = case.x.roll(k, 0)[k % 2 :], len(case.x) - k % 2
        cuts = [slice(0, n)] if parts == 1 or n == 1 else [slice(0, 1), slice(1, n)]  # the mean over none is not finite
        for cut in cuts:
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x[cut]), case.t[k % 2 :][cut])
            maker.accumulate(len(x[cut]) / n)
        maker.precondition()
    return oracles.gradient_vector(case.model), maker


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("reduction, sharing", [("sum", "reduce"), ("none", "expand")])
def test_forward_only_by_rows_is_that_of_the_newest_factors(name: str, reduction: str, sharing: str) -> None:
    """SKFAC with the inputs alone, by few rows or by whole factors."""
    found, maker = run_of("skfac", FORWARD[name], reduction=reduction)
    expected, _ = run_of("kfac", FORWARD[name], decay=0.0, sharing=sharing)
    assert oracles.relative_error(found, expected) < 1e-10
    assert maker.verify().passed
    for block in maker.plan.blocks:
        side = block.triple.representation.factors(block.state)[1 if block.sites[0].rule.transposed else 0]
        assert oracles.relative_error(side, torch.ones_like(side)) < 1e-12  # of the outputs: the identity, as its diagonal
    if name != "tagger":  # where micro-batches hold unlike numbers of tokens
        assert oracles.relative_error(run_of("skfac", FORWARD[name], 2, reduction=reduction)[0], found) < 1e-10


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("preconditioner_interval", [1, 9])
@pytest.mark.parametrize("decay", [0.8, None])
def test_forward_only_in_an_eigenbasis_is_the_diagonal_there(
    name: str, preconditioner_interval: int, decay: float | None
) -> None:
    """``D = diag(Q^T (I (x) A) Q)`` with the average ``A``, also in the basis of an earlier one."""
    options = {"preconditioner_interval": preconditioner_interval, "decay": decay}
    _, maker = run_of("ekfac", FORWARD[name], **options)
    _, exact = run_of("kfac", FORWARD[name], split="exact", decay=decay)
    for block, other in zip(maker.plan.blocks, exact.plan.blocks, strict=True):
        C = other.triple.representation.to_dense(other.state)
        bases = [Q if Q is not None else torch.eye(d).double() for Q, d in zip(_bases(block), block.frame.shape, strict=True)]
        bases = [Q.expand(block.frame.stack, *Q.shape[-2:]) for Q in bases]
        Q = torch.stack([torch.kron(*pair) for pair in zip(*bases, strict=True)])
        D = block.triple.representation.spectrum(block.state).flatten(1)
        assert oracles.relative_error(D, (Q.mT @ C @ Q).diagonal(dim1=-2, dim2=-1)) < 1e-10
    assert maker.verify().passed
    if name != "tagger" and preconditioner_interval == 9:  # a basis of the first step is that of its first micro-batches
        _, parts = run_of("ekfac", FORWARD[name], 2, **options)
        for block, other in zip(maker.plan.blocks, parts.plan.blocks, strict=True):
            traces = (b.triple.representation.spectrum(b.state).flatten(1).sum(1) for b in (block, other))
            assert oracles.relative_error(*traces) < 1e-10


def _bases(block: Any) -> Any:
    return block.triple.representation.bases(block.state)


def test_forward_only_is_for_kronecker_factors_alone() -> None:
    for solver in (Cholesky(), Eigh(), CG()):
        Triple(FisherForward(), Kron(), solver)
    Triple(FisherForward(), KronRows(), FactorWoodbury())
    Triple(FisherForward(), Eigenbasis(), Rotate())
    with pytest.raises(TripleError, match=r"TensorNormal is built from .* but FisherForward gives Outer \(inputs\)"):
        METHODS["tnt"](models.mlp().model, METHODS["tnt"].Config(fisher=FisherForward()))
    with pytest.raises(TripleError, match=r"Dense is built from .* but FisherForward gives Outer \(inputs\)"):
        Triple(FisherForward(), Dense(), Cholesky())
    bare = METHODS["custom"](models.bare_scale().model, custom(FisherForward(), Kron(), Eigh(damping=0.5)))
    case = models.bare_scale()._replace(model=bare.model)
    step(bare, case)
    scale = next(k for k, _ in bare.model.named_parameters() if k.endswith("scale"))
    found = bare.model.get_parameter(scale).grad
    plain = models.bare_scale()
    plain.run().backward()
    expected = plain.model.get_parameter(scale).grad
    assert found is not None and expected is not None
    assert oracles.relative_error(found, expected / 1.5) < 1e-12  # no inputs: C is the identity


# --- the example ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rbm() -> Any:
    path = Path(__file__).resolve().parents[2] / "examples" / "fang_rbm.py"
    spec = importlib.util.spec_from_file_location("fang_rbm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fang_rbm"] = module
    spec.loader.exec_module(module)
    return module


def small(rbm: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = rbm.RBM(4, 3)
        for p in model.parameters():
            p.data.normal_()
        return model.double()


def listed(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Every joint state of an RBM with its probability: statistics, visible vectors, probabilities."""
    v = torch.tensor(list(product([0.0, 1.0], repeat=4)), dtype=torch.float64).repeat_interleave(8, 0)
    h = torch.tensor(list(product([0.0, 1.0], repeat=3)), dtype=torch.float64).repeat(16, 1)
    energy = v @ model.b + h @ model.c + ((v @ model.W) * h).sum(1)
    return torch.cat([v, h, torch.einsum("nv,nh->nvh", v, h).flatten(1)], 1), v, energy.detach().softmax(0)


def test_rbm_likelihood_and_samples(rbm: Any) -> None:
    model = small(rbm)
    phi, v, p = listed(model)
    for x in v[::8]:
        assert abs(float(model(x[None]).detach()) + float(p[(v == x).all(1)].sum().log())) < 1e-10
    drawn_v, drawn_h = model.sample(40_000, torch.Generator().manual_seed(0))
    drawn = torch.cat([drawn_v, drawn_h, torch.einsum("nv,nh->nvh", drawn_v, drawn_h).flatten(1)], 1)
    mean = p @ phi
    assert ((drawn.mean(0) - mean).abs() <= 5 * (mean * (1 - mean) / 40_000).sqrt() + 1e-9).all()


def test_rbm_fisher_is_the_covariance_of_the_model(rbm: Any) -> None:
    model = small(rbm)
    phi, v, p = listed(model)
    centred = phi - p @ phi
    exact = (centred * p[:, None]).mT @ centred
    samples = 40_000
    maker = rbm.fang(model, samples=samples)
    maker.setup_loss_repr(maker.setup_model_call(model, v[::8]).mean())
    maker.forward_and_backward()
    (block,) = maker.plan.blocks
    assert [s.name for s in block.sites] == ["b", "c", "W"]
    found = block.state["matrix"][0] / block.state["mass"]
    spread = ((centred.square() * p[:, None]).mT @ centred.square() - exact.square()).clamp(min=0)
    assert ((found - exact).abs() <= 5 * (spread / samples).sqrt() + 50 / samples).all()
    graph = block.triple.representation
    assert block.triple.solver.operator(graph, block.state).shape == (1, 19, 19)
    assert [len(own) for own in graph.structure] == [3] * 4 + [0, 1, 2] + [2] * 12
    assert graph.structure[7:10] == ((0, 4), (0, 5), (0, 6))


def test_rbm_learns_faster_than_by_the_gradient(rbm: Any) -> None:
    curves = []
    for natural in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = rbm.RBM(6, 3)
            data = (torch.rand(200, 1) < torch.tensor([0.9])).float() * torch.tensor([1.0, 1, 1, 0, 0, 0])
            data = (data + (torch.rand(200, 6) < 0.1)) % 2
        maker = rbm.fang(model, damping=0.05, samples=500) if natural else METHODS["gradient"](model)
        curves.append(rbm.train(model, maker, data, 0.2, 30))
    assert curves[1][-1] < curves[0][-1] < curves[0][0]
