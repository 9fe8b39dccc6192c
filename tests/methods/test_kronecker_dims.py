"""Shampoo and its relatives on blocks of tensors: whole runs, exact identities of blocking and merging, the Loewner order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.capture.shapes import ShapePolicy
from tests import models, oracles
from tests.kronecker_reference import Reference, Rule, inverse_root, moments, on_axis
from tests.methods.test_trajectories import compare
from tests.models import Case

SCHEDULE: dict[str, Any] = {"preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}


def convolution() -> Case:
    return models.convolution(2, groups=2)


class Shampoo:
    """``m x_k H_k^-e``, roots renewed every ``every`` steps."""

    def __init__(
        self, ridge: float, decay: float | None, e: float | None = None, balanced: bool = False, every: int = 1
    ) -> None:
        self.ridge, self.decay, self.e, self.balanced, self.every = ridge, decay, e, balanced, every
        self.history: list[Tensor] = []
        self.roots: list[Tensor] = []

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g)
        if step % self.every == 0:
            factors = [moments(self.history, axis, self.decay) for axis in range(g.ndim)]
            e = self.e or 1 / (2 * g.ndim)
            trace = factors[0].trace()
            scale = trace ** ((2 * e * g.ndim - 1) / (2 * g.ndim)) if self.balanced else 1.0
            self.roots = [inverse_root(H, self.ridge, -e) * scale for H in factors]
        for axis, X in enumerate(self.roots):
            m = on_axis(X, m, axis)
        return m


class FullMatrix:
    """``(sum g g^T + ridge)^-1/2 m``."""

    def __init__(self, ridge: float, decay: float | None) -> None:
        self.ridge, self.decay, self.history = ridge, decay, list[Tensor]()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g.reshape(-1, 1))
        return (inverse_root(moments(self.history, 0, self.decay), self.ridge, -0.5) @ m.reshape(-1)).reshape(m.shape)


class OneSided:
    """``L^-1/2 m``."""

    def __init__(self, ridge: float, decay: float | None) -> None:
        self.ridge, self.decay, self.history = ridge, decay, list[Tensor]()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g)
        return on_axis(inverse_root(moments(self.history, 0, self.decay), self.ridge, -0.5), m, 0)


ROWS: dict[str, tuple[str, Callable[[], Case], Callable[[], Rule], dict[str, Any], float]] = {
    "full": ("full_adagrad", models.mlp, lambda: FullMatrix(1e-6, None), {"damping": 1e-6}, 0.05),
    "full_average_blocks": (
        "full_adagrad",
        convolution,
        lambda: FullMatrix(1e-4, 0.9),
        {"damping": 1e-4, "decay": 0.9, "merge": "to_2d", "block_size": 3},
        0.02,
    ),
    "one_sided": ("one_sided", models.mlp, lambda: OneSided(1e-6, 0.95), {"grafting": "none"}, 0.02),
    "one_sided_right": (
        "one_sided",
        models.mlp,
        lambda: OneSided(1e-6, None),
        {"grafting": "none", "side": "right", "decay": None},
        0.05,
    ),
    "one_sided_left": (
        "one_sided",
        convolution,
        lambda: OneSided(1e-4, 0.9),
        {"grafting": "adam", "side": "left", "decay": 0.9, "damping": 1e-4},
        0.02,
    ),
    "merge": ("shampoo", convolution, lambda: Shampoo(1e-6, 0.95), {"merge": "to_2d", "grafting": "none"}, 0.02),
    "greedy": (
        "shampoo",
        convolution,
        lambda: Shampoo(1e-6, None),
        {"merge": "greedy", "block_size": 5, "decay": None, "grafting": "none"},
        0.05,
    ),
    "blocks": ("shampoo", models.mlp, lambda: Shampoo(1e-6, 0.95), {"block_size": 2, "grafting": "adagrad"}, 0.05),
    "blocks_order_4": (
        "shampoo",
        convolution,
        lambda: Shampoo(1e-4, 0.95),
        {"block_size": 2, "grafting": "keep", "damping": 1e-4},
        0.05,
    ),
    "half": (
        "shampoo",
        models.mlp,
        lambda: Shampoo(1e-4, 0.95, 0.5),
        {"exponent": 0.5, "damping": 1e-4, "grafting": "adam"},
        0.02,
    ),
    "half_balanced": (
        "shampoo",
        models.mlp,
        lambda: Shampoo(1e-4, None, 0.5, True),
        {"exponent": 0.5, "balanced": True, "damping": 1e-4, "decay": None, "grafting": "none"},
        0.05,
    ),
    "rmsprop": ("shampoo", models.mlp, lambda: Shampoo(1e-6, 0.95), {"grafting": "rmsprop"}, 1e-3),
    "rmsprop_normalised": ("shampoo", models.mlp, lambda: Shampoo(1e-6, 0.95), {"grafting": "rmsprop_normalised"}, 1e-3),
    "sqrtn_momentum": ("shampoo", models.mlp, lambda: Shampoo(1e-6, 0.95), {"grafting": "sqrtn", "beta1": 0.8}, 1e-2),
    "nesterov_start": (
        "shampoo",
        models.mlp,
        lambda: Shampoo(1e-6, 0.95),
        {"grafting": "adam", "beta1": 0.9, "nesterov_average": True, "start_step": 7},
        2e-2,
    ),
    "plain_start": ("shampoo", models.mlp, lambda: Shampoo(1e-6, 0.95), {"grafting": "keep", "start_step": 5}, 0.1),
    "refresh": (
        "shampoo",
        models.mlp,
        lambda: Shampoo(1e-6, 0.95, every=4),
        {"grafting": "none", "preconditioner_interval": 4},
        0.02,
    ),
}


def reference_options(options: dict[str, Any], default_merge: str, rows: str) -> dict[str, Any]:
    names = {"block_size": "block", "start_step": "start", "side": "rows"}
    used = {"merge": default_merge, "rows": rows, **options}
    kept = {names.get(k, k): v for k, v in used.items()}
    return {k: v for k, v in kept.items() if k in ("merge", "block", "rows", "grafting", "beta1", "nesterov_average", "start")}


@pytest.mark.parametrize("row", ROWS)
def test_thirty_steps(row: str) -> None:
    method, make, rule, options, lr = ROWS[row]
    case = make()
    schedule = {k: v for k, v in SCHEDULE.items() if k not in options}
    maker = from_config(case.model, {"method": method, **schedule, **options})
    sided = method == "one_sided"
    own = reference_options(options, "to_2d" if sided else "none", "short" if sided else "left")
    compare(case, maker, Reference(rule, **own), lr, 1e-7)


# --- shapes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (4, 3, 2, 2), (2, 1, 3, 1, 2)])
@pytest.mark.parametrize("merge", ["none", "to_2d", "greedy"])
@pytest.mark.parametrize("size", [None, 1, 2, 4])
@pytest.mark.parametrize("rows", ["left", "right", "short"])
def test_views_cover_a_tensor_once_and_write_what_they_read(
    shape: tuple[int, ...], merge: Any, size: int | None, rows: Any
) -> None:
    w = torch.randn(shape)
    for like in (w, w.to(memory_format=torch.channels_last) if w.ndim == 4 else w.mT.clone().mT if w.ndim == 2 else w):
        views = ShapePolicy(merge, size, rows).views(shape)
        out, count = torch.zeros_like(like), torch.zeros(shape)
        for view in views:
            block = view.read(like)
            assert tuple(block.shape) == view.shape and (size is None or max(view.shape, default=1) <= size)
            view.write(out, block)
            view.write(count, view.read(count) + 1)
        assert torch.equal(out, w) and torch.equal(count, torch.ones(shape))
        assert len({v.label for v in views}) == len(views)


def test_merging_of_known_shapes() -> None:
    """Google's own examples, and the small matrix that becomes a vector."""
    greedy = ShapePolicy("greedy", 1024)
    assert greedy._merged((1, 2, 512, 1, 2048, 1, 3, 4)) == (1024, 2048, 12)
    assert greedy._merged((1, 2, 768, 1, 2048)) == (2, 768, 2048)
    assert ShapePolicy("greedy", 128)._merged((12, 7)) == (84,)
    assert ShapePolicy("to_2d")._merged((64, 3, 7, 7)) == (64, 147)
    assert ShapePolicy()._merged((64, 3, 7, 7)) == (64, 3, 7, 7)


class Matrices(nn.Module):
    """Independent parameters; the loss is linear, so that gradients are the inputs."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes])


def run(config: dict[str, Any], steps: list[list[Tensor]]) -> list[Tensor]:
    """The last step's preconditioned gradients."""
    model = Matrices(*(tuple(g.shape) for g in steps[0]))
    maker = from_config(model, config)
    for gs in steps:
        for p, g in zip(model.w, gs, strict=True):
            p.grad = g.clone()
        maker.precondition()
    return [p.grad for p in model.w if p.grad is not None]


def gradients(*shape: int, steps: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(steps)]


PRODUCTS = ["shampoo", "full_adagrad", "one_sided", "caspr", "soap", "eshampoo", "kradagrad_star", "kradagrad", "kl_shampoo"]
BLOCKED = [*PRODUCTS, "muon"]


@pytest.mark.parametrize("method", BLOCKED)
@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_block_grid_equals_independent_tensors(method: str, grafting: str) -> None:
    """Bit by bit; blocks know nothing of one another."""
    steps = gradients(5, 8)
    config = {"method": method, "grafting": grafting, "stagger": False}
    grid = [(slice(a, min(a + 3, 5)), slice(b, min(b + 3, 8))) for a in (0, 3) for b in (0, 3, 6)]
    (whole,) = run({**config, "block_size": 3}, [[g] for g in steps])
    apart = run(config, [[g[where] for where in grid] for g in steps])
    for where, own in zip(grid, apart, strict=True):
        assert torch.equal(whole[where], own)


@pytest.mark.parametrize("method", BLOCKED)
def test_a_block_as_large_as_the_tensor_is_the_tensor(method: str) -> None:
    steps = [[g] for g in gradients(5, 7)]
    assert torch.equal(run({"method": method, "block_size": 7}, steps)[0], run({"method": method}, steps)[0])


def test_blocks_of_size_one_are_adagrad() -> None:
    steps = [[g] for g in gradients(3, 4)]
    options = {"decay": None, "grafting": "none", "damping": 1e-14, "preconditioner_interval": 1}
    found = run({"method": "shampoo", "block_size": 1, **options}, steps)[0]
    squares = torch.stack([g for (g,) in steps]).square().sum(0)
    torch.testing.assert_close(found, steps[-1][0] / squares.sqrt(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["shampoo", "caspr", "one_sided"])
def test_transposing_the_parameter_transposes_the_step(method: str) -> None:
    steps = [[g] for g in gradients(5, 3)]
    turned = [[g.T.contiguous()] for (g,) in steps]
    torch.testing.assert_close(run({"method": method}, turned)[0], run({"method": method}, steps)[0].T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "method", ["shampoo", "caspr", "one_sided", "kl_shampoo", "soap", "muon", "kradagrad_star", "kradagrad"]
)
def test_rotations_commute_with_the_step(method: str) -> None:
    """U G V^T -> U step V^T; SOAP and EShampoo too, and Adam does not."""
    config = {"method": method, "grafting": "none", "beta1": 0.0}
    steps = gradients(4, 5)
    U, V = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in (4, 5))
    plain, turned = run(config, [[g] for g in steps])[0], run(config, [[U @ g @ V.T] for g in steps])[0]
    assert oracles.relative_error(turned, U @ plain @ V.T) < 1e-6
    adam = {"method": "adam", "beta1": 0.0}
    plain, turned = run(adam, [[g] for g in steps])[0], run(adam, [[U @ g @ V.T] for g in steps])[0]
    assert oracles.relative_error(turned, U @ plain @ V.T) > 0.1


def test_zero_history_is_the_polar_factor() -> None:
    G = gradients(4, 6, steps=1)
    U, _, Vh = torch.linalg.svd(G[0], full_matrices=False)
    for method, extra in {
        "shampoo": {},
        "one_sided": {},
        "caspr": {"beta1": 0.0},
        "full_adagrad": {"block_size": None},
    }.items():
        found = run({"method": method, "grafting": "none", "damping": 1e-12, **extra}, [G])[0]
        if method == "full_adagrad":  # a vector's polar factor
            assert oracles.relative_error(found, G[0] / G[0].norm()) < 1e-9
        else:
            assert oracles.relative_error(found, U @ Vh) < 1e-8, method


def test_one_sided_is_full_matrix_for_a_column() -> None:
    steps = [[g] for g in gradients(5, 1)]
    options = {"damping": 1e-6, "decay": None, "grafting": "none", "preconditioner_interval": 1}
    column = run({"method": "one_sided", "side": "left", **options}, steps)[0]
    torch.testing.assert_close(column, run({"method": "full_adagrad", **options}, steps)[0], rtol=1e-9, atol=0)


def test_shampoos_lemma() -> None:
    """eps I + (1/r) sum g g^T <= (eps I + L)^(1/2) (x) (eps I + R)^(1/2), r the largest rank."""
    for seed in range(20):
        steps = gradients(3, 4, steps=5, seed=seed)
        eps = 1e-3
        L, R = (moments(steps, axis, None) + eps * torch.eye(d, dtype=torch.float64) for axis, d in ((0, 3), (1, 4)))
        A = sum(torch.outer(g.reshape(-1), g.reshape(-1)) for g in steps) / 3
        X = (
            oracles.kron(oracles.matrix_power(L, 0.5), oracles.matrix_power(R, 0.5))
            - A
            - eps * torch.eye(12, dtype=torch.float64)
        )
        assert torch.linalg.eigvalsh(X)[0] > -1e-10


@pytest.mark.parametrize("method", PRODUCTS)
def test_preconditioner_stays_positive(method: str) -> None:
    """Symmetric and positive definite after 200 updates."""
    model = Matrices((3, 4))
    maker: Any = from_config(model, {"method": method, "preconditioner_interval": 5, "beta1": 0.0})
    for g in gradients(3, 4, steps=200):
        model.w[0].grad = g.clone()
        maker.precondition()
    (block,) = maker.plan.blocks
    solver, representation = block.triple.solver, block.triple.representation
    columns = [
        solver.solve(representation, block.cache, e.reshape(1, 3, 4)).reshape(-1) for e in torch.eye(12, dtype=torch.float64)
    ]
    P = torch.stack(columns, 1)
    assert oracles.relative_error(P, P.T) < 1e-10
    assert torch.linalg.eigvalsh((P + P.T) / 2)[0] > 0


# --- regressions of reference codes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", PRODUCTS)
def test_a_solve_leaves_the_statistic(method: str) -> None:
    """The PyTorch references add the ridge in place."""
    model = Matrices((3, 4))
    maker: Any = from_config(model, {"method": method})
    model.w[0].grad = gradients(3, 4, steps=1)[0]
    maker.precondition()
    (block,) = maker.plan.blocks
    before = {k: v.clone() for k, v in block.state.items()}
    cache = block.triple.solver.prepare(block.triple.representation, block.state, None)
    block.triple.solver.solve(block.triple.representation, cache, gradients(3, 4, steps=1, seed=9)[0].unsqueeze(0))
    assert all(torch.equal(v, before[k]) for k, v in block.state.items())


@pytest.mark.parametrize("method", ["shampoo", "caspr", "one_sided", "kradagrad_star"])
def test_a_one_by_one_factor_is_a_scalar_root(method: str) -> None:
    """They return the identity for it."""
    steps = [[g] for g in gradients(1, 1)]
    found = run(
        {"method": method, "decay": None, "grafting": "none", "beta1": 0.0, "preconditioner_interval": 1, "damping": 1e-12},
        steps,
    )[0]
    total = torch.stack([g for (g,) in steps]).square().sum()
    torch.testing.assert_close(found, steps[-1][0] / total.sqrt(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", [m for m in METHODS if m in BLOCKED])
@pytest.mark.parametrize("grafting", ["none", "keep", "adam", "rmsprop_normalised", "sqrtn"])
def test_zero_gradients_stay_zero_and_finite(method: str, grafting: str) -> None:
    """CASPR's code divides by the length of the step."""
    zeros = [torch.zeros(3, 4, dtype=torch.float64)]
    assert torch.equal(run({"method": method, "grafting": grafting}, [zeros] * 4)[0], zeros[0])
    found = run({"method": method, "grafting": grafting}, [zeros, *([g] for g in gradients(3, 4, steps=3))])[0]
    assert found.isfinite().all() and found.norm() > 0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("method", ["shampoo", "caspr", "one_sided", "full_adagrad"])
def test_direction_does_not_depend_on_the_scale(method: str, scale: float) -> None:
    """The references' power iteration stops at once on small matrices."""
    for extra in ({}, {"root": "newton"}) if method != "full_adagrad" else ({},):
        config = {"method": method, "grafting": "none", **extra}
        steps = gradients(4, 5)
        found = run(config, [[scale * g] for g in steps])[0]
        assert oracles.relative_error(found, run(config, [[g] for g in steps])[0]) < 1e-5


def test_grafting_takes_the_length_and_none_leaves_it() -> None:
    steps = [[g] for g in gradients(4, 5)]
    own = run({"method": "shampoo", "grafting": "none"}, steps)[0]
    kept = run({"method": "shampoo", "grafting": "keep"}, steps)[0]
    assert abs(float(kept.norm() / steps[-1][0].norm()) - 1) < 1e-9
    assert (
        oracles.relative_error(kept / kept.norm(), own / own.norm()) < 1e-12 and abs(float(own.norm() / kept.norm()) - 1) > 1e-3
    )


@pytest.mark.parametrize(
    "wrong", [{"merge": "2d"}, {"block_size": 0}, {"block_size": 2.0}, {"exponent": 0.0}, {"exponent": -1.0}]
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        from_config(nn.Linear(2, 2), {"method": "shampoo", **wrong})
