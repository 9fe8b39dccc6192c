"""Conjugate gradients that are preconditioned by K-FAC's factors of the batch, against dense float64 algebra."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.curvature import FisherMC, GaussNewton
from gradmaker.curvature.products import Factors, Layers
from gradmaker.representations import Kron
from gradmaker.solvers.layer_inverse import LayerInverse
from tests import models, oracles
from tests.methods.test_hessian_free import NETWORKS, ONE
from tests.models import Case
from tests.passes.test_products import dense, step, trainable
from tests.solvers.test_matrix_free import gradient

LAMBDA = 0.3
BY_FACTORS = {**ONE, "line_search": False, "factors": True, "damping": LAMBDA}


def ridged(F: Tensor, ridge: Tensor) -> Tensor:
    return F + ridge * torch.eye(len(F), dtype=F.dtype)


def damped(B: Tensor, A: Tensor, damping: float) -> Tensor:
    """(B + sqrt(lambda) / pi I) (x) (A + pi sqrt(lambda) I), pi^2 = (tr A / d_A) / (tr B / d_B)."""
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    return torch.kron(ridged(B, damping**0.5 / pi), ridged(A, damping**0.5 * pi))


def psd(*shape: int, seed: int) -> Tensor:
    X = torch.randn(*shape, shape[-1] + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X @ X.mT


# --- the inverse --------------------------------------------------------------------------------------------------------------
def test_inverse_of_layers_side_by_side() -> None:
    """A layer, two groups of one, a layer whose sides are swapped, a diagonal factor, and a layer that took no part."""
    plain = Factors(psd(1, 4, seed=1), psd(1, 3, seed=2))
    groups = Factors(psd(2, 2, seed=3), psd(2, 3, seed=4))
    swapped = Factors(psd(1, 5, seed=5).diagonal(dim1=-2, dim2=-1), psd(1, 2, seed=6), transposed=True)
    layers = Layers((12, 12, 10, 3), (plain, groups, swapped, None))
    M = torch.block_diag(
        damped(plain.B[0], plain.A[0], LAMBDA),
        *(damped(groups.B[j], groups.A[j], LAMBDA) for j in range(2)),
        damped(swapped.A[0].diag(), swapped.B[0], LAMBDA),
        LAMBDA * torch.eye(3, dtype=torch.float64),
    )
    v = torch.randn(1, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = torch.linalg.solve(M, v[0])
    assert oracles.relative_error(LayerInverse([(1.0, layers)], LAMBDA)(v)[0], expected) < 1e-10


def test_factors_of_micro_batches_add_up_by_weight() -> None:
    """Factors of gradients by what the loss makes of them, those of inputs by count. One did not reach the second layer."""
    A, B = [psd(1, 3, seed=k) for k in (1, 2)], [psd(1, 2, seed=k) for k in (3, 4)]
    rest = Factors(psd(1, 2, seed=5), psd(1, 2, seed=6))
    first, second = (
        Layers((6, 4), (Factors(A[k], B[k], counted=c), other)) for k, c, other in ((0, 2, rest), (1, torch.tensor(3.0), None))
    )
    both = Layers((6, 4), (Factors(0.4 * A[0] + 0.6 * A[1], 0.25 * B[0] + 0.75 * B[1]), Factors(rest.A, 0.25 * rest.B)))
    v = torch.randn(1, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = LayerInverse([(0.25, first), (0.75, second)], LAMBDA)(v)
    assert oracles.relative_error(found, LayerInverse([(1.0, both)], LAMBDA)(v)) < 1e-12


# --- what is measured ---------------------------------------------------------------------------------------------------------
def by_hand(case: Case, cotangent: Tensor) -> tuple[list[nn.Linear], list[tuple[Tensor, Tensor]]]:
    """Factors of the linear layers, ``A = mean a a^T`` with a one appended and ``B = sum g g^T``, by a loop over examples."""
    layers = [m for m in case.model.modules() if isinstance(m, nn.Linear)]
    moments = [(0.0, 0.0)] * len(layers)
    for x, c in zip(case.x.split(1), cotangent.split(1), strict=True):
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        hooks = [m.register_forward_hook(lambda m, i, o, seen=seen: seen.update({m: (i[0], o)})) for m in layers]
        y = case.model(x)
        for hook in hooks:
            hook.remove()
        slopes = torch.autograd.grad(y, [seen[m][1] for m in layers], c)
        inputs = [torch.cat([seen[m][0].detach()[0], torch.ones(1, dtype=x.dtype)]) for m in layers]
        outers = [(a.outer(a) / len(case.x), g[0].outer(g[0])) for a, g in zip(inputs, slopes, strict=True)]
        moments = [(A + a, B + b) for (A, B), (a, b) in zip(moments, outers, strict=True)]
    return layers, moments  # type: ignore[return-value]


def preconditioned(case: Case, vector: Tensor, layers: list[nn.Linear], moments: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``M^-1 v``, with weight and bias of a layer as one matrix."""
    pieces = iter(vector.split([p.numel() for p in trainable(case)]))
    out = []
    for layer, (A, B) in zip(layers, moments, strict=True):
        V = torch.cat([next(pieces).reshape(layer.weight.shape), next(pieces).unsqueeze(-1)], 1)
        V = torch.linalg.solve(damped(B, A, LAMBDA), V.reshape(-1)).reshape(V.shape)
        out += [V[:, :-1].reshape(-1), V[:, -1]]
    return torch.cat(out)


def test_one_iteration_by_the_factors_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are dictated in place of drawn: the direction is the preconditioned gradient, the length that of CG."""
    case = models.mlp()
    y = torch.randn(len(case.x), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = y[:, : case.model(case.x).shape[1]]

    def dictated(self: FisherMC, *args: Any) -> Iterator[Tensor]:
        yield cotangent.unsqueeze(0)

    monkeypatch.setattr(FisherMC, "cotangents", dictated)
    g = gradient(case)
    p = preconditioned(case, g, *by_hand(case, cotangent))
    A = dense(case, "ggn") + LAMBDA * torch.eye(len(g), dtype=torch.float64)
    assert oracles.relative_error(step(from_config(case.model, BY_FACTORS), case), (g @ p) / (p @ A @ p) * p) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_direction_as_kfac(name: str) -> None:
    """K-FAC of the same batch with the same seed, on the layers that have factors."""
    case = NETWORKS[name]()
    found = step(from_config(case.model, {**BY_FACTORS, "seed": 4}), case)
    parameters = dict(case.model.named_parameters())
    options = {"damping": LAMBDA, "decay": 0.0, "seed": 4, "warmup_steps": 0, "curvature_interval": 1}
    kfac: Any = from_config(case.model, {"method": "kfac", "preconditioner_interval": 1, **options})
    expected = step(kfac, case)
    blocks = [b for b in kfac.plan.blocks if isinstance(b.triple.representation, Kron)]
    known = {k for b in blocks for s in b.sites for k in s.parameters}
    covered = torch.cat([torch.full((p.numel(),), k in known) for k, p in parameters.items() if p.requires_grad])
    a, b = found[covered], expected[covered]
    assert covered.any() and float(a @ b / (a.norm() * b.norm())) == pytest.approx(1.0, abs=1e-9)


def test_another_seed_draws_other_targets() -> None:
    case = models.mlp()
    one, same, other = (step(from_config(case.model, {**BY_FACTORS, "seed": s}), case) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_sides_that_are_too_long_have_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as with the off-diagonal of the factors taken away."""
    case = models.mlp()
    full = step(from_config(case.model, BY_FACTORS), case)
    monkeypatch.setattr("gradmaker.curvature.layer_factors.LONGEST", 1)
    short = step(from_config(case.model, BY_FACTORS), case)
    made: list[Layers] = []

    def kept(batches: list[tuple[float, Layers]], damping: float) -> LayerInverse:
        made.extend(layers for _, layers in batches)
        return LayerInverse(batches, damping)

    monkeypatch.setattr("gradmaker.solvers.truncated_cg.LayerInverse", kept)
    assert torch.equal(step(from_config(case.model, BY_FACTORS), case), short) and not torch.allclose(full, short)
    assert {F.ndim for f in made[0].factors if f is not None for F in (f.A, f.B)} == {2}


# --- what it is for -----------------------------------------------------------------------------------------------------------
def decrease(case: Case, config: dict[str, Any]) -> float:
    """Of the quadratic model after a few iterations, as a part of all that there is."""
    g, A = gradient(case), dense(case, "ggn")
    A = A + config["damping"] * torch.eye(len(A), dtype=A.dtype)
    x = step(from_config(case.model, {**config, "iterations": 3}), case)
    return float((x @ A @ x / 2 - g @ x) / (-g @ torch.linalg.solve(A, g) / 2))


def test_a_few_iterations_go_further_than_with_squares() -> None:
    """Layer inputs of very unequal and correlated sizes: a product of factors sees them, a diagonal does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    mix = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * torch.logspace(0.5, -1.5, 6, dtype=torch.float64)
    x, t = torch.randn(200, 6, dtype=torch.float64) @ mix.T, torch.randint(3, (200,))
    case = Case(model, x, t, F.cross_entropy)
    common = {**ONE, "line_search": False, "damping": 1e-3}
    by_factors, by_squares = (decrease(case, {**common, **o}) for o in ({"factors": True, "factor_damping": 1e-3}, {}))
    assert by_squares < 0.85 < 0.93 < by_factors, f"{by_factors} against {by_squares}"


def test_the_factors_keep_a_damping_of_their_own() -> None:
    """It counts where lambda is below it, and in the preconditioner alone."""
    case = models.mlp()
    one, other, high, same = (
        step(from_config(case.model, {**BY_FACTORS, "damping": damping, "factor_damping": least}), case)
        for damping, least in ((1e-3, 0.1), (1e-3, 0.2), (0.3, 0.1), (0.3, 0.2))
    )
    assert not torch.allclose(one, other) and torch.equal(high, same)


# --- bad input ----------------------------------------------------------------------------------------------------------------
def test_one_preconditioner() -> None:
    with pytest.raises(ValueError, match="squares=True, factors=True: expected at most one"):
        GaussNewton(squares=True, factors=True)
    for option in ({"squares": "batch"}, {"preconditioner": 0.5}):
        with pytest.raises(ValueError, match="it goes with factors=False"):
            from_config(models.mlp().model, {"method": "hessian_free", "factors": True, **option})
    with pytest.raises(ValueError, match="it goes with factors=True"):
        from_config(models.mlp().model, {"method": "hessian_free", "factor_damping": 0.5})


def test_targets_are_drawn_of_a_recognised_loss() -> None:
    case = models.mlp_gaussian()
    huber = case._replace(loss=lambda y, t: F.huber_loss(y, t, reduction="none").sum() / len(t))
    maker: Any = from_config(case.model, {**BY_FACTORS, "curvature": "Hessian", "self_check": "error"})
    with pytest.raises(ValueError, match="needs the likelihood behind the loss"):
        step(maker, huber)


UNREAD = [("neumann", "factors"), ("lissa", "squares"), ("curveball", "factors"), ("newton", "factors"), ("neumann", "squares")]


@pytest.mark.parametrize("method, auxiliary", UNREAD)
def test_what_nothing_reads_is_refused(method: str, auxiliary: str) -> None:
    curvature = GaussNewton(squares=auxiliary == "squares", factors=auxiliary == "factors")
    with pytest.raises(
        ValueError, match=f"GaussNewton\\({auxiliary}=True\\) measures {auxiliary} that .* does not read. Solvers that fit"
    ):
        from_config(models.mlp().model, {"method": method, "curvature": curvature})


@pytest.mark.parametrize("cut", [(6,), (1, 5), (4, 2)], ids=str)
def test_input_factors_of_micro_batches_are_those_of_the_batch(cut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sums, whose micro-batches have weight one: what was counted decides."""
    case = models.mlp()
    made: list[list[tuple[float, Layers]]] = []

    class Watching(LayerInverse):
        def __init__(self, batches: Any, damping: float) -> None:
            made.append(list(batches))
            super().__init__(batches, damping)

    monkeypatch.setattr("gradmaker.solvers.truncated_cg.LayerInverse", Watching)
    maker: Any = from_config(case.model, BY_FACTORS)
    for x, t in zip(case.x.split(list(cut)), case.t.split(list(cut)), strict=True):
        maker.setup_loss_call(torch.nn.functional.cross_entropy, maker.setup_model_call(case.model, x), t, reduction="sum")
        maker.accumulate()
    maker.precondition()
    (batches,) = made
    x = torch.cat([case.x, torch.ones(6, 1).double()], 1)
    found = Watching(batches, LAMBDA).inverses[0]
    assert found is not None and [w for w, _ in batches] == [1.0] * len(cut)
    moments = [(layers.factors[0], layers.factors[0].counted) for _, layers in batches if layers.factors[0] is not None]
    assert [int(c) for _, c in moments] == list(cut)
    A = sum(f.A[0] * c for f, c in moments) / 6
    assert oracles.relative_error(A, x.mT @ x / 6) < 1e-12
