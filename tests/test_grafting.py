"""Every grafted length with every average of gradients, on stacks and tensors of all orders, against whole histories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.grafting import GRAFTINGS
from tests import oracles
from tests.kronecker_reference import Reference
from tests.methods.test_kronecker_dims import Shampoo, gradients, run

AVERAGES: dict[str, dict[str, Any]] = {
    "none": {"beta1": 0.0},
    "momentum": {"beta1": 0.8},
    "nesterov": {"beta1": 0.8, "nesterov_average": True},
}
SHAPES = ((3, 4), (3, 4), (4, 4), (5,), (2, 3, 2))  # the first two are one stack


def histories(steps: int) -> list[list[Tensor]]:
    """Gradients whose sizes differ by tensor and by step, one of them with a row of zeros."""
    drawn = [gradients(*shape, steps=steps, seed=j) for j, shape in enumerate(SHAPES)]
    sized = [[g * 10.0 ** (j - 2) * (1 + t % 3) for t, g in enumerate(each)] for j, each in enumerate(drawn)]
    for g in sized[2]:
        g[1] = 0
    return [list(step) for step in zip(*sized, strict=True)]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("grafting", [name for name in ("none", *GRAFTINGS) if name != "amplitude"])
def test_lengths_with_averages(grafting: str, average: str) -> None:
    """The length is that of the average as the method sees it; second moments are those of the gradients themselves."""
    options = {"grafting": grafting, **AVERAGES[average]}
    config = {"method": "shampoo", "decay": 0.9, "damping": 1e-4, "preconditioner_interval": 1, "warmup_steps": 0, **options}
    for count in (1, 2, 6):
        steps = histories(count)
        found = run({**config, "stagger": False}, steps)
        for j, value in enumerate(found):
            reference = Reference(lambda: Shampoo(1e-4, 0.9), **options)
            for t in range(count):
                expected = reference.oriented((str(j), 0), steps[t][j], t)
            assert oracles.relative_error(value, expected) < 1e-8, (count, j)


@pytest.mark.parametrize("beta1", [0.0, 0.8])
def test_amplitudes_of_each_block(beta1: float) -> None:
    """A root mean square of at most two and then entries of at most ten, block by block: small ones are left alone."""
    config = {"method": "shampoo", "decay": 0.9, "damping": 1e-4, "beta1": beta1, "preconditioner_interval": 1}
    steps = histories(5)
    own, bounded = (run({**config, "grafting": grafting}, steps) for grafting in ("none", "amplitude"))
    scaled = [[100.0 * g if t == 4 else g for g in step] for t, step in enumerate(steps)]
    large, cut = (run({**config, "grafting": grafting}, scaled) for grafting in ("none", "amplitude"))
    for U, found in (*zip(own, bounded, strict=True), *zip(large, cut, strict=True)):
        rms = float(U.square().mean().sqrt())
        expected = (U * min(1.0, 2.0 / rms)).clamp(-10.0, 10.0)
        assert oracles.relative_error(found, expected) < 1e-12
    assert any(float(U.square().mean().sqrt()) < 2 for U in (*own, *large))


def test_an_amplitude_is_cut_on_both_sides() -> None:
    """One large entry among many small ones, of either sign."""
    grafting = GRAFTINGS["amplitude"]
    assert grafting is not None
    value = torch.zeros(4, 400, dtype=torch.float64)
    value[0, 0], value[1, 3], value[2, :] = 100.0, -100.0, 1.5
    found = grafting.rescale({}, value, value, value)
    assert float(found[0, 0]) == 10.0 and float(found[1, 3]) == -10.0
    assert torch.equal(found[2], value[2]) and torch.equal(found[3], value[3])
