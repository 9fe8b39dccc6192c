"""Approximations that are exact read zero, and every measure equals its dense oracle."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker
from gradmaker.fidelity.catalogue import BLOCKS, EXACT
from gradmaker.fidelity.layers import WHOLE
from tests import models, oracles
from tests.models import Case

EXACT_FISHER = {"fisher": "FisherExact"}
CASES: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "convolution": models.convolution,
    "embedding": models.embedding_mean,
    "tokens": models.tagger,
    "attention": models.attention,
    "norm": models.normed,
    "shared": models.called_twice,
    "tied": models.tied,
    "bare": models.bare_scale,
}


def measured(case: Case, approximations: Any, reference: Any = "fisher_exact", **options: Any) -> gradmaker.Fidelity:
    return gradmaker.fidelity(case.model, case.loss, [(case.x, case.t)], approximations, reference, **options)


def exact(case: Case) -> Tensor:
    return oracles.loss_ggn(copy.deepcopy(case.model), case.x, lambda z: case.loss(z, case.t))


# ------------------------------------------------------------------ zero where exact
def one_layer(n: int, bias: bool = True) -> Case:
    return models.build(lambda: nn.Linear(4, 3, bias=bias), n, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_kflr_of_one_linear_layer_with_one_example(bias: bool) -> None:
    result = measured(one_layer(1, bias), ["kflr"])
    for name in ("error", "error_scaled", "spectral", "spectral_scaled"):
        assert result.value("kflr", name) < 1e-10
        assert result.value("kflr", name, "(model)") < 1e-10
    assert result.value("kflr", "scale") == pytest.approx(1, abs=1e-10)


def test_exact_damping_is_exact_in_the_inverse() -> None:
    triple = {
        "method": "custom",
        "curvature": "FisherExact",
        "representation": "Kron",
        "solver": {"Eigh": {"power": -1.0, "damping": 1e-2}},
    }
    result = measured(one_layer(1), {"exact": triple})
    assert result.value("exact", "inverse") < 1e-10
    assert result.value("exact", "cosine") == pytest.approx(1, abs=1e-10)
    assert result.value("exact", "length") == pytest.approx(1, abs=1e-10)
    best = result.value(EXACT, "quadratic"), result.value(EXACT, "decrease")
    assert (result.value("exact", "quadratic"), result.value("exact", "decrease")) == pytest.approx(best, rel=1e-3)


def test_ekfac_has_the_diagonal_in_its_basis() -> None:
    """With the basis of the truth itself, its moments are the eigenvalues: one example, once it is measured in the basis."""
    case = one_layer(1)
    result = measured(case, {"ekfac": {"method": "ekfac", **EXACT_FISHER}}, repeats=2)
    assert result.value("ekfac", "error") < 1e-10
    assert result.value("ekfac", "inverse") < 1e-10


@pytest.mark.parametrize("name", ["mlp", "convolution", "norm"])
def test_dense_blocks_are_exact(name: str) -> None:
    """Whole matrices, layers and units: exact on what they hold."""
    case = CASES[name]()
    made = [{"method": m, **EXACT_FISHER} for m in ("full_ng", "layer_ng", "unit_ng")]
    result = measured(case, dict(zip(("full", "layer", "unit"), made, strict=True)))
    assert result.value("full", "error") < 1e-10
    assert result.value("full", "inverse") < 1e-10
    assert result.value("full", "cosine") == pytest.approx(1, abs=1e-10)
    for layer in result.layer_names:
        assert result.value("layer", "error", layer) < 1e-10
        assert result.value("layer", "cosine", layer) == pytest.approx(1, abs=1e-10)
    assert result.value("layer", "error") == pytest.approx(result.value(BLOCKS, "error"), abs=1e-10)


def test_units_are_exact_where_the_truth_has_none_between_them() -> None:
    """A Gaussian likelihood of one linear layer: its outputs are independent."""
    case = models.build(lambda: nn.Linear(4, 3), 5, 4)
    target = torch.randn(5, 3, dtype=torch.float64)
    result = gradmaker.fidelity(case.model, F.mse_loss, (case.x, target), [{"method": "unit_ng", **EXACT_FISHER}])
    (label,) = result.labels
    assert result.value(label, "error") < 1e-10 > result.value(label, "inverse")


def test_shampoo_on_a_kronecker_second_moment() -> None:
    """The gradients ``b a^T`` of all pairs of some ``a`` and ``b``: Shampoo^2 is exact, Shampoo where the factors are units."""
    case = one_layer(1, bias=False)
    (W,) = case.model.parameters()
    unit, skew = torch.eye(4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    squared = {
        "method": "custom",
        "curvature": "BatchGradient",
        "representation": {"KronDims": {"exponent": 1.0, "balanced": True}},
        "solver": {"Eigh": {"power": -0.5}},
        "decay": None,
    }
    for rows, label in ((skew, "squared"), (unit, "squared"), (unit, "shampoo")):
        inputs = [(a.unsqueeze(0), b[:3]) for a in rows for b in rows[:3]]
        batches = [(a, a @ W.detach().mT - b / 2) for a, b in inputs]
        made = {"squared": squared, "shampoo": {"method": "shampoo", "decay": None}}
        result = gradmaker.fidelity(case.model, half_square, batches, made, "second_moment", line_searches="none")
        assert result.value(label, "error_scaled") < 1e-10
        assert result.value(label, "spectral_scaled") < 1e-10


def half_square(y: Tensor, t: Tensor) -> Tensor:
    return (y - t).square().sum()


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_oracle(name: str) -> None:
    case = CASES[name]()
    C = exact(case)
    s = torch.linalg.eigvalsh(C)
    for reference in ("fisher_exact", "ggn"):
        result = measured(case, [{"method": "adam"}], reference, line_searches="none")
        assert result.value(EXACT, "trace") == pytest.approx(float(C.trace()), rel=1e-10)
        assert result.value(EXACT, "largest") == pytest.approx(float(s[-1]), rel=1e-10)
        assert result.value(EXACT, "effective_rank") == pytest.approx(float(C.trace() ** 2 / C.square().sum()), rel=1e-10)


def _slices(case: Case) -> dict[str, Tensor]:
    """Indices of the parameters that each module holds."""
    found: dict[str, list[Tensor]] = {}
    for name, where in oracles.parameter_slices(case.model).items():
        found.setdefault(name.rpartition(".")[0] or "(model)", []).append(torch.arange(where.start, where.stop))
    return {k: torch.cat(v) for k, v in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_measures_are_those_of_the_oracle(name: str) -> None:
    """Of the diagonal of the exact Fisher matrix, which is known without the library."""
    case = CASES[name]()
    C, lam = exact(case), 1e-2
    g = torch.autograd.grad(case.run(), list(case.model.parameters()))
    gradient = torch.cat([x.reshape(-1) for x in g])
    options = {"method": "diag_ng", "damping": lam, "fisher": {"FisherExact": {}}}
    result = measured(case, {"diagonal": options}, line_searches="none")
    whole = {WHOLE: torch.arange(len(C))}
    joint = _slices(case)
    assert set(joint) == set(result.layer_names)
    for layer, index in (joint | whole).items():
        block, own = C[index][:, index], gradient[index]
        D = block.diag().diag()
        expected = {
            "error": (D - block).norm() / block.norm(),
            "scale": (D * block).sum() / D.square().sum(),
            "spectral": torch.linalg.matrix_norm(D - block, 2) / torch.linalg.matrix_norm(block, 2),
        }
        inverse, P = torch.linalg.inv(block + lam * torch.eye(len(block), dtype=block.dtype)), (1 / (D.diag() + lam)).diag()
        expected["inverse"] = (P - inverse).norm() / inverse.norm()
        d, exact_d = P @ own, inverse @ own
        expected["cosine"] = d @ exact_d / (d.norm() * exact_d.norm())
        expected["length"] = d.norm() / exact_d.norm()
        expected["quadratic"] = (own @ d) ** 2 / (2 * d @ block @ d)
        expected["condition"] = (D.max() + lam) / (D.diag().min() + lam)
        for measure, value in expected.items():
            assert result.value("diagonal", measure, layer) == pytest.approx(float(value), rel=1e-9), (layer, measure)


def test_hessian_and_empirical_and_second_moment() -> None:
    case = models.mlp()
    H = oracles.hessian(copy.deepcopy(case.model), case.x, lambda z: case.loss(z, case.t))
    E = oracles.empirical_fisher(
        copy.deepcopy(case.model), case.x, lambda y, n: F.cross_entropy(y, case.t[n : n + 1], reduction="sum"), len(case.x)
    )
    g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(case.run(), list(case.model.parameters()))])
    for reference, C in (("hessian", H), ("fisher_emp", E), ("second_moment", torch.outer(g, g))):
        result = measured(case, ["adam"], reference, line_searches="none")
        s = torch.linalg.eigvalsh(C)
        assert result.value(EXACT, "trace") == pytest.approx(float(C.trace()), rel=1e-9)
        assert result.value(EXACT, "largest") == pytest.approx(float(s[-1]), rel=1e-9)


def test_between_layers() -> None:
    case = models.mlp()
    C, index = exact(case), _slices(case)
    result = measured(case, ["adam"], line_searches="none")
    inside = sum(float(C[k][:, k].square().sum()) for k in index.values())
    assert result.value(EXACT, "off_diagonal") == pytest.approx(1 - inside / float(C.square().sum()), rel=1e-10)
    a, b = list(index.values())[:2]
    sizes = [float(C[k][:, k].norm()) for k in (a, b)]
    assert result.coupling[0][1] == pytest.approx(float(C[a][:, b].norm()) / math.sqrt(sizes[0] * sizes[1]), rel=1e-10)
    assert result.value(BLOCKS, "error") ** 2 == pytest.approx(result.value(EXACT, "off_diagonal"), rel=1e-10)


def test_decrease_is_that_of_the_best_step() -> None:
    case = models.mlp()
    result = measured(case, [{"method": "diag_ng", **EXACT_FISHER}])
    C = exact(case)
    before = [p.detach().clone() for p in case.model.parameters()]
    g = torch.autograd.grad(case.run(), list(case.model.parameters()))
    flat = torch.cat([x.reshape(-1) for x in g])
    d = flat / (C.diag() + 1e-3)

    def loss_at(step: float) -> float:
        pieces = d.split([p.numel() for p in before])
        with torch.no_grad():
            for p, old, x in zip(case.model.parameters(), before, pieces, strict=True):
                p.copy_(old - step * x.view_as(p))
            return float(case.run())

    best = min(loss_at(x) for x in torch.logspace(-4, 2, 600).tolist())
    (label,) = result.labels
    assert result.value(label, "decrease") == pytest.approx(loss_at(0.0) - best, rel=2e-2)
