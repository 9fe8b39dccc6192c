"""The text as indices of its characters, its batches and its windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradmaker.compare.errors import InputError

__all__ = ["Text", "batch", "encode", "read_text", "windows"]

HUB = "hf://datasets/karpathy/tiny_shakespeare@refs/convert/parquet/default/{part}/*.parquet"
NAME = "tinyshakespeare"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Text:
    """Indices of characters; the first nine tenths train, the next twentieth chooses, the last is the test part."""

    characters: str
    train: Tensor
    validation: Tensor
    test: Tensor


def read_text(folder: Path | None) -> Text:
    """Karpathy's tiny Shakespeare, from a folder with input.txt or from the hub."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    if folder is None:
        loaded = load_dataset("parquet", data_files={part: HUB.format(part=part) for part in PARTS})
        return encode("".join(row for part in PARTS for row in loaded[part]["text"]))
    loaded = load_dataset("text", data_files={"train": _file(folder)}, sample_by="document")
    return encode("".join(loaded["train"]["text"]))


def _file(folder: Path) -> str:
    """In the folder itself, or in its sub-folder of the data's name. InputError where there is none."""
    home = folder / NAME if (folder / NAME).is_dir() else folder
    if not (home / "input.txt").is_file():
        raise InputError(f"the data folder {str(home)!r} lacks input.txt")
    return str(home / "input.txt")


def encode(text: str) -> Text:
    """The vocabulary is that of the whole text."""
    characters = "".join(sorted(set(text)))
    index = {c: k for k, c in enumerate(characters)}
    ids = torch.tensor([index[c] for c in text])
    first, second = int(0.9 * len(ids)), int(0.95 * len(ids))
    return Text(characters, ids[:first], ids[first:second], ids[second:])


def batch(part: Tensor, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows at random places, and the characters that follow each of theirs.  # (size, context) twice"""
    places = torch.randint(len(part) - context, (size, 1), generator=generator) + torch.arange(context)
    return part[places], part[places + 1]


def windows(part: Tensor, context: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Windows side by side, all or so many of them at equal distances.  # (n, context) twice"""
    count = (len(part) - 1) // context
    if count < 1:
        raise InputError(f"a part of the text has {len(part)} characters: a window needs {context + 1}")
    kept = torch.arange(count) if most is None or most >= count else torch.arange(most) * count // most
    places = kept[:, None] * context + torch.arange(context)
    return part[places], part[places + 1]
