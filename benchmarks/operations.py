"""Operations and host reads of a step: idle, measured, refreshed; and of 48 equal layers against one.

    python benchmarks/operations.py [METHOD ...] [--json] [--device cuda]

An operation is one call that torch dispatches to a kernel or a view of aten. A host read waits for the device: ``item()``,
``tolist()``, ``bool(tensor)``, a result whose shape depends on values, a copy to the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that the script lies in, whatever is installed

from gradmaker import METHODS
from gradmaker.compare.cost import machine as facts

DEFAULT = ("adam", "kfac", "shampoo", "soap")
MEASURE, REFRESH = 2, 3  # intervals in steps
KINDS = {"idle": 7, "measured": 10, "refreshed": 9, "measured and refreshed": 12}
"""A step of each kind, late enough that first passes have been checked and every clock has begun anew."""
WANTED: dict[str, Any] = {
    "curvature_interval": MEASURE,
    "preconditioner_interval": REFRESH,
    "warmup_steps": 0,
    "stagger": False,
}
"""Options, as far as a method has them."""
READS = frozenset(
    {
        "_local_scalar_dense",
        "equal",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
    }
)
"""Of aten; on an accelerator they wait for it."""
LAYERS, BATCH = 8, 32
MANY, SIDE = 48, 64


@dataclass
class Count:
    """What a step dispatches."""

    operations: int = 0
    views: int = 0
    reads: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {"operations": self.operations, "views": self.views, "reads": dict(self.reads)}


class Dispatched(TorchDispatchMode):
    """Counts calls of aten."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count.operations += 1
        self.count.views += bool(func.is_view)
        name = func.overloadpacket.__name__
        if name in READS or _leaves_device(args, result, kwargs or {}):
            self.count.reads[name] += 1
        return result


class Called(TorchFunctionMode):
    """Counts ``tolist`` of what is on the CPU, which dispatches nothing."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist and args[0].device.type == "cpu":  # of another device, its copy is dispatched
            self.count.reads["tolist"] += 1
        return func(*args, **(kwargs or {}))


def _leaves_device(args: tuple[Any, ...], result: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call copies from an accelerator to the host, and waits for it."""
    given = [a for a in args if isinstance(a, Tensor)]
    here = isinstance(result, Tensor) and result.device.type == "cpu"
    return here and any(a.device.type not in ("cpu", "meta") for a in given) and not kwargs.get("non_blocking")


def counted(work: Callable[[], Any]) -> Count:
    """What a piece of work dispatches."""
    count = Count()
    with Dispatched(count), Called(count):
        work()
    return count


# --- steps ----------------------------------------------------------------------------------------------------------------
def options(name: str) -> dict[str, Any]:
    """Those of `WANTED` that a method does not refuse."""
    config, legal = METHODS[name].Config, {}
    for key, value in WANTED.items():
        try:
            config(**{key: value})
        except (TypeError, ValueError):  # not an option, or one without effect
            continue
        legal[key] = value
    return legal


def mlp(layers: int, bias: bool, device: str) -> nn.Sequential:
    """Equal layers with an activation after each."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(SIDE, SIDE, bias=bias), nn.Tanh()))).to(device)


class Steps:
    """One method on one model, step by step; a step of every kind is counted."""

    def __init__(self, name: str, model: nn.Module, device: str) -> None:
        self.model, self.maker = model, METHODS[name](model, METHODS[name].Config(**options(name)))
        self.x = torch.randn(BATCH, SIDE, device=device)
        self.t = torch.randint(SIDE, (BATCH,), device=device)

    def declare(self) -> None:
        y = self.maker.setup_model_call(self.model, self.x)
        self.maker.setup_loss_call(F.cross_entropy, y, self.t)

    def whole(self) -> Count:
        """Of a step, the model's passes among it."""
        self.model.zero_grad()

        def work() -> None:
            self.declare()
            self.maker.forward_and_backward()

        return counted(work)

    def end(self) -> Count:
        """Of `precondition` alone."""
        self.model.zero_grad()
        self.declare()
        self.maker.accumulate()
        return counted(self.maker.precondition)

    def kinds(self, step: Callable[[], Count]) -> dict[str, Count]:
        """By `KINDS`."""
        made = [step() for _ in range(max(KINDS.values()) + 1)]
        return {kind: made[at] for kind, at in KINDS.items()}


def step_counts(name: str, device: str) -> dict[str, Count]:
    steps = Steps(name, mlp(LAYERS, True, device), device)
    return steps.kinds(steps.whole)


def end_counts(name: str, layers: int, device: str) -> dict[str, Count]:
    steps = Steps(name, mlp(layers, False, device), device)
    return steps.kinds(steps.end)


# --- report ---------------------------------------------------------------------------------------------------------------
def machine(device: str) -> str:
    """What ran it, without the machine's name."""
    own = facts(device)
    return f"torch {own['torch']}, Python {own['python']}, {own['system']}, {own.get('device', own['processor'])}"


def measure(names: tuple[str, ...], device: str) -> dict[str, Any]:
    plain = step_counts("gradient", device)["idle"]
    steps = {name: {kind: c.as_dict() for kind, c in step_counts(name, device).items()} for name in names}
    ends = {}
    for name in names:
        one, many = (end_counts(name, layers, device) for layers in (1, MANY))
        ends[name] = {kind: {"one": one[kind].as_dict(), "many": many[kind].as_dict()} for kind in KINDS}
    return {"machine": machine(device), "gradient": plain.as_dict(), "steps": steps, "precondition": ends}


def report(found: Mapping[str, Any]) -> str:
    """Two markdown tables."""
    plain = found["gradient"]
    lines = [
        f"{found['machine']}. Measured every {MEASURE} steps, refreshed every {REFRESH}.",
        "",
        f"A step on {LAYERS} equal layers of side {SIDE}, both passes of the model among it:",
        "",
        "| method | step | operations | beyond the plain gradient's | of these views | host reads |",
        "|---|---|---|---|---|---|",
        f"| gradient | every | {plain['operations']} | 0 | 0 | {_reads(plain['reads'])} |",
    ]
    for name, kinds in found["steps"].items():
        for kind, c in kinds.items():
            beyond = f"{c['operations'] - plain['operations']} | {c['views'] - plain['views']}"
            lines.append(f"| {name} | {kind} | {c['operations']} | {beyond} | {_reads(c['reads'])} |")
    lines += [
        "",
        f"`precondition()` alone, {MANY} equal layers of side {SIDE} against one:",
        "",
        f"| method | step | operations of 1 | of {MANY} | ratio | without views | host reads of 1 | of {MANY} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, kinds in found["precondition"].items():
        for kind, c in kinds.items():
            one, many = c["one"], c["many"]
            bare = [each["operations"] - each["views"] for each in (one, many)]
            all_ = [each["operations"] for each in (one, many)]
            sizes = f"{all_[0]} | {all_[1]} | {_ratio(*all_)} | {_ratio(*bare)}"
            lines.append(f"| {name} | {kind} | {sizes} | {_reads(one['reads'])} | {_reads(many['reads'])} |")
    return "\n".join(lines)


def _ratio(one: int, many: int) -> str:
    return f"{many / one:.2f}" if one else "-"


def _reads(reads: Mapping[str, int]) -> str:
    """In all, and by the call that reads."""
    named = ", ".join(f"{name} {count}" for name, count in sorted(reads.items()))
    return f"{sum(reads.values())} ({named})" if reads else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"by default {', '.join(DEFAULT)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of markdown")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    found = measure(tuple(given.methods) or DEFAULT, given.device)
    print(json.dumps(found, indent=1) if given.json else report(found))


if __name__ == "__main__":
    main()
