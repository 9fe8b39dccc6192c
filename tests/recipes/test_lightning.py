"""Lightning: automatic and manual optimization, accumulation, schedules, clipping, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradmaker as gm
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.recipes.watched import METHODS, Micro, Watch, close, equal
from tests.registry import from_the_first
from tests.test_state import equal_states


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Classifier(L.LightningModule):
    """Keeps its batches."""

    def __init__(self, method: str, **options: Any) -> None:
        super().__init__()
        self.model, self.method, self.options = network(), method, {**METHODS[method], **options}
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.optimizer: Any = None
        self.watch: Any = None

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(batch)
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        self.optimizer = gm.optimizer(self.model, self.method, **self.options)
        self.watch = Watch(self.optimizer)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Classifier):
    """Four micro-batches a step, or those that are left; each is divided by the module itself."""

    def __init__(self, method: str, closure: bool = False) -> None:
        super().__init__(method)
        self.automatic_optimization, self.closure = False, closure

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        if self.closure:
            optimizer.step(closure=lambda: self.manual_backward(self.loss(batch)))
            optimizer.zero_grad()
            return
        self.manual_backward(self.loss(batch) / 4)
        if (index + 1) % 4 == 0 or self.trainer.is_last_batch:
            optimizer.step()
            optimizer.zero_grad()


class Called(Classifier):
    """The module itself is the model of the optimizer."""

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(batch)
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        self.optimizer = gm.optimizer(self, self.method, **self.options)
        return self.optimizer


def loader(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """Seven batches."""
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(56, 6, generator=generator, dtype=dtype), torch.randint(3, (56,), generator=generator)
    return DataLoader(TensorDataset(x, t), batch_size=8)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    plain = {"accelerator": "cpu", "enable_checkpointing": "callbacks" in options, "max_epochs": 2}
    return L.Trainer(default_root_dir=folder, **{**quiet, **plain, **options})


def outside(maker: Any, model: nn.Module, batch: Any) -> None:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, batch[0]), batch[1])


# --- the same steps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_automatic_optimization(method: str, accumulation: int, tmp_path: Path) -> None:
    """Lightning divides every loss by the number of micro-batches, those of a short last group by the same one."""
    module = Classifier(method)
    trainer(tmp_path, accumulate_grad_batches=accumulation, max_epochs=4 // accumulation).fit(module, loader())
    lengths = [1] * 28 if accumulation == 1 else [4, 3]
    check(module, lengths, accumulation)


def check(module: Classifier, lengths: list[int], accumulation: int) -> None:
    seen = iter(module.seen)
    steps = [[Micro(next(seen), 1 / accumulation) for _ in range(n)] for n in lengths]
    assert next(seen, None) is None
    close(module.watch.gradients, module.watch.declared(steps, outside))


@pytest.mark.parametrize("method", METHODS)
def test_manual_optimization(method: str, tmp_path: Path) -> None:
    module = Manual(method)
    trainer(tmp_path).fit(module, loader())
    check(module, [4, 3, 4, 3], 4)


@pytest.mark.parametrize("method", ["kfac", "soap"])
def test_manual_optimization_with_a_closure(method: str, tmp_path: Path) -> None:
    module = Manual(method, closure=True)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    check(module, [1] * 7, 1)


def test_the_module_may_be_the_model(tmp_path: Path) -> None:
    inner, outer = Classifier("kfac"), Called("kfac")
    inner.configure_optimizers = lambda: gm.optimizer(inner.model, "kfac", **inner.options)  # type: ignore[method-assign]
    for module in (inner, outer):
        trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert equal(inner.model, outer.model)


class Scaled(Classifier):
    """Gives the scaler of its trainer to the optimizer."""

    def configure_optimizers(self) -> Any:
        self.options["scaler"] = self.trainer.precision_plugin.scaler
        return super().configure_optimizers()


def mixed(dtype: torch.dtype) -> tuple[type[Classifier], Any]:
    """A module and the plugin of mixed precision in a dtype."""
    if dtype is torch.bfloat16:
        return Classifier, MixedPrecision("bf16-mixed", "cpu")
    return Scaled, MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The weights of the terms are read from gradients in half precision."""
    kind, plugin = mixed(dtype)
    module = kind(method, **from_the_first(method))
    module.model.float()
    trainer(tmp_path, plugins=[plugin], accumulate_grad_batches=4).fit(module, loader(torch.float32))

    def declare(maker: Any, model: nn.Module, batch: Any) -> None:
        cast = torch.autocast("cpu", dtype)
        z = maker.setup_model_call(cast(model.__call__), batch[0])
        maker.setup_loss_call(cast(F.cross_entropy), z, batch[1])

    seen = iter(module.seen)
    steps = [[Micro(next(seen), 1 / 4) for _ in range(n)] for n in (4, 3, 4, 3)]
    close(module.watch.gradients, module.watch.declared(steps, declare), 2e-2)


def test_fabric(tmp_path: Path) -> None:
    """Its steps and its checkpoints."""
    plain, model, resumed = network(), network(), network()
    optimizers = [gm.optimizer(m, "kfac", **METHODS["kfac"]) for m in (plain, model, resumed)]
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, optimizers[1])
    for x, t in loader():
        fabric.backward(F.cross_entropy(wrapped(x), t))
        F.cross_entropy(plain(x), t).backward()
        for own in (optimizer, optimizers[0]):
            own.step()
            own.zero_grad()
    assert equal(model, plain) and not equal(model, resumed)
    fabric.save(tmp_path / "run.ckpt", {"model": wrapped, "optimizer": optimizer})
    again = fabric.setup(resumed, optimizers[2])
    fabric.load(tmp_path / "run.ckpt", dict(zip(("model", "optimizer"), again, strict=True)))
    assert equal(resumed, plain) and equal_states(optimizers[2].state_dict(), optimizers[0].state_dict())


# --- clipping -------------------------------------------------------------------------------------------------------------
def test_clipping_of_the_trainer_is_that_of_raw_gradients(tmp_path: Path) -> None:
    with pytest.warns(ChangedGradientWarning, match="as by clipping"):
        trainer(tmp_path, gradient_clip_val=1e-3, max_epochs=1).fit(Classifier("soap"), loader())


def test_clipping_of_the_step(tmp_path: Path) -> None:
    module = Classifier("soap", max_norm=0.5)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    norms = [torch.stack([g.norm() for g in step.values()]).norm() for step in module.watch.gradients]
    torch.testing.assert_close(torch.stack(norms), torch.full((7,), 0.5, dtype=torch.float64), rtol=1e-4, atol=0.0)


# --- saved and resumed ----------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_bitwise(method: str, tmp_path: Path) -> None:
    """Three steps of two micro-batches and a short one an epoch; a schedule, momentum or decay, clipping."""

    def fit(folder: str, epochs: int, **options: Any) -> Classifier:
        module = Classifier(method, max_norm=0.5)
        saved = ModelCheckpoint(tmp_path / folder, save_last=True)
        made = trainer(tmp_path, max_epochs=epochs, accumulate_grad_batches=2, callbacks=[saved])
        made.fit(module, loader(), **options)
        return module

    whole = fit("whole", 3)
    fit("stopped", 2)
    resumed = fit("stopped", 3, ckpt_path=tmp_path / "stopped" / "last.ckpt")
    assert resumed.optimizer.maker.step == 12 and len(resumed.watch.gradients) == 4
    assert equal(resumed.model, whole.model)
    assert equal_states(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
