"""A step is that of its whole batch, whatever way this is cut: curvatures x methods x splits, and factors by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import HessianProbe
from gradmaker.representations import ProbeDiagonal
from gradmaker.step import pool
from tests import models, oracles
from tests.models import CLASSES, Case

EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
N, R = 8, 5
SPLITS: dict[str, Sequence[int]] = {"1+7": (1, 7), "4+4": (4, 4), "3+0+5": (3, 0, 5), "2+1+5": (2, 1, 5)}


# ------------------------------------------------------------------ models of a batch of eight
def mlp() -> Case:
    return models.build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), N, 4)


def convolution() -> Case:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, CLASSES)
        )

    return models.build(make, N, 4, R)


class Mixed(nn.Module):
    """Neighbouring positions are coupled; token embeddings with an index of no input, or vectors."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.first = nn.Embedding(7, 4, padding_idx=0) if tokens else nn.Linear(3, 4)
        self.second, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = (h + 0.5 * h.roll(1, 1)) if x.shape[1] > 1 else h
        z: Tensor = self.last(self.second(h).tanh())
        return z


def left_out(t: Tensor) -> Tensor:
    """Unequal numbers of ignored tokens; the third example has none that counts."""
    kept = torch.arange(R) < torch.tensor([5, 2, 0, 3, 1, 5, 4, 2]).unsqueeze(1)
    return t.masked_fill(~kept, -100)


def sequences(tokens: bool) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x = torch.randint(7, (N, R)) if tokens else torch.randn(N, R, 3, dtype=torch.float64)
        t = torch.randint(CLASSES, (N, R))
        model = Mixed(tokens).double()
    return Case(model, x, left_out(t), lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()))


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "convolution": convolution,
    "masked": partial(sequences, False),
    "masked_tokens": partial(sequences, True),
}


def flat_cross_entropy(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    z, t = (z, t) if z.ndim == 2 else (z.flatten(0, 1), t.flatten())
    return F.cross_entropy(z, t, reduction=reduction)


# ------------------------------------------------------------------ steps of parts
def in_parts(maker: Any, case: Case, sizes: Sequence[int], reduction: str) -> Tensor:
    """``P g`` of one step whose batch is cut like this; a part without a term that counts has no mean."""
    case.model.zero_grad(set_to_none=True)
    total = int((case.t >= 0).sum())
    for x, t in zip(case.x.split(list(sizes)), case.t.split(list(sizes)), strict=True):
        counted = int((t >= 0).sum())
        if reduction == "mean" and not counted:
            continue
        y = maker.setup_model_call(case.model, x)
        maker.setup_loss_call(flat_cross_entropy, y, t, reduction)
        maker.accumulate(counted / total if reduction == "mean" else 1.0)
    maker.precondition()
    return oracles.gradient_vector(case.model)


def run(make: Callable[[], Case], config: dict[str, Any], sizes: Sequence[int], reduction: str, steps: int = 3) -> list[Tensor]:
    """Directions of steps, each from where the last one led, on targets that are not the same."""
    case, found = make(), []
    maker = from_config(case.model, config)
    for k in range(steps):
        found.append(in_parts(maker, case._replace(x=case.x.roll(k, 0), t=case.t.roll(k, 0)), sizes, reduction))
        with torch.no_grad():
            for p in case.model.parameters():
                p.sub_(p.grad, alpha=0.02)
    return found


EXACT: dict[str, Any] = {"damping": 0.1, **EVERY_STEP}
SEQUENCE_METHODS: dict[str, dict[str, Any]] = {
    "kfac_exact": {"method": "kfac", "fisher": "FisherExact", "split": "exact", **EXACT},
    "kfac_sum": {"method": "kfac", "fisher": "FisherExact", "decay": None, **EXACT},
    "kfac_emp": {"method": "kfac", "fisher": "FisherEmp", **EXACT},
    "kfac_token": {"method": "kfac", "fisher": {"FisherEmp": {"examples": "token"}}, **EXACT},
    "kfac_forward": {"method": "kfac", "fisher": "FisherForward", "split": "exact", **EXACT},
    "kfac_reduce": {"method": "kfac", "fisher": "FisherExact", "sharing": "reduce", **EXACT},
    "kfac_blocks": {"method": "kfac", "fisher": "FisherExact", "max_dim": 3, "wide_sides": "blocks", **EXACT},
    "kfac_diagonal": {"method": "kfac", "fisher": "FisherExact", "max_dim": 3, **EXACT},
    "ekfac_exact": {"method": "ekfac", "fisher": "FisherExact", "preconditioner_interval": 1, **EXACT},
    "ekfac_emp": {"method": "ekfac", "fisher": "FisherEmp", "preconditioner_interval": 2, "sharing": "reduce", **EXACT},
    "ekfac_forward": {
        "method": "custom", "curvature": "FisherForward", "representation": "Eigenbasis", "preconditioner_interval": 2,
        "solver": {"Rotate": {"damping": 0.1}}, "decay": 0.9,
    },
    "skfac_sum": {"method": "skfac", "fisher": "FisherExact", **EXACT},
    "skfac_none": {"method": "skfac", "fisher": "FisherEmp", "reduction": "none", **EXACT},
    "skfac_subsample": {"method": "skfac", "fisher": "FisherExact", "reduction": "subsample", "positions": 2, **EXACT},
    "skfac_forward": {
        "method": "custom", "curvature": "FisherForward", "representation": "KronRows",
        "solver": {"Eigh": {"damping": 0.1}},
    },
    "layer_ng": {"method": "layer_ng", "fisher": "FisherExact", **EXACT},
    "diag_emp": {"method": "diag_ng", "fisher": "FisherEmp", **EXACT},
    "smw_ng": {"method": "smw_ng", "damping": 0.1},
}  # fmt: skip
METHODS_OF_ALL: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("kbfgs", "kbfgs_l", "lbfgs", "newton", "psgd", "psgd_kf", "psgd_whiten")},
    **{name: {"method": name} for name in ("adahessian", "esgd", "saddle_free_diagonal")},
    "kbfgs_both": {"method": "kbfgs_l", "limited": "both", "pairs": 3, "beta1": 0.0},
    "esgd_two": {"method": "esgd", "samples": 2},
}
TABLE = [
    *((name, method) for name in CASES for method in SEQUENCE_METHODS),
    *((name, method) for name in ("mlp", "masked") for method in METHODS_OF_ALL),
]


@pytest.mark.parametrize("name, method", TABLE)
def test_any_cut_gives_the_step_of_the_whole_batch(name: str, method: str) -> None:
    """Means and sums, also where a part has no example, or none that counts, and in the steps that follow."""
    config = {**SEQUENCE_METHODS, **METHODS_OF_ALL}[method]
    for reduction, splits in (("mean", ("1+7", "2+1+5")), ("sum", SPLITS)):
        whole = run(CASES[name], config, (N,), reduction)
        for split in splits:
            parts = run(CASES[name], config, SPLITS[split], reduction)
            for k, (one, other) in enumerate(zip(whole, parts, strict=True)):
                tolerance = 1e-10 if method in SEQUENCE_METHODS else 1e-8
                assert oracles.relative_error(other, one) < tolerance, (reduction, split, k)


# ------------------------------------------------------------------ factors by hand
def counted(t: Tensor) -> list[list[int]]:
    """Positions of each example."""
    return [[r for r in range(R) if row[r] >= 0] for row in t]


def factors_by_hand(x: Tensor, z: Tensor, t: Tensor, reduction: str, positions: int) -> tuple[Tensor, float, Tensor]:
    """``sum a a^T`` with a one for the bias, how many, and ``B`` of a sum of cross entropies: example by example.

    reduction: expand, reduce (the mean input), or subsample (so many evenly spaced ones, each for ``c / k`` of them)
    """
    A, B, total = torch.zeros(4, 4).double(), torch.zeros(CLASSES, CLASSES).double(), 0.0
    for n, kept in enumerate(counted(t)):
        if not kept:
            continue
        weight, rows = 1.0, [torch.cat([x[n, r], torch.ones(1).double()]) for r in kept]
        k = min(positions, len(kept))
        chosen = [round(j * (len(kept) - 1) / max(k - 1, 1)) for j in range(k)]
        if reduction == "subsample":
            weight, rows = len(kept) / k, [rows[j] for j in chosen]
        if reduction == "reduce":
            rows = [torch.stack(rows).mean(0)]
        A += weight * sum(torch.outer(a, a) for a in rows)
        total += weight * len(rows)
        for r in [kept[j] for j in chosen] if reduction == "subsample" else kept:
            p = z[n, r].softmax(0)
            B += weight * (p.diag() - torch.outer(p, p))
    return A, total, B


BY_HAND: list[tuple[str, int, dict[str, Any], float | None]] = [
    *(("expand", 2, {"Kron": {}}, decay) for decay in (0.7, 0.0, None)),
    *(("reduce", 2, {"Kron": {"sharing": "reduce"}}, decay) for decay in (0.7, 0.0, None)),
    ("expand", 2, {"KronRows": {"reduction": "none"}}, 0.0),  # which holds the newest step alone
    ("reduce", 2, {"KronRows": {"reduction": "sum"}}, 0.0),
    *(("subsample", k, {"KronRows": {"reduction": "subsample", "positions": k}}, 0.0) for k in (1, 2, 3)),
]


@pytest.mark.parametrize("sizes", [(N,), (1, 7), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("reduction, positions, parts, decay", BY_HAND)
def test_factors_of_masked_positions(
    reduction: str, positions: int, parts: dict[str, Any], decay: float | None, sizes: Sequence[int]
) -> None:
    """One layer, whose inputs and output are known; averages over steps that counted different numbers."""
    case = sequences(False)
    model = nn.Linear(3, CLASSES).double()
    options = {} if "KronRows" in parts else {"decay": decay}
    config = {"method": "custom", "curvature": "FisherExact", "representation": parts, "solver": "Eigh", **options}
    maker: Any = from_config(model, config)
    A, total, B, mass = 0.0, 0.0, 0.0, 0.0
    for k in range(3):
        t = case.t.masked_fill(torch.arange(N).unsqueeze(1) < 2 * k, -100)  # fewer and fewer
        in_parts(maker, case._replace(model=model, x=case.x * (k + 1), t=t), sizes, "sum")
        with torch.no_grad():
            fresh = factors_by_hand(case.x * (k + 1), model(case.x * (k + 1)), t, reduction, positions)
        keep, share = (1.0, 1.0) if decay is None else (decay, 1 - decay)
        A, total, B = (keep * old + share * new for old, new in zip((A, total, B), fresh, strict=True))
        mass = 1.0 if decay is None else keep * mass + share
    (block,) = maker.plan.blocks
    left, right = block.triple.representation.factors(block.state)
    assert oracles.relative_error(right[0], A / total) < 1e-12
    assert oracles.relative_error(left[0], B / mass) < 1e-12


def test_the_inputs_pair_of_k_bfgs_is_of_what_was_counted() -> None:
    """``H_a`` is the inverse of the damped moment of the whole first step, and the secant's mean output leaves out the mask."""
    case, seen = sequences(False), {}
    model = nn.Linear(3, CLASSES).double()
    case = case._replace(model=model)
    maker: Any = METHODS["kbfgs"](model, METHODS["kbfgs"].Config(damping=0.3, beta1=0.0))
    in_parts(maker, case, (1, 7), "sum")
    (block,) = maker.plan.blocks
    A, total, _ = factors_by_hand(case.x, model(case.x).detach(), case.t, "expand", 1)
    damped = R * A / total + (0.3 * R) ** 0.5 * torch.eye(4, dtype=torch.float64)
    held = block.triple.representation.snapshot(block.state)
    assert oracles.relative_error(held["right"][0], torch.linalg.inv(damped)) < 1e-12
    at = case.t >= 0
    seen["before"] = model(case.x)[at].mean(0).detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0)))
    in_parts(maker, case, (N,), "sum")
    moved = model(case.x)[at].mean(0).detach() - seen["before"]
    assert oracles.relative_error(block.state["step"][0], 0.1 * moved) < 1e-10  # the first share of its average


# ------------------------------------------------------------------ pairs that micro-batches make together
def test_a_probe_is_one_product_with_the_hessian_of_the_sum() -> None:
    """By hand: ``(H v)^2`` with the Hessian of the step's loss, and not the sum of those of its parts."""
    case = mlp()
    config = METHODS["custom"].Config(
        curvature=HessianProbe(samples=2),
        representation=ProbeDiagonal(),
        solver=METHODS["esgd"].Config().triple(_site(case)).solver,
        damping=None,
        decay=0.0,
    )
    maker: Any = METHODS["custom"](case.model, config)
    case.model.zero_grad()
    H = oracles.hessian(case.model, case.x, lambda z: F.cross_entropy(z, case.t, reduction="sum"))
    pools = []
    for part in (slice(0, 3), slice(3, 8)):
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, case.x[part]), case.t[part], reduction="sum")
        maker.accumulate()
        pools.append(maker.step_state.now.work.pooled)
    ((chunks,),) = ([*pools[-1].values()],)
    assert len(chunks) == 2 and not torch.equal(chunks[0]["0.weight"].v, chunks[1]["0.weight"].v)
    for chunk in chunks:
        v, hv = (torch.cat([getattr(chunk[k], x).reshape(-1) for k, _ in case.model.named_parameters()]) for x in ("v", "cv"))
        assert oracles.relative_error(hv, H @ v) < 1e-10
    (earlier,) = pools[0].values()
    assert all(torch.equal(a[k].v, b[k].v) for a, b in zip(earlier, chunks, strict=True) for k in a)
    maker.precondition()
    assert not maker.step_state.now.work.pooled
    squares = torch.stack([chunk["0.weight"].cv for chunk in chunks]).square().mean(0).sqrt()
    block = next(b for b in maker.plan.blocks if b.sites[0].name == "0.weight")
    assert oracles.relative_error(block.triple.representation.diagonal(block.state), squares) < 1e-12


def _site(case: Case) -> Any:
    return METHODS["esgd"](case.model).plan.blocks[0].sites[0]


@pytest.mark.parametrize("method", ["psgd", "esgd"])
def test_a_step_that_was_saved_half_way_goes_on(method: str) -> None:
    """With the images of the parts that came before."""
    case, found = mlp(), []
    state: dict[str, Any] = {}
    for resumed in (False, True):
        model = copy.deepcopy(case.model)
        maker: Any = METHODS[method](model)
        for part in (slice(0, 3), slice(3, 8)):
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, case.x[part]), case.t[part], reduction="sum")
            if part.start and resumed:
                maker.load_state_dict(copy.deepcopy(state))
            maker.accumulate()
            state = state or maker.state_dict()
        maker.precondition()
        found.append([{k: v.clone() for k, v in block.state.items()} for block in maker.plan.blocks])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert pool.load({}, maker.plan.blocks) == {}


def test_a_part_that_fails_is_not_counted() -> None:
    """The pairs of a pass that raised are gone with it."""
    case = mlp()
    maker: Any = METHODS["esgd"](case.model)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, case.x), case.t)
    maker.accumulate(0.5)
    before = pool.dump(maker.step_state.now.work.pooled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(maker), "_merge", lambda *_: None)
        patch.setattr(pool, "add", _then_raise(pool.add))
        with pytest.raises(ZeroDivisionError):
            maker.accumulate(0.5)
    after = pool.dump(maker.step_state.now.work.pooled)
    assert before and after.keys() == before.keys()
    for site, chunks in before.items():
        assert after[site].keys() == chunks.keys()
        assert all(torch.equal(after[site][k][part], pair[part]) for k, pair in chunks.items() for part in pair)


def _then_raise(add: Callable[..., None]) -> Callable[..., None]:
    def adds(*args: Any) -> None:
        add(*args)
        raise ZeroDivisionError

    return adds
