"""What stands beside a time: peak memory, learning on digits, and equal directions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from own_rows import EMP, KINDS, NEVER, OWN, Make, Own, Row, sgd
from torch import Tensor
from workloads import Case, build, layered

from gradmaker.compare.batches.sources import SPLIT_SEED
from gradmaker.compare.cost import cpu_peak
from gradmaker.compare.data import Data, load
from gradmaker.linalg.factored_gradient import FactoredGradient

MEMORY_STEPS = 3
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEARNING_STEPS, LEARNING_BATCH = 100, 128
DIRECTION_STEPS = 3
EXACT = 1e-10


# ------------------------------------------------------------------ memory
def peak_ratio(row: Row, workload: str) -> float:
    """Peak memory over that of SGD."""
    return round(peak(row.make, row.kinds, workload) / peak_of_sgd(workload), 4)


def peak(make: Make, kinds: tuple[str, ...], workload: str) -> int:
    """Peak bytes of tensors from building a model to the end of some steps that do everything."""

    def work() -> None:
        step = make(build(workload), kinds[-1] if "T1" not in kinds else "T1", 1e-4)
        for _ in range(MEMORY_STEPS):
            step()

    return cpu_peak(work)


@cache
def peak_of_sgd(workload: str) -> int:
    return peak(sgd, ("T1",), workload)


# ------------------------------------------------------------------ learning
@cache
def digits() -> Data:
    """The digits without the tenth of the training samples that selects."""
    data = load("digits")
    size = len(data.train_inputs)
    kept = torch.randperm(size, generator=torch.Generator().manual_seed(SPLIT_SEED))[round(0.1 * size) :]
    return replace(data, train_inputs=data.train_inputs[kept], train_targets=data.train_targets[kept])


def train(make: Make, kind: str, rate: float, steps: int = LEARNING_STEPS) -> tuple[float, float, float]:
    """Losses of the first steps and of the last ones, and the accuracy on the test data."""
    torch.manual_seed(0)
    x, t = digits().train_inputs.flatten(1), digits().train_targets
    generator = torch.Generator().manual_seed(0)
    case = Case(layered(x.shape[1], 128), x[:LEARNING_BATCH], t[:LEARNING_BATCH])
    step, losses = make(case, kind, rate), []
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:LEARNING_BATCH]
        case.x, case.t = x[rows], t[rows]
        with torch.no_grad():
            losses.append(float(F.cross_entropy(case.model(case.x), case.t)))
        step()
    x, t = digits().test_inputs, digits().test_targets
    with torch.no_grad():
        right = (case.model(x.flatten(1)).argmax(1) == t).double().mean()
    return sum(losses[:3]) / 3, sum(losses[-5:]) / 5, float(right)


def learning(row: Row, steps: int = LEARNING_STEPS) -> dict[str, Any]:
    """The best of a grid of learning rates, with refreshes every tenth step where the row has such steps."""
    kind = "T10" if "T10" in row.kinds else row.kinds[-1]
    found: dict[str, Any] = {}
    for rate in GRID:
        try:
            first, last, accuracy = train(row.make, kind, rate, steps)
        except (RuntimeError, ValueError):  # it diverged
            continue
        if last == last and (not found or last < found["last"]):
            found = {"rate": rate, "first": round(first, 4), "last": round(last, 4), "accuracy": round(accuracy, 4)}
    return found


# ------------------------------------------------------------------ equal directions
@contextmanager
def formed() -> Iterator[None]:
    """Every gradient is formed: none is held by its rows."""
    before = FactoredGradient.pays
    FactoredGradient.pays = property(lambda _: False)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FactoredGradient.pays = before  # type: ignore[method-assign]


def trajectory(make: Make, kind: str, workload: str, rate: float = 1e-2) -> list[Tensor]:
    """The changes of all parameters in some steps, in float64."""
    case = build(workload).double()
    torch.manual_seed(1)
    step, made = make(case, kind, rate), []
    for _ in range(DIRECTION_STEPS):
        before = flat(case)
        step()
        made.append((flat(case) - before) / rate)
    return made


def flat(case: Case) -> Tensor:
    return torch.cat([p.detach().flatten() for p in case.model.parameters()])


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of a step; a step that both skip is equal."""
    return max(float((a - b).norm() / b.norm()) if b.any() else float(a.norm()) for a, b in zip(found, wanted, strict=True))


def equal_to_formed(row: Row, workload: str) -> float:
    """The largest relative error of all kinds of steps against the same with formed gradients."""
    found = []
    for kind in row.kinds:
        with formed():
            wanted = trajectory(row.make, kind, workload)
        found.append(distance(trajectory(row.make, kind, workload), wanted))
    return max(found)


def _peer(name: str) -> Make:
    from peer_rows import ASDL_KFAC, asdl, asdl_smw, of_asdl, pytorch_optimizer

    return {
        "kfac": asdl(of_asdl(ASDL_KFAC, fisher_type="fisher_emp"), momentum=0.0),
        "smw": partial(asdl_smw, momentum=0.0),
        "soap": pytorch_optimizer("SOAP", weight_decay=0.0, precondition_frequency=NEVER),
    }[name]


Pair = tuple[Make, Callable[[], Make], str]
PAIRS: dict[str, Pair] = {
    "kfac-emp-decay0": (
        Own("kfac", {"fisher": EMP, "decay": 0.0, "warmup_steps": 0}, momentum=0.0),
        lambda: _peer("kfac"),
        "ASDL kfac, no average",
    ),
    "smw_ng": (Own("smw_ng", clocks="none", momentum=0.0), lambda: _peer("smw"), "ASDL smw"),
    "soap": (Own("soap", {"skip_first": True}, momentum=0.0), lambda: _peer("soap"), "pytorch_optimizer SOAP"),
    "adam": (
        Own("adam", clocks="none", momentum=0.0),
        lambda: _torch("Adam"),
        "torch Adam",
    ),
    "adagrad": (
        Own("adagrad", clocks="none", momentum=0.0),
        lambda: _torch("Adagrad"),
        "torch Adagrad",
    ),
}
"""Rows whose formula a peer has, or nearly: ours, the peer's, its name."""


def _torch(name: str) -> Make:
    from own_rows import of_torch

    return of_torch(lambda ps, lr: getattr(torch.optim, name)(ps, lr=lr))


def equal_to_peer(name: str, workload: str) -> tuple[str, float] | None:
    """The peer whose formula is near and the largest relative error against it, at steps that do everything; SOAP's measure."""
    if name not in PAIRS:
        return None
    own, make, peer = PAIRS[name]
    kind = "stat" if name == "soap" else "T1"
    return peer, distance(trajectory(own, kind, workload), trajectory(make(), kind, workload))


assert {kind for row in OWN for kind in row.kinds} <= {*KINDS}
