"""PSGD's whitening of gradients: whole runs against re-derivations, finite precision, scale, seeds, bounds on the result."""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, PsgdWhitenGradientConfig, PsgdWhitenGradientMaker, from_config
from gradmaker.curvature import GradientProbe
from gradmaker.curvature.evidence import Pair
from gradmaker.grafting import Amplitude
from gradmaker.representations import KronQ, geometries as module
from gradmaker.representations.geometries import GEOMETRIES
from gradmaker.solvers import Apply
from tests import models, oracles
from tests.kronecker_reference import Reference, merged
from tests.methods.test_kronecker_dims import convolution
from tests.methods.test_probes import step
from tests.methods.test_psgd_geometries import FOLD, Rederived, definite, every_geometry, frame, kron, randn
from tests.methods.test_trajectories import compare, raw


# --- whole runs -----------------------------------------------------------------------------------------------------------
def draw(seed: int, name: str, at: int, shape: tuple[int, ...]) -> Tensor:
    """The noise of a site at a step: it can be drawn again by name."""
    key = hashlib.blake2b(f"{seed}/{name}/{at}/0".encode(), digest_size=7).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key, "little"))).double()


class Whitening:
    """The method on all tensors of a model: shapes, blocks, the rule of skew, lifted gradients, momentum, bounds or a graft."""

    def __init__(
        self,
        geometry: str,
        momentum: float,
        lift: float,
        seed: int,
        merge: str = "squeeze",
        block: int | None = None,
        **length: Any,
    ) -> None:
        self.geometry, self.momentum, self.lift, self.seed, self.merge, self.size = geometry, momentum, lift, seed, merge, block
        self.blocks: dict[str, Rederived] = {}
        self.history: dict[str, list[Tensor]] = {}
        self.length = Reference(lambda: None, **length) if length else None  # type: ignore[arg-type,return-value]

    def __call__(self, case: models.Case, at: int) -> dict[str, Tensor]:
        out = {}
        for name, g in raw(case).items():
            shape = merged(tuple(g.shape), self.merge, None) if self.merge != "squeeze" else squeezed(g)
            whole, result = g.reshape(shape), torch.empty(shape, dtype=g.dtype)
            for corner in product(*(range(0, d, self.size or d) for d in shape)):
                ends = [min(c + (self.size or d), d) for c, d in zip(corner, shape, strict=True)]
                where = tuple(slice(*each) for each in zip(corner, ends, strict=True))
                label = (
                    ""
                    if self.size is None or max(shape) <= self.size
                    else f"[{','.join(f'{s.start}:{s.stop}' for s in where)}]"
                )
                result[where] = self.step(name + label, whole[where], at)
            out[name] = result.reshape(g.shape)
        return out

    def step(self, name: str, g: Tensor, at: int) -> Tensor:
        wide = tuple(axis for axis, d in enumerate(g.shape) if d * d > g.numel())
        block = self.blocks.setdefault(name, Rederived(self.geometry, tuple(g.shape), wide, 0.1))
        v, noise = (draw(self.seed, f"{kind} {name}", at, (1, *g.shape))[0] for kind in ("probe", "lift"))
        block.update(v, g + (self.lift + 2.0**-52 * g.abs()) * noise, whitens=True)
        past = self.history.setdefault(name, [])
        past.append(g)
        weights = torch.tensor([self.momentum**age for age in reversed(range(len(past)))], dtype=torch.float64)
        m = torch.einsum("t,t...->...", weights, torch.stack(past)) / weights.sum()
        u = (block.P() @ m.reshape(-1)).reshape(g.shape)
        if self.length is None:
            return (u * min(1.0, 2 / float(u.square().mean().sqrt()))).clamp(-10, 10)
        target = self.length.target(past, m)
        return u if target is None else u * target.norm() / u.norm()


def squeezed(g: Tensor) -> tuple[int, ...]:
    return tuple(d for d in g.shape if d > 1) or (1,)


@pytest.mark.parametrize(
    "geometry, make",
    [*((name, models.mlp) for name in GEOMETRIES), ("Q0.5EQ1.5", lambda: models.convolution(2, groups=2))],
)
def test_thirty_steps(geometry: str, make: Any) -> None:
    case = make()
    maker = PsgdWhitenGradientMaker(case.model, PsgdWhitenGradientConfig(geometry=geometry, beta1=0.9, seed=3))
    compare(case, maker, Whitening(geometry, 0.9, 1e-9, 3), 1e-2, 1e-8)


SWITCHED: dict[str, dict[str, Any]] = {
    "blocks": {"block_size": 3},
    "separate": {"merge": "none"},
    "merged": {"merge": "to_2d"},
    "merged_blocks": {"merge": "to_2d", "block_size": 3},
    **{name: {"grafting": name} for name in ("none", "keep", "adagrad", "rmsprop", "adam")},
    "all": {"merge": "to_2d", "block_size": 3, "grafting": "adam", "grafting_decay": 0.9, "beta1": 0.8},
}


@pytest.mark.parametrize("row", SWITCHED)
def test_thirty_switched_steps(row: str) -> None:
    """Cut, merged and grafted in every way; it has no running average of a statistic to be switched."""
    given = {"beta1": 0.0, **SWITCHED[row]}
    case = convolution() if "merge" in given else models.mlp()
    maker = PsgdWhitenGradientMaker(case.model, PsgdWhitenGradientConfig(seed=3, **given))
    names = {"merge": "merge", "block_size": "block", "grafting": "grafting", "grafting_decay": "grafting_decay"}
    options = {names[key]: value for key, value in given.items() if key in names}
    compare(case, maker, Whitening("Q0.5EQ1.5", given["beta1"], 1e-9, 3, **options), 1e-2, 1e-8)


@every_geometry
@pytest.mark.parametrize("method, lr", [("psgd_whiten", 3e-2), ("psgd_kf", 0.3)])
def test_every_geometry_trains(geometry: str, method: str, lr: float) -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": method, "geometry": geometry})
    first = step(maker, case).item()
    for _ in range(40):
        step(maker, case)
        with torch.no_grad():
            for p in case.model.parameters():
                p -= lr * p.grad
    assert step(maker, case).item() < 0.7 * first
    assert maker.verify().passed


# --- finite precision -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "geometry",
    [name if name in ("EQ", "Q0.5EQ1.5", "QUAD") else pytest.param(name, marks=pytest.mark.slow) for name in GEOMETRIES],
)
def test_a_thousand_steps_in_single_precision(geometry: str) -> None:
    """Property 38: float32 statistics of float32 and of bfloat16 gradients whose covariance has a condition of 1e4."""
    C = definite(4, 1, 100.0), definite(3, 2, 100.0)
    roots = [oracles.matrix_power(X, 0.5) for X in C]
    held = KronQ(geometry=geometry)
    state = held.init(frame(4, 3, stack=2, dtype=torch.float32))
    skewed = 0.0
    for v, z in randn(1000, 2, 4, 3, seed=5):
        g = roots[0] @ z @ roots[1]
        h = torch.stack([g.float(), g.bfloat16().float()])
        held.update(state, Pair(v.float().expand(2, -1, -1), h, "noise_and_gradient"), FOLD)
        skewed = max(skewed, *(float((Q - Q.mT).abs().max() / Q.abs().max()) for Q in held.held(state)))
    P = torch.linalg.inv(held.to_dense({name: x.double() for name, x in state.items()}))
    exact = oracles.matrix_power(kron(*C), -0.5)
    for found in P:
        assert torch.linalg.eigvalsh((found + found.T) / 2)[0] > 0
        assert oracles.relative_error(found, exact) < 0.6  # the noise of a constant rate
    assert oracles.relative_error(P[1], P[0]) < 0.02  # that of rounded gradients
    if geometry == "EQ":
        assert all(torch.equal(Q, Q.triu()) and Q.diagonal(dim1=1, dim2=2).min() > 0 for Q in held.held(state))
    else:
        assert skewed <= {"Q0.5EQ1.5": 1e-2}.get(geometry, 0.0 if geometry in ("QUAD", "QUAD4P", "PRO4P") else 1.0)


def test_rotations_keep_the_factor_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Q0.5EQ1.5 would drift to without them."""
    found = []
    for turn in (True, False):
        if not turn:
            monkeypatch.setattr(module, "rotate", lambda Q, *_, **__: Q)
        held, state = KronQ(geometry="Q0.5EQ1.5"), None
        state = held.init(frame(4, 3))
        scale = torch.logspace(0, -2, 4, dtype=torch.float64).unsqueeze(1)
        for v, z in randn(400, 2, 1, 4, 3, seed=5):
            held.update(state, Pair(v, scale * z, "noise_and_gradient"), FOLD)
        found.append(max(float((Q - Q.mT).abs().max() / Q.abs().max()) for Q in held.held(state)))
    assert found[0] < 0.2 * found[1]


# --- scale, zeros, seeds --------------------------------------------------------------------------------------------------
@every_geometry
@pytest.mark.parametrize("method", ["psgd_whiten", "psgd_kf"])
def test_scale_of_the_loss(method: str, geometry: str) -> None:
    """Loss x c: P x 1/c on the same trajectory, so P g stays; no smoothing term has a scale of its own."""
    found = []
    for c in (1.0, 2.0**10):
        case = models.mlp()
        scaled = case._replace(loss=lambda y, t, c=c, case=case: c * case.loss(y, t))
        maker: Any = from_config(case.model, {"method": method, "geometry": geometry, "damping": 0.0, "grafting": "none"})
        for _ in range(6):
            step(maker, scaled)
        found.append(oracles.gradient_vector(case.model))
    assert oracles.relative_error(*found) < 1e-9


@every_geometry
def test_a_zero_gradient_says_nothing(geometry: str) -> None:
    """Before the first one that is not zero there is no scale: a fit to the noise alone would start at 1 / damping."""
    w = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    model = nn.ParameterList([w])
    maker: Any = from_config(model, {"method": "psgd_whiten", "geometry": geometry, "grafting": "none"})

    def given(g: Tensor) -> Tensor:
        w.grad = g.clone()
        maker.precondition()
        return w.grad

    zero, first = torch.zeros(3, 4, dtype=torch.float64), randn(3, 4)
    for _ in range(100):
        assert torch.equal(given(zero), zero)
    found = given(first)
    fresh: Any = from_config(nn.ParameterList([w]), {"method": "psgd_whiten", "geometry": geometry, "grafting": "none"})
    assert 0.2 < float(found.square().mean().sqrt()) < 5
    held = {k: v.clone() for k, v in maker.plan.blocks[0].state.items()}
    given(zero)
    assert all(torch.equal(v, held[k]) for k, v in maker.plan.blocks[0].state.items())
    w.grad = first.clone()
    fresh.precondition()
    assert torch.equal(fresh.plan.blocks[0].state["age"], maker.plan.blocks[0].state["age"])


def test_what_is_fitted_is_lifted_by_its_roundoff() -> None:
    """``g + (lift + eps |g|) n``, bit by bit, with noise that is drawn by name."""
    seen: list[Any] = []

    class Watching(GradientProbe):
        def measure(self, step: Any) -> Any:
            for chunk in super().measure(step):
                seen.append(chunk)
                yield chunk

    case = models.mlp()
    model = case.model.float()
    parts = {"curvature": Watching(lift=1e-9), "representation": KronQ(granularity="tensor"), "solver": Apply()}
    maker: Any = METHODS["custom"](model, METHODS["custom"].Config(**parts))
    for p in model.parameters():
        p.grad = randn(*p.shape).float()
    given = {name: p.grad.clone() for name, p in model.named_parameters()}
    maker.precondition()
    for name, g in given.items():
        noise = draw(0, f"lift {name}", 0, (1, *g.shape)).float()[0]
        assert torch.equal(seen[0][name].cv[0], g + (1e-9 + 2.0**-23 * g.abs()) * noise)
        assert torch.equal(seen[0][name].v[0], draw(0, f"probe {name}", 0, (1, *g.shape)).float()[0])


def test_seeds_and_checkpoints() -> None:
    """The noise is the maker's own: the same run twice, another one with another seed, and resumed bit by bit."""

    def run(seed: int, break_at: int | None = None) -> Tensor:
        case = models.mlp()
        torch.manual_seed(break_at or 0)  # the global generator plays no part
        maker: Any = METHODS["psgd_whiten"](case.model, PsgdWhitenGradientConfig(seed=seed, beta1=0.5))
        for k in range(8):
            if k == break_at:
                saved = maker.state_dict()
                maker = METHODS["psgd_whiten"](case.model, PsgdWhitenGradientConfig(seed=seed, beta1=0.5))
                maker.load_state_dict(saved)
            step(maker, case._replace(x=case.x.roll(k, 0)))
        return oracles.gradient_vector(case.model)

    assert torch.equal(run(0), run(0)) and torch.equal(run(0), run(0, break_at=5))
    assert not torch.equal(run(0), run(1))


# --- blocks and bounds ----------------------------------------------------------------------------------------------------
def test_which_axes_have_a_diagonal() -> None:
    """d^2 > max_skew n: of a matrix the longer side, of a vector the only one, of a square none; axes of size one go."""
    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(4, 4, bias=False), nn.Conv2d(1, 4, (1, 3), bias=False)])
    maker: Any = from_config(model, {"method": "psgd_whiten"})
    frames = {s.name: b.frame for b in maker.plan.blocks for s in b.sites}
    assert {name: (f.shape, sorted(f.diagonal)) for name, f in frames.items()} == {
        "0.weight": ((5, 3), [0]),
        "0.bias": ((5,), [0]),
        "1.weight": ((4, 4), []),
        "2.weight": ((4, 3), [0]),
    }
    dense: Any = from_config(model, {"method": "psgd_whiten", "max_skew": None})
    assert not any(b.frame.diagonal for b in dense.plan.blocks)
    long: Any = from_config(model, {"method": "psgd_whiten", "max_skew": None, "max_dim": 4})
    assert {s.name for b in long.plan.blocks for s in b.sites if b.frame.diagonal} == {"0.weight", "0.bias"}


def test_amplitudes_are_bounded() -> None:
    """First the root mean square, then single entries, block by block; what is within the bounds is left to the last bit."""
    rule, zeros = Amplitude(2.0, 10.0), torch.zeros(2, 3, 4)
    small = randn(1, 3, 4)
    small = small / small.square().mean().sqrt()
    large = 30 * small
    outlier = torch.zeros(1, 10, 100, dtype=torch.float64)
    outlier[0, 0, 0] = 50.0
    assert torch.equal(rule.rescale({}, small, small, small), small)
    both = rule.rescale({}, torch.cat([small, large]), zeros, zeros)
    assert torch.equal(both[:1], small) and oracles.relative_error(both[1:], 2 * small) < 1e-12
    assert float(rule.rescale({}, outlier, outlier, outlier).max()) == 10.0
    assert torch.equal(rule.rescale({}, zeros, zeros, zeros), zeros)


@pytest.mark.parametrize("method", ["psgd", "psgd_kf", "psgd_whiten"])
def test_a_decay_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"decay=0.9 would have no effect: P is fitted by one step for each pair"):
        METHODS[method].Config(decay=0.9)


def test_the_geometries_have_the_names_of_their_author() -> None:
    assert list(GEOMETRIES) == ["EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD", "QUAD4P", "PRO4P"]
    with pytest.raises(ValueError, match="geometry"):
        PsgdWhitenGradientConfig(geometry="quad")
