"""The memory of pairs of L-BFGS: its product against the dense recursion and the two loops, what it takes in, how it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature.evidence import Gradient, Pair
from gradmaker.representations import Pairs
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.memory import multiply, ordered, push, unfilled
from tests import models, oracles
from tests.live import Live
from tests.methods.test_probes import quadratic, step

FOLD = Fold(0.9, 0.1, 0.1)
SOLVED = ("gradient", "direction", "solved")
"""What is kept for the solve of the same gradient, beside the memory."""


def frame(*shape: int, stack: int = 1) -> Frame:
    return Frame(stack, shape, frozenset(), torch.float64, torch.device("cpu"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """(I - r s y^T) H (I - r y s^T) + r s s^T, as a product of matrices."""
    r, eye = 1 / (s @ y), torch.eye(len(s), dtype=s.dtype)
    V = eye - r * torch.outer(y, s)
    return V.mT @ H @ V + r * torch.outer(s, s)


def positive(size: int, seed: int = 0) -> Tensor:
    X = randn(size, size, seed=seed)
    return X @ X.mT + torch.eye(size, dtype=torch.float64)


# --- the two loops ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [1, 4, 10])
def test_two_loops_are_the_dense_recursion(memory: int) -> None:
    """And take in the last ``memory`` pairs only; the secant equation of the newest holds (1e-12)."""
    held, A = Pairs(memory), positive(6)
    state = held.init(frame(6))
    pairs = [(s, A @ s) for s in randn(7, 6, seed=1)]
    for k, (s, y) in enumerate(pairs):
        held.update(state, Pair(s[None], y[None]), FOLD)
        H = torch.eye(6, dtype=torch.float64) * (s @ y) / (y @ y)
        for one in pairs[max(0, k + 1 - memory) : k + 1]:
            H = dense_bfgs(H, *one)
        g = randn(1, 6, seed=k)
        assert oracles.relative_error(held.apply(state, g)[0], H @ g[0]) < 1e-12
        assert oracles.relative_error(held.apply(state, y[None])[0], s) < 1e-12
        assert oracles.relative_error(torch.linalg.inv(held.to_dense(state)[0]), H) < 1e-9


def two_loops(S: Tensor, Y: Tensor, gamma: float, G: Tensor) -> Tensor:
    """Nocedal and Wright 2006, algorithm 7.4, a vector at a time; S and Y as lists of pairs, the oldest first."""
    columns = []
    for g in G.unbind(1):
        q, alphas = g.clone(), []
        for s, y in zip(reversed(S), reversed(Y), strict=True):
            alphas.append((s @ q) / (y @ s))
            q -= alphas[-1] * y
        r = gamma * q
        for s, y, alpha in zip(S, Y, reversed(alphas), strict=True):
            r += s * (alpha - (y @ r) / (y @ s))
        columns.append(r)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("size", [3, 40, 150])
@pytest.mark.parametrize("count", [0, 1, 60, 100, 130])
def test_substitutions_are_the_two_loops(size: int, count: int) -> None:
    """A hundred places, empty ones among them, and members of the stack that refuse some of the pairs."""
    A, held = positive(size), unfilled(frame(size, stack=2), 100, size)
    s = randn(max(count, 1), 2, size, seed=1)[:count]
    y = s @ A / size + 0.1 * s * torch.rand(1, dtype=torch.float64)
    taken: list[list[int]] = [[], []]
    for k in range(count):
        accepted = torch.tensor([True, k % 3 != 0])
        push(held, s[k], y[k], accepted)
        for member in range(2):
            taken[member] += [k] if accepted[member] else []
    G = randn(2, size, 4, seed=2)
    found = multiply(held, torch.tensor([0.7, 1.3], dtype=torch.float64), G)
    for member, gamma in enumerate((0.7, 1.3)):
        rows = taken[member][-100:]
        expected = two_loops(s[rows, member], y[rows, member], gamma, G[member])
        assert oracles.relative_error(found[member], expected) < 1e-10


def test_no_memory_is_a_scale() -> None:
    held = Pairs(0)
    state = held.init(frame(4))
    s, y = randn(2, 1, 4)
    held.update(state, Pair(s, y * (s * y).sum().sign()), FOLD)
    gamma = (s * y).sum().abs() / y.square().sum()
    assert oracles.relative_error(held.apply(state, s), gamma * s) < 1e-12


def test_quadratic_termination() -> None:
    """With exact line searches and room for all pairs: P steps."""
    A = positive(5)
    case = quadratic(A)
    maker: Any = METHODS["lbfgs"](case.model, METHODS["lbfgs"].Config(memory=5))
    w = case.model.get_parameter("w")
    for _ in range(5):
        step(maker, case)
        with torch.no_grad():
            assert w.grad is not None
            d, g = w.grad, A @ w
            w -= (g @ d) / (d @ A @ d) * d
    assert float((A @ w.detach()).norm()) < 1e-9


@pytest.mark.parametrize("indefinite", ["skip", "damp"])
def test_pairs_of_negative_curvature(indefinite: Any) -> None:
    """Left out, or damped to a fifth of I / gamma: P stays positive through a thousand adversarial pairs."""
    held = Pairs(5, indefinite)
    state = held.init(frame(4, stack=2))
    for k in range(1000):
        s, y = randn(2, 2, 4, seed=k) * 10.0 ** (k % 7 - 3)
        y = y if k % 97 else torch.full_like(y, torch.inf)
        s = s if k % 89 else torch.zeros_like(s)
        held.update(state, Pair(s, y), FOLD)
        if k % 50 == 0:
            P = held.apply(state, torch.eye(4, dtype=torch.float64)[None, 0].expand(2, 4))
            assert P.isfinite().all() and (P[:, 0] > 0).all()
    assert (state["products"].diagonal(dim1=-2, dim2=-1) > 0).all() and (state["taken"] + state["refused"] == 1000).all()
    taken = float(state["taken"].double().mean())
    assert taken > 950 if indefinite == "damp" else 300 < taken < 700


def test_powell_damping_by_hand() -> None:
    s, y = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[-1.0, 0.5]]).double()
    held = Pairs(3, "damp")
    state = held.init(frame(2))
    held.update(state, Pair(s, y), FOLD)  # gamma is 1: s^T B s = 1, tau = 0.8 / (1 + 1) = 0.4
    assert oracles.relative_error(state["y"][0, -1], torch.tensor([0.2, 0.2], dtype=torch.float64)) < 1e-12


def test_tikhonov_is_added_to_every_pair() -> None:
    held = Pairs(3, damping=0.5)
    state = held.init(frame(3))
    s, y = randn(1, 3), 2 * randn(1, 3)
    held.update(state, Pair(s, y), FOLD)
    assert oracles.relative_error(state["y"][0, -1], (y + 0.5 * s)[0]) < 1e-12


def test_first_step_has_the_length_of_torch() -> None:
    """min(1, 1 / |g|_1), until a pair has been taken."""
    held = Pairs(3)
    state = held.init(frame(3))
    for g, gamma in (([2.0, -3.0, 5.0], 0.1), ([0.1, 0.0, 0.1], 1.0), ([0.0, 0.0, 0.0], 1.0)):
        held.update(state, Gradient(torch.tensor([g]).double(), kind="initial_scaling"), FOLD)
        assert float(state["gamma"]) == pytest.approx(gamma)


# --- what is read and kept --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("memory", [1, 2, 5])
def test_the_ring_holds_the_last_pairs_in_their_order(memory: int, stack: int) -> None:
    """Of every member those that it accepted; what it refused is nowhere, and the products are those of the pairs."""
    held = unfilled(frame(4, stack=stack), memory, 4)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(stack)]
    for k in range(13):
        s, y = randn(2, stack, 4, seed=k)
        accepted = torch.tensor([(k + j) % (j + 2) != 0 or not j for j in range(stack)])
        push(held, s.where(accepted[:, None], torch.nan), y, accepted)
        for j in range(stack):
            kept[j] += [(s[j], y[j])] if accepted[j] else []
            last = kept[j][-memory:]
            empty = memory - len(last)
            S, Y = (torch.stack([torch.zeros(4).double()] * empty + [pair[side] for pair in last]) for side in (0, 1))
            assert torch.equal(ordered(held)[0][j], S) and torch.equal(ordered(held)[1][j], Y)
            products = (S @ Y.T).triu() + torch.diag((torch.arange(memory) < empty).double())
            assert oracles.relative_error(held["products"][j], products) < 1e-12


def test_a_solve_of_the_same_gradient_is_the_one_that_was_kept() -> None:
    """Until a pair comes; another gradient, as an average of them, is multiplied anew."""
    held, A = Pairs(3), positive(5)
    state, twin = held.init(frame(5)), held.init(frame(5))
    for k in range(4):
        s, g = randn(1, 5, seed=k), randn(1, 5, seed=k + 9)
        for one in (state, twin):
            held.update(one, Pair(s, s @ A, "secant"), FOLD)
        held.update(state, Gradient(g, kind="initial_scaling"), FOLD)
        for v in (g, g + 1):
            expected = multiply(twin, twin["gamma"], v.unsqueeze(-1)).squeeze(-1)
            assert oracles.relative_error(held.apply(state, v), expected) < 1e-14
        assert torch.equal(held.apply(state, g), state["direction"])
    held.update(state, Pair(s.flip(1), s.flip(1) @ A, "secant"), FOLD)
    assert oracles.relative_error(held.apply(state, g), state["direction"]) > 1e-3


def test_a_step_reads_the_pairs_and_copies_none() -> None:
    """Bytes of a step once the memory is full: a few vectors. The cache is the state, and told once."""
    model = nn.Linear(300, 200)
    maker: Any = METHODS["lbfgs"](model, METHODS["lbfgs"].Config(memory=40))
    x, t = torch.randn(8, 300), torch.randint(200, (8,))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(45):
        model.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
        with Live() as live:
            maker.forward_and_backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
    (block,) = maker.plan.blocks
    assert int(block.state["taken"]) >= 40 and block.state["s"].numel() * 4 == 40 * size
    held = sum(x.numel() * x.element_size() for x in block.state.values())  # written in place, and counted for that
    assert 80 * size < held < 83 * size and live.peak - held < 15 * size
    assert maker.summary().bytes == held
    assert all(block.cache[name] is value for name, value in block.state.items())


def test_what_is_applied_at_once_has_no_interval() -> None:
    for option, value in {"preconditioner_interval": 3, "stagger": False}.items():
        with pytest.raises(ValueError, match=f"{option}={value} would have no effect"):
            METHODS["lbfgs"].Config(**{option: value})


@pytest.mark.slow
def test_a_step_costs_a_few_of_adam() -> None:
    """2.6 M parameters, ten pairs of memory, all filled: the best of several steps, side by side."""
    seconds = {}
    for method in ("adam", "lbfgs"):
        model = nn.Sequential(nn.EmbeddingBag(20000, 128), nn.Linear(128, 10))
        x, t = torch.randint(20000, (32, 16)), torch.randint(10, (32,))
        maker, taken = from_config(model, {"method": method}), []
        for _ in range(30):
            model.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
            begun = time.perf_counter()
            maker.forward_and_backward()
            taken.append(time.perf_counter() - begun)
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
        seconds[method] = min(taken[15:])
    assert seconds["lbfgs"] < 6 * seconds["adam"], seconds


# --- reset ------------------------------------------------------------------------------------------------------------------
def test_a_memory_that_turns_the_gradient_around_is_emptied() -> None:
    """Of one member of a stack, once g^T P g <= 0: then it starts again like a new one; the other is untouched."""
    held, A = Pairs(3), positive(4)
    state = held.init(frame(4, stack=2))
    for k in range(5):
        s = randn(2, 4, seed=k)
        held.update(state, Pair(s, s @ A, "secant"), FOLD)
    state["gamma"][1] = -100.0  # as rounding may leave it
    other = {k: v[0].clone() for k, v in state.items() if k not in SOLVED}
    g = randn(2, 4, seed=9)
    assert float(g[1] @ held.apply(state, g)[1]) < 0
    held.update(state, Gradient(g, kind="initial_scaling"), FOLD)
    assert all(torch.equal(state[k][0], v) for k, v in other.items())
    fresh = held.init(frame(4))
    held.update(fresh, Gradient(g[1:], kind="initial_scaling"), FOLD)
    for key, value in fresh.items():
        assert torch.equal(value[0], state[key][1]) or key in ("refused", "resets"), key
    assert state["resets"].tolist() == [0, 1]
    assert oracles.relative_error(held.apply(state, g)[1], g[1] / g[1].abs().sum().clamp(min=1)) < 1e-12


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_gradients_without_a_direction_empty_nothing(bad: float) -> None:
    held = Pairs(3)
    state = held.init(frame(4))
    s = randn(1, 4)
    held.update(state, Pair(s, 2 * s, "secant"), FOLD)
    before = {k: v.clone() for k, v in state.items() if k not in SOLVED}
    held.update(state, Gradient(torch.full((1, 4), bad).double(), kind="initial_scaling"), FOLD)
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_products_that_overflow_are_emptied_in_a_run() -> None:
    """Pairs of weights that have run away: the method goes on by itself."""
    case = models.mlp()
    maker: Any = METHODS["lbfgs"](case.model)
    for _ in range(4):
        step(maker, case)
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0.1 * p.grad  # type: ignore[operator]
    (block,) = maker.plan.blocks
    assert int(block.state["taken"]) > 0
    block.state["s"].mul_(1e200)
    step(maker, case)
    assert int(block.state["resets"]) == 1 and int(block.state["taken"]) == 0
    raw = torch.autograd.grad(case.run(), list(case.model.parameters()))
    found = torch.cat([p.grad.reshape(-1) for p in case.model.parameters()])  # type: ignore[union-attr]
    g = torch.cat([x.reshape(-1) for x in raw])
    assert oracles.relative_error(found, g * min(1.0, 1 / float(g.abs().sum()))) < 1e-12


# --- K-BFGS(L) --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [models.mlp, lambda: models.convolution(2, groups=2)])
def test_with_room_for_all_pairs_it_is_kbfgs(make: Callable[[], models.Case]) -> None:
    """H_g from the identity by the same updates, H_a the same matrix: step by step, until the first pair has to leave."""
    cases = make(), make(), make()
    options: list[dict[str, Any]] = [{"method": "kbfgs"}, {"method": "kbfgs_l", "pairs": 8}, {"method": "kbfgs_l", "pairs": 3}]
    makers: list[Any] = [from_config(c.model, o) for c, o in zip(cases, options, strict=True)]
    apart = []
    for _ in range(8):
        found = []
        for maker, case in zip(makers, cases, strict=True):
            step(maker, case)
            found.append(oracles.gradient_vector(case.model))
            with torch.no_grad():
                for p in case.model.parameters():
                    p -= 0 if p.grad is None else 0.1 * p.grad
        assert oracles.relative_error(found[1], found[0]) < 1e-9
        apart.append(oracles.relative_error(found[2], found[0]))
    assert max(apart[:4]) < 1e-9 and apart[-1] > 1e-6


def test_both_sides_as_pairs_start_from_the_identity() -> None:
    """The first step has the inputs' first pair alone, H_a a = A_damped^-1 A_damped a along it; the published one inverts A."""
    case, twin = models.mlp(), models.mlp()
    published: Any = from_config(case.model, {"method": "kbfgs_l"})
    both: Any = from_config(twin.model, {"method": "kbfgs_l", "limited": "both"})
    step(published, case)
    step(both, twin)
    for one, other in zip(published.plan.blocks, both.plan.blocks, strict=True):
        representation = other.triple.representation
        damped = representation._damped_input(other.state)[0]
        assert oracles.relative_error(representation._damped_input(one.state)[0], damped) < 1e-12
        published_state, state = one.triple.representation.snapshot(one.state), representation.snapshot(other.state)
        assert oracles.relative_error(published_state["right"][0], torch.linalg.inv(damped)) < 1e-9
        s, y = state["right_s"][0, -1], state["right_y"][0, -1]
        assert oracles.relative_error(y, damped @ s) < 1e-12
        H = dense_bfgs(torch.eye(len(s), dtype=torch.float64), s, y)
        assert oracles.relative_error(representation._formed(state, "right")[0], H) < 1e-10
