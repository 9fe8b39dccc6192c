"""The treebank as indices, and its batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmaker.compare.errors import InputError
from ud_tagger.setting import Setting

__all__ = ["IGNORED", "PAD", "PARTS", "Rows", "Treebank", "batches", "collate", "encode", "read_treebank"]

HUB = "hf://datasets/universal-dependencies/universal_dependencies@refs/convert/parquet/en_ewt/{part}/*.parquet"
NAME = "ud_english_ewt"
PARTS = ("train", "validation", "test")
PAD, UNKNOWN, IGNORED = 0, 1, -100
Rows = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Treebank:
    """Sentences as word and tag indices; a tag that the training part lacks has the index `tags`."""

    words: int
    tags: int
    parts: dict[str, Rows]

    def tokens(self, part: str) -> int:
        return sum(len(x) for x, _ in self.parts[part])


def read_treebank(setting: Setting, folder: Path | None) -> Treebank:
    """Words (lower case) and language-specific tags (xpos), from a folder with train.parquet and so on, or from the hub."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    loaded = load_dataset("parquet", data_files=_files(folder))
    sentences = {part: list(zip(loaded[part]["tokens"], loaded[part]["xpos"], strict=True)) for part in PARTS}
    random.Random("sentences").shuffle(sentences["train"])
    del sentences["train"][max(1, round(setting.fraction * len(sentences["train"]))) :]
    return encode(sentences, setting)


def _files(folder: Path | None) -> dict[str, str]:
    """On the hub, in the folder itself, or in its sub-folder of the treebank's name."""
    if folder is None:
        return {part: HUB.format(part=part) for part in PARTS}
    home = folder / NAME if (folder / NAME).is_dir() else folder
    if missing := [f"{part}.parquet" for part in PARTS if not (home / f"{part}.parquet").is_file()]:
        raise InputError(f"the data folder {str(home)!r} lacks {' and '.join(missing)}")
    return {part: str(home / f"{part}.parquet") for part in PARTS}


def encode(sentences: dict[str, list[tuple[list[str], list[str]]]], setting: Setting) -> Treebank:
    """Vocabulary and tags are those of the training part; a tag that is missing ('_') counts nowhere."""
    counts = Counter(word.lower() for words, _ in sentences["train"] for word in words)
    kept = sorted(word for word, n in counts.items() if n >= setting.least)
    known = {word: 2 + k for k, word in enumerate(kept)}
    names = sorted({tag for _, tags in sentences["train"] for tag in tags if tag not in (None, "_")})
    index = {tag: k for k, tag in enumerate(names)} | {"_": IGNORED, None: IGNORED}
    parts = {
        part: [
            (
                torch.tensor([known.get(word.lower(), UNKNOWN) for word in words[: setting.length]]),
                torch.tensor([index.get(tag, len(names)) for tag in tags[: setting.length]]),
            )
            for words, tags in rows
        ]
        for part, rows in sentences.items()
    }
    return Treebank(2 + len(kept), len(names), parts)


def collate(rows: Rows) -> tuple[Tensor, Tensor]:
    """Words and tags of some sentences, as long as the longest.  # (n, l), (n, l)"""
    words, tags = zip(*rows, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(list(words), True, PAD), pad(list(tags), True, IGNORED)


def batches(rows: Rows, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: each epoch in another order, cut into batches of sentences of similar length (of pools of 8 batches)."""
    generator = random.Random(f"batches {seed}")
    size = min(size, len(rows))
    while True:
        order = generator.sample(range(len(rows)), len(rows))
        pools = [sorted(order[k : k + 8 * size], key=lambda i: len(rows[i][0])) for k in range(0, len(order), 8 * size)]
        cut = [pool[k : k + size] for pool in pools for k in range(0, len(pool) - size + 1, size)]
        generator.shuffle(cut)
        yield from (collate([rows[i] for i in batch]) for batch in cut)
