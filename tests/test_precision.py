"""Precisions apart: float32 statistics with float64 roots, and roots that are held and applied in bfloat16."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, cost_report, from_config
from gradmaker.precision import Precision
from gradmaker.solvers.rooting import Root
from tests import oracles

WITH_ROOTS = ["shampoo", "one_sided", "caspr", "kradagrad_star"]
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.V = nn.Parameter(torch.zeros(12, 8)), nn.Parameter(torch.zeros(12, 8))


BASES = [torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)))[0] for d in (12, 8)]


def gradient(generator: torch.Generator) -> Tensor:
    """Of rotated rows and columns with lengths from 1 to 1e-3."""
    rows, columns = (Q * torch.logspace(-3, 0, len(Q)) for Q in BASES)
    G: Tensor = rows @ torch.randn(12, 8, generator=generator) @ columns.T
    return G


def run(options: dict[str, Any], steps: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A maker after so many gradients, every one refreshed."""
    model, generator = Matrices().to(dtype), torch.Generator().manual_seed(3)
    every: dict[str, Any] = {"preconditioner_interval": 1, "warmup_steps": 0, "grafting": "none", "decay": None}
    every |= {"beta1": 0.0, "nesterov_average": False}
    maker = from_config(model, {**every, **options})
    for _ in range(steps):
        step(model, maker, generator)
    return model, maker


def step(model: Any, maker: Any, generator: torch.Generator) -> None:
    model.W.grad, model.V.grad = (gradient(generator).to(model.W.dtype) for _ in range(2))
    maker.precondition()


def roots_of(block: Any, damping: float) -> list[Tensor]:
    """``(H + damping lambda_max)^(-1/4)`` of the statistics as they are held, in float64."""
    held = {name: x.double() for name, x in block.state.items()}
    found = []
    for H in block.triple.representation.factors(held):
        s, Q = torch.linalg.eigh((H + H.mT) / 2)  # products of float32 need not be symmetric to the last bit
        found.append((Q * ((s.clamp(min=0) + damping * s[:, -1:]) ** -0.25).unsqueeze(-2)) @ Q.mT)
    return found


# --- roots ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("root", get_args(Root))
def test_roots_in_float64_lose_no_digit_of_a_float32_statistic(root: str) -> None:
    damping, errors = 1e-7, {}
    for root_dtype in (None, "float64"):
        _, maker = run({"method": "shampoo", "root": root, "damping": damping, "root_dtype": root_dtype})
        block = maker.plan.blocks[0]
        assert all(x.dtype == torch.float32 for name, x in block.state.items())
        found = [block.cache[f"root_{k}"] for k in range(2)]
        assert all(X.dtype == torch.float32 for X in found)
        errors[root_dtype] = max(
            oracles.relative_error(X.double(), exact) for X, exact in zip(found, roots_of(block, damping), strict=True)
        )
    assert errors["float64"] < 1e-5
    assert root == "svd" or errors[None] > 100 * errors["float64"]


def test_a_root_in_float32_of_a_float64_statistic() -> None:
    (_, fine), (_, coarse) = (
        run({"method": "shampoo", "dtype": "float64", "damping": 1e-4, "root_dtype": dtype}) for dtype in (None, "float32")
    )
    a, b = (maker.plan.blocks[0].cache["root_0"] for maker in (fine, coarse))
    assert a.dtype == b.dtype == torch.float64
    assert 1e-8 < oracles.relative_error(b, a) < 1e-2


# --- application ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", WITH_ROOTS)
@pytest.mark.parametrize("root_dtype", [None, "float64"])
def test_what_is_applied_is_as_coarse_as_asked(method: str, root_dtype: str | None) -> None:
    """Statistics are those of the other run to the bit, and the error of a step is that of rounded roots."""
    damping = 1e-3
    (one, fine), (other, coarse) = (
        run({"method": method, "damping": damping, "root_dtype": root_dtype, "apply_dtype": a}) for a in (None, "bfloat16")
    )
    for block, same in zip(fine.plan.blocks, coarse.plan.blocks, strict=True):
        assert all(torch.equal(block.state[name], same.state[name]) for name in block.state)
        roots = [name for name in block.cache if name.startswith("root_")]
        assert roots and all(torch.equal(same.cache[name], block.cache[name].bfloat16()) for name in roots)
        assert all(torch.equal(same.cache[name], block.cache[name]) for name in block.cache if name not in roots)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        error = oracles.relative_error(q.grad, p.grad)
        assert 1e-4 < error < 8 * ROUNDOFF[torch.bfloat16] * damping**-0.5
    assert torch.equal(other.W.grad, other.W.grad.bfloat16().float())  # products were rounded, too


def test_a_coarse_root_that_is_kept_stays_what_it_was() -> None:
    """Of two members of a stack, one whose statistic is broken."""
    model, maker = run({"method": "shampoo", "root_dtype": "float64", "apply_dtype": "bfloat16"})
    (block,) = maker.plan.blocks
    before = {name: x.clone() for name, x in block.cache.items()}
    block.state["factor_0"][1] = torch.nan
    step(model, maker, torch.Generator().manual_seed(5))
    assert block.cache["failures"].tolist() == [0, 1]
    for name in ("root_0", "root_1", "diagnosis"):
        assert torch.equal(block.cache[name][1], before[name][1]) and not torch.equal(block.cache[name][0], before[name][0])


# --- the rest of the library ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", WITH_ROOTS)
def test_a_saved_state_goes_on_bitwise(method: str) -> None:
    options = {"method": method, "root_dtype": "float64", "apply_dtype": "bfloat16", "preconditioner_interval": 3}
    model, maker = run(options, 5)
    other, resumed = run(options, 0)
    resumed.load_state_dict(maker.state_dict())
    for seed in range(4):
        step(model, maker, torch.Generator().manual_seed(seed))
        step(other, resumed, torch.Generator().manual_seed(seed))
        assert torch.equal(model.W.grad, other.W.grad) and torch.equal(model.V.grad, other.V.grad)


@pytest.mark.parametrize("method", WITH_ROOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_and_costs_know_of_them(method: str, dtype: torch.dtype) -> None:
    held = {}
    for apply_dtype in (None, "bfloat16"):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        maker: Any = from_config(model, {"method": method, "root_dtype": "float64", "apply_dtype": apply_dtype})
        x = torch.randn(9, 6, dtype=dtype)
        maker.setup_loss_call(nn.functional.mse_loss, maker.setup_model_call(model, x), torch.randn(9, 3, dtype=dtype))
        maker.forward_and_backward()
        assert maker.verify().passed, str(maker.verify())
        held[apply_dtype] = cost_report(maker, x)
    assert sum(row.bytes for row in held["bfloat16"].rows) < sum(row.bytes for row in held[None].rows)


@pytest.mark.parametrize(
    ("held", "roots", "application", "coarsest"),
    [
        (torch.float64, None, None, torch.float64),
        (torch.float32, torch.float64, None, torch.float32),
        (torch.float64, torch.float32, None, torch.float32),
        (torch.float32, torch.float64, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_coarsest_decides(held: Any, roots: Any, application: Any, coarsest: Any) -> None:
    assert Precision(roots, application).coarsest(held) == coarsest


@pytest.mark.parametrize(("option", "value"), [("root_dtype", "bfloat16"), ("apply_dtype", "float16"), ("apply_dtype", 16)])
@pytest.mark.parametrize("method", WITH_ROOTS)
def test_wrong_precisions_are_refused(method: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}="):
        METHODS[method].Config(**{option: value})
