"""A document with everything in it: twenty rows, all kinds of marks, names that HTML must not read."""

from __future__ import annotations

import math

from gradmaker.reporting import (
    Axis,
    Code,
    Column,
    Document,
    Facts,
    Figure,
    HeatMap,
    Rule,
    Section,
    Series,
    Table,
    Text,
)

ROWS = [f"method {k}" for k in range(19)] + ["<b>K-FAC</b> & 'co'"]
STEPS = [1, 10, 100, 1000]
PARTS = ("forward and backward", "refresh")
LAYERS = ("conv1", "fc")


def curve(k: int) -> Series:
    """A loss with a gap and a band."""
    loss = [2.0, 1.0 / (k + 1), None if k == 3 else 0.1, 0.01 * (k + 1)]
    low, high = ([None if y is None else y * by for y in loss] for by in (0.9, 1.1))
    return Series(ROWS[k], STEPS, loss, low, high)


def point(k: int) -> Series:
    accuracy = 0.9 + 0.004 * k
    return Series(ROWS[k], [1 + 0.2 * k], [accuracy], [accuracy - 0.01], [accuracy + 0.01], {"rate": [0.1]}, "points")


def summary() -> Table:
    columns = (
        Column("method", kind="row"),
        Column("accuracy", "test accuracy", "percent", ".2f", spread="std", best="high", help="mean over seeds"),
        Column("time", kind="seconds", best="low"),
        Column("memory", kind="bytes"),
        Column("ratio", "time / SGD", format=".2f"),
        Column("note", kind="text"),
    )
    rows = [
        {
            "method": name,
            "accuracy": 0.9 + 0.004 * k if k != 4 else math.nan,
            "std": 0.002,
            "time": 1e-3 * (20 - k) ** 2,
            "memory": 1e6 * (k + 1),
            "ratio": None if k == 5 else 1 + k / 10,
            "note": "rate at the edge of its grid" if k % 5 == 0 else "",
        }
        for k, name in enumerate(ROWS)
    ]
    return Table("summary", "Summary", columns, rows, "All rows.", marked=[ROWS[0]])


def document() -> Document:
    curves = [curve(k) for k in range(len(ROWS))]
    front = Series("", [1, 4.8], [0.9, 0.976], mark="step")
    bars = [Series(part, [1.0 + k for k in range(3)], ROWS[:3], mark="bars") for part in PARTS]
    errors = [[None if row == 1 else 0.01 * (row + 1) * (layer + 1) for layer in range(2)] for row in range(3)]
    trials = Table(
        "trials", "All trainings", [Column("method", kind="row")], [{"method": name} for name in ROWS], collapsed=True
    )
    return Document(
        title="Twenty methods </script> on digits",
        answer=["Method 1 reaches a loss of 0.1 first.", "It takes 1.2 times the time of SGD."],
        sections=[
            Section("Summary", [summary()]),
            Section(
                "Figures",
                [
                    Figure("loss", "Training loss", Axis("step", "log"), Axis("loss", "log"), curves, "Lines: means."),
                    Figure(
                        "pareto",
                        "Accuracy against time",
                        Axis("time / SGD", "log"),
                        Axis("accuracy", format=".1%"),
                        [*(point(k) for k in range(len(ROWS))), front],
                        rules=[Rule(0.95, "target"), Rule(2.0, "twice", "x")],
                    ),
                    Figure("parts", "Parts of a step", Axis("ms", zero=True), Axis("", "category"), bars),
                    HeatMap("errors", "Errors", LAYERS, ROWS[:3], errors, "relative error", scale="log"),
                ],
            ),
            Section(
                "More", [Text(["one", "two"], bullets=True), Facts({"epochs": "20"}), Code("x: 1", "config", True), trials]
            ),
        ],
        lead="20 methods",
        warning="Interrupted.",
        rows=ROWS,
        notes=["One seed."],
        machine={"processor": "any"},
        command="gradmaker compare 'a b'",
        files={"kfac": "method: kfac"},
    )
