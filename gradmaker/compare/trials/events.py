"""TensorBoard event files of all trainings."""

import re

from gradmaker.compare.result import Comparison
from gradmaker.compare.trial import Record

FOLDER = "tensorboard"


def write_events(comparison: Comparison) -> None:
    """Write a run for every training into the folder `tensorboard` beside the report; what is there already stays."""
    from torch.utils.tensorboard import SummaryWriter

    for record in comparison.records():
        folder = comparison.out / FOLDER / run_name(record)
        if not folder.exists():
            with SummaryWriter(str(folder)) as writer:
                _write(writer, record)
    comparison.files["tensorboard"] = comparison.out / FOLDER


def run_name(record: Record) -> str:
    """The folder of a training: label, learning rate, seed, and the start of its key."""
    label = re.sub(r"[^\w.-]+", "_", record.label)
    return f"{label}/lr{record.learning_rate:g}-seed{record.seed}-{record.key[:6]}"


def _write(writer: object, record: Record) -> None:
    curves = {"train/loss": (record.curve_steps, record.curve_loss)}
    for part in ("validation", "test"):
        curves |= {f"{part}/{name}": (list(map(float, record.marks)), values) for name, values in getattr(record, part).items()}
    for name, (steps, values) in curves.items():
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                writer.add_scalar(name, value, int(step))  # type: ignore[attr-defined]
