"""Numbers by which a step knows that its tensors are finite, and the tensors in arguments."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from math import inf, isfinite, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from gradmaker import from_config
from gradmaker.linalg.arithmetic import total
from gradmaker.trees import tensors

Named = namedtuple("Named", "first second")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,)])
@pytest.mark.parametrize("wrong", [None, inf, -inf, nan])
def test_a_total_is_finite_where_all_elements_are(dtype: torch.dtype, shape: tuple[int, ...], wrong: float | None) -> None:
    x = torch.full(shape, 1e4, dtype=dtype)
    if wrong is not None and x.numel():
        x.view(-1)[-1] = wrong
    found = total(x)
    assert found.shape == () and not found.is_complex()
    assert isfinite(float(found)) == (wrong is None or not x.numel())


def test_a_total_of_a_sparse_gradient() -> None:
    for value, expected in ((2.0, True), (nan, False)):
        table = nn.Embedding(4, 1, sparse=True)
        (value * table(torch.tensor([0, 2])).sum()).backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        assert isfinite(float(total(table.weight.grad))) is expected


@pytest.mark.parametrize("method", ["kfac", "smw_ng", "shampoo"])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    maker = from_config(model, {"method": method})
    x, t = torch.randn(8, 4), torch.randint(3, (8,))
    for shift, skipped in ((0.0, 0), (inf, 1), (0.0, 1)):
        logits = maker.setup_model_call(model, x)
        maker.setup_loss_repr(F.cross_entropy(logits, t) + shift)
        maker.forward_and_backward()
        assert maker.skipped == skipped
        model.zero_grad()


def test_tensors_are_found_in_order() -> None:
    a, b, c, d, e, f = (torch.tensor(float(k)) for k in range(6))
    packed = pack_sequence([torch.ones(2)])
    tree: Any = (a, [b, (c, None, "x")], {"z": d, "y": {"k": [e]}}, OrderedDict(v=f), Named(a, 3), packed, 7)
    found = list(tensors(tree, {"more": b}))
    expected: list[Tensor] = [a, b, c, d, e, f, a, *(v for v in packed if isinstance(v, Tensor)), b]
    assert len(found) == len(expected) and all(x is y for x, y in zip(found, expected, strict=True))


def test_a_parameter_and_a_subclass_are_tensors() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert [v is weight for v in tensors((weight,), {"w": [weight]})] == [True, True]
