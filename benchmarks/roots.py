"""Accuracy of inverse roots: every solver, over conditions, roots and precisions, beside the figures of the specification.

    python benchmarks/roots.py --out benchmarks/roots.md

Matrices are ``Q diag(logspace(-log10 kappa, 0)) Q^T``, 96 x 96. Errors are relative, in the Frobenius norm, medians of seeds.
The fallbacks, larger ridges first, are left out: a number says what one attempt gives.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, log10, sqrt
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmaker.linalg.coupled_iteration import compose
from gradmaker.linalg.eigen import decompose
from gradmaker.linalg.roots import residual
from gradmaker.representations.root_dims import RootKronDims
from gradmaker.solvers import DenmanBeavers, Eigh, HigherOrder, NewtonRoot, NewtonSchulz, Solver, SvdRoot
from gradmaker.solvers.denman_beavers import denman_beavers
from gradmaker.solvers.higher_order import coupled_series
from gradmaker.solvers.newton_root import iterate_newton
from gradmaker.solvers.newton_schulz import coupled_square_root

N, SEEDS, SLACK = 96, (0, 1, 2), 3.0
CONDITIONS = (1e2, 1e4, 1e6, 1e7, 1e8, 1e10, 1e12)
ROOTS = (1, 2, 3, 4, 5, 6, 7, 8)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LIMIT, TOLERANCE = 100, 1e-6
Root = Callable[[Tensor, int, float], tuple[Tensor, float]]


class Entry(NamedTuple):
    """One cell. ``spec`` is the figure of the specification, None where it has none; infinite: a negative eigenvalue."""

    table: str
    method: str
    dtype: str
    condition: float
    p: int
    damping: float
    error: float
    iterations: float
    residual: float
    spec: float | None


# ------------------------------------------------------------------ the roots, without the ladder
def eigen(A: Tensor, p: int, condition: float) -> tuple[Tensor, float]:
    s, Q, _ = decompose(A)
    return (Q * (s ** (-1 / p)).unsqueeze(-2)) @ Q.mT, 0.0  # not a number where an eigenvalue is negative


def newton(A: Tensor, p: int, condition: float) -> tuple[Tensor, float]:
    X, count = iterate_newton(A, p, LIMIT, TOLERANCE)
    return X, float(count)


def series(A: Tensor, p: int, condition: float) -> tuple[Tensor, float]:
    X, count = coupled_series(A, p, 3, LIMIT, 1e-13 if A.dtype == torch.float64 else TOLERANCE)
    return X, float(count)


def schulz(A: Tensor, p: int, condition: float, polynomial: Any) -> tuple[Tensor, float]:
    def half(A: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        lowest = sqrt(condition ** (-1 / 2**stage) / sqrt(A.shape[-1]))
        return coupled_square_root(A, polynomial, LIMIT, TOLERANCE, lowest)

    X, count = compose(half, A, p)
    return X, float(count)


def beavers(A: Tensor, p: int, condition: float) -> tuple[Tensor, float]:
    X, count = compose(lambda A, stage: denman_beavers(A, LIMIT, TOLERANCE), A, p)
    return X, float(count)


METHODS: dict[str, Root] = {
    "Eigh": eigen,
    "NewtonRoot": newton,
    "HigherOrder": series,
    "NewtonSchulz cubic": partial(schulz, polynomial="cubic"),
    "NewtonSchulz": partial(schulz, polynomial="polar_express"),
    "DenmanBeavers": beavers,
}
BINARY = ("NewtonSchulz cubic", "NewtonSchulz", "DenmanBeavers")

# ------------------------------------------------------------------ the specification, tables 2.1 and S9
NEGATIVE = inf
COLUMNS = [("Eigh", "float32"), ("NewtonRoot", "float32"), ("HigherOrder", "float32"), ("NewtonSchulz cubic", "float32")]
COLUMNS += [("Eigh", "float64"), ("NewtonRoot", "float64"), ("HigherOrder", "float64")]
TABLE = {
    (1e2, 4): (1.3e-6, 8.4e-7, 9.7e-7, 1.5e-6, 2.9e-15, 1.9e-8, 2.1e-15),
    (1e4, 4): (3.5e-5, 1.8e-5, 2.7e-5, 3.0e-5, 5.3e-14, 2.3e-9, 5.9e-14),
    (1e6, 4): (2.4e-2, 1.3e-3, 2.2e-3, 1.7e-3, 3.2e-12, 1.7e-9, 3.5e-12),
    (1e7, 4): (4.4e-2, 9.1e-3, 1.2e-2, 1.6e-2, 2.8e-11, 3.7e-7, 3.5e-11),
    (1e8, 4): (NEGATIVE, 7.5e-2, 1.5e-1, 1.9e-1, 2.2e-10, 2.5e-9, 2.6e-10),
    (1e10, 4): (NEGATIVE, 5.4e-1, 6.4e-1, 7.0e-1, 1.6e-8, 1.4e-8, 2.2e-8),
    (1e12, 4): (NEGATIVE, 8.6e-1, 9.1e-1, 8.9e-1, 1.3e-6, 8.4e-7, 1.7e-6),
    (1e2, 2): (3.0e-6, 1.4e-6, 1.6e-6, 1.5e-6, 4.0e-15, 9.5e-7, 3.4e-15),
    (1e6, 2): (6.5e-2, 3.9e-3, 4.7e-3, 5.3e-3, 6.6e-12, 1.2e-7, 9.3e-12),
    (1e10, 2): (NEGATIVE, 8.8e-1, 9.2e-1, 9.3e-1, 4.7e-8, 4.0e-7, 4.7e-8),
}
FIGURES = {(k, p, *c): x for (k, p), row in TABLE.items() for c, x in zip(COLUMNS, row, strict=True)}
FIGURES[1e6, 2, "DenmanBeavers", "float32"] = 1.8e-3
DAMPED = {("NewtonRoot", 1e-3): 4e-6, ("NewtonRoot", 1e-4): 4e-5, ("NewtonRoot", 1e-5): 3e-4}
DAMPED |= {("NewtonRoot", 1e-6): 3.2e-3, ("NewtonRoot", 1e-7): 3.2e-2, ("NewtonRoot", 1e-8): 0.22, ("Eigh", 1e-6): 8.1e-3}
BFLOAT = {1e-1: 4e-4, 1e-2: 4e-3, 1e-3: 3e-2, 1e-4: 1.4e-1}
SQUARE = {1e4: 1.2e-6, 1e6: 2.9e-6, 1e8: 1.7e-5, 1e10: 1.5e-4, 1e12: 1.1e-1}
WORST = {1e4: 1.0e-6, 1e6: 1.2e-6, 1e8: 1.4e-5, 1e10: 2.0e-4, 1e12: 1.1e-1}
WHOLE = {1e4: 3.5e-5, 1e6: 2.0e-2, 1e8: 1.9e-1, 1e10: 5e5, 1e12: 2e5}
RIDGED = {1e4: 1.3e-3, 1e6: 8.8e-2, 1e8: 5.4e-1, 1e10: 8.4e-1, 1e12: 9.5e-1}


# ------------------------------------------------------------------ what is measured
def spectrum(condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and basis, float64."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator))
    return torch.logspace(-log10(condition), 0, N, dtype=torch.float64), Q


def error(X: Tensor, exact: Tensor) -> float:
    found = float((X.double() - exact).norm() / exact.norm())
    return found if found == found else inf


def cell(method: str, dtype: str, condition: float, p: int, seeds: Sequence[int] = SEEDS) -> Entry:
    """Undamped."""
    errors, counts, residuals = [], [], []
    for seed in seeds:
        s, Q = spectrum(condition, seed)
        A = ((Q * s) @ Q.mT).to(DTYPES[dtype])
        A = ((A + A.mT) / 2).unsqueeze(0)
        X, count = METHODS[method](A, p, condition)
        errors.append(error(X[0], (Q * s ** (-1 / p)) @ Q.mT))
        counts.append(count)
        residuals.append(float(residual(A, X, p)[0].nan_to_num(inf)))
    spec = FIGURES.get((condition, p, method, dtype))
    return Entry("2.1", method, dtype, condition, p, 0.0, median(errors), median(counts), median(residuals), spec)


def damped_cell(method: str, damping: float, stored: torch.dtype = torch.float32, seeds: Sequence[int] = SEEDS) -> Entry:
    """Condition 1e14, p = 4, in float32 with a ridge, against the exact root of the damped matrix."""
    errors, counts = [], []
    for seed in seeds:
        s, Q = spectrum(1e14, seed)
        A = ((Q * s) @ Q.mT).to(stored).float()
        A = ((A + A.mT) / 2).unsqueeze(0)
        X, count = clamped(A, damping) if method == "Eigh" else METHODS[method](A + damping * torch.eye(N), 4, 1 / damping)
        errors.append(error(X[0], (Q * (s + damping) ** (-1 / 4)) @ Q.mT))
        counts.append(count)
    if stored == torch.bfloat16:
        spec = BFLOAT.get(damping) if method == "Eigh" else None
        return Entry("bfloat16", method, "bfloat16", 1e14, 4, damping, median(errors), median(counts), 0.0, spec)
    spec = DAMPED.get((method, damping))
    return Entry("damped", method, "float32", 1e14, 4, damping, median(errors), median(counts), 0.0, spec)


def clamped(A: Tensor, damping: float) -> tuple[Tensor, float]:
    """As `Eigh` does it: negative eigenvalues count as zero, then the ridge is added."""
    s, Q, _ = decompose(A)
    return (Q * ((s.clamp(min=0) + damping) ** (-1 / 4)).unsqueeze(-2)) @ Q.mT, 0.0


def rows_of(condition: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 rows ``X`` with ``X^T X`` of the given condition; exact eigenvalues and basis of ``X^T X``."""
    s, Q = spectrum(condition, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    U, _ = torch.linalg.qr(torch.randn(4 * N, N, dtype=torch.float64, generator=generator))
    return ((U * s.sqrt()) @ Q.mT).float(), s, Q


def held_by_root(X: Tensor) -> dict[str, Tensor]:
    """The rows, a quarter at a time, folded into ``R`` by the representation itself."""
    from gradmaker.curvature.evidence import Gradient
    from gradmaker.representations.base import Fold, Frame

    representation = RootKronDims()
    state = representation.init(Frame(1, (N, N), frozenset({1}), torch.float32, torch.device("cpu")))
    for part in X.split(N):
        representation.update(state, Gradient(part.mT.unsqueeze(0)), Fold(1.0, 1.0, 1.0, summed=True))
    return {"factor_0": state["factor_0"], "mass": state["mass"]}


def square_root_cells(condition: float, seeds: Sequence[int] = SEEDS) -> list[Entry]:
    """``H^(-1/4)`` in float32: of ``H``, of ``H`` with a ridge, of its square root. Errors to the undamped root."""
    found: dict[str, list[float]] = {
        name: [] for name in ("Eigh, floor u", "Eigh + 1e-6", "SvdRoot", "SvdRoot worst direction")
    }
    for seed in seeds:
        X, s, Q = rows_of(condition, seed)
        exact = (Q * s**-0.25) @ Q.mT
        H = (X.mT @ X).unsqueeze(0)
        eigenvalues, basis = torch.linalg.eigh(H[0])
        floored = eigenvalues.clamp(min=float(eigenvalues[-1]) * torch.finfo(H.dtype).eps / 2)
        found["Eigh, floor u"].append(error((basis * floored**-0.25) @ basis.mT, exact))
        found["Eigh + 1e-6"].append(error(eigen(H + 1e-6 * torch.eye(N), 4, condition)[0][0], exact))
        solver = SvdRoot(power=-0.25, damping=0.0)
        root = solver.prepare(RootKronDims(), held_by_root(X), None)["root_0"][0].double()
        found["SvdRoot"].append(error(root, exact))
        found["SvdRoot worst direction"].append(float(((Q.mT @ root @ Q).diagonal() * s**0.25 - 1).abs().max()))
    specs = dict(zip(found, (WHOLE, RIDGED, SQUARE, WORST), strict=True))
    make = partial(Entry, "S9", dtype="float32", condition=condition, p=4, damping=0.0, iterations=0.0, residual=0.0)
    return [make(method=name, error=median(xs), spec=specs[name][condition]) for name, xs in found.items()]


def seconds(n: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """A refresh of one factor, p = 4, damping 1e-6, condition 1e6; the median of five."""
    from gradmaker.representations.dense import Dense

    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    A = ((Q * torch.logspace(-6, 0, n)) @ Q.mT).to(dtype)
    R = (Q * torch.logspace(-3, 0, n)).mT.to(dtype)
    solvers: dict[str, Solver] = {
        "Eigh": Eigh(power=-0.25, damping=1e-6, split="each", mode="largest"),
        "NewtonRoot": NewtonRoot(power=-0.25),
        "HigherOrder": HigherOrder(power=-0.25),
        "NewtonSchulz cubic": NewtonSchulz(power=-0.25, polynomial="cubic"),
        "NewtonSchulz": NewtonSchulz(power=-0.25),
        "DenmanBeavers": DenmanBeavers(power=-0.25),
        "SvdRoot": SvdRoot(power=-0.25),
    }
    out = {}
    for name, solver in solvers.items():
        rooted = name == "SvdRoot"
        state = {"factor_0" if rooted else "matrix": (R if rooted else A).unsqueeze(0), "mass": torch.ones(1, dtype=dtype)}
        representation = RootKronDims() if rooted else Dense()
        times = []
        for _ in range(5):
            start = perf_counter()
            solver.prepare(representation, state, None)
            times.append(perf_counter() - start)
        out[name] = median(times)
    return out


def everything(progress: Callable[[str], None] = print) -> list[Entry]:
    entries = []
    for dtype in DTYPES:
        for method in METHODS:
            progress(f"{method} {dtype}")
            roots = [p for p in ROOTS if method not in BINARY or p in (2, 4, 8)]
            entries += [cell(method, dtype, condition, p) for condition in CONDITIONS for p in roots]
    for method in METHODS:
        entries += [damped_cell(method, 10.0**-k) for k in range(3, 9)]
        entries += [damped_cell(method, 10.0**-k, torch.bfloat16) for k in range(1, 5)]
    for condition in (1e4, 1e6, 1e8, 1e10, 1e12):
        entries += square_root_cells(condition)
    return entries


def violations(entries: Sequence[Entry]) -> list[Entry]:
    """Entries that are worse than three times the specification's figure."""
    return [e for e in entries if e.spec is not None and not e.error <= SLACK * e.spec]


# ------------------------------------------------------------------ the page
def number(x: float) -> str:
    return "negative" if x == inf else f"{x:.1e}"


def shown(entry: Entry) -> str:
    its = f" ({entry.iterations:.0f})" if entry.iterations else ""
    return f"{number(entry.error)}{its}" + (f" / {number(entry.spec)}" if entry.spec is not None else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


HEAD = """# Accuracy of inverse roots

Made by `python benchmarks/roots.py`. Relative error of `A^(-1/p)`, medians of three seeds, 96 x 96; in brackets the
iterations; after a slash the figure of our specification, which was measured before any of this was written. *negative*: a
computed eigenvalue is negative, so that there is no root. An error near or above one is what a matrix gives that rounding has
made indefinite; the fallbacks of the solvers see that and take a larger ridge.
"""
NOTES = {
    "damped": "## float32, p = 4, condition 1e14, with a ridge\n\nError to the exact root of the damped matrix.\n",
    "bfloat16": "## Stored in bfloat16, rooted in float32\n\nThe same matrix, rounded to bfloat16 before the ridge is added.\n",
    "S9": "## Square-root statistics, float32, p = 4\n\nFrom 384 float32 rows; error to the root of the undamped matrix.\n"
    "*floor u*: eigenvalues below the unit roundoff of the largest count as that.\n",
    "time": "## Time of a refresh\n\nMilliseconds for one float32 factor, p = 4, damping 1e-6, condition 1e6, one thread.\n",
}


def render(entries: Sequence[Entry], times: dict[int, dict[str, float]], facts: dict[str, str]) -> str:
    """The page."""
    lines = [HEAD, "On " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
    for dtype in DTYPES:
        for p in ROOTS:
            chosen = [e for e in entries if (e.table, e.dtype, e.p) == ("2.1", dtype, p)]
            lines += [f"## {dtype}, p = {p}, undamped", "", *_pivot("condition", chosen, lambda e: e.condition)]
    for name in ("damped", "bfloat16"):
        lines += [NOTES[name], *_pivot("damping", [e for e in entries if e.table == name], lambda e: e.damping)]
    lines += [NOTES["S9"], *_pivot("condition", [e for e in entries if e.table == "S9"], lambda e: e.condition)]
    body = [[str(n), *(f"{1e3 * x:.1f}" for x in row.values())] for n, row in times.items()]
    return "\n".join([*lines, NOTES["time"], *table(["n", *next(iter(times.values()))], body)])


def _pivot(head: str, entries: Sequence[Entry], key: Callable[[Entry], float]) -> list[str]:
    methods = list(dict.fromkeys(e.method for e in entries))
    found = {(key(e), e.method): shown(e) for e in entries}
    rows = [[f"{k:.0e}", *(found[k, m] for m in methods)] for k in dict.fromkeys(key(e) for e in entries)]
    return table([head, *methods], rows)


def main() -> None:
    """Measure and write the page and the JSON file beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/roots.md"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    entries = everything()
    times = {n: seconds(n) for n in (64, 128, 512)}
    facts = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, "threads": "1"}
    out.write_text(render(entries, times, facts).rstrip("\n") + "\n", encoding="utf-8")
    finite = [{k: str(v) if v == inf else v for k, v in e._asdict().items()} for e in entries]
    saved = {"machine": facts, "entries": finite, "seconds": times}
    out.with_suffix(".json").write_text(json.dumps(saved, indent=0) + "\n", encoding="utf-8")
    for entry in violations(entries):
        print("worse than three times the specification:", entry)


if __name__ == "__main__":
    main()
