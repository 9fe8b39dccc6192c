"""Search, repeat: every training is saved as soon as it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import GradientMaker
from gradmaker.compare.errors import InputError
from ud_tagger.methods import METHODS
from ud_tagger.model import Tagger
from ud_tagger.setting import Point, Setting
from ud_tagger.treebank import IGNORED, Rows, Treebank, batches, collate

__all__ = ["Results", "accuracy", "run", "step", "train"]


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, device: str) -> float:
    """Share of the tokens whose tag is right."""
    model.eval()
    right = total = 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for k in range(0, len(ordered), 256):
        x, t = (tensor.to(device) for tensor in collate(ordered[k : k + 256]))
        right += int((model(x).argmax(-1) == t).sum())
        total += int((t != IGNORED).sum())
    model.train()
    return right / total


def train(method: str, point: Point, seed: int, s: Setting, data: Treebank, device: str, test: bool) -> dict[str, Any]:
    """One training. Its dev accuracy is the best of its evaluations; test accuracy is that of the same weights."""
    torch.manual_seed(seed)
    model = Tagger(s, data.words, data.tags).to(device)
    maker, optimizer = METHODS[method](model, point, s)
    stream = batches(data.parts["train"], s.batch_size, seed)
    record: dict[str, Any] = {"status": "finished", "curve": [], "dev": 0.0, "seconds": 0.0}
    best, losses, clock = None, [], process_time if device == "cpu" else perf_counter
    for t in range(1, s.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = point["lr"] * s.share(t, point["warmup"])
        started = clock()
        losses.append(float(step(maker, optimizer, *(tensor.to(device) for tensor in next(stream)))))
        record["seconds"] += clock() - started
        if not math.isfinite(losses[-1]):
            record["status"] = "diverged"
            break
        if t % s.evaluate_every == 0 or t == s.steps:
            dev = accuracy(model, data.parts["validation"], device)
            record["curve"].append([t, dev, sum(losses) / len(losses)])
            losses.clear()
            if dev > record["dev"]:
                record["dev"], best = dev, deepcopy(model.state_dict())
    if test and best is not None:
        model.load_state_dict(best)
        record["test"] = accuracy(model, data.parts["test"], device)
    return {**record, "skipped": getattr(maker, "skipped", 0)}


def step(maker: GradientMaker, optimizer: torch.optim.Optimizer, x: Tensor, tags: Tensor) -> Tensor:
    """One step; the mean is over tokens. Returns the loss."""
    optimizer.zero_grad()
    y = maker.setup_model_call(maker.model, x)
    maker.setup_loss_call(F.cross_entropy, y.flatten(0, 1), tags.flatten())
    _, loss = maker.forward_and_backward()
    optimizer.step()
    return loss


class Results:
    """Finished trainings in a file, each saved as soon as it ends."""

    def __init__(self, file: Path, head: dict[str, Any]) -> None:
        self.file, self.content = file, {**head, "trainings": []}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))
            if {key: self.content[key] for key in head} != json.loads(json.dumps(head)):
                raise InputError(f"{file} holds results of another setting or treebank: give another --out, or remove it")

    def get(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The training of that key, now or from before."""
        for record in self.content["trainings"]:
            if {name: record[name] for name in key} == key:
                return record
        record = {**key, **make()}
        self.content["trainings"].append(record)
        self.save()
        print(*key.values(), f"dev {100 * record['dev']:.2f} %", record["status"], f"{record['seconds']:.0f} s", flush=True)
        return record

    def describe(self, machine: dict[str, Any]) -> None:
        """Say what ran it, once all is there."""
        if "machine" not in self.content:
            self.content["machine"] = machine
            self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.file)


def run(s: Setting, data: Treebank, results: Results, device: str) -> None:
    """The search, trial by trial, then the chosen configurations, seed by seed."""

    def result(method: str, phase: str, number: int, point: Point) -> dict[str, Any]:
        """Numbers are those of trials, which all have seed 0, or seeds of final trainings, which alone see the test part."""
        final = phase == "final"
        make = partial(train, method, point, number if final else 0, s, data, device, final)
        return results.get({"method": method, "phase": phase, "number": number}, lambda: {"point": point, **make()})

    search: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for number, point in enumerate(s.points()):
        for method in METHODS:
            search[method].append(result(method, "search", number, point))
    chosen = {method: choose(method, records) for method, records in search.items()}
    for seed in range(1, s.seeds + 1):
        for method, point in chosen.items():
            result(method, "final", seed, point)


def choose(method: str, records: list[dict[str, Any]]) -> Point:
    """The configuration with the best dev accuracy of those that did not diverge."""
    ended = [record for record in records if record["status"] == "finished"]
    if not ended:
        raise InputError(f"{method}: every configuration diverged; lower the range of lr")
    point: Point = max(ended, key=lambda record: record["dev"])["point"]
    return point
