"""`fidelity`: approximations of a curvature matrix against the matrix, on one's own model, loss and batches."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from gradmaker.fidelity.approximations import Approximation, Measured, Refused, measured_of, read_approximations
from gradmaker.fidelity.dense_runs import DenseRuns
from gradmaker.fidelity.layers import Layers
from gradmaker.fidelity.meter import Meter, meter
from gradmaker.fidelity.notes import notes_of
from gradmaker.fidelity.probe_runs import ProbeRuns
from gradmaker.fidelity.problem import Batch, Loss, Problem, read_batches
from gradmaker.fidelity.references import REFERENCES, Reference, ReferenceName, reference_of
from gradmaker.fidelity.result import Fidelity
from gradmaker.fidelity.run import Options, Run
from gradmaker.fidelity.values import Kept
from gradmaker.options.checks import check_choice, check_count
from gradmaker.version import __version__

__all__ = ["fidelity"]


class Measures(Protocol):
    """The measures against the reference matrix of a batch."""

    def of_reference(self, run: Run, damping: float | None) -> None:
        """Add those of the reference itself."""

    def of_approximation(self, run: Run, label: str, measured: Measured) -> None:
        """Add those of an approximation."""


LineSearches = Literal["all", "whole", "none"]


def fidelity(
    model: nn.Module,
    loss: Loss | None,
    batches: Any,
    approximations: Any,
    reference: ReferenceName = "fisher_exact",
    *,
    damping: float | None = None,
    seeds: int = 1,
    repeats: int = 1,
    max_batches: int | None = None,
    layers: Sequence[str] = (),
    dense_limit: int = 2048,
    probes: int = 8,
    iterations: int = 20,
    line_searches: LineSearches | None = None,
    layerwise: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Fidelity:
    """Compare approximations of a curvature matrix with the matrix itself, layer by layer and as a whole.

    Weights, gradients, buffers and the global random state of the model stay as they are.

    Args:
        model: in the mode, and with the dtype, in which it is trained; float64 for errors below 1e-6.
        loss: ``loss(result, targets)``; None: the attribute ``loss`` of the model's result.
        batches: a pair (inputs, targets), a mapping of the model's keywords, or an iterable of these, as a `DataLoader`.
        approximations: names of methods, mappings as of `from_config`, configs, `Triple`, makers with their statistics, each
            alone or as a pair (label, one of these).
        reference: ``fisher_exact``, ``ggn``, ``hessian``, ``fisher_emp`` (loss terms are examples), or ``second_moment`` of the
            gradients of all batches.
        damping: of the exact inverse; None: that in force in each approximation, or 1e-3.
        seeds: repetitions with other sampled targets, for approximations that draw.
        repeats: how often each batch is measured at constant weights: EKFAC has its own moments from the second on.
        max_batches: read at most so many of an iterable.
        layers: name patterns of layers to be measured on their own; all by default.
        dense_limit: models with more parameters are measured by products with random vectors.
        probes: of these; their number decides the standard errors.
        iterations: of CG and Lanczos at most, for the whole model.
        line_searches: for which directions the loss itself is searched; by default ``all`` of dense measures, else ``whole``.
        layerwise: whether to solve with the block of each layer, where it is not dense: the cosines by layer.
        seed: of the probes, and of the global random numbers in every pass (dropout).
        progress: show a bar with the time that is left; it needs `rich`.
    """
    check_choice("reference", reference, REFERENCES)
    for name, value, least in (
        ("seeds", seeds, 1),
        ("repeats", repeats, 1),
        ("probes", probes, 2),
        ("iterations", iterations, 1),
    ):
        check_count(name, value, least)
    parts = Layers(model, layers)
    problem = Problem(model, loss, parts, seed)
    read = read_batches(batches, max_batches)
    rows = read_approximations(approximations, problem)
    given = [one for one in rows if isinstance(one, Approximation)]
    refused = {one.label: one for one in rows if isinstance(one, Refused)}
    is_dense = parts.size <= dense_limit
    search = line_searches or ("all" if is_dense else "whole")
    check_choice("line_searches", search, ("all", "whole", "none"))
    options = Options(damping, repeats, is_dense, probes, iterations, seed, search, layerwise)
    groups = [read] if reference == "second_moment" else [[batch] for batch in read]
    with problem.undisturbed(), meter(progress, "reference") as bar:
        bar.expect(len(groups) * (1 + len(given) * seeds))
        runs = [
            run
            for number, group in enumerate(groups)
            for run in _runs(problem, group, number, reference, given, refused, options, seeds, bar)
        ]
    rows = [refused.get(one.label, one) for one in rows]
    return _result(parts, reference, runs, rows, options, read)


def _runs(
    problem: Problem,
    batches: list[Batch],
    number: int,
    name: ReferenceName,
    given: list[Approximation],
    refused: dict[str, Refused],
    options: Options,
    seeds: int,
    bar: Meter,
) -> list[Run]:
    """The runs of a batch, one for each seed."""
    measures = _measures(reference_of(name, problem, batches), options, bar)
    run = Run(problem, batches[-1], number, 0, loss=float(problem.evaluate(batches[-1])[1].detach()))
    found: list[Run] = []
    for seed in range(seeds):
        run = run.of_seed(seed)
        for one in given:
            bar.advance(one.label)
            if one.label in refused or (seed and not found[0].measured[one.label].draws):
                continue
            try:
                measured = measured_of(one, problem, batches, seed, options.repeats, options.dense)
            except (ValueError, RuntimeError) as error:  # it ends this row alone
                if len(given) == 1:
                    raise
                refused[one.label] = Refused(one.label, one.method, str(error))
                continue
            run.measured[one.label] = measured
            measures.of_approximation(run, one.label, measured)
            measured.held.release()
        if not seed:
            dampings = [m.damping for m in run.measured.values() if m.damping is not None]
            measures.of_reference(run, options.damping if options.damping is not None else next(iter(dampings), None))
        found.append(run)
    bar.advance("reference")
    return found


def _measures(reference: Reference, options: Options, bar: Meter) -> Measures:
    return DenseRuns(reference, options) if options.dense else ProbeRuns(reference, options, bar)


def _result(
    layers: Layers,
    reference: ReferenceName,
    runs: list[Run],
    rows: list[Approximation | Refused],
    options: Options,
    batches: list[Batch],
) -> Fidelity:
    first = runs[0].measured
    given = [one for one in rows if isinstance(one, Approximation)]
    refused = {one.label: one.reason for one in rows if isinstance(one, Refused)}
    if not given:
        raise ValueError("; ".join(f"{label}: {reason}" for label, reason in refused.items()))
    kept = [_refused(one) if isinstance(one, Refused) else _kept(one, first[one.label]) for one in rows]
    numbers, seeds = (len({getattr(r, name) for r in runs}) for name in ("number", "seed"))
    groups = f"{numbers} {'batch' if numbers == 1 else 'batches'} of {batches[0].examples}"
    count = f"{groups}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    setting = {
        "reference": reference,
        "parameters": layers.size,
        "how": "dense" if options.dense else f"by {options.probes} probes",
        "runs": count,
        "coupled": [layer.name for layer in layers.layers],
        "device": str(layers.device),
        "dtype": str(layers.parameters[0].dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradmaker": __version__,
        **{k: v for k, v in vars(options).items()},
    }
    told = [{"name": k.name, "kind": k.kind, "parameters": k.size} for k in layers.chosen]
    notes = [f"{label}: refused: {' '.join(reason.split())}" for label, reason in refused.items()]
    notes += notes_of(reference, given, first, len(batches), options.repeats)
    notes += [note for run in runs for note in run.notes]
    return Fidelity(
        setting,
        told,
        kept,
        [v for run in runs for v in run.values if v.approximation not in refused],
        [s for run in runs for s in run.spectra if s.approximation not in refused],
        runs[0].coupling,
        list(dict.fromkeys(notes)),
    )


def _kept(approximation: Approximation, m: Measured) -> Kept:
    damping = float("nan") if m.damping is None else m.damping
    return Kept(approximation.label, approximation.method, str(approximation.config), damping, m.power, m.seconds, m.bytes)


def _refused(one: Refused) -> Kept:
    """A row without numbers."""
    return Kept(one.label, one.method, "refused", float("nan"), float("nan"), float("nan"), 0)
