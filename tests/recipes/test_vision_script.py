"""The loop of torchvision's and timm's training scripts: warm-up, smoothed labels, scaler, clipping, micro-batches, average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradmaker as gm
from gradmaker.curvature import Categorical
from tests.recipes.protocol import Declared, close, same, through_file, weights

CLASSES, EPOCHS, BATCHES = 4, 3, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.1, "damping": 0.1, "likelihood": Categorical(), "curvature_interval": 2, "warmup_steps": 0},
    "soap": {"lr": 0.01, "preconditioner_interval": 2},
}


class Block(nn.Module):
    """A basic block of a residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        y: Tensor = self.relu(out)
        return y


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = Block(4, 4, 1), Block(4, 8, 2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def without_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay, as by `param_groups_weight_decay` of timm and `set_weight_decay` of torchvision."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    rest = [p for name, p in named if p.ndim > 1 and not name.endswith(".bias")]
    return [{"params": bare, "weight_decay": 0.0}, {"params": rest, "weight_decay": weight_decay}]


def loader(epoch: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(8, 3, 6, 6, generator=g, dtype=torch.float64), torch.randint(CLASSES, (8,), generator=g))
        for _ in range(BATCHES)
    ]


def warm_up(optimizer: Any) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)], [1])


class Script:
    """What a script makes, saves and loads."""

    def __init__(self, method: str, accumulation: int = 1, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = ResNet().double()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
        self.optimizer = gm.optimizer(
            self.model,
            method,
            without_decay(self.model, 0.05),
            **{**OPTIONS[method], **options},
            max_norm=1.0,
            scaler=self.scaler,
            accumulation=accumulation,
        )
        self.scheduler = warm_up(self.optimizer)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.accumulation = accumulation

    def train_one_epoch(self, epoch: int) -> None:
        self.model.train()
        for i, (image, target) in enumerate(loader(epoch)):
            with torch.amp.autocast("cpu", enabled=False):
                loss = self.criterion(self.model(image), target) / self.accumulation
            self.scaler.scale(loss).backward()
            if (i + 1) % self.accumulation == 0:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.ema.update_parameters(self.model)
        self.scheduler.step()

    def checkpoint(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        return {k: v.state_dict() for k, v in {**parts, "model_ema": self.ema, "scaler": self.scaler}.items()}

    def resume(self, saved: dict[str, Any]) -> None:
        for part, name in (
            (self.model, "model"),
            (self.optimizer, "optimizer"),
            (self.scheduler, "lr_scheduler"),
            (self.ema, "model_ema"),
            (self.scaler, "scaler"),
        ):
            part.load_state_dict(saved[name])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", OPTIONS)
def test_the_script_is_the_declared_protocol(method: str, accumulation: int) -> None:
    script = Script(method, accumulation)
    declared = Declared(script.optimizer)
    twin = warm_up(declared.base)
    for epoch in range(EPOCHS):
        script.train_one_epoch(epoch)
        for i, (image, target) in enumerate(loader(epoch)):
            declared.accumulate(script.criterion, image, target, 1 / accumulation)
            if (i + 1) % accumulation == 0:
                declared.step()
        twin.step()
    assert script.optimizer.maker.step == EPOCHS * BATCHES // accumulation
    close(script.model, declared.model, rtol=1e-6)  # the scaler divides in float32


@pytest.mark.parametrize("method", OPTIONS)
def test_the_script_is_resumed_bitwise(method: str, tmp_path: Path) -> None:
    straight, resumed = Script(method), Script(method)
    straight.train_one_epoch(0)
    resumed.resume(through_file(straight.checkpoint(), tmp_path))
    for script in (straight, resumed):
        for epoch in range(1, EPOCHS):
            script.train_one_epoch(epoch)
    for a, b in ((straight.model, resumed.model), (straight.ema, resumed.ema)):
        assert same(weights(a), weights(b))


def test_groups_decay_as_the_script_says() -> None:
    script = Script("kfac")
    decays = {p: g["weight_decay"] for g in script.optimizer.param_groups for p in g["params"]}
    assert all(decays[p] == (0.0 if p.ndim == 1 else 0.05) for p in script.model.parameters())
    assert len(decays) == len(list(script.model.parameters()))


def test_smoothed_labels_have_to_be_declared() -> None:
    script = Script("kfac", likelihood=None)
    with pytest.raises(RuntimeError, match=r"label smoothing.*likelihood="):
        script.train_one_epoch(0)
