"""The low-rank methods against dense matrices: SMW-NG, SMW-GN, TONGA, M-FAC, GGT, SENG, in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradmaker import METHODS, from_config
from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature import BatchGradient, FisherEmp, FisherExact
from gradmaker.curvature.evidence import Gradient, Joint, Outer
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.representations import Dense, Rows, Sketched, Truncated, Window, low_rank
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.capabilities import LowRank
from gradmaker.representations.low_rank import Spanned, form_rows
from gradmaker.representations.rows import chunks
from gradmaker.solvers import CG, Cholesky, Gram
from tests import models, oracles
from tests.live import Live
from tests.methods.test_methods import digits, leaves, passes, raw_gradients, reloaded
from tests.models import CLASSES, Case
from tests.registry import legal_options
from tests.test_triples import custom, direction, fisher_and_gradient, groups_of

ONCE = Fold(0.0, 1.0, 1.0)
SUM = Fold(1.0, 1.0, 1.0, summed=True)
CPU = torch.device("cpu")
METHODS_HERE = ("smw_ng", "smw_gn", "tonga", "tonga_unit", "mfac", "ggt", "seng")


class Mixed(nn.Module):
    """An embedding, a convolution, a norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(6, 3), nn.Conv1d(3, 4, 2)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.norm(self.convolution(self.embedding(tokens).mT))).mean(-1))
        return y


def mixed(n: int = 5) -> Case:
    return models.build_tokens(Mixed, n, 4, 6, tags=False)


def frame(stack: int, *shape: int) -> Frame:
    return Frame(stack, shape, frozenset(), torch.float64, CPU)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def apply(representation: Any, state: Any, solver: Gram, g: Tensor) -> Tensor:
    """P g of a block."""
    return solver.solve(representation, solver.prepare(representation, state, None), g)


def streamed(representation: Any, gradients: Tensor, fold: Fold) -> Any:
    """The state after some gradients.  gradients: (t, P)"""
    state = representation.init(frame(1, gradients.shape[1]))
    for g in gradients:
        representation.update(state, Gradient(g.unsqueeze(0)), fold)
    return state


def average(decay: float | None) -> Fold:
    return SUM if decay is None else Fold(decay, 1 - decay, 1 - decay)


# --- SMW: rows of a batch -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n", [5, 40], ids=["N < P", "N > P"])
@pytest.mark.parametrize("method", ["smw_ng", "smw_gn"])
def test_smw_is_the_dense_solve(method: str, n: int, damping: float) -> None:
    """Property 19, for an embedding, a convolution, a norm and a linear layer that are coupled."""
    make = partial(mixed, n if method == "smw_gn" else 2 * n)
    curvature = FisherExact() if method == "smw_gn" else FisherEmp()
    C, g = fisher_and_gradient(make(), curvature, 1, 0.0)
    maker: Any = METHODS[method](make().model)
    assert len(maker.plan.blocks) == 1
    found = direction(make, METHODS[method].Config(damping=damping), method)
    assert oracles.relative_error(found, oracles.tikhonov_solve(C, damping, g)) < 1e-10


MODELS: dict[str, Callable[[], Case]] = {
    "grouped convolution": partial(models.convolution, 2, groups=2),
    "padded embedding": partial(models.embedding_mean, padding_idx=1),
    "layer norm": models.normed,
    "sequences": partial(models.tagger, mix=True),
    "no bias": partial(models.mlp, bias=False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("curvature", [FisherExact(), FisherExact(chunk=1), FisherEmp()], ids=str)
def test_rows_of_every_layer(name: str, curvature: Any) -> None:
    C, g = fisher_and_gradient(MODELS[name](), curvature, 2, 0.0)
    found = direction(MODELS[name], METHODS["smw_ng"].Config(damping=0.05, fisher=curvature), "smw_ng", 2)
    assert oracles.relative_error(found, oracles.tikhonov_solve(C, 0.05, g)) < 1e-10


@pytest.mark.parametrize("method", ["smw_ng", "smw_gn", "seng"])
@pytest.mark.parametrize("name", ["sequences", "grouped convolution"])
def test_micro_batches_are_one_batch(method: str, name: str) -> None:
    """Uneven ones: rows of every micro-batch, and the products between them."""
    whole, parts = MODELS[name](), MODELS[name]()
    one, two = METHODS[method](whole.model), METHODS[method](parts.model)
    passes(one, whole)
    total = len(parts.x)
    for rows in (slice(0, 1), slice(1, total)):
        y = two.setup_model_call(parts.model, parts.x[rows])
        two.setup_loss_call(parts.loss, y, parts.t[rows])
        two.accumulate(weight=len(parts.x[rows]) / total)
    two.precondition()
    found, expected = oracles.gradient_vector(parts.model), oracles.gradient_vector(whole.model)
    assert oracles.relative_error(found, expected) < 1e-10


class Sometimes(nn.Module):
    """A hidden layer that is left out where all inputs are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x if bool((x < 0).all()) else torch.tanh(self.extra(x)))
        return y


@pytest.mark.parametrize("first", [0, 2], ids=["silent first", "silent last"])
def test_a_layer_that_only_some_micro_batches_use(first: int) -> None:
    """Its rows are zero for the others."""
    found = []
    options: dict[str, Any] = {"decay": 0.0, "damping": 0.05}
    dense = {"curvature": "FisherEmp", "representation": {"Dense": {"granularity": "full"}}, "solver": "Cholesky"}
    for method in ({"method": "smw_ng"}, {"method": "custom", **dense}):
        case = models.build(Sometimes, 4, 4)
        x = torch.cat([-case.x[:2].abs(), case.x[2:].abs()])
        maker: Any = from_config(case.model, {**method, **options})
        for rows in (slice(first, first + 2), slice(2 - first, 4 - first)):
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x[rows]), case.t[rows])
            maker.accumulate(weight=0.5)
        maker.precondition()
        found.append(oracles.gradient_vector(case.model))
    assert oracles.relative_error(*found) < 1e-10


def test_gram_has_the_spectrum_of_the_matrix() -> None:
    """Property 18: J J^T has the non-zero eigenvalues of J^T J."""
    case = mixed()
    maker: Any = METHODS["smw_gn"](case.model)
    passes(maker, case)
    (block,) = maker.plan.blocks
    K = block.triple.representation.gram(block.state)[0]
    C, _ = fisher_and_gradient(mixed(), FisherExact(), 1, 0.0)
    small, large = torch.linalg.eigvalsh(K), torch.linalg.eigvalsh(C)[-len(K) :]
    assert (small - large).abs().max() < 1e-9 * large[-1]


@pytest.mark.parametrize("method, moves", [("smw_gn", False), ("smw_ng", True)])
def test_label_smoothing(method: str, moves: bool) -> None:
    """Property 40: no class weights, so that the Gauss-Newton matrix stays and the empirical Fisher does not."""
    dense = []
    for smoothing in (0.0, 0.2):
        case = models.mlp()._replace(loss=partial(F.cross_entropy, label_smoothing=smoothing))
        maker: Any = METHODS[method](case.model)
        passes(maker, case)
        (block,) = maker.plan.blocks
        dense.append(block.triple.representation.to_dense(block.state))
    error = oracles.relative_error(*dense)
    assert error > 1e-2 if moves else error < 1e-12


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_smw_never_forms_rows_of_a_wide_layer() -> None:
    n, width = 16, 128
    case = models.build(lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)), n, width)
    maker = METHODS["smw_ng"](case.model)
    with Largest() as largest:
        passes(maker, case)
    P = sum(p.numel() for p in case.model.parameters())
    assert largest.numel <= 2 * P < n * P


def test_rows_are_formed_where_that_is_smaller() -> None:
    """A convolution with many positions and few weights: the identity would take (n r)^2."""
    case = models.build(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(200, CLASSES)), 4, 1, 12, 12)
    maker = METHODS["smw_ng"](case.model)
    with Largest() as largest:
        passes(maker, case)
    assert largest.numel < (4 * 100) ** 2


def test_too_many_rows_are_refused() -> None:
    case = models.mlp()
    maker = METHODS["smw_gn"](case.model, METHODS["smw_gn"].Config(max_rows=4))
    with pytest.raises(ValueError, match=r"rows.*max_rows=4: raise it, use a smaller batch"):
        passes(maker, case)


@pytest.mark.parametrize("method", ["smw_ng", "smw_gn", "seng"])
def test_a_running_average_of_rows_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"decay=0\.9 would have no effect: the newest step alone is held"):
        METHODS[method].Config(decay=0.9)


@pytest.mark.parametrize("method", ["smw_ng", "smw_gn", "seng"])
def test_parameters_without_a_layer_get_the_fallback(method: str) -> None:
    maker: Any = METHODS[method](models.bare_scale().model)
    assert set(maker.plan.plain) == {"scale"}
    maker = METHODS[method](models.bare_scale().model, METHODS[method].Config(fallback="adam"))
    assert not maker.plan.plain


# --- push-through and powers ----------------------------------------------------------------------------------------------
def test_push_through() -> None:
    """``(C + d)^-1 J^T y = J^T (J J^T + d)^-1 y``: as the plain form where that is accurate, and still where it is not."""
    J, y = random(4, 30), random(4)
    window = Window(size=4, scale="sum")
    state, g = streamed(window, J, SUM), (J.mT @ y).unsqueeze(0)
    for damping, plain_error in ((1e-2, 1e-10), (1e-14, float("inf"))):
        K = J @ J.mT + damping * torch.eye(4, dtype=torch.float64)
        expected = J.mT @ torch.linalg.solve(K, y)
        plain = (g[0] - J.mT @ torch.linalg.solve(K, J @ g[0])) / damping
        for tail in ("eps", "none"):
            pushed = apply(window, state, Gram(damping=damping, tail=tail), g)[0]  # type: ignore[arg-type]
            assert oracles.relative_error(pushed, expected) < 1e-10
        assert oracles.relative_error(plain, expected) < plain_error
    assert oracles.relative_error(plain, expected) > 1e-6  # Woodbury's subtraction loses all digits but a few


@pytest.mark.parametrize("beyond", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_single_precision_keeps_its_digits(damping: float, beyond: float) -> None:
    """Of gradients in, beside and far from the span of the rows, two of which are almost parallel."""
    J, y, far = random(6, 40), random(6), beyond * random(40)
    J[5] = J[4] + 1e-2 * J[5]
    J = J.float().double()
    window = Window(size=6, scale="sum")
    state = window.init(Frame(1, (40,), frozenset(), torch.float32, J.device))
    for r in J.float():
        window.update(state, Gradient(r.reshape(1, -1)), SUM)
    inside = J.mT @ torch.linalg.solve(J @ J.mT + damping * torch.eye(6, dtype=torch.float64), y)
    expected = inside + oracles.tikhonov_solve(J.mT @ J, damping, far)
    found = apply(window, state, Gram(damping=damping), (J.mT @ y + far).float().unsqueeze(0))[0].double()
    assert oracles.relative_error(found, expected) < 1e-3


def test_rows_are_fitted_where_digits_would_be_lost_alone() -> None:
    """Of ``|K| = 100``, a thousandth is ``u / damping`` for 1.2e-2 in float32."""
    J = torch.zeros(1, 40)
    J[0, :2] = torch.tensor([6.0, 8.0])
    window = Window(size=2, scale="sum")
    state = window.init(Frame(1, (40,), frozenset(), torch.float32, J.device))
    window.update(state, Gradient(J), SUM)
    fitted = [damping for damping in (1e-3, 1e-2, 1.5e-2, 1.0) if "fit" in Gram(damping=damping).prepare(window, state, None)]
    assert fitted == [1e-3, 1e-2]


def test_mfac_in_single_precision() -> None:
    """At the published damping, with gradients of length ten: Woodbury's subtraction would be off by a third of a percent."""

    def last(dtype: torch.dtype) -> Tensor:
        case = models.build(lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, CLASSES)), 16, 20)
        case = case._replace(model=case.model.to(dtype), x=10 * case.x.to(dtype))
        maker = METHODS["mfac"](case.model, METHODS["mfac"].Config(window=8))
        for k in range(10):
            case.model.zero_grad()
            passes(maker, case, case.x.roll(k, 1))
        return oracles.gradient_vector(case.model).double()

    assert oracles.relative_error(last(torch.float32), last(torch.float64)) < 1e-5


def dense_root(J: Tensor, damping: float, tail: str) -> Tensor:
    """``((J^T J)^(1/2) + damping)^-1`` from an SVD of the rows, with one of three tails."""
    _, s, Vh = torch.linalg.svd(J, full_matrices=False)
    s, Vh = s[s > 1e-6 * s[0]], Vh[s > 1e-6 * s[0]]
    rest = torch.eye(J.shape[1], dtype=J.dtype) - Vh.mT @ Vh
    if tail == "eps":
        return (Vh.mT / (s + damping)) @ Vh + rest / damping
    return (Vh.mT / s) @ Vh + (rest / s[-1] if tail == "sigma_min" else 0)


@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("tail", ["eps", "none", "sigma_min"])
def test_solve_is_its_operator(power: float, tail: str) -> None:
    if power == -1 and tail == "sigma_min":
        with pytest.raises(ValueError, match="sigma_min"):
            Gram(power=power, tail=tail)
        return
    solver, window = Gram(power=power, damping=0.1, tail=tail), Window(size=6, scale="sum")  # type: ignore[arg-type]
    for rows in (random(6, 9), random(6, 4), random(2, 9)[torch.tensor([0, 1, 0, 1, 0])], random(1, 1)):
        state, g = streamed(window, rows, SUM), random(1, rows.shape[1])
        P = solver.operator(window, state)[0]
        assert oracles.relative_error(apply(window, state, solver, g)[0], P @ g[0]) < 1e-9


# --- M-FAC ----------------------------------------------------------------------------------------------------------------
def mfac_recursion(rows: Tensor, damping: float, m: int) -> Tensor:
    """``F_i^-1 = F_(i-1)^-1 - F_(i-1)^-1 r r^T F_(i-1)^-1 / (m + r^T F_(i-1)^-1 r)`` from ``I / damping``, as published."""
    inverse = torch.eye(rows.shape[1], dtype=rows.dtype) / damping
    for r in rows:
        moved = inverse @ r
        inverse = inverse - torch.outer(moved, moved) / (m + r @ moved)
    return inverse


def history(method: str, make: Callable[[], Case], steps: int, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients and directions of some steps, each on another batch."""
    case = make()
    maker = from_config(case.model, {"method": method, **options})
    raw, found = [], []
    for k in range(steps):
        x, t = case.x[: 2 + (k % 3)], case.t.roll(k, 0)[: 2 + (k % 3)]
        raw.append(torch.cat([v.reshape(-1) for v in raw_gradients(case, x, t).values()]))
        passes(maker, case, x, t)
        found.append(oracles.gradient_vector(case.model))
    return raw, found


@pytest.mark.parametrize("m", [1, 4, 20])
def test_mfac_is_its_recursion(m: int) -> None:
    """Up to and beyond the window: only the last m rows count."""
    raw, found = history("mfac", mixed, 9, window=m, damping=1e-2)
    for t in range(9):
        rows = torch.stack(raw[max(0, t + 1 - m) : t + 1])
        expected = mfac_recursion(rows, 1e-2, m) @ raw[t]
        assert oracles.relative_error(found[t], expected) < 1e-8
        dense = oracles.tikhonov_solve(rows.mT @ rows / m, 1e-2, raw[t])
        assert oracles.relative_error(found[t], dense) < 1e-8
    if m == 1:
        assert oracles.relative_error(found[-1], raw[-1] / (1e-2 + raw[-1] @ raw[-1])) < 1e-10


@pytest.mark.parametrize("name", ["window", "layer", "tonga", "unit"])
@pytest.mark.parametrize("piece", [1, 3])
def test_pieces_of_any_size_are_one_window(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {
        "window": Window(size=7, scale="sum"),
        "layer": Window(size=4, granularity="layer"),
        "tonga": Truncated(rank=2, window=5),
        "unit": Truncated(rank=2, window=3, granularity="unit"),
    }[name]
    options = {"curvature": BatchGradient(), "representation": held, "solver": Gram(damping=1e-2), "decay": 0.9}
    _, expected = history("custom", mixed, 20, **options)
    monkeypatch.setattr(low_rank, "PIECE", piece)
    _, found = history("custom", mixed, 20, **options)
    for one, other in zip(found, expected, strict=True):
        assert oracles.relative_error(one, other) < 1e-10


def test_a_window_is_never_there_twice() -> None:
    """Neither at a step that drops a row, nor while the last cache is held."""
    window, solver, m, P = Window(size=128), Gram(damping=1e-2), 128, 20_000
    state, cache = window.init(frame(1, P)), None
    with Live() as live:
        for k in range(150):
            window.update(state, Gradient(random(1, P)), SUM)
            if k % 10 == 0:
                cache = solver.prepare(window, state, cache)
                solver.solve(window, cache, random(1, P))
    assert m * P * 8 < live.peak < 1.6 * m * P * 8


def test_mfac_warmup_by_mean() -> None:
    raw, found = history("mfac", models.mlp, 3, window=10, damping=1e-2, warmup="mean")
    rows = torch.stack(raw)
    assert oracles.relative_error(found[-1], oracles.tikhonov_solve(rows.mT @ rows / 3, 1e-2, raw[-1])) < 1e-8


# --- GGT ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tail", ["eps", "none", "sigma_min"])
@pytest.mark.parametrize("decay", [None, 0.8])
def test_ggt_is_the_dense_root(tail: str, decay: float | None) -> None:
    """Rows and Gram matrix decay alike, also of gradients that come after the window is full."""
    raw, found = history("ggt", models.mlp, 8, window=5, damping=1e-2, decay=decay, beta1=0.0, tail=tail)
    for t in range(8):
        kept = raw[max(0, t - 4) : t + 1]
        weights = [(1.0 if decay is None else decay) ** (len(kept) - 1 - j) for j in range(len(kept))]
        rows = torch.stack([w**0.5 * r for w, r in zip(weights, kept, strict=True)])
        assert oracles.relative_error(found[t], dense_root(rows, 1e-2, tail) @ raw[t]) < 1e-8


def test_ggt_of_one_number_is_adagrad() -> None:
    window, solver = Window(size=9, scale="sum"), Gram(power=-0.5, damping=1e-2)
    g = random(5, 1)
    found = apply(window, streamed(window, g, SUM), solver, g[-1:])
    assert oracles.relative_error(found, g[-1:] / (g.square().sum().sqrt() + 1e-2)) < 1e-12


def test_ggt_averages_its_gradients() -> None:
    raw, found = history("ggt", models.mlp, 3, damping=1e-2)
    m = sum(0.9 ** (2 - j) * g for j, g in enumerate(raw)) / sum(0.9**j for j in range(3))
    assert oracles.relative_error(found[-1], dense_root(torch.stack(raw), 1e-2, "eps") @ m) < 1e-8


# --- TONGA ----------------------------------------------------------------------------------------------------------------
def top(C: Tensor, k: int) -> Tensor:
    """The best approximation of rank k."""
    s, Q = torch.linalg.eigh(C)
    return (Q[:, -k:] * s[-k:]) @ Q[:, -k:].mT


def tonga_oracle(raw: list[Tensor], decay: float | None, rank: int, window: int, damping: float) -> list[Tensor]:
    """Dense, with a cut to `rank` before a gradient comes for which there is no room."""
    C, mass, held, out = torch.zeros(len(raw[0]), len(raw[0]), dtype=torch.float64), 0.0, 0, []
    for g in raw:
        if held == rank + window:
            C, held = top(C, rank), rank
        beta = 1.0 if decay is None else decay
        C, mass, held = beta * C + torch.outer(g, g), beta * mass + 1, held + 1
        out.append(oracles.tikhonov_solve(C / (1 if decay is None else mass), damping, g))
    return out


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("rank, window", [(30, 5), (2, 3), (1, 1)])
def test_tonga_is_dense(decay: float | None, rank: int, window: int) -> None:
    """Not cut at all it is the dense average, and cut it is the average of what the cuts leave."""
    raw, found = history("tonga", models.mlp, 12, decay=decay, rank=rank, window=window, damping=1e-2)
    for value, expected in zip(found, tonga_oracle(raw, decay, rank, window, 1e-2), strict=True):
        assert oracles.relative_error(value, expected) < 1e-8


def test_tonga_unit_is_dense_by_unit() -> None:
    raw, found = history("tonga_unit", mixed, 9, rank=2, window=3, damping=1e-2, decay=0.9)
    for block in groups_of(mixed().model, "unit"):
        if not any(bool(g[block].abs().sum()) for g in raw):
            continue  # a token that never occurred
        expected = tonga_oracle([g[block] for g in raw], 0.9, 2, 3, 1e-2)
        for value, wanted in zip(found, expected, strict=True):
            assert torch.linalg.norm(value[block] - wanted) <= 1e-8 * torch.linalg.norm(wanted)


def test_tonga_may_keep_the_scale() -> None:
    _, plain = history("tonga", models.mlp, 3, damping=0.05)
    _, kept = history("tonga", models.mlp, 3, damping=0.05, scale_preserving=True)
    assert oracles.relative_error(kept[-1], 0.05 * plain[-1]) < 1e-12


# --- SENG -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["grouped convolution", "padded embedding", "sequences", "no bias"])
@pytest.mark.parametrize("positions", [None, 64])
def test_seng_is_the_dense_solve_of_layers(name: str, positions: int | None) -> None:
    """Without sketches, and with one that has nothing to cut."""
    C, g = fisher_and_gradient(MODELS[name](), FisherEmp(), 1, 0.0)
    expected = torch.zeros_like(g)
    for block in groups_of(MODELS[name]().model, "layer"):
        expected[block] = oracles.tikhonov_solve(oracles.reorder(C, block), 0.05, g[block])
    found = direction(MODELS[name], METHODS["seng"].Config(positions=positions), "seng")
    assert oracles.relative_error(found, expected) < 1e-10


def layer_evidence(r: int = 1, bias: bool = True) -> Outer:
    return Outer(random(1, 3, r, 4), random(1, 1, 3, r, 3), bias)


def sampled(evidence: Outer, sketch: Sketched) -> list[Any]:
    """One state for each pair of coordinate sets."""
    state = sketch.init(frame(1, 3, 4 + evidence.bias))
    sketch.update(state, evidence, ONCE)
    assert sketch.coordinates is not None
    sides = [list(itertools.combinations(range(d), sketch.coordinates)) for d in (3, 4)]
    chosen = itertools.product(*[[torch.tensor([s]) for s in side] for side in sides])
    return [{**state, "sample.0.outputs": o, "sample.0.inputs": i} for o, i in chosen]


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_sampled_products_are_unbiased(r: int, bias: bool) -> None:
    evidence = layer_evidence(r, bias)
    sketch, exact = Sketched(coordinates=2, above=0), Rows(granularity="layer")
    states, v = sampled(evidence, sketch), random(1, 3, 4 + bias)
    reference = exact.init(frame(1, 3, 4 + bias))
    exact.update(reference, evidence, ONCE)
    J = evidence.rows().flatten(1)
    assert oracles.relative_error(exact.gram(reference)[0], J @ J.mT) < 1e-12
    gram = torch.stack([sketch.gram(s) for s in states]).mean(0)
    projection = torch.stack([sketch.project(s, v) for s in states]).mean(0)
    assert oracles.relative_error(gram[0], J @ J.mT) < 1e-12
    assert oracles.relative_error(projection[0], J @ v.reshape(-1)) < 1e-12
    assert oracles.relative_error(sketch.gram(states[0])[0], J @ J.mT) > 1e-2
    dense = torch.stack([sketch.to_dense(s) for s in states]).mean(0)
    assert oracles.relative_error(dense[0], J.mT @ J) < 1e-12


def test_official_sketch_has_the_published_scale() -> None:
    """Each side by d / s, that is each inner product by its square: too large by the ratios, without a bias."""
    evidence = layer_evidence(bias=False)
    ours, theirs = Sketched(coordinates=2, above=0), Sketched(coordinates=2, above=0, official=True)
    for state in sampled(evidence, ours):
        ratio = (3 / 2) * (4 / 2)
        assert oracles.relative_error(theirs.gram(state), ratio * ours.gram(state)) < 1e-12
        v = random(1, 3, 4)
        assert oracles.relative_error(theirs.project(state, v), ratio * ours.project(state, v)) < 1e-12


def test_positions_are_cut_to_the_best_rank() -> None:
    evidence = layer_evidence(r=5)
    for rank in (1, 2, 3):
        sketch = Sketched(positions=rank)
        state = sketch.init(frame(1, 3, 5))
        sketch.update(state, evidence, ONCE)
        a = torch.cat([evidence.inputs[0], torch.ones(3, 5, 1, dtype=torch.float64)], -1)  # type: ignore[index]
        rows = []
        for n in range(3):
            U, s, Vh = torch.linalg.svd(evidence.gradients[0, 0, n].mT, full_matrices=False)
            rows.append(((U[:, :rank] * s[:rank]) @ Vh[:rank] @ a[n]).reshape(-1))
        assert oracles.relative_error(form_rows(sketch, state)[0], torch.stack(rows)) < 1e-12
        assert oracles.relative_error(sketch.gram(state)[0], torch.stack(rows) @ torch.stack(rows).mT) < 1e-12


def test_draws_are_reproducible_and_change() -> None:
    def draw(seed: int) -> list[Tensor]:
        sketch = Sketched(coordinates=6, above=0, seed=seed)
        state = sketch.init(frame(1, 12, 16))
        out = []
        for _ in range(2):
            sketch.update(state, Outer(random(1, 3, 1, 16), random(1, 1, 3, 1, 12)), ONCE)
            out += [state["sample.0.outputs"], state["sample.0.inputs"]]
        return out

    before = torch.get_rng_state()
    one, two = draw(0), draw(0)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[2]) and not torch.equal(one[0], draw(1)[0])
    torch.set_rng_state(before)
    sketch = Sketched(coordinates=6, above=0)
    evidence, state = Outer(random(1, 3, 1, 16), random(1, 1, 3, 1, 12)), sketch.init(frame(1, 12, 16))
    after = torch.get_rng_state()
    sketch.update(state, evidence, ONCE)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize(
    "options", [{"coordinates": 2}, {"positions": 1}, {"coordinates": 2, "positions": 1, "official": True}]
)
def test_sketched_blocks_solve_what_they_say(options: dict[str, Any]) -> None:
    """``(J^T J S + damping)^-1``, also of an embedding, and with several chunks of evidence."""
    for name in ("sequences", "grouped convolution", "padded embedding"):
        case = MODELS[name]()
        sketch = Sketched(above=0, **options)
        maker: Any = METHODS["custom"](case.model, custom(FisherExact(chunk=2), sketch, Gram(damping=0.5)))
        passes(maker, case)
        for block in maker.plan.blocks:
            g = random(block.frame.stack, *block.frame.shape)
            P = block.triple.solver.operator(sketch, block.state)
            found = block.triple.solver.solve(sketch, block.cache, g)
            assert oracles.relative_error(found.flatten(1), (P @ g.flatten(1).unsqueeze(-1)).squeeze(-1)) < 1e-9


# --- equivalences ---------------------------------------------------------------------------------------------------------
def test_four_ways_to_one_solve() -> None:
    """SMW-NG, the dense natural gradient, CG, and M-FAC and TONGA with the examples of the batch as their stream."""
    case = models.mlp()
    found = direction(models.mlp, METHODS["smw_ng"].Config(damping=0.05), "smw_ng")
    full = METHODS["full_ng"].Config(damping=0.05, decay=0.0, fisher=FisherEmp())
    assert oracles.relative_error(found, direction(models.mlp, full, "full_ng")) < 1e-10
    cg = custom(FisherEmp(), Rows(), CG(damping=0.05, iterations=500, tolerance=1e-13), decay=0.0)
    assert oracles.relative_error(found, direction(models.mlp, cg)) < 1e-8
    gradients = oracles.per_example_gradients(case.model, case.x, lambda y, n: F.cross_entropy(y, case.t[n : n + 1]))
    rows = oracles.gradient_rows(gradients)
    g, n = rows.mean(0, keepdim=True), len(rows)
    stream = Window(size=n)
    assert oracles.relative_error(apply(stream, streamed(stream, rows, SUM), Gram(damping=0.05), g)[0], found) < 1e-10
    tonga = Truncated(rank=n, window=1)
    scaled = apply(tonga, streamed(tonga, rows, SUM), Gram(damping=0.05 * n), g)  # a sum: the damping is times M
    assert oracles.relative_error(n * scaled[0], found) < 1e-10


def test_smw_gn_is_the_other_solvers() -> None:
    found = direction(mixed, METHODS["smw_gn"].Config(damping=0.05), "smw_gn")
    for solver in (CG(damping=0.05, iterations=500, tolerance=1e-13), Cholesky(damping=0.05)):
        other = custom(FisherExact(), Dense(granularity="full"), solver, decay=0.0)
        assert oracles.relative_error(found, direction(mixed, other)) < 1e-8


def test_one_layer() -> None:
    """SENG = SMW-NG; TONGA by units = TONGA where there is one output."""
    found = [direction(models.linear, METHODS[m].Config(damping=0.05), m) for m in ("seng", "smw_ng")]
    assert oracles.relative_error(*found) < 1e-12

    def one_output() -> Case:
        case = models.build(lambda: nn.Linear(4, 1), 7, 4, loss=F.mse_loss)
        return case._replace(t=case.x[:, :1])

    both = [history(m, one_output, 9, rank=2, window=3)[1] for m in ("tonga", "tonga_unit")]
    assert oracles.relative_error(both[0][-1], both[1][-1]) < 1e-10


# --- state, schedules, failures -------------------------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "smw_ng": {},
    "smw_gn": {},
    "tonga": {"rank": 2, "window": 2},
    "tonga_unit": {"rank": 2, "window": 2},
    "mfac": {"window": 3},
    "ggt": {"window": 3, "decay": 0.9},
    "seng": {"coordinates": 2, "positions": 1},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_resuming_at_any_step_is_bitwise(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of another size at each step; evictions and cuts before and after; refreshes less often than updates."""
    monkeypatch.setattr(Sketched, "__init__", _sketch_everything(Sketched.__init__))
    wanted = {"curvature_interval": 2, "preconditioner_interval": 3, "warmup_steps": 3, "stagger": False}
    intervals = legal_options(method, **wanted)

    def run(maker: Any, case: Case, start: int, stop: int) -> None:
        for k in range(start, stop):
            n = 2 + k % 3
            passes(maker, case, case.x[:n], case.t.roll(k, 0)[:n])
            with torch.no_grad():
                for p in case.model.parameters():
                    p -= 1e-3 * (p.grad if p.grad is not None else 0)

    for stop in range(10):
        case, twin = mixed(), mixed()
        maker, other = (from_config(c.model, {"method": method, **intervals, **OPTIONS[method]}) for c in (case, twin))
        run(maker, case, 0, stop)
        other.load_state_dict(reloaded(maker.state_dict()))  # type: ignore[attr-defined]
        twin.model.load_state_dict(copy.deepcopy(case.model.state_dict()))
        run(maker, case, stop, 12)
        run(other, twin, stop, 12)
        mine, its = leaves(maker.state_dict()), leaves(other.state_dict())  # type: ignore[attr-defined]
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            assert torch.equal(value, its[key]) if isinstance(value, Tensor) else value == its[key], key
        for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(p, q)


def _sketch_everything(init: Callable[..., None]) -> Callable[..., None]:
    """Layers as small as those of the tests are sketched too."""

    def changed(self: Sketched, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "above": 0})

    return changed


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_stale_cache_keeps_its_rows(method: str) -> None:
    """The preconditioner of step 0 is used until it is refreshed, whatever is measured meanwhile."""
    case, v = mixed(), None
    maker: Any = from_config(case.model, {"method": method, "curvature_interval": 1, "preconditioner_interval": 100})
    passes(maker, case, case.x[:3], case.t[:3])
    blocks = maker.plan.blocks
    v = [random(b.frame.stack, *b.frame.shape) for b in blocks]
    before = [b.triple.solver.solve(b.triple.representation, b.cache, u) for b, u in zip(blocks, v, strict=True)]
    for k in range(4):
        passes(maker, case, case.x[: 2 + k], case.t.roll(k)[: 2 + k])
    after = [b.triple.solver.solve(b.triple.representation, b.cache, u) for b, u in zip(blocks, v, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_batches_of_another_size_go_through_cg() -> None:
    case = mixed()
    maker = METHODS["custom"](case.model, custom(FisherEmp(), Rows(), CG(damping=0.1)))
    for n in (2, 5, 3):
        passes(maker, case, case.x[:n], case.t[:n])
    C, g = fisher_and_gradient(case._replace(x=case.x[:3], t=case.t[:3]), FisherEmp(), 1, 0.0)
    case.model.zero_grad()
    passes(maker, case, case.x[:3], case.t[:3])
    assert oracles.relative_error(oracles.gradient_vector(case.model), oracles.tikhonov_solve(C, 0.1, _raw(case, 3))) < 1e-8


def _raw(case: Case, n: int) -> Tensor:
    return torch.cat([v.reshape(-1) for v in raw_gradients(case, case.x[:n], case.t[:n]).values()])


@pytest.mark.parametrize("solver", [Gram(damping=0.1), Gram(power=-0.5, damping=0.1)])
def test_a_failed_block_keeps_its_last_cache(solver: Gram) -> None:
    window, g = Window(size=4, scale="sum"), random(1, 6)
    good = streamed(window, random(3, 6), SUM)
    bad = streamed(window, torch.full((2, 6), torch.nan, dtype=torch.float64), SUM)
    first = solver.prepare(window, good, None)
    kept = solver.prepare(window, bad, first)
    assert torch.equal(solver.solve(window, kept, g), solver.solve(window, first, g))
    assert first["failures"].tolist() == [0] and kept["failures"].tolist() == [1]
    nothing = solver.prepare(window, bad, None)
    assert oracles.relative_error(solver.solve(window, nothing, g), 10 * g) < 1e-12


def test_prepare_and_solve_leave_the_statistic_alone() -> None:
    case = mixed()
    for method in METHODS_HERE:
        maker: Any = METHODS[method](case.model)
        passes(maker, case)
        for block in maker.plan.blocks:
            before = {k: v.clone() for k, v in block.state.items()}
            for _ in range(3):
                block.held, _ = block.prepare(block.held, {s.name for s in block.sites})
                block.triple.solver.solve(
                    block.triple.representation, block.cache, random(block.frame.stack, *block.frame.shape)
                )
            assert all(torch.equal(v, block.state[k]) for k, v in before.items())


class NoRead(TorchDispatchMode):
    """Refuses what would wait for a device: a number read by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS_HERE)
def test_update_and_solve_read_nothing(method: str) -> None:
    case = mixed()
    maker: Any = METHODS[method](case.model)
    passes(maker, case)
    for block in maker.plan.blocks:
        g = random(block.frame.stack, *block.frame.shape)
        triple = block.triple
        with NoRead():
            triple.solver.solve(triple.representation, block.cache, g)
            if kinds(Gradient) <= triple.representation.takes:
                triple.representation.update(block.state, Gradient(g), SUM)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lookup", [False, True])
def test_products_of_rows(transposed: bool, lookup: bool) -> None:
    """All three products against J itself, for every layout, in two chunks of different sizes."""

    def evidence(n: int) -> Outer:
        inputs = OneHot(torch.randint(4, (n, 3)), 4) if lookup else random(1, n, 3, 4)
        return Outer(inputs, random(2, 1, n, 3, 3), bias=not lookup, transposed=transposed)

    shape = (4, 3) if lookup else (5, 3)
    rows = Rows(granularity="layer")
    state, pieces = rows.init(frame(1, *(shape if transposed else shape[::-1]))), [evidence(2), evidence(3)]
    rows.update(state, pieces[0], Fold(0.0, 0.25, 1.0, of_step=1.0))
    rows.update(state, pieces[1], Fold(1.0, 0.75, 0.0, of_step=1.0))
    assert len(chunks(state)) == 2 and isinstance(rows, LowRank) and isinstance(rows, Spanned)
    J = torch.cat([0.5 * pieces[0].rows().flatten(1), 0.75**0.5 * pieces[1].rows().flatten(1)])
    v, z = random(1, *(shape if transposed else shape[::-1])), random(1, 10)
    assert oracles.relative_error(rows.gram(state)[0], J @ J.mT) < 1e-12
    assert oracles.relative_error(rows.project(state, v)[0], J @ v.reshape(-1)) < 1e-12
    assert oracles.relative_error(rows.combine(state, z).reshape(-1), J.mT @ z[0]) < 1e-12
    assert oracles.relative_error(rows.matvec(state, v).reshape(-1), J.mT @ (J @ v.reshape(-1))) < 1e-12
    assert oracles.relative_error(rows.to_dense(state)[0], J.mT @ J) < 1e-12


@pytest.mark.parametrize("granularity", ["layer", "full"])
@pytest.mark.parametrize("r", [1, 3], ids=["products", "formed"])
def test_products_of_groups(granularity: Any, r: int) -> None:
    """The groups of a convolution are one block: rows and vectors go over all of them."""
    rows = Rows(granularity=granularity)
    shape = (2, 3, 5) if granularity == "layer" else (30,)
    state, pieces = rows.init(frame(1, *shape)), [Outer(random(2, n, r, 4), random(2, 2, n, r, 3), bias=True) for n in (2, 3)]
    rows.update(state, pieces[0], Fold(1.0, 1.0, 1.0))
    rows.update(state, pieces[1], Fold(1.0, 1.0, 0.0))
    J = torch.cat([piece.rows().flatten(1) for piece in pieces])
    v, z = random(1, *shape), random(1, 10)
    assert oracles.relative_error(rows.gram(state)[0], J @ J.mT) < 1e-12
    assert oracles.relative_error(rows.project(state, v)[0], J @ v.reshape(-1)) < 1e-12
    found = rows.combine(state, z)
    assert found.shape == v.shape and oracles.relative_error(found.reshape(-1), J.mT @ z[0]) < 1e-12


def test_joint_rows_lie_side_by_side() -> None:
    parts = (
        Outer(random(2, 3, 2, 2), random(1, 2, 3, 2, 2), True),
        Outer(OneHot(torch.randint(4, (3, 2)), 4), random(1, 1, 3, 2, 2), transposed=True),
    )
    rows = Rows()
    state = rows.init(frame(1, 12 + 8))
    rows.update(state, Joint(parts), ONCE)
    J = Joint(parts).rows()[:, 0]
    assert oracles.relative_error(form_rows(rows, state)[0], J) < 1e-12
    assert oracles.relative_error(rows.gram(state)[0], J @ J.mT) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        partial(Window, size=0),
        partial(Window, scale="none"),
        partial(Truncated, rank=0),
        partial(Rows, max_rows=0),
        partial(Sketched, coordinates=0),
        partial(Window, granularity="unit"),
        partial(Gram, power=-0.25),
        partial(Gram, damping=0.0),
    ],
)
def test_illegal_options_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


def test_replaced_options_reach_the_parts() -> None:
    maker: Any = METHODS["seng"](digits().model, METHODS["seng"].Config(coordinates=3, positions=2, official=True))
    (held,) = {b.triple.representation for b in maker.plan.blocks}
    assert (held.coordinates, held.positions, held.official) == (3, 2, True)
    assert replace(held) == held
