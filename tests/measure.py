"""What a maker measured, laid out so that it can be held against an oracle's matrix of the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmaker import CustomGradientConfig, CustomGradientMaker
from gradmaker.capture.sites import Site
from gradmaker.curvature import Curvature, FisherExact
from gradmaker.representations import Dense, Diagonal, Representation
from gradmaker.solvers import Cholesky, Division, Solver
from tests import oracles
from tests.models import Case

EXACT = 1e-10


def custom(model: nn.Module, curvature: Curvature, representation: Representation, **options: Any) -> CustomGradientMaker:
    """A maker of a free triple that keeps the newest statistic."""
    solver: Solver = Division(damping=1.0) if isinstance(representation, Diagonal) else Cholesky(damping=1.0)
    options = {"decay": 0.0, **options}
    return CustomGradientMaker(
        model, CustomGradientConfig(curvature=curvature, representation=representation, solver=solver, **options)
    )


def measure(
    case: Case, curvature: Curvature | None = None, representation: Representation | None = None, **options: Any
) -> CustomGradientMaker:
    """After one step on the case; the exact Fisher of all parameters unless said otherwise."""
    maker = custom(case.model, curvature or FisherExact(), representation or Dense(granularity="full"), **options)
    setup(maker, case)
    maker.forward_and_backward()
    return maker


def setup(maker: CustomGradientMaker, case: Case) -> None:
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)


def site_order(model: nn.Module, site: Site) -> Tensor:
    """Where a site's numbers, in the order of its blocks, lie in the vector of all trainable parameters."""
    slices = oracles.parameter_slices(model)
    whole = {k: torch.arange(slices[k].start, slices[k].stop).view_as(p) for k, p in site.parameters.items()}
    parts = {k: index[site.rows.get(k, ...)] for k, index in whole.items()}
    turned = site.rule is not None and site.rule.inputs_first
    found = torch.cat([(part.mT if turned and part.ndim == 2 else part).reshape(-1) for part in parts.values()])
    G, *rest = site.shape
    return found if len(site.parameters) == 1 else found[oracles.joint_order(G * rest[0], rest[1] - 1)]


def blocks(maker: CustomGradientMaker) -> dict[str, tuple[Tensor, Tensor]]:
    """By site: its matrices (B, P, P), and where their rows lie in the vector of all trainable parameters (B, P)."""
    found = {}
    for block in maker.plan.blocks:
        C = block.triple.representation.to_dense(block.state)
        if block.full:
            found["full"] = (C, torch.cat([site_order(maker.model, s) for s in block.sites]).unsqueeze(0))
            continue
        for site, slot in zip(block.sites, block.slots, strict=True):
            found[site.name] = (C[slot], site_order(maker.model, site).reshape(-1, C.shape[-1]))
    return found


def compare(maker: CustomGradientMaker, oracle: Tensor, skip: tuple[str, ...] = (), tolerance: float = EXACT) -> None:
    """Every block is the slice of the oracle (P, P) that it stands for."""
    found = {name: pair for name, pair in blocks(maker).items() if name not in skip}
    assert found
    for name, (C, where) in found.items():
        expected = torch.stack([oracle[rows][:, rows] for rows in where])
        if isinstance(maker.plan.blocks[0].triple.representation, Diagonal):
            expected = torch.diag_embed(expected.diagonal(dim1=1, dim2=2))
        assert C.shape == expected.shape
        scale = max(1e-6 * float(torch.linalg.norm(oracle)), float(torch.linalg.norm(expected)))  # blocks may be zero
        assert float(torch.linalg.norm(C - expected)) / scale < tolerance, name


def ggn(case: Case, select: oracles.Select = oracles.identity) -> Tensor:
    """The Gauss-Newton matrix of a case."""
    return oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t), select=select)
