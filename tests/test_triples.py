"""Which triples are legal, that every legal one trains, and that triples agree with dense oracles and with one another."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config, register
from gradmaker.curvature import CURVATURES, BatchGradient, Curvature, FisherEmp, FisherExact
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.representations import REPRESENTATIONS, Dense, Diagonal, Kron, KronDims, Representation, Window
from gradmaker.solvers import CG, SOLVERS, Cholesky, Division, Eigh, NewtonRoot, Solver
from gradmaker.triple import Triple, TripleError, legality
from tests import models, oracles
from tests.models import Case

ROWS = list(legality())
LEGAL = [row[:3] for row in ROWS if row[3] is None]
REFUSED = [row for row in ROWS if row[3] is not None]
KNOWN = frozenset(LEGAL)
PAIRS_THAT_FIT = frozenset(row[:2] for row in LEGAL)


def step(maker: Any, case: Case, x: Tensor | None = None, t: Tensor | None = None) -> None:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x if x is None else x)
    maker.setup_loss_call(case.loss, y, case.t if t is None else t)
    maker.forward_and_backward()


def direction(make: Callable[[], Case], config: Any, method: str = "custom", steps: int = 1) -> Tensor:
    """P g as one vector after some steps that change nothing but the statistics (the batch in another order of targets)."""
    case = make()
    maker = METHODS[method](case.model, config)
    for k in range(steps):
        step(maker, case, t=case.t.roll(k, 0))
    return oracles.gradient_vector(case.model)


def custom(curvature: Curvature, representation: Representation, solver: Solver, **options: Any) -> CustomGradientConfig:
    return CustomGradientConfig(curvature=curvature, representation=representation, solver=solver, **options)


# --- legality -------------------------------------------------------------------------------------------------------------
def mapping(curvature: str, label: str, solver: str) -> dict[str, Any]:
    """The triple of a row of the table as a config."""
    name, _, grain = label.rstrip(")").partition("(")
    representation = {name: {"granularity": grain} if grain else {}}
    return {"method": "custom", "curvature": curvature, "representation": representation, "solver": solver}


def legality_table() -> str:
    """The whole table in Markdown, a mark for each legal triple."""
    lines = [f"| curvature | representation | {' | '.join(SOLVERS)} |", f"|---|---|{'---|' * len(SOLVERS)}"]
    marks: dict[tuple[str, str], list[str]] = {}
    for c, label, _, reason in legality():
        marks.setdefault((c, label), []).append("no" if reason else "yes")
    return "\n".join(lines + [f"| {c} | {label} | {' | '.join(row)} |" for (c, label), row in marks.items()])


def expected_legal(c: str, label: str, s: str) -> bool:
    """By hand, for the parts of the first release."""
    if label == "Kron" and c == "BatchGradient":
        return False  # a batch gradient has no pairs (a, g)
    if label in ("KronDims", "Diagonal(tensor)") and c != "BatchGradient":
        return False  # layers are not single tensors
    if label.startswith("Diagonal"):
        return s in ("CG", "Division")
    return s != "Division" and (label, s) != ("KronDims", "Cholesky")


def test_table_is_as_specified() -> None:
    curvatures, solvers = (
        ("FisherExact", "FisherMC", "FisherEmp", "BatchGradient"),
        ("Cholesky", "Eigh", "NewtonRoot", "CG", "Division"),
    )
    labels = ("Dense(full)", "Dense(layer)", "Dense(unit)", "Kron", "KronDims", "Diagonal(tensor)", "Diagonal(layer)")
    found = {(c, label, s): reason is None for c, label, s, reason in ROWS}
    for c in curvatures:
        for label in labels:
            for s in solvers:
                assert found[c, label, s] == expected_legal(c, label, s), (c, label, s)


def test_table_names_every_part() -> None:
    table = legality_table()
    for name in (*CURVATURES, *REPRESENTATIONS, *SOLVERS):
        assert name in table
    assert table.count("yes") == len(LEGAL) and table.count("no |") == len(REFUSED)
    assert {row[0] for row in LEGAL} == set(CURVATURES)  # no part is good for nothing
    assert {row[1].split("(")[0] for row in LEGAL} == set(REPRESENTATIONS)
    assert {row[2] for row in LEGAL} == set(SOLVERS)


@pytest.mark.parametrize("row", LEGAL, ids="-".join)
def test_legal_triple_trains(row: tuple[str, str, str]) -> None:
    late = "previous" in CURVATURES[row[0]]().needs  # says nothing of the first step
    for lr in (1e-2, 1e-1, 1e-3, 1.0, 1e-4):
        case = models.mlp()
        maker = from_config(case.model, mapping(*row))
        first = case.run().item()
        raw = torch.autograd.grad(case.run(), list(case.model.parameters()))
        optimizer = torch.optim.SGD(case.model.parameters(), lr)
        for k in range(5):
            step(maker, case)
            for p, g in zip(case.model.parameters(), raw, strict=True):
                assert p.grad is not None and p.grad.isfinite().all()
                assert k > 0 or late or oracles.relative_error(p.grad, g) > 1e-3
            optimizer.step()
        if case.run().item() < 0.95 * first:
            return
    raise AssertionError("no learning rate lowers the loss by 5 %")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_refused_triples_say_why_and_what_fits(curvature: str) -> None:
    """Thousands of rows: one test for each curvature."""
    rows = [row for row in REFUSED if row[0] == curvature]
    assert rows
    for row in rows:
        check_refusal(*row)


def check_refusal(c: str, label: str, s: str, reason: str) -> None:
    with pytest.raises(TripleError) as caught:
        from_config(nn.Linear(2, 2), mapping(c, label, s))
    assert str(caught.value) == reason
    assert all(name in reason for name in (c, label.split("(")[0])) or s in reason
    found = re.search(r"(Curvatures|Solvers) that fit [^:]*: (.*)$", reason)
    assert found, reason
    kind, fits = found[1], found[2].split(", ")
    registry = CURVATURES if kind == "Curvatures" else SOLVERS
    for name in registry:
        if kind == "Solvers":
            legal = (c, label, name) in KNOWN
        else:
            legal = (name, label) in PAIRS_THAT_FIT
        assert (name in fits) == legal, f"{name} is {'legal' if legal else 'refused'}"
    if "granularity='layer'" in reason:
        assert (c, "Diagonal(layer)") in PAIRS_THAT_FIT


@dataclass(frozen=True)
class Another(Division):
    pass


@dataclass(frozen=True, kw_only=True)
class Indefinite(BatchGradient):
    definite: ClassVar[bool] = False


def refusal_of(*parts: Any) -> str:
    with pytest.raises(TripleError) as caught:
        Triple(*parts)
    return str(caught.value)


@pytest.mark.usefixtures("registrations")
def test_sentences_are_computed_from_the_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_solver, wrong_curvature = (BatchGradient(), Diagonal(), Cholesky()), (BatchGradient(), Kron(), Cholesky())
    assert refusal_of(*wrong_solver).endswith(": CG, Division, AbsoluteDivision, SignedDivision")
    assert refusal_of(*wrong_curvature).endswith(": FisherExact, FisherMC, FisherEmp, FisherRecursive, FisherForward")
    assert refusal_of(FisherEmp(), Diagonal(), Division()).endswith(": BatchGradient, Hessian, GaussNewton")
    monkeypatch.delitem(SOLVERS.entries, "CG")
    monkeypatch.delitem(CURVATURES.entries, "FisherMC")
    register(Another)
    register(Indefinite)
    assert refusal_of(*wrong_solver).endswith(": Division, AbsoluteDivision, SignedDivision, Another")
    assert refusal_of(*wrong_curvature).endswith(": FisherExact, FisherEmp, FisherRecursive, FisherForward")
    assert refusal_of(FisherEmp(), Diagonal(), Division()).endswith(": BatchGradient, Hessian, GaussNewton, Indefinite")


@pytest.mark.parametrize("solver", [s for s in SOLVERS.values() if "definite" in s().asks])
def test_indefinite_curvature_is_refused(solver: type[Solver]) -> None:
    kinds = [Dense(), Diagonal(), Window(), *(make() for make in REPRESENTATIONS.values())]
    representation = next(r for r in kinds if isinstance(r, solver.needs))
    measured = type("Indefinite", (Indefinite,), {"gives": representation.takes})
    reason = refusal_of(measured(), representation, solver())
    assert "positive semidefinite" in reason and solver.__name__ in reason
    others = [(n, s) for n, s in SOLVERS.items() if "definite" not in s().asks and isinstance(representation, s.needs)]
    indifferent = [n for n, s in others if s().refuse(representation) is None]
    assert reason.endswith(", ".join(indifferent) or "none")


# --- dense oracles of whole directions ------------------------------------------------------------------------------------
MODELS: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "convolution": partial(models.convolution, 1, groups=2),
    "layer_norm": models.normed,
    "group_norm_no_bias": partial(models.normed, "group_norm", bias=False),
    "embedding": models.embedding_mean,
    "sequences": partial(models.tagger, mix=True),
    "bare_scale": models.bare_scale,
    "called_twice": models.called_twice,
}
FISHERS: dict[str, Curvature] = {"exact": FisherExact(), "exact_chunks": FisherExact(chunk=1), "emp": FisherEmp()}


def fisher_and_gradient(case: Case, curvature: Curvature, steps: int, decay: float | None) -> tuple[Tensor, Tensor]:
    """The averaged dense Fisher over the steps of `direction`, and the gradient of the last one."""
    state: oracles.State = {}
    select: oracles.Select = (lambda y: y.mT) if case.t.ndim == 2 else oracles.identity
    for k in range(steps):
        t = case.t.roll(k, 0)
        columns = oracles.exact_columns("categorical", t)
        if isinstance(curvature, FisherEmp):
            columns = oracles.empirical_columns("categorical", t, example="sequence")
        fresh = oracles.fisher_from_columns(case.model, case.x, columns, t.numel(), None, select)
        C = oracles.averaged(state, "C", fresh, decay)
    case.loss(case.model(case.x), t).backward()
    return C, oracles.gradient_vector(case.model)


def groups_of(model: nn.Module, granularity: str) -> list[Tensor]:
    """Indices into the parameter vector of every block; a layer is one, whatever its groups."""
    where = {k: torch.arange(s.start, s.stop) for k, s in oracles.parameter_slices(model).items()}
    if granularity == "full":
        return [torch.cat(list(where.values()))]
    groups = []
    for prefix, module in model.named_modules():
        own = {k: p for k, p in module.named_parameters(prefix, recurse=False)}
        parametric = not any(k.endswith("scale") for k in own)  # `BareScale.scale` has no rows: units of one number
        rows = [where[k].reshape(len(p) if parametric else p.numel(), -1) for k, p in own.items()]
        joined = torch.cat(rows, 1) if rows else torch.empty(0, 0)
        if granularity == "unit" or not parametric:
            groups += list(joined)
        elif rows:
            groups.append(joined.reshape(-1))
    return groups


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method, granularity", [("unit_ng", "unit"), ("full_ng", "full")])
@pytest.mark.parametrize("decay", [0.8, None])
def test_natural_gradients_are_dense_solves(name: str, fisher: str, method: str, granularity: str, decay: float | None) -> None:
    make, curvature = MODELS[name], FISHERS[fisher]
    C, g = fisher_and_gradient(make(), curvature, 3, decay)
    config = METHODS[method].Config(fisher=curvature, damping=0.05, decay=decay)
    expected = torch.zeros_like(g)
    for block in groups_of(make().model, granularity):
        expected[block] = oracles.tikhonov_solve(oracles.reorder(C, block), 0.05, g[block])
    assert oracles.relative_error(direction(make, config, method, 3), expected) < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch, for vmap through weight norm
@pytest.mark.parametrize("name", ["tied", "weight_norm", "unused", "frozen"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_full_natural_gradient_of_odd_models(name: str, fisher: str) -> None:
    make = models.ZOO[name]
    C, g = fisher_and_gradient(make(), FISHERS[fisher], 2, 0.8)
    config = METHODS["full_ng"].Config(fisher=FISHERS[fisher], damping=0.05, decay=0.8)
    assert oracles.relative_error(direction(make, config, "full_ng", 2), oracles.tikhonov_solve(C, 0.05, g)) < 1e-9


SOLVES: dict[str, Solver] = {
    "cholesky": Cholesky(damping=0.05),
    "eigh": Eigh(damping=0.05),
    "cg": CG(damping=0.05, iterations=500, tolerance=1e-12),
}


@pytest.mark.parametrize("name", ["mlp", "convolution", "sequences"])
@pytest.mark.parametrize("granularity", ["full", "layer", "unit"])
@pytest.mark.parametrize("solver", SOLVES)
def test_free_triples_are_dense_solves(name: str, granularity: str, solver: str) -> None:
    """Property 20: what the solvers agree on is the dense solve."""
    make = MODELS[name]
    C, g = fisher_and_gradient(make(), FisherEmp(), 1, 0.0)
    expected = torch.zeros_like(g)
    for block in groups_of(make().model, granularity):
        expected[block] = oracles.tikhonov_solve(oracles.reorder(C, block), 0.05, g[block])
    found = direction(make, custom(FisherEmp(), Dense(granularity=granularity), SOLVES[solver]))  # type: ignore[arg-type]
    assert oracles.relative_error(found, expected) < 1e-8


PAIRS: dict[str, tuple[Representation, Solver, Solver]] = {
    "kron_pi": (Kron(), Cholesky(damping=0.05), Eigh(damping=0.05, split="pi")),
    "kron_each": (Kron(), Cholesky(damping=0.05, split="each"), Eigh(damping=0.05, split="each")),
    "kron_exact": (Kron(), Eigh(damping=0.05), CG(damping=0.05, iterations=500, tolerance=1e-12)),
    "kron_reduce": (Kron(sharing="reduce"), Eigh(damping=0.05), CG(damping=0.05, iterations=500, tolerance=1e-12)),
    "newton": (Kron(), NewtonRoot(power=-1.0, damping=0.01), Eigh(damping=0.01, split="each", mode="largest")),
    "newton_root": (Dense(), NewtonRoot(power=-0.25, damping=0.01), Eigh(power=-0.25, damping=0.01, mode="largest")),
    "diagonal": (Diagonal(granularity="layer"), Division(damping=0.05), CG(damping=0.05, iterations=500, tolerance=1e-12)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", MODELS)
def test_solvers_agree(pair: str, name: str) -> None:
    representation, one, other = PAIRS[pair]
    found = [direction(MODELS[name], custom(FisherExact(), representation, solver), steps=2) for solver in (one, other)]
    assert oracles.relative_error(*found) < 1e-6


def test_full_matrix_adagrad() -> None:
    """(sum_t g_t g_t^T + damping)^(-1/2) g, over all parameters at once."""
    case, history = models.mlp(), []
    maker = METHODS["custom"](
        case.model, custom(BatchGradient(), Dense(granularity="full"), Eigh(power=-0.5, damping=0.01), decay=None)
    )
    for k in range(5):
        t = case.t.roll(k)
        history.append(
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(case.loss(case.model(case.x), t), list(case.model.parameters()))]
            )
        )
        step(maker, case, t=t)
        total = sum(torch.outer(g, g) for g in history) + 0.01 * torch.eye(len(history[0]), dtype=torch.float64)
        assert (
            oracles.relative_error(oracles.gradient_vector(case.model), oracles.matrix_power(total, -0.5) @ history[-1]) < 1e-9
        )


# --- equivalences ---------------------------------------------------------------------------------------------------------
def one_output() -> Case:
    case = models.build(lambda: nn.Linear(4, 1), 7, 4, loss=F.binary_cross_entropy_with_logits)
    return case._replace(t=(case.t[:, None] > 0).double())


def one_datum(make: Callable[[], Case] = models.mlp) -> Case:
    case = make()
    return case._replace(x=case.x[:1], t=case.t[:1])


class Vector(nn.Module):
    """One vector parameter: Shampoo's only axis."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.w)


def vector() -> Case:
    case = models.build(Vector, 5, 5, loss=F.mse_loss)
    return case._replace(t=case.x.flip(0))


EXACT, RELATIVE = FisherExact(), Eigh(power=-0.5, damping=1e-4, mode="largest")
EQUAL: dict[str, tuple[Callable[[], Case], Any, Any]] = {
    "one output: unit = layer": (
        one_output,
        custom(EXACT, Dense(granularity="unit"), Cholesky()),
        custom(EXACT, Dense(), Cholesky()),
    ),
    "one layer: full = layer": (
        models.linear,
        custom(EXACT, Dense(granularity="full"), Eigh()),
        custom(EXACT, Dense(), Eigh()),
    ),
    "one datum: K-FAC = layer": (one_datum, custom(EXACT, Kron(), Eigh()), custom(EXACT, Dense(), Cholesky())),
    "one datum, empirical": (one_datum, custom(FisherEmp(), Kron(), Eigh()), custom(FisherEmp(), Dense(), Cholesky())),
    "vector: Shampoo = full AdaGrad": (
        vector,
        custom(BatchGradient(), KronDims(), RELATIVE),
        custom(BatchGradient(), Dense(granularity="full"), RELATIVE),
    ),
    "diagonal of one: AdaGrad": (
        one_output,
        custom(BatchGradient(), Diagonal(), Division()),
        custom(BatchGradient(), Diagonal(granularity="layer"), Division()),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equivalent_triples(name: str) -> None:
    make, one, other = EQUAL[name]
    steps = 1 if "datum" in name else 3
    assert oracles.relative_error(direction(make, one, steps=steps), direction(make, other, steps=steps)) < 1e-9


def test_shampoo_is_its_triple() -> None:
    named = METHODS["shampoo"].Config(grafting="none", decay=None, damping=1e-4, preconditioner_interval=1)
    free = custom(BatchGradient(), KronDims(), Eigh(power=-0.5, damping=1e-4, split="each", mode="largest"), decay=None)
    assert oracles.relative_error(direction(models.mlp, named, "shampoo", 3), direction(models.mlp, free, steps=3)) < 1e-12


def test_kfac_is_not_the_dense_block() -> None:
    """Property 13: with more than one datum K-FAC is an approximation; else the test above compares a thing with itself."""
    found = [direction(models.mlp, custom(EXACT, r, Eigh(damping=0.05))) for r in (Kron(), Dense())]
    assert oracles.relative_error(*found) > 1e-3
