"""Defaults of the commands for each data set."""

from dataclasses import dataclass

__all__ = ["HIDDEN", "PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Default model and training options for a data set, and the shape of an example."""

    shape: tuple[int, ...]
    model: str
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    threads: int | None = None  # None: torch's choice


PRESETS = {
    "digits": Preset((1, 8, 8), "mlp", (32, 32), 20, 64, threads=1),  # small enough for methods with one dense matrix
    "mnist": Preset((1, 28, 28), "mlp", (512, 512), 5, 512),  # the MLP of the case study of Osawa et al. 2023, arXiv:2305.04684
    "cifar10": Preset((3, 32, 32), "conv", (32, 64, 128), 10, 256),
}
HIDDEN: dict[str, tuple[int, ...]] = {"mlp": (128, 128), "conv": (32, 64)}  # for a --model other than that of the preset
