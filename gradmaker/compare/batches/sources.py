"""Sources of batches: tensors, data sets with a length, and iterables of ready batches."""

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from gradmaker.compare.batches.trees import leaves, moved, rows_of
from gradmaker.compare.errors import InputError

SPLIT_SEED = 0  # splits are part of the data: they are the same in every run and for every method
LEGAL = (
    "a tuple of tensors (inputs, ..., targets), a dictionary of tensors, a datasets split, a torch Dataset or DataLoader, "
    "a list of batches, or a function that returns an iterable of batches"
)


class Source(ABC):
    """Where the batches of a part of the data come from."""

    size: int | None = None
    """Number of examples; None for ready batches."""
    own: int | None = None
    """The batch size that the data come with."""

    @abstractmethod
    def steps(self, batch_size: int) -> int:
        """Number of batches of an epoch."""

    @abstractmethod
    def epoch(self, batch_size: int, seed: int, number: int) -> Iterator[Any]:
        """The batches of an epoch, which depend on seed and number alone."""

    @abstractmethod
    def all(self, batch_size: int) -> Iterator[Any]:
        """Every example once, in order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data."""

    def to(self, device: str) -> "Source":
        """The same source, with data that are held as tensors on a device."""
        return self


class Samples(Source):
    """Examples that are picked by index; the last, smaller batch of an epoch is left out."""

    def __init__(self, index: Tensor, shuffled: bool = True, batch_size: int | None = None) -> None:
        self.index, self.shuffled, self.own = index, shuffled, batch_size
        self.size = len(index)

    def steps(self, batch_size: int) -> int:
        return len(self.index) // self._size(batch_size)

    def epoch(self, batch_size: int, seed: int, number: int) -> Iterator[Any]:
        order = self.order(batch_size, seed, number) if self.shuffled else self.index
        size = self._size(batch_size)
        return self.pick(order[: len(order) // size * size].view(-1, size))

    def all(self, batch_size: int) -> Iterator[Any]:
        return self.pick(self.index.split(batch_size))

    def order(self, batch_size: int, seed: int, number: int) -> Tensor:
        """The shuffled indices of an epoch."""
        drawn = torch.randperm(len(self.index), generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
        return self.index[drawn.to(self.index.device)]

    @abstractmethod
    def pick(self, batches: Any) -> Iterator[Any]:
        """The batches with these indices."""

    @abstractmethod
    def part(self, index: Tensor) -> "Samples":
        """The examples at these places."""

    def _size(self, batch_size: int) -> int:
        return min(batch_size, len(self.index))


class TensorSamples(Samples):
    """Examples along the first dimension of the tensors of a tuple or dictionary."""

    def __init__(self, tensors: Any, index: Tensor | None = None) -> None:
        self.tensors = tensors
        sizes = {len(tensor) for tensor in leaves(tensors)}
        if len(sizes) != 1 or 0 in sizes:
            raise InputError(
                f"the tensors of the data have {', '.join(map(str, sorted(sizes)))} rows: expected one number above 0"
            )
        super().__init__(torch.arange(sizes.pop(), device=leaves(tensors)[0].device) if index is None else index)

    def pick(self, batches: Any) -> Iterator[Any]:
        return (rows_of(self.tensors, rows) for rows in batches)

    def part(self, index: Tensor) -> "TensorSamples":
        return TensorSamples(rows_of(self.tensors, self.index[index.to(self.index.device)]))

    def to(self, device: str) -> "TensorSamples":
        return TensorSamples(moved(self.tensors, device), self.index.to(device))

    def fingerprint(self) -> str:
        return hashed(self.tensors)


class ItemSamples(Samples):
    """Items of a data set with a length, collated as a `DataLoader` would; `loading` has options of a loader."""

    def __init__(self, items: Any, index: Tensor, loading: Mapping[str, Any], **own: Any) -> None:
        super().__init__(index, **own)
        self.items, self.loading, self.kept = items, loading, own

    def pick(self, batches: Any) -> Iterator[Any]:
        listed = [rows.tolist() for rows in batches]
        # a loader draws a seed for its workers from the generator
        loader = DataLoader(self.items, batch_sampler=listed, generator=torch.Generator().manual_seed(0), **self.loading)
        return iter(loader)

    def part(self, index: Tensor) -> "ItemSamples":
        return ItemSamples(self.items, self.index[index], self.loading, **self.kept)

    def epoch(self, batch_size: int, seed: int, number: int) -> Iterator[Any]:
        return apart(super().epoch(batch_size, seed, number), seed * 1_000_003 + number)

    def fingerprint(self) -> str:
        ends = [self.items[int(self.index[place])] for place in (0, len(self.index) // 2, -1)]
        return hashed([self.index, *ends])


class ReadyBatches(Source):
    """An iterable of batches, or a function that returns one."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.length: int | None = None

    def steps(self, batch_size: int) -> int:
        if self.length is None:
            try:
                self.length = len(self._epoch())
            except TypeError:  # it has no length, or its data set has none
                self.length = sum(1 for _ in self.all(batch_size))
            if not self.length:
                raise InputError("the data have no batch")
        return self.length

    def epoch(self, batch_size: int, seed: int, number: int) -> Iterator[Any]:
        own = getattr(self.batches, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(seed * 1_000_003 + number)
        return apart(self._epoch(), seed * 1_000_003 + number)

    def all(self, batch_size: int) -> Iterator[Any]:
        return apart(self._epoch(), SPLIT_SEED)

    def fingerprint(self) -> str:
        return hashed(next(self.all(0), None))

    def _epoch(self) -> Any:
        return self.batches() if callable(self.batches) else self.batches


def apart(batches: Any, seed: int) -> Iterator[Any]:
    """The batches, with torch's global generator at a state of their own while they are made: methods draw from it, too."""
    state = torch.Generator().manual_seed(seed).get_state()
    source: Iterator[Any] | None = None
    while True:
        with _generator(state) as kept:
            source = iter(batches) if source is None else source
            try:
                batch = next(source)
            except StopIteration:
                return
        state = kept[0]
        yield batch


@contextmanager
def _generator(state: Tensor) -> Iterator[list[Tensor]]:
    before, kept = torch.get_rng_state(), [state]
    torch.set_rng_state(state)
    try:
        yield kept
    finally:
        kept[0] = torch.get_rng_state()
        torch.set_rng_state(before)


def source_of(given: Any, what: str) -> Source:
    """The source of a part of a task. InputError for what is none of the legal forms."""
    if isinstance(given, (tuple, Tensor)) or (isinstance(given, Mapping) and not hasattr(given, "column_names")):
        return _tensors(given, what)
    if isinstance(given, DataLoader):
        return _loader(given)
    if isinstance(given, list):
        return _listed(given, what)
    if isinstance(given, IterableDataset) or (callable(given) and not isinstance(given, Dataset)):
        return ReadyBatches(given)
    if hasattr(given, "__getitem__") and isinstance(given, Sized):
        return _items(given, what)
    if isinstance(given, Iterator):
        raise InputError(f"{what}: an iterator is used up after one epoch: give a function that returns it")
    if hasattr(given, "__iter__"):
        return ReadyBatches(given)
    raise InputError(f"{what}: expected {LEGAL}, got {type(given).__name__}")


def divided(source: Source, fraction: float) -> tuple[Source, Source]:
    """Training and validation part: a random share of the examples, the same in every run. InputError where that cannot be."""
    if not isinstance(source, Samples):
        raise InputError(
            "train is an iterable of batches, of which no validation part can be held out: give Task(validation=...)"
        )
    size = len(source.index)
    held = max(1, round(fraction * size))
    if not 0 < fraction < 1 or held >= size:
        raise InputError(f"validation={fraction}: expected a fraction in (0, 1) that splits {size} samples in two parts")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return source.part(order[held:]), source.part(order[:held])


def hashed(value: Any) -> str:
    """A hash of tensors, or else of what pickle makes of a value."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in leaves(value, tensors_only=False):
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            digest.update(
                leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if leaf.numel() else b""
            )
        else:
            digest.update(pickle.dumps(leaf))
    return digest.hexdigest()


def _tensors(given: Any, what: str) -> Source:
    found = leaves(given, tensors_only=False)
    if not found or any(not isinstance(leaf, Tensor) or not leaf.dim() for leaf in found):
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in found if not isinstance(leaf, Tensor))) or "no rows"
        raise InputError(f"{what}: a tuple or dictionary holds tensors with one row for each example, got {kinds}")
    return TensorSamples(given)


def _listed(given: list[Any], what: str) -> Source:
    if not given:
        raise InputError(f"{what}: the list of batches is empty")
    if all(isinstance(item, Tensor) for item in given) and len({(item.dtype, item.dim()) for item in given}) > 1:
        raise InputError(f"{what}: a list holds batches; inputs and targets are a tuple (inputs, ..., targets)")
    return ReadyBatches(given)


def _loader(loader: Any) -> Source:
    sampler = loader.sampler
    plain = loader.batch_size is not None and isinstance(sampler, (RandomSampler, SequentialSampler))
    if isinstance(loader.dataset, IterableDataset) or not plain or getattr(sampler, "replacement", False):
        return ReadyBatches(loader)
    kept = {name: getattr(loader, name) for name in ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context")}
    index = torch.arange(len(loader.dataset))
    return ItemSamples(loader.dataset, index, kept, shuffled=isinstance(sampler, RandomSampler), batch_size=loader.batch_size)


def _items(given: Any, what: str) -> Source:
    if not len(given):
        raise InputError(f"{what}: the data are empty")
    if hasattr(given, "with_format") and hasattr(given, "column_names"):
        given = given if (getattr(given, "format", None) or {}).get("type") == "torch" else given.with_format("torch")
    return ItemSamples(given, torch.arange(len(given)), {"collate_fn": default_collate})
