"""How stale do bases get? Off-diagonal shares of Shampoo's statistics in an older basis, and what that does to the root.

    python benchmarks/staleness.py --out benchmarks/staleness.md

An MLP on digits is trained by Shampoo; the statistics of its two hidden weights are followed with bases of every age.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradmaker import ShampooGradientConfig, ShampooGradientMaker
from gradmaker.linalg.orthogonal_iteration import off_diagonal, orthonormal, power_step, sorted_eigenvectors

DECAYS, AGES, SEEDS, STEPS, EVERY = (0.9, 0.95, 0.99), (1, 5, 10, 20, 50), (0, 1, 2), 400, 50
RIDGE = 1e-6
COLUMNS = ("stale", "power step", "QR step", "root by a stale basis", "after a power step", "the old root")


def root(values: Tensor, Q: Tensor) -> Tensor:
    """``Q (diag values + ridge)^(-1/4) Q^T``."""
    return (Q * (values.clamp(min=0) + RIDGE * values.amax(-1, keepdim=True)).pow(-0.25).unsqueeze(-2)) @ Q.mT


def exact(H: Tensor) -> Tensor:
    return root(*torch.linalg.eigh(H))


def error(X: Tensor, Y: Tensor) -> float:
    return float(((X - Y).norm(dim=(-2, -1)) / Y.norm(dim=(-2, -1))).mean())


def in_basis(H: Tensor, Q: Tensor) -> Tensor:
    """The root that takes the diagonal of ``Q^T H Q`` for the spectrum."""
    return root((Q.mT @ H @ Q).diagonal(dim1=-2, dim2=-1), Q)


def measured(now: Tensor, before: Tensor) -> list[float]:
    """One row of `COLUMNS`.  # statistics (1, d, d)"""
    Q = sorted_eigenvectors(before)
    powered, turned = power_step(now, Q)[0], orthonormal(now @ Q)
    shares = [float(off_diagonal(now, basis).mean()) for basis in (Q, powered, turned)]
    true = exact(now)
    return [*shares, error(in_basis(now, Q), true), error(in_basis(now, powered), true), error(exact(before), true)]


def train(decay: float, seed: int) -> dict[int, list[list[float]]]:
    """Rows by the age of the basis, after the first 100 steps."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, t = torch.tensor(digits.data / 16, dtype=torch.float64), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    maker = ShampooGradientMaker(model, ShampooGradientConfig(decay=decay, preconditioner_interval=10))
    optimizer, past = torch.optim.SGD(model.parameters(), lr=0.1), list[list[Tensor]]()
    found: dict[int, list[list[float]]] = {age: [] for age in AGES}
    for step in range(STEPS):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x[rows]), t[rows])
        maker.forward_and_backward()
        optimizer.step()
        blocks: list[Any] = [b for b in maker.plan.blocks if b.name in ("0.weight", "2.weight")]
        past.append([b.state[f"factor_{axis}"][:1].clone() for b in blocks for axis in (0, 1)])
        if step >= 100 and step % EVERY == 0:
            for age in AGES:
                found[age] += [measured(now, before) for now, before in zip(past[-1], past[-1 - age], strict=True)]
        past = past[-max(AGES) - 1 :]
    return found


def table() -> list[str]:
    """Means over factors and steps; the deviation of the mean over seeds for the first column."""
    lines = [f"| decay | age | {' | '.join(COLUMNS)} |", f"|{'---|' * (2 + len(COLUMNS))}"]
    for decay in DECAYS:
        runs = [train(decay, seed) for seed in SEEDS]
        for age in AGES:
            each = [[mean(column) for column in zip(*run[age], strict=True)] for run in runs]
            cells = [f"{mean(column):.3f}" for column in zip(*each, strict=True)]
            cells[0] += f" ± {stdev(row[0] for row in each):.3f}"
            lines.append(f"| {decay} | {age} | {' | '.join(cells)} |")
    return lines


HEAD = """# Staleness of bases

Made by `python benchmarks/staleness.py`. Statistics `H` of the two hidden weights of a 64-48-32-10 network on digits, batches
of 64, trained by Shampoo (step 0.1, roots every ten steps): 400 steps, looked at every 50 from the 100th, three seeds. *stale*:
`|B - diag B| / |B|` of `B = Q^T H Q`, `Q` the eigenbasis of the statistic so many steps ago; then the same after one step of
orthogonal iteration, or of the QR algorithm. Errors of `H^(-1/4)` with the ridge 1e-6 of the largest eigenvalue, relative, in
the Frobenius norm: by the diagonal of `B` in the stale basis and in the one after a power step, and of the old root.
"""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/staleness.md"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    out.write_text("\n".join([HEAD, *table()]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
