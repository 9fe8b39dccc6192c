"""Accelerate: `prepare`, `accumulate`, mixed precision, scalers, clipping, `save_state` and `load_state`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradmaker as gm
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.recipes.watched import METHODS, Micro, Watch, close, equal
from tests.test_state import equal_states

pytestmark = pytest.mark.usefixtures("accelerate_anew")


class Tokens(nn.Module):
    """Labels shifted by the loop: the logits of a token are those of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.embed(x)))


def network() -> Tokens:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Tokens().double()


def loss_of(z: Tensor, x: Tensor) -> Tensor:
    """The mean over the next tokens, without those that are masked."""
    return F.cross_entropy(z[:, :-1].flatten(0, 1), x[:, 1:].masked_fill(x[:, 1:] == 0, -100).flatten())


def masked_loss_of(z: Tensor, x: Tensor) -> Tensor:
    """The same, with a term for each position, as the layers have it: which ones enter ``A`` is seen in either way."""
    return F.cross_entropy(z.flatten(0, 1), F.pad(x[:, 1:].masked_fill(x[:, 1:] == 0, -100), (0, 1), value=-100).flatten())


class Run:
    """A loop as Accelerate's documentation has it."""

    def __init__(self, method: str, accumulation: int = 1, network: Any = network, scaler: Any = None, **options: Any) -> None:
        line = {**METHODS[method], **options.pop("line", {})}
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
        self.accelerator.scaler = scaler
        model = network()
        self.own = gm.optimizer(model, method, **line, scaler=scaler)
        self.watch = Watch(self.own)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.own, 60)
        generator = torch.Generator().manual_seed(5)
        rows = torch.randint(9, (56, 6), generator=generator)
        loader: Any = DataLoader(TensorDataset(rows), batch_size=8)  # seven batches
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(model, self.own, loader, schedule)
        self.seen: list[Tensor] = []
        self.max_norm: float | None = None

    def epoch(self) -> None:
        for (x,) in self.loader:
            self.seen.append(x)
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model(x), x))
                if self.max_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

    def micros(self, accumulation: int) -> list[list[Micro]]:
        """A short group at the end of an epoch is divided by the same number."""
        found = []
        for start in range(0, len(self.seen), 7):
            epoch = [Micro(x, 1 / accumulation) for x in self.seen[start : start + 7]]
            found += [epoch[j : j + accumulation] for j in range(0, 7, accumulation)]
        return found


def outside(maker: Any, model: nn.Module, batch: Any) -> None:
    maker.setup_loss_call(masked_loss_of, maker.setup_model_call(model, batch), batch)


# --- the same steps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_loop(method: str, accumulation: int) -> None:
    made = Run(method, accumulation)
    for _ in range(2 if accumulation > 1 else 1):
        made.epoch()
    assert len(made.watch.gradients) == (4 if accumulation > 1 else 7)
    close(made.watch.gradients, made.watch.declared(made.micros(accumulation), outside))


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    made = Run(method, 4, lambda: network().float(), mixed_precision="bf16")
    made.epoch()

    def declare(maker: Any, model: nn.Module, batch: Any) -> None:
        def call(x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                z = model(x)
            return z.float()

        maker.setup_loss_call(masked_loss_of, maker.setup_model_call(call, batch), batch)

    close(made.watch.gradients, made.watch.declared(made.micros(4), declare), 1e-3)
    assert not made.own.maker.silent()


@pytest.mark.parametrize("method", ["kfac", "soap"])
def test_the_scaler_of_the_accelerator(method: str) -> None:
    """As with ``mixed_precision="fp16"``: steps with an infinite gradient are left out, as if they had not been."""
    made, plain = (Run(method, 4, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**13)) for _ in range(2))
    made.epoch()
    close(made.watch.gradients, made.watch.declared(made.micros(4), outside))
    hook = made.model.head.weight.register_hook(lambda g: g * float("inf"))
    made.epoch()
    hook.remove()
    assert made.optimizer.step_was_skipped and made.accelerator.scaler.get_scale() == 2.0**11
    made.epoch()
    for _ in range(2):
        plain.epoch()
    assert made.own.maker.step == plain.own.maker.step == 4
    assert equal(made.model, plain.model) and equal_states(made.own.state_dict(), plain.own.state_dict())


# --- clipping -------------------------------------------------------------------------------------------------------------
def test_clipping_by_the_accelerator_is_that_of_raw_gradients() -> None:
    made = Run("soap")
    made.max_norm = 1e-3
    with pytest.warns(ChangedGradientWarning, match="as by clipping"):
        made.epoch()


def test_clipping_of_the_step() -> None:
    made = Run("soap", line={"max_norm": 0.5})
    made.max_norm = float("inf")  # to read the norm
    made.epoch()
    norms = [torch.stack([g.norm() for g in step.values()]).norm() for step in made.watch.gradients]
    torch.testing.assert_close(torch.stack(norms), torch.full((7,), 0.5, dtype=torch.float64), rtol=1e-4, atol=0.0)


# --- saved and resumed ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_bitwise(method: str, tmp_path: Path) -> None:
    line = {"max_norm": 0.5}
    whole = Run(method, 2, line=line)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    resumed = Run(method, 2, line=line)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    assert resumed.own.maker.step == 8 and equal(resumed.model, whole.model)
    assert equal_states(resumed.own.state_dict(), whole.own.state_dict())
