"""Secants on consistent batches: L-BFGS, K-BFGS and K-BFGS(L)."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature.evidence import Outer, Pair
from gradmaker.representations import KronPairs
from gradmaker.representations.base import Fold
from gradmaker.representations.kron_pairs import bfgs_update_, double_damping
from gradmaker.representations.memory import ordered
from tests import models, oracles
from tests.measure import site_order
from tests.methods.test_probes import dropout, quadratic, step, symmetric
from tests.models import Case
from tests.representations.test_secants_memory import FOLD, dense_bfgs, frame, positive, randn

SECANTS = ("lbfgs", "kbfgs", "kbfgs_l")
ALL = (*SECANTS, "psgd", "psgd_kf", "adahessian", "esgd", "saddle_free_diagonal")


# --- the pairs ---------------------------------------------------------------------------------------------------------------
def flat_gradient(case: Case, x: Tensor, t: Tensor) -> Tensor:
    named = [p for p in case.model.parameters() if p.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(case.loss(case.model(x), t), named, materialize_grads=True)])


def halves(case: Case) -> list[tuple[Tensor, Tensor]]:
    n = len(case.x) // 2
    return [(case.x[:n], case.t[:n]), (case.x[n:], case.t[n:])]


@pytest.mark.parametrize("interval", [1, 3])
def test_pairs_come_from_one_batch(interval: int) -> None:
    """s and y of the batch before the step, at the weights before and after it, though the next batch is another one."""
    case = models.mlp()
    maker: Any = METHODS["lbfgs"](case.model, METHODS["lbfgs"].Config(curvature_interval=interval, acceptance=0.0))
    (block,) = maker.plan.blocks
    order = torch.cat([site_order(case.model, s) for s in block.sites])
    last: Any = None
    for k in range(7):
        x, t = halves(case)[k % 2]
        step(maker, case._replace(x=x, t=t))
        if last is not None and k % interval == 0:
            s, y = (v[order] for v in last)
            if float(s @ y) > 0:
                S, Y = ordered(block.state)
                assert oracles.relative_error(S[0, -1], s) < 1e-12
                assert oracles.relative_error(Y[0, -1], y) < 1e-9
        before, g = oracles.parameter_vector(case.model), flat_gradient(case, x, t)
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0.1 * p.grad
        if k % interval == 0:
            last = oracles.parameter_vector(case.model) - before, flat_gradient(case, x, t) - g


def test_dropout_is_the_same_on_both_sides() -> None:
    """Without a move of the weights y is zero to the last bit, with dropout and batch norm."""
    case = dropout()
    maker: Any = METHODS["lbfgs"](case.model)
    step(maker, case)
    step(maker, case)
    pairs = maker.step_state.now.previous
    assert pairs.pairs is None and len(pairs.passes) == 1
    step(maker, case)
    (block,) = maker.plan.blocks
    assert int(block.state["refused"]) == 2 and int(block.state["taken"]) == 0
    found = maker.secants(maker.step_state.now.previous)
    assert all(float(e.v.abs().max()) == float(e.cv.abs().max()) == 0 for e in found.values() if isinstance(e, Pair))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_make_one_pair(reduction: str) -> None:
    """Of their summed loss, whatever their sizes: with a pair of the last part alone a sum has too little curvature."""
    whole, parted = (models.mlp() for _ in range(2))
    found = []
    for case, parts in ((whole, 1), (parted, 2)):
        maker: Any = METHODS["lbfgs"](case.model, METHODS["lbfgs"].Config(indefinite="damp"))
        for k in range(4):
            cuts = [slice(None)] if parts == 1 else [slice(1 + k % 2), slice(1 + k % 2, None)]
            micro_step(maker, case, cuts, reduction)
            with torch.no_grad():
                for p in case.model.parameters():
                    p -= 0.3 * p.grad
        assert int(maker.plan.blocks[0].state["taken"]) == 3
        found.append(oracles.parameter_vector(case.model))
    assert oracles.relative_error(found[1], found[0]) < 1e-10


def micro_step(maker: Any, case: Case, cuts: list[slice], reduction: str) -> None:
    case.model.zero_grad(set_to_none=True)
    for cut in cuts:
        x, t = case.x[cut], case.t[cut]
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, x), t, reduction=reduction)
        maker.accumulate(len(x) / len(case.x) if reduction == "mean" else 1.0)
    maker.precondition()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_layer_secants_of_micro_batches_are_those_of_the_batch(reduction: str) -> None:
    found = []
    for cuts in ([slice(None)], [slice(2), slice(2, None)]):
        case = models.mlp()
        maker: Any = METHODS["kbfgs"](case.model)
        micro_step(maker, case, cuts, reduction)
        with torch.no_grad():
            for j, p in enumerate(case.model.parameters()):
                p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(j))
        found.append(maker.secants(maker.step_state.now.previous))
    for name, pair in found[0].items():
        assert oracles.relative_error(found[1][name].v, pair.v) < 1e-12  # type: ignore[attr-defined]
        assert oracles.relative_error(found[1][name].cv, pair.cv) < 1e-12  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", SECANTS)
def test_a_step_that_begins_again_counts_once(method: str) -> None:
    """After an exception in its solve."""
    case = models.mlp()
    maker: Any = METHODS[method](case.model)
    step(maker, case)
    expected = maker.step_state.now.previous.gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(maker.plan.blocks[-1].triple.solver), "solve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(maker, case)
    step(maker, case)
    assert len(maker.step_state.now.previous.passes) <= 1
    for p, g in maker.step_state.now.previous.gradients.items():
        assert oracles.relative_error(g, expected[p]) < 1e-12


@pytest.mark.parametrize("method", SECANTS)
def test_a_batch_that_was_overwritten_is_refused(method: str) -> None:
    """The secant of two batches would be noise."""
    case = models.mlp()
    maker: Any = METHODS[method](case.model)
    step(maker, case)
    case.x.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        step(maker, case)


def test_losses_that_are_not_finite_leave_the_pair_alone() -> None:
    case = models.mlp()
    maker: Any = METHODS["lbfgs"](case.model)
    step(maker, case)
    with torch.no_grad():
        for p in case.model.parameters():
            p -= 0.1 * p.grad
    step(maker, case._replace(loss=lambda y, t: case.loss(y, t) * torch.inf))
    assert maker.skipped == 1 and maker.step_state.now.previous.pairs is not None
    step(maker, case)
    assert int(maker.plan.blocks[0].state["taken"]) == 1


# --- K-BFGS ------------------------------------------------------------------------------------------------------------------
def test_update_is_the_product_form() -> None:
    """And holds the secant equation; a member that refuses keeps its matrix to the last bit."""
    H, s, y = torch.stack([positive(4), positive(4, 1)]), randn(2, 4, seed=2), randn(2, 4, seed=3)
    y = y * (s * y).sum(1, keepdim=True).sign()
    found = H.clone()
    bfgs_update_(found, s, y, torch.tensor([True, False]))
    assert oracles.relative_error(found[0], dense_bfgs(H[0], s[0], y[0])) < 1e-12
    assert oracles.relative_error(found[0] @ y[0], s[0]) < 1e-12
    assert torch.equal(found[1], H[1]) and torch.equal(found, found.mT)


@pytest.mark.parametrize("form", ["powell", "shift"])
def test_double_damping_bounds(form: str) -> None:
    """s^T y >= 0.2 y^T H y and >= floor s^T s for any pair; a good one is not touched."""
    H, floor = positive(4).expand(500, 4, 4), torch.full((500,), 0.3, dtype=torch.float64)
    s, y = randn(2, 500, 4)
    Hy = (H @ y.unsqueeze(-1)).squeeze(-1)
    s1, y1 = double_damping(s, y, Hy, 0.2, floor, form)
    assert ((s1 * y).sum(1) >= 0.2 * (y * Hy).sum(1) - 1e-9).all()
    assert ((s1 * y1).sum(1) >= 0.3 * s1.square().sum(1) - 1e-9).all()
    same = (s * y).sum(1) > torch.maximum(0.2 * (y * Hy).sum(1), 0.3 * s.square().sum(1))
    assert same.any() and torch.equal(s1[same], s[same])
    assert form == "shift" or torch.equal(y1[same], y[same])


@pytest.mark.parametrize("floor", [0.999, 1.0, 1.5])
def test_a_floor_that_is_out_of_reach_is_taken_itself(floor: float) -> None:
    """Of a damping above one: ``y`` never turns around, and is nowhere near a pole."""
    s, given = randn(300, 4), torch.linspace(0.05, 1.6, 300, dtype=torch.float64)
    across = torch.stack([-s[:, 1], s[:, 0], -s[:, 3], s[:, 2]], 1)  # at right angles to s, as long
    y = s * given.unsqueeze(1) + across
    s1, y1 = double_damping(s, y, y, 0.0, torch.full((300,), floor, dtype=torch.float64), "powell")
    assert torch.equal(s1, s)
    assert oracles.relative_error((s * y1).sum(1) / s.square().sum(1), given.clamp(min=floor)) < 1e-9
    kept = (y1 * across).sum(1) / s.square().sum(1)
    assert -1e-9 < float(kept.min()) and float(kept.max()) < 1 + 1e-9


def inputs_of(a: Tensor, outputs: int) -> Outer:
    """(n, i) -> one position an example, a one appended."""
    n = len(a)
    g = torch.zeros(1, 1, n, 1, outputs, dtype=a.dtype)
    return Outer(a[None, :, None], g, bias=True, kind="with_secants")


def test_hessian_action_goes_to_the_inverse() -> None:
    """One moment, many random directions: H_a -> (A + sqrt(damping) I)^-1 (4e-16 after 400)."""
    held = KronPairs(damping=0.25)
    state = held.init(frame(2, 4))
    a = randn(50, 3)
    held.update(state, inputs_of(a, 2), Fold(0.0, 1.0, 1.0))
    assert torch.equal(state["right"][0], torch.eye(4, dtype=torch.float64))  # the step may bring more of them
    state = {**state, **held.snapshot(state)}
    x = torch.cat([a, torch.ones(50, 1, dtype=torch.float64)], 1)
    exact = torch.linalg.inv(x.mT @ x / 50 + 0.5 * torch.eye(4, dtype=torch.float64))
    assert oracles.relative_error(state["right"][0], exact) < 1e-12  # the first is inverted exactly
    state["right"].copy_(torch.eye(4, dtype=torch.float64))
    damped = held._damped_input(state)
    for v in randn(400, 1, 4, seed=1):
        s = (state["right"] @ v.unsqueeze(-1)).squeeze(-1)
        held._push(state, "right", s, (damped @ s.unsqueeze(-1)).squeeze(-1), torch.tensor([True]))
    assert oracles.relative_error(state["right"][0], exact) < 1e-12


@pytest.mark.parametrize("pairs, limited", [(None, "outputs"), (10, "outputs"), (10, "both")])
def test_both_sides_stay_positive(pairs: int | None, limited: Any) -> None:
    """A thousand adversarial pairs (property 44: s^T y < 0 among them), infinite ones, inputs of any scale."""
    held = KronPairs(damping=0.3, pairs=pairs, limited=limited)
    state = held.init(frame(3, 4, stack=2))
    for k in range(1000):
        s, y = randn(2, 2, 3, seed=k) * 10.0 ** (k % 5 - 2)
        y = y if k % 97 else torch.full_like(y, torch.nan)
        held.update(state, Pair(s, y, "output_secant"), FOLD)
        a = randn(2, 6, 1, 3, seed=-k) * 10.0 ** (k % 3 - 1)
        held.update(state, Outer(a, torch.zeros(1, 2, 6, 1, 3).double(), bias=True, kind="with_secants"), FOLD)
    for side in ("left", "right"):
        H = held._formed(state, side)
        assert torch.linalg.eigvalsh(H)[:, 0].min() > 0 and torch.equal(H, H.mT)
    g = randn(2, 3, 4)
    P = torch.linalg.inv(held.to_dense(state))
    assert oracles.relative_error(held.apply(state, g), (P @ g.reshape(2, -1, 1)).reshape(g.shape)) < 1e-6


def test_secant_equation_without_damping() -> None:
    """Property 44: H_g y = s for a pair that needs no damping, in both forms of memory."""
    for pairs in (None, 5):
        held = KronPairs(damping=1e-12, pairs=pairs, memory_decay=0.0, least=0.0)
        state = held.init(frame(3, 2))
        for k in range(4):
            s = randn(1, 3, seed=k)
            held.update(state, Pair(s, s @ positive(3), "output_secant"), FOLD)
        assert (
            oracles.relative_error(held._inverse(state, "left", state["change"].unsqueeze(-1)).squeeze(-1), state["step"])
            < 1e-12
        )


def secants_of(case: Case, method: str = "kbfgs", rate: float = 0.1) -> tuple[Any, dict[str, Any]]:
    """The layer secants of one step."""
    maker: Any = METHODS[method](case.model, METHODS[method].Config(beta1=0.0))
    step(maker, case)
    with torch.no_grad():
        for p in case.model.parameters():
            p -= 0 if p.grad is None else rate * p.grad
    return maker, maker.secants(maker.step_state.now.previous)


def test_last_layer_with_squares_keeps_the_identity() -> None:
    """Half the squared error: y = s (1e-16), so that H_g stays I."""
    base = models.mlp_gaussian()
    case = base._replace(loss=lambda y, t: F.mse_loss(y, t, reduction="sum") / (2 * len(t)))
    maker, found = secants_of(case)
    assert oracles.relative_error(found["2"].cv, found["2"].v) < 1e-12
    for _ in range(4):
        step(maker, case)
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0.1 * p.grad
    block = next(b for b in maker.plan.blocks if b.sites[0].name == "2")
    assert oracles.relative_error(block.state["left"][0], torch.eye(3, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [models.mlp, lambda: models.convolution(2, groups=2), lambda: models.convolution(1)])
def test_layer_secants_by_hand(make: Callable[[], Case], reduction: str) -> None:
    """Mean output, and sum over examples of the mean over locations of dL/d(output), before and after: by hooks."""
    case = make()
    case = case._replace(loss=lambda y, t: F.cross_entropy(y, t, reduction=reduction))
    layers = {k: m for k, m in case.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}

    def look() -> dict[str, tuple[Tensor, Tensor]]:
        outputs: dict[str, Tensor] = {}
        handles = [m.register_forward_hook(lambda _, __, y, k=k: outputs.__setitem__(k, y)) for k, m in layers.items()]
        loss = case.run()
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        flat = {k: (y.flatten(2).mean((0, 2)), g.flatten(2).mean(2).sum(0)) for (k, y), g in _spatial(outputs, gradients)}
        return {k: (s.detach(), g) for k, (s, g) in flat.items()}

    before = look()
    _, found = secants_of(case)
    after = look()
    assert found.keys() == layers.keys()
    for name, pair in found.items():
        assert oracles.relative_error(pair.v.reshape(-1), after[name][0] - before[name][0]) < 1e-9
        assert oracles.relative_error(pair.cv.reshape(-1), after[name][1] - before[name][1]) < 1e-9


def _spatial(outputs: dict[str, Tensor], gradients: Any) -> Any:
    wide = {k: y if y.ndim > 2 else y.unsqueeze(-1) for k, y in outputs.items()}
    return zip(wide.items(), (g if g.ndim > 2 else g.unsqueeze(-1) for g in gradients), strict=True)


def test_inputs_of_a_convolution_are_summed_over_locations() -> None:
    """A = Omega, the sum over T locations, and sqrt(damping T) on it."""
    case = models.convolution(2)
    maker: Any = METHODS["kbfgs"](case.model, METHODS["kbfgs"].Config(damping=0.3))
    patches = oracles.conv_patches(case.model.get_submodule("convolution"), case.x)
    rows = patches.reshape(len(case.x), -1, patches.shape[-1])
    x = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    A = torch.einsum("nri,nrj->ij", x, x) / len(x)
    step(maker, case)
    block = next(b for b in maker.plan.blocks if b.sites[0].name == "convolution")
    T = rows.shape[1]
    found = block.triple.representation._damped_input(block.state)[0]
    assert oracles.relative_error(found, A + (0.3 * T) ** 0.5 * torch.eye(len(A), dtype=A.dtype)) < 1e-10


# --- state -------------------------------------------------------------------------------------------------------------------
def reloaded(maker: Any) -> Any:
    file = io.BytesIO()
    torch.save(maker.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(maker: Any, case: Case, start: int, stop: int) -> None:
    for k in range(start, stop):
        torch.manual_seed(k)  # dropout
        x, t = halves(case)[k % 2]
        step(maker, case._replace(x=x, t=t))
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0.05 * p.grad


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_resume_is_bitwise_at_any_step(method: str, interval: int, at: int) -> None:
    """Also while a pair is under way, with dropout and batch norm: saving completes it."""
    case = dropout()
    options = {"curvature_interval": interval, **({"pairs": 5} if method == "kbfgs_l" else {})}
    maker = from_config(case.model, {"method": method, **options})
    train(maker, case, 0, at)
    state, model = reloaded(maker), copy.deepcopy(case.model.state_dict())
    train(maker, case, at, at + 5)
    twin = dropout()
    twin.model.load_state_dict(model)
    second = from_config(twin.model, {"method": method, **options})
    second.load_state_dict(state)
    train(second, twin, at, at + 5)
    for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_saved_before_the_optimizer_has_stepped() -> None:
    """Nothing can be completed then: the pair is left out, and the next one is as ever."""
    case = models.mlp()
    maker: Any = METHODS["lbfgs"](case.model)
    step(maker, case)
    state = reloaded(maker)
    assert state["secants"]["known"] == []
    second: Any = METHODS["lbfgs"](case.model)
    second.load_state_dict(state)
    for _ in range(2):
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0.05 * p.grad
        step(second, case)
    assert int(second.plan.blocks[0].state["taken"] + second.plan.blocks[0].state["refused"]) == 1


@pytest.mark.parametrize("method", SECANTS)
def test_bad_options_are_refused(method: str) -> None:
    bad: dict[str, list[dict[str, Any]]] = {
        "lbfgs": [{"memory": -1}, {"indefinite": "flip"}, {"acceptance": -1.0}],
        "kbfgs": [{"output_damping": "none"}, {"damping": 0.0}],
        "kbfgs_l": [{"pairs": 0}, {"limited": "inputs"}, {"damping": 0.0}],
    }
    for options in bad[method]:
        with pytest.raises(ValueError, match=next(iter(options))):
            METHODS[method].Config(**options)


def test_hessian_is_not_consulted_where_it_is_wrong() -> None:
    """The pairs of an indefinite quadratic: y = H s, and only those with s^T H s > 0 are taken."""
    H = symmetric(4)
    case = quadratic(H)
    maker: Any = METHODS["lbfgs"](case.model)
    for k in range(9):
        step(maker, case)
        with torch.no_grad():
            case.model.get_parameter("w").add_(randn(4, seed=k))
    state = maker.plan.blocks[0].state
    assert int(state["taken"]) >= 2 and int(state["refused"]) >= 2
    kept = state["s"][0].any(1)
    assert oracles.relative_error(state["y"][0][kept], state["s"][0][kept] @ H) < 1e-9
    assert (state["s"][0][kept] * state["y"][0][kept]).sum(1).min() > 0


@pytest.mark.parametrize("method", ["lbfgs", "kbfgs", "kbfgs_l"])
def test_a_copied_maker_makes_its_secants_with_its_own_model(method: str) -> None:
    """The original goes on with other weights: the copy does what it does alone."""

    def run(maker: Any, x: Tensor, t: Tensor) -> None:
        maker.model.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(maker.model, x), t)
        maker.forward_and_backward()
        with torch.no_grad():
            for p in maker.model.parameters():
                p.sub_(0.05 * p.grad)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(5)]
    maker: Any = METHODS[method](model)
    for x, t in batches[:2]:
        run(maker, x, t)
    copied = copy.deepcopy(maker)
    for each in (maker, copied):
        for x, t in batches[2:]:
            run(each, x, t)
    assert all(torch.equal(p, q) for p, q in zip(maker.model.parameters(), copied.model.parameters(), strict=True))
