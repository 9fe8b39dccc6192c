"""Runs methods on the zoo and names the outcome: exact, refused, or wrong. `python -m tests.zoo.measure` renews the table."""

from __future__ import annotations

import json
import linecache
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmaker import from_config
from tests.zoo import steps
from tests.zoo.case import Case, Entry
from tests.zoo.oracles import Oracle, Vectors, couples, ekfac_direction, kfac_direction, plain_gradient
from tests.zoo.registry import ZOO

DAMPING = 0.05
DAMPING_OF_SEARCHES = 0.5  # what conjugate gradients reach in float64 goes with the condition of the matrix
TOLERANCE = 1e-8
STEPS = 3  # of methods of the gradient alone
TABLE = Path(__file__).with_name("outcomes.json")

EXACT, HELD = "exact", "exact, statistics of the batch held"
FISHER: dict[str, Any] = {"fisher": "FisherExact", "damping": DAMPING}
METHODS: dict[str, dict[str, Any]] = {
    "kfac": FISHER,
    "ekfac": FISHER,
    "unit_ng": FISHER,
    "full_ng": FISHER,
    "hessian_free": {
        **{"damping": DAMPING_OF_SEARCHES, "tolerance": 1e-17, "iterations": 2000},
        **{"adapt": False, "backtrack": False, "line_search": False},
    },
    "shampoo": {},
    "soap": {"skip_first": False},
    "adam": {},
}
OF_CURVATURE = [m for m in METHODS if m not in ("shampoo", "soap", "adam")]


# ------------------------------------------------------------------ running a maker
def make(case: Case, entry: Entry, method: str, **options: Any) -> Any:
    return from_config(case.model, {"method": method, **METHODS[method], **entry.options, **options})


def step(case: Case, maker: Any) -> Tensor:
    """One declared step; returns the loss."""
    case.model.zero_grad()
    case.declare(maker)
    loss: Tensor = maker.forward_and_backward()[1]
    return loss


def gradients_of(case: Case) -> Vectors:
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in case.parameters().items()}


def nudge(case: Case, index: int) -> None:
    """Move the weights a little, always in the same way."""
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for p in case.parameters().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def trajectory(entry: Entry) -> list[Vectors]:
    """The plain gradients of a few steps."""
    case, found = entry.make(), []
    for index in range(STEPS):
        found.append(plain_gradient(case))
        nudge(case, index)
    return found


# ------------------------------------------------------------------ what is right
@cache
def oracle(name: str, held: bool = False) -> Oracle:
    return Oracle(ZOO[name], held)


def of_matrices(found: Oracle, method: str) -> Iterator[Vectors]:
    """What a method may put into `.grad`: more than one thing where a layer's weight has uses outside of the layer."""
    if method in ("full_ng", "hessian_free"):
        yield found.full(METHODS[method]["damping"])
    elif method == "unit_ng":
        yield from found.in_units(DAMPING)
    else:
        solve = kfac_direction(DAMPING) if method == "kfac" else ekfac_direction(DAMPING)
        yield found.kronecker(solve, DAMPING, tied=method == "kfac")


def right(name: str, method: str) -> Iterator[tuple[str, Vectors]]:
    """Every right answer with its name."""
    for vectors in of_matrices(oracle(name), method):
        yield EXACT, vectors
    if couples(oracle(name).case) and method != "hessian_free":
        for vectors in of_matrices(oracle(name, held=True), method):
            yield HELD, vectors


def error(found: Vectors, expected: Vectors) -> float:
    """The largest of all parameters; one that is small beside the whole vector is compared with a thousandth of it."""
    whole = float(torch.stack([v.square().sum() for v in expected.values()]).sum().sqrt())
    return max(
        float(torch.linalg.norm(found[k] - v)) / max(float(torch.linalg.norm(v)), 1e-3 * whole) for k, v in expected.items()
    )


# ------------------------------------------------------------------ one cell
def cell(name: str, method: str) -> str:
    """The outcome of a method on a model."""
    entry = ZOO[name]
    case = entry.make()
    before = snapshot(case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            word = curvature_cell(case, entry, method) if method in OF_CURVATURE else gradient_cell(case, entry, method)
        changed = [k for k, v in snapshot(case).items() if v != before[k] and k in ("modules", "hooks", "modes")]
        return word if not changed else f"WRONG: leaves {', '.join(changed)} changed"
    except Exception as problem:
        if not refuses(problem):
            return f"WRONG: {type(problem).__name__} from inside: {first_line(problem)}"
        if changed := [k for k, v in snapshot(case).items() if v != before[k]]:
            return f"WRONG: refuses and leaves {', '.join(changed)} changed"
        return f"refused: {first_line(problem)}"


def curvature_cell(case: Case, entry: Entry, method: str) -> str:
    step(case, make(case, entry, method))
    found, errors = gradients_of(case), {}
    for word, expected in right(entry.name, method):
        errors[word] = min(errors.get(word, float("inf")), error(found, expected))
        if errors[word] < TOLERANCE:
            return word
    return f"WRONG: {min(errors.values()):.0e}"


def gradient_cell(case: Case, entry: Entry, method: str) -> str:
    maker, found = make(case, entry, method), []
    for index in range(STEPS):
        step(case, maker)
        found.append(gradients_of(case))
        if index == 0:
            bases = bases_of(maker) if method == "soap" else {}
        nudge(case, index)
    expected: list[Vectors] = [{} for _ in range(STEPS)]
    history = trajectory(entry)
    for k in history[0]:
        own = [g[k] for g in history]
        directions = (
            steps.soap(own, bases[k]) if method == "soap" else {"adam": steps.adam, "shampoo": steps.shampoo}[method](own)
        )
        for index, direction in enumerate(directions):
            expected[index][k] = direction
    worst = max(error(*pair) for pair in zip(found, expected, strict=True))
    return EXACT if worst < TOLERANCE else f"WRONG: {worst:.0e}"


def bases_of(maker: Any) -> dict[str, list[Tensor]]:
    """SOAP's bases of every parameter, off the state."""
    found: dict[str, list[Tensor]] = {}
    for block in maker.plan.blocks:
        for site, slot in zip(block.sites, block.slots, strict=True):
            keys = sorted(k for k in block.state if k.startswith("basis_"))
            (name,) = site.parameters
            found[name] = [block.state[k][slot][0].clone() for k in keys]
    return found


# ------------------------------------------------------------------ other precisions
OF_TORCH = "There is a performance drop"  # vmap over an operation without a rule for it
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


def differentiable(name: str, precision: str) -> bool:
    """Whether torch has the gradient: 2.6 has none of the MSE of bfloat16 outputs and float32 targets."""
    try:
        plain_gradient(ZOO[name].make(*PRECISIONS[precision]))
    except RuntimeError:
        return False
    return True


def told(name: str, method: str, precision: str) -> list[str]:
    """What a maker says in two steps in another precision: warnings, or an error. A gradient that is not finite is one."""
    dtype, autocast = PRECISIONS[precision]
    case = ZOO[name].make(dtype, autocast)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            maker = make(case, ZOO[name], method)
            for _ in range(2):
                step(case, maker)
        except Exception as problem:
            return [f"{type(problem).__name__}: {first_line(problem)}"]
    messages = [str(w.message) for w in said if OF_TORCH not in str(w.message)]
    return messages if all(bool(g.isfinite().all()) for g in gradients_of(case).values()) else [*messages, "not finite"]


# ------------------------------------------------------------------ refusals
def snapshot(case: Case) -> dict[str, Any]:
    """What a refusal leaves as it was."""
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    modules = dict(case.model.named_modules(remove_duplicate=False))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": {k: (id(m), [id(p) for p in m._parameters.values()]) for k, m in modules.items()},
        "parameters": {k: (id(p), p.requires_grad, p._version, len(p._backward_hooks or {})) for k, p in parameters.items()},
        "gradients": {k: p.grad is None for k, p in parameters.items()},
        "hooks": {k: [len(getattr(m, hook)) for hook in hooks] for k, m in modules.items()},
        "modes": {k: m.training for k, m in modules.items()},
    }


def refuses(problem: Exception) -> bool:
    """Whether an error is the library's own sentence, and not one that came out of torch on the way."""
    if not isinstance(problem, (ValueError, RuntimeError, TypeError, NotImplementedError)):
        return False
    trace = problem.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.startswith("gradmaker") and line.lstrip().startswith("raise")


def first_line(problem: Exception) -> str:
    return re.sub(r"\s+", " ", str(problem))[:300]


# ------------------------------------------------------------------ the table
def count(method: str) -> int:
    """For how many models a method is exact."""
    return sum(found[method].startswith(EXACT) for found in expected().values())


def reasons() -> list[str]:
    """Why anything is refused, in order of appearance."""
    said = (c.removeprefix("refused: ") for row in expected().values() for c in row.values() if c.startswith("refused"))
    return list(dict.fromkeys(said))


@cache
def expected() -> dict[str, dict[str, str]]:
    """The outcomes that were written down."""
    found: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def renew(only: list[str]) -> None:
    """Run the zoo, or some of its models, and write the outcomes down."""
    known = dict(expected()) if only else {}
    for name in only or ZOO:
        known[name] = {method: cell(name, method) for method in METHODS}
        print(name, {m: c for m, c in known[name].items() if c != EXACT})
    ordered = {name: known[name] for name in ZOO if name in known}
    TABLE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    renew(sys.argv[1:])
