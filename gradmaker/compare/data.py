"""Data sets as four tensors: digits of scikit-learn, and MNIST and CIFAR-10 from the hub or a local folder."""

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmaker.compare.batches.sources import SPLIT_SEED
from gradmaker.compare.errors import InputError, require_extra
from gradmaker.options.suggestions import did_you_mean

IMAGES = {"mnist": ("ylecun/mnist", "image"), "cifar10": ("uoft-cs/cifar10", "img")}  # hub name, image column
NAMES = ("digits", *IMAGES)


@dataclass(frozen=True)
class Data:
    """Training and test data of a supervised problem. Integer targets are classes; floating targets are regression values."""

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            inputs, targets = getattr(self, f"{part}_inputs"), getattr(self, f"{part}_targets")
            if len(inputs) != len(targets) or not len(inputs):
                raise InputError(f"data {self.name!r}: {len(inputs)} {part} inputs do not match {len(targets)} {part} targets")


def load(name: str, folder: str | Path | None = None) -> Data:
    """Load a data set by name.

    Args:
        folder: contains train.parquet and test.parquet, or a folder of the data's name with them. Default: the environment
            variable GRADMAKER_DATA, else the Hugging Face hub. Not used by digits.

    InputError for an unknown name, or files that cannot be read.
    """
    if name not in NAMES:
        raise InputError(f"data={name!r}: {did_you_mean(name, NAMES)}")
    data = digits() if name == "digits" else _images(name, folder or os.environ.get("GRADMAKER_DATA"))
    return _standardised(data)


def digits() -> Data:
    """scikit-learn's 8x8 digits: 1437 training and 360 test samples, stratified, scaled to [0, 1]."""
    require_extra(["sklearn"])
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=360, stratify=labels, random_state=SPLIT_SEED)
    train, test, train_labels, test_labels = (torch.as_tensor(part) for part in parts)
    return Data("digits", *_shaped(train, train_labels, 8), *_shaped(test, test_labels, 8))


def _shaped(images: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    return images.float().view(len(images), 1, side, side), labels.long()


def _standardised(data: Data) -> Data:
    """The data with mean 0 and variance 1 per channel, computed on the training images."""
    axes = (0, *range(2, data.train_inputs.dim()))
    deviation, mean = torch.std_mean(data.train_inputs, dim=axes, keepdim=True, correction=0)
    train, test = ((inputs - mean) / deviation for inputs in (data.train_inputs, data.test_inputs))
    return replace(data, train_inputs=train, test_inputs=test)


def _images(name: str, folder: str | Path | None) -> Data:
    require_extra(["datasets", "PIL"])
    hub, column = IMAGES[name]
    loaded = _load_dataset(hub) if folder is None else _load_dataset("parquet", data_files=_parquet_files(name, Path(folder)))
    return Data(name, *(tensor for part in ("train", "test") for tensor in _decoded(loaded[part], column)))


def _load_dataset(path: str, **options: Any) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        return load_dataset(path, **options)
    except Exception as error:  # the hub client raises many types for a failed download
        raise InputError(
            f"could not load {path!r} ({type(error).__name__}: {str(error).splitlines()[0][:160]}); check the network, "
            "or name a local folder by --data-dir or GRADMAKER_DATA"
        ) from error


def _parquet_files(name: str, folder: Path) -> dict[str, str]:
    """The local files, in `folder` or in its sub-folder of the data's name. InputError where one is missing."""
    home = folder / name if (folder / name).is_dir() else folder
    files = {part: home / f"{part}.parquet" for part in ("train", "test")}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise InputError(f"the data folder {str(home)!r} lacks {' and '.join(missing)}")
    return {part: str(file) for part, file in files.items()}


def _decoded(part: Any, column: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] as (n, channels, height, width) and labels of a Hugging Face split. InputError without a column."""
    import numpy
    from datasets import Image
    from PIL import Image as Pillow

    column = column if column in part.column_names else "image"
    if missing := {column, "label"} - set(part.column_names):
        raise InputError(f"the data have no column {' and '.join(sorted(missing))}; they have {', '.join(part.column_names)}")
    encoded = part.cast_column(column, Image(decode=False))[column]
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(Pillow.open(io.BytesIO(row["bytes"]))) for row in encoded]))
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.float().div_(255).contiguous(), torch.as_tensor(part["label"][:], dtype=torch.long)
