"""`matvec` of every representation of the registry is the product with `to_dense`, which knows nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradmaker import from_config
from gradmaker.representations import REPRESENTATIONS
from gradmaker.representations.roles import PerStep
from tests import models, oracles
from tests.models import Case
from tests.test_triples import LEGAL, mapping

ROWS = {
    row[1]: row for row in reversed(LEGAL) if row[2] == "CG" and not issubclass(REPRESENTATIONS[row[1].split("(")[0]], PerStep)
}


def case_of(row: tuple[str, str, str]) -> Case:
    return models.mlp() if row[0] == "FisherRecursive" else models.convolution(1, groups=2)


@pytest.mark.parametrize("row", ROWS.values(), ids="-".join)
def test_the_product_is_that_of_the_dense_matrix(row: tuple[str, str, str]) -> None:
    case = case_of(row)
    maker: Any = from_config(case.model, mapping(*row))
    for k in range(3):
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t.roll(k, 0))
        maker.forward_and_backward()
        with torch.no_grad():
            for p in case.model.parameters():
                p.sub_(p.grad, alpha=1e-2)
    generator = torch.Generator().manual_seed(0)
    for block in maker.plan.blocks:
        held = block.triple.representation
        v = torch.randn(block.frame.stack, *block.frame.shape, generator=generator, dtype=torch.float64)
        expected = (held.to_dense(block.state) @ v.reshape(len(v), -1, 1)).reshape(v.shape)
        assert oracles.relative_error(held.matvec(block.state, v), expected) < 1e-8, block.name
