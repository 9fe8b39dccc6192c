"""Trainings: each is saved in a file of its own as soon as it ends."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from subprocess import CalledProcessError, run as run_command
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from char_gpt.model import Gpt
from char_gpt.rows import ROWS
from char_gpt.setting import Setting
from char_gpt.text import Text, batch, windows
from gradmaker.compare.errors import InputError

__all__ = ["Trainings", "choose", "evaluate", "final", "search", "train"]

Record = dict[str, Any]
SEARCH_SEED = 0
"""Of all trainings that choose learning rates; those that are reported have the seeds 1, 2, ..."""


@torch.no_grad()
def evaluate(model: Gpt, x: Tensor, t: Tensor) -> float:
    """Mean cross-entropy of a character, in nats."""
    parts = zip(x.split(64), t.split(64), strict=True)
    total = sum(float(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum")) for a, b in parts)
    return total / t.numel()


def train(row: str, lr: float, seed: int, s: Setting, text: Text, device: str, last: bool) -> Record:
    """One training; one seed means the same initial parameters and the same batches for all rows."""
    torch.manual_seed(seed)
    model = Gpt(s, len(text.characters)).to(device)
    generator = torch.Generator().manual_seed(seed)
    held_out = [tensor.to(device) for tensor in windows(text.validation, s.context, s.windows)]
    steps, every = (s.steps, s.evaluate_every) if last else (s.trial_steps, s.trial_steps)
    optimizers = ROWS[row].build(model, lr, s)
    schedules = [LambdaLR(optimizer, lambda k: s.share(k + 1, steps)) for optimizer in optimizers]
    seconds, clock = 0.0, process_time if device == "cpu" else perf_counter
    record: Record = {"status": "finished", "curve": [], "commit": commit()}
    for t in range(1, steps + 1):
        x, y = (tensor.to(device) for tensor in batch(text.train, s.batch_size, s.context, generator))
        started = clock()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        value = float(loss.detach())
        seconds += clock() - started
        if not math.isfinite(value):
            return {**record, "status": "diverged", "seconds": seconds}
        if t % every == 0 or t == steps:
            record["curve"].append([t, round(seconds, 3), round(evaluate(model, *held_out), 6)])
    record |= {"validation": record["curve"][-1][2], "seconds": seconds}
    if not math.isfinite(record["validation"]):
        return {**record, "status": "diverged", "curve": [], "validation": None}
    if last:
        record["test"] = evaluate(model, *(tensor.to(device) for tensor in windows(text.test, s.context)))
    return record


def commit() -> str | None:
    """Of the checkout that is run, if it is one."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return run_command(command, cwd=Path(__file__).parent, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, CalledProcessError):
        return None


class Trainings:
    """The trainings in a folder: those of before are read, the others are run and saved."""

    def __init__(self, folder: Path, setting: Setting, text: Text, device: str) -> None:
        self.folder, self.setting, self.text, self.device = folder, setting, text, device
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, row: str, lr: float, seed: int) -> Record:
        """InputError for a training of another setting."""
        last = seed != SEARCH_SEED
        key = {"row": row, "phase": "final" if last else "search", "lr": lr, "seed": seed}
        head = {"setting": asdict(self.setting), "characters": len(self.text.train)}
        file = self.folder / f"{row}-{key['phase']}-{lr:g}-{seed}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if {name: found[name] for name in head} != head:
                raise InputError(f"{file} is a training of another setting or text: give another --out, or remove it")
        else:
            found = {**head, **key, **train(row, lr, seed, self.setting, self.text, self.device, last)}
            draft = file.with_suffix(".part")
            draft.write_text(json.dumps(found) + "\n", encoding="utf-8")
            draft.replace(file)
            print(*key.values(), found["status"], found.get("validation"), f"{found['seconds']:.0f} s", flush=True)
        return {name: value for name, value in found.items() if name not in head}


def search(row: str, trainings: Trainings) -> list[Record]:
    """The trials of a row: its grid, and further rates while the best is at an end. InputError if all diverged."""
    rates = sorted(ROWS[row].rates)
    ratio, most = rates[1] / rates[0], len(rates) + trainings.setting.extensions
    while True:
        records = [trainings.get(row, lr, SEARCH_SEED) for lr in rates]
        best = choose(row, records)
        if best not in (rates[0], rates[-1]) or len(rates) == most:
            return records
        rates = [float(f"{rates[0] / ratio:.3g}"), *rates] if best == rates[0] else [*rates, float(f"{best * ratio:.3g}")]


def final(row: str, tried: list[Record], trainings: Trainings) -> list[Record]:
    """The trainings with the chosen learning rate."""
    lr = choose(row, tried)
    return [trainings.get(row, lr, SEARCH_SEED + k) for k in range(1, trainings.setting.seeds + 1)]


def choose(row: str, records: list[Record]) -> float:
    """The learning rate with the lowest validation loss."""
    ended = [r for r in records if r["status"] == "finished"]
    if not ended:
        raise InputError(f"{row}: every learning rate diverged")
    return float(min(ended, key=lambda r: r["validation"])["lr"])
