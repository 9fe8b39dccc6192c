"""Granularity ``layer`` is the layer: all channels of a norm layer, or all groups of a convolution, in one block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import BatchGradient, Curvature, FisherEmp, FisherExact, GaussNewton, HessianProbe, Secant
from gradmaker.representations import Dense, Pairs, Representation, Rows, Sketched, TriangularQ, Window
from gradmaker.solvers import CG, Apply, Cholesky, Eigh, Gram, Solver
from tests import models, oracles
from tests.measure import EXACT, blocks, ggn, measure, setup, site_order
from tests.models import Case

GROUPED: dict[str, Callable[[], Case]] = {
    "layer norm": partial(models.normed, "layer_norm"),
    "layer norm, no bias": partial(models.normed, "layer_norm", bias=False),
    "group norm": partial(models.normed, "group_norm"),
    "group norm, flat": partial(models.normed, "group_norm", positions=None),
    "groups": partial(models.convolution, 2, groups=2),
    "depthwise": partial(models.convolution, 1, groups=4),
    "groups, no bias": partial(models.convolution, 1, 8, groups=2, bias=False),
    "transposed groups": partial(models.convolution, 1, transposed=True, groups=2),
}
"""By their names, cases with a layer of several groups beside layers of one."""


def evaluated() -> Case:
    case = models.normed("batch_norm")
    case.model.eval()
    return case


GROUPED["batch norm"] = evaluated


def of_layer(model: nn.Module, names: list[str]) -> Tensor:
    slices = oracles.parameter_slices(model)
    return torch.cat([torch.arange(slices[name].start, slices[name].stop) for name in names])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("curvature", [FisherExact(), GaussNewton()], ids=lambda c: type(c).__name__)
def test_a_block_is_the_slice_of_the_whole_matrix(name: str, curvature: Curvature) -> None:
    """One block a layer, of all its parameters, whose parts between the groups are not zero."""
    case, oracle = GROUPED[name](), ggn(GROUPED[name]())
    maker = measure(case, curvature, Dense(granularity="layer"))
    grouped = 0
    for block in maker.plan.blocks:
        for site, slot in zip(block.sites, block.slots, strict=True):
            C, where = block.triple.representation.to_dense(block.state)[slot], site_order(case.model, site)
            assert C.shape == (1, len(where), len(where))
            assert sorted(where.tolist()) == sorted(of_layer(case.model, list(site.parameters)).tolist())
            assert oracles.relative_error(C[0], oracles.reorder(oracle, where)) < EXACT
            G = site.shape[0]
            if G > 1:
                grouped += 1
                between = C[0].reshape(G, len(where) // G, G, -1).transpose(1, 2)[~torch.eye(G, dtype=torch.bool)]
                assert float(between.norm()) > 1e-2 * float(C.norm())
    assert grouped == 1


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(
    "solver", [Cholesky(damping=0.05), Eigh(damping=0.05), CG(damping=0.05, iterations=500, tolerance=1e-13)]
)
def test_a_step_is_the_dense_solve(name: str, solver: Solver) -> None:
    """Of `layer_ng`, and of the other solvers of a dense matrix, layer by layer."""
    case, C = GROUPED[name](), ggn(GROUPED[name]())
    raw = torch.cat([g.flatten() for g in torch.autograd.grad(case.run(), list(case.model.parameters()))])
    maker: Any = from_config(case.model, {"method": "layer_ng", "fisher": FisherExact(), "damping": 0.05})
    if not isinstance(solver, Cholesky):
        parts = {"curvature": FisherExact(), "representation": Dense(granularity="layer"), "solver": solver}
        maker = METHODS["custom"](case.model, METHODS["custom"].Config(**parts, decay=0.0))
    setup(maker, case)
    maker.forward_and_backward()
    found = oracles.gradient_vector(case.model)
    for block in maker.plan.blocks:
        for site in block.sites:
            where = site_order(case.model, site)
            expected = oracles.tikhonov_solve(oracles.reorder(C, where), 0.05, raw[where])
            assert oracles.relative_error(found[where], expected) < (1e-8 if isinstance(solver, CG) else 1e-10)


class Frozen(nn.Module):
    """A trained layer of several groups between layers that are not: the layer is all that there is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), layer, nn.Linear(4, models.CLASSES)
        for frozen in (self.first, self.head):
            frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.layer(self.first(x).unsqueeze(-1)).squeeze(-1)))
        return z


VECTORS: dict[str, tuple[Curvature, Callable[..., Representation], Solver, dict[str, Any]]] = {
    "dense": (FisherExact(), Dense, Cholesky(damping=0.05), {}),
    "products": (GaussNewton(), Dense, Cholesky(damping=0.05), {}),
    "gradients": (BatchGradient(), Dense, Eigh(power=-0.5, damping=0.05), {}),
    "rows": (FisherEmp(), Rows, Gram(damping=0.05), {"decay": 0.0}),
    "sketched": (FisherEmp(), Sketched, Gram(damping=0.05), {"decay": 0.0}),
    "window": (BatchGradient(), partial(Window, size=2), Gram(damping=0.05), {}),
    "triangular": (HessianProbe(), TriangularQ, Apply(), {}),
    "pairs": (Secant(), partial(Pairs, 3), Apply(), {}),
}
"""Representations that hold a block as a vector, with parts that fit."""
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.GroupNorm(2, 4),
    "groups": lambda: nn.Conv1d(4, 4, 1, groups=2),
    "no bias": lambda: nn.Conv1d(4, 4, 1, groups=4, bias=False),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", VECTORS)
def test_the_one_layer_of_a_model_is_the_full_matrix(name: str, layer: str) -> None:
    """Granularities `layer` and `full` of one trained layer are the same block, step by step."""
    curvature, representation, solver, options = VECTORS[name]
    found = []
    for granularity in ("full", "layer"):
        case = models.build(lambda: Frozen(LAYERS[layer]()), 6, 4)
        config = METHODS["custom"].Config
        parts = {"curvature": curvature, "representation": representation(granularity=granularity), "solver": solver}
        maker: Any = METHODS["custom"](case.model, config(**parts, **options))
        steps = []
        for k in range(4):
            case.model.zero_grad()
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x.roll(k, 0)), case.t)
            maker.forward_and_backward()
            steps.append(torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None]))
            with torch.no_grad():
                for p in case.model.parameters():
                    p.sub_(0 if p.grad is None else 0.1 * p.grad)
        (block,) = maker.plan.blocks
        assert block.frame.stack == 1
        found.append(torch.stack(steps))
    assert oracles.relative_error(found[1], found[0]) < 1e-10


def test_a_limit_speaks_of_the_whole_layer() -> None:
    for layer, size in ((nn.LayerNorm(40), 80), (nn.Conv1d(8, 8, 3, groups=4), 56)):
        with pytest.raises(ValueError, match=rf"would hold a {size} x {size} matrix .* raise max_dim \(now {size - 1}\)"):
            from_config(layer, {"method": "layer_ng", "max_dim": size - 1})
        maker: Any = from_config(layer, {"method": "layer_ng", "max_dim": size})
        assert maker.plan.blocks[0].state["matrix"].shape == (1, size, size)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "skfac", "tnt", "unit_ng"])
def test_units_and_kronecker_factors_keep_a_block_a_channel(method: str) -> None:
    """The 2 x 2 blocks of scale and shift, slices of the exact Fisher matrix."""
    case, oracle = GROUPED["layer norm"](), ggn(GROUPED["layer norm"]())
    maker: Any = from_config(
        case.model, {"method": method, **({} if method == "tnt" else {"fisher": FisherExact()}), "decay": 0.0}
    )
    setup(maker, case)
    maker.forward_and_backward()
    C, where = blocks(maker)["norm"]
    assert C.shape == (4, 2, 2) and where.shape == (4, 2)
    if method != "tnt":  # which draws
        assert oracles.relative_error(C, torch.stack([oracles.reorder(oracle, pair) for pair in where])) < EXACT


def test_an_accumulated_batch_is_the_whole_one() -> None:
    """Micro-batches, and a state that is saved in between, of a block that joins its groups."""
    found = []
    for parts in ([slice(None)], [slice(0, 3), slice(3, None)]):
        case = GROUPED["group norm, flat"]()
        maker: Any = from_config(case.model, {"method": "layer_ng", "fisher": FisherExact(), "decay": 0.0})
        for part in parts:
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, case.x[part]), case.t[part])
            maker.accumulate(weight=len(case.x[part]) / len(case.x))
        maker.precondition()
        found.append(oracles.gradient_vector(case.model))
        again: Any = from_config(
            GROUPED["group norm, flat"]().model, {"method": "layer_ng", "fisher": FisherExact(), "decay": 0.0}
        )
        again.load_state_dict(maker.state_dict())
        for one, other in zip(maker.plan.blocks, again.plan.blocks, strict=True):
            assert torch.equal(one.state["matrix"], other.state["matrix"])
    assert oracles.relative_error(found[1], found[0]) < 1e-10
