"""Measures by random rows and products stay within five standard errors of the dense ones; Krylov ones are exact at the end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker
from gradmaker.fidelity.catalogue import BLOCKS, EXACT
from gradmaker.fidelity.lanczos import krylov
from gradmaker.fidelity.layers import WHOLE
from gradmaker.fidelity.samples import RowSamples, combined
from gradmaker.fidelity.values import Value
from tests import models
from tests.models import Case

SAMPLED = ("error", "error_scaled", "scale", "trace", "effective_rank", "residual", "off_diagonal")
EXACTLY = ("cosine", "length", "quadratic", "largest")
GIVEN: dict[str, Any] = {
    "kflr": "kflr",
    "ekfac": {"method": "ekfac", "fisher": "FisherExact"},
    "diagonal": {"method": "diag_ng", "fisher": "FisherExact"},
    "unit": {"method": "unit_ng", "fisher": "FisherExact"},
    "shampoo": "shampoo",
}
CASES: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "convolution": models.convolution,
    "tokens": models.tagger,
    "norm": models.normed,
    "attention": models.attention,
}


def both(case: Case, reference: Any, probes: int, given: Any = None, **options: Any) -> list[gradmaker.Fidelity]:
    arguments = case.model, case.loss, (case.x, case.t), given or GIVEN, reference
    shared: dict[str, Any] = {"repeats": 2, "damping": 0.1, "line_searches": "none", "iterations": 400, **options}
    return [gradmaker.fidelity(*arguments, dense_limit=limit, probes=probes, **shared) for limit in (4096, 0)]


def within(v: Value, expected: float) -> bool:
    """Whether a sampled value is within five standard errors; an error after the best scalar in units of its cosine."""
    if abs(v.value - expected) < 5 * v.error + 1e-9 or v.measure != "error_scaled":
        return abs(v.value - expected) < 5 * v.error + 1e-9
    value, low, high, true = map(_cosine, (v.value, v.value + v.error, v.value - v.error, expected))
    return abs(value - true) < 5 * max(value - low, high - value)


def _cosine(sine: float) -> float:
    return max(0.0, 1 - min(1.0, sine) ** 2) ** 0.5


def compare(dense: gradmaker.Fidelity, sampled: gradmaker.Fidelity) -> int:
    """The number of sampled values; all within five standard errors."""
    known = {(v.approximation, v.layer, v.measure): v for v in dense.values}
    count = 0
    for v in sampled.values:
        expected = known.get((v.approximation, v.layer, v.measure))
        if expected is None:
            continue
        if v.measure in SAMPLED and v.error > 0:
            count += 1
            assert within(v, expected.value), (v, expected.value)
        elif v.measure in EXACTLY:
            assert v.value == pytest.approx(expected.value, rel=1e-6), v
    return count


@pytest.mark.parametrize("name", CASES)
def test_rows_of_the_exact_fisher(name: str) -> None:
    assert compare(*both(CASES[name](), "fisher_exact", 40)) > 20


@pytest.mark.parametrize("reference", ["hessian", "ggn", "fisher_emp"])
def test_other_references(reference: str) -> None:
    assert compare(*both(models.mlp(), reference, 40, {"diagonal": GIVEN["diagonal"]}, damping=3.0)) > 10


def test_all_rows_of_the_second_moment_are_exact() -> None:
    case = models.mlp()
    batches = [(case.x[:3], case.t[:3]), (case.x[3:], case.t[3:])]
    arguments = case.model, case.loss, batches, {"diagonal": GIVEN["diagonal"], "shampoo": "shampoo"}, "second_moment"
    shared: dict[str, Any] = {"line_searches": "none", "damping": 0.1}
    dense, rows = (gradmaker.fidelity(*arguments, dense_limit=limit, **shared) for limit in (4096, 0))
    for label in rows.labels:
        for layer in (*rows.layer_names, WHOLE):
            for measure in ("error", "error_scaled", "scale"):
                expected = dense.value(label, measure, layer)
                assert rows.value(label, measure, layer) == pytest.approx(expected, rel=1e-9, abs=1e-9)
                mean = rows.mean(label, measure, layer)
                assert mean is not None and mean.error == 0


def test_spectral_error_and_blocks() -> None:
    dense, sampled = both(models.mlp(), "fisher_exact", 20, {"kflr": "kflr"})
    assert sampled.value("kflr", "spectral_scaled") == pytest.approx(dense.value("kflr", "spectral_scaled"), rel=0.3)
    assert sampled.value(BLOCKS, "cosine") == pytest.approx(dense.value(BLOCKS, "cosine"), rel=1e-6)
    assert sampled.value(EXACT, "condition") == pytest.approx(dense.value(EXACT, "condition"), rel=1e-6)


def test_zero_where_exact_without_matrices() -> None:
    """Steps are exact; the norms are those of samples."""
    case = models.build(lambda: nn.Linear(4, 3), 1, 4)
    triple = {"method": "full_ng", "fisher": "FisherExact"}
    result = gradmaker.fidelity(case.model, F.cross_entropy, (case.x, case.t), triple, dense_limit=0)
    (label,) = result.labels
    assert result.value(label, "cosine") == pytest.approx(1, abs=1e-10)
    assert result.value(label, "length") == pytest.approx(1, abs=1e-10)
    assert result.value(label, "residual") < 1e-10


def test_standard_errors_are_honest() -> None:
    """Over many draws of the rows the estimates scatter as their standard errors say."""
    torch.manual_seed(0)
    root = torch.randn(30, 12, dtype=torch.float64) * torch.logspace(0, -1, 12, dtype=torch.float64)
    C = root @ root.mT

    def draw(seed: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(24, 12, dtype=torch.float64, generator=generator) @ root.mT
        found = RowSamples(rows, False)
        norm = combined(lambda x: x.clamp(min=0).sqrt(), found.norm(None))
        return norm.value, norm.error

    rows = RowSamples(torch.randn(6, 30, dtype=torch.float64), False).norm(None)
    assert float(rows.without.mean()) == pytest.approx(rows.value)  # of a mean over pairs
    values, errors = (torch.tensor(x) for x in zip(*map(draw, range(300)), strict=True))
    assert abs(float(values.mean()) - float(C.norm())) < float(values.std()) / 3  # the root of an unbiased square
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.3)


def test_krylov_functions() -> None:
    torch.manual_seed(0)
    root = torch.randn(9, 6, dtype=torch.float64)
    C, v = root @ root.mT, torch.randn(9, dtype=torch.float64)

    def product(x: Tensor) -> Tensor:
        return C @ x

    space = krylov(product, v, 50)
    assert len(space.T) <= 8
    eye = torch.eye(9, dtype=torch.float64)
    found, residual = space.solve(0.1, -1.0, True)
    assert torch.allclose(found, torch.linalg.solve(C + 0.1 * eye, v), atol=1e-9)
    assert residual < 1e-9
    s, Q = torch.linalg.eigh(C + 0.1 * eye)
    assert torch.allclose(space.solve(0.1, -0.5, True)[0], (Q * s**-0.5) @ Q.mT @ v, atol=1e-9)
    few = krylov(product, v, 3)
    x, residual = few.solve(0.1, -1.0, True)
    assert residual == pytest.approx(float((C @ x + 0.1 * x - v).norm() / v.norm()), rel=1e-6)


@pytest.mark.parametrize(("iterations", "told"), [(2, True), (400, False)])
def test_unfinished_solves_are_told(iterations: int, told: bool) -> None:
    case = models.mlp()
    result = gradmaker.fidelity(case.model, case.loss, (case.x, case.t), "kflr", dense_limit=0, iterations=iterations)
    assert any("unfinished" in note for note in result.notes) == told
