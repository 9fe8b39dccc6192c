"""Vision: blocks of timm and torchvision, and a diffusion U-Net."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, alone, entry


def classified(model: nn.Module, x: Tensor, classes: int = 3) -> Case:
    """A classifier with one label an example."""
    t = torch.randint(classes, (len(x),))
    return Case(model, (x,), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


class DropPath(nn.Module):
    """Stochastic depth: leaves the branch of an example out; nothing in evaluation mode."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1)) >= self.rate
        return x * kept / (1 - self.rate)


class LayerScale(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.5 + 0.1 * torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


# ------------------------------------------------------------------ timm
class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, channels-last norm and MLP, layer scale, drop path."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.fc1, self.act, self.fc2 = nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        self.gamma = nn.Parameter(0.5 + 0.1 * torch.randn(d))
        self.drop_path = DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)
        y = self.fc2(self.act(self.fc1(self.norm(y)))).permute(0, 3, 1, 2)
        return x + self.drop_path(y * self.gamma.reshape(1, -1, 1, 1))


@entry("ConvNeXt block", "timm")
def convnext() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), ConvNeXtBlock(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    return classified(model.eval(), torch.randn(4, 2, 3, 3))


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class ViT(nn.Module):
    """Patches by a convolution, a class token and positions that are bare parameters, one pre-norm block with layer scale."""

    def __init__(self, d: int = 4, patches: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, d, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, patches + 1, d))
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(d), Attention(d, 2), LayerScale(d)
        self.norm2, self.mlp, self.ls2 = (
            nn.LayerNorm(d),
            nn.Sequential(nn.Linear(d, 6), nn.GELU(), nn.Linear(6, d)),
            LayerScale(d),
        )
        self.drop_path, self.norm, self.head = DropPath(0.1), nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        y: Tensor = self.head(self.norm(x)[:, 0])
        return y


@entry("ViT with class token", "timm")
def vit() -> Case:
    return classified(ViT().eval(), torch.randn(4, 1, 4, 4))


class SqueezeExcite(nn.Module):
    """A gate of each channel from the mean over the image, by convolutions of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.reduce, self.expand = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        y: Tensor = self.head((x * gate).amax((2, 3)))
        return y


@entry("squeeze-excite", "timm")
def squeeze_excite() -> Case:
    return classified(SqueezeExcite(), torch.randn(4, 2, 3, 3))


# ------------------------------------------------------------------ torchvision
class BasicBlock(nn.Module):
    """Two convolutions without bias, batch norms, in-place activations, a shortcut with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 2, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.downsample = nn.Sequential(nn.Conv2d(1, 2, 1, stride=2, bias=False), nn.BatchNorm2d(2))
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(2, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        z: Tensor = self.fc(y.mean((2, 3)))
        return z


@entry("BasicBlock, batch norm in training", "torchvision", independent=False)
def basic_block_training() -> Case:
    return classified(BasicBlock(), torch.randn(4, 1, 4, 4))


def evaluated(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics off their start, then in evaluation mode."""
    with torch.no_grad():
        model(x)
    return model.eval()


@entry("BasicBlock, batch norm in evaluation", "torchvision")
def basic_block_evaluation() -> Case:
    return classified(evaluated(BasicBlock(), torch.randn(4, 1, 4, 4)), torch.randn(4, 1, 4, 4))


class DenseLayer(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


@entry("DenseNet", "torchvision")
def densenet() -> Case:
    layers = [nn.Conv2d(1, 2, 3, padding=1, bias=False), DenseLayer(2, 2), nn.AvgPool2d(2), DenseLayer(4, 2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return classified(evaluated(model, torch.randn(4, 1, 4, 4)), torch.randn(4, 1, 4, 4))


class Inception(nn.Module):
    """Three branches side by side, of which one is behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(2, 2, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, (1, 3), padding=(0, 1)))
        self.branch3 = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(2, 2, 1))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1)
        z: Tensor = self.fc(torch.tanh(y).mean((2, 3)))
        return z


@entry("Inception branches", "torchvision")
def inception() -> Case:
    return classified(Inception(), torch.randn(4, 2, 4, 4))


# ------------------------------------------------------------------ diffusion
class UNet(nn.Module):
    """Down, middle, up by a transposed convolution, a skip connection; the time enters behind the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2))
        self.inside, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2)
        self.down, self.up = nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.ConvTranspose2d(2, 2, 2, stride=2)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(100.0) * torch.arange(2, dtype=x.dtype) / 2)
        angles = time[:, None] * frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        skip = F.silu(self.norm(self.inside(x) + embedded[:, :, None, None]))
        y: Tensor = self.out(torch.cat([skip, self.up(F.silu(self.down(skip)))], 1))
        return y


@entry("U-Net with time embedding", "diffusion")
def unet() -> Case:
    x, time, noise = torch.randn(3, 1, 4, 4), torch.rand(3) * 10, torch.randn(3, 1, 4, 4)
    return Case(UNet(), (x, time), alone, [lambda z: F.mse_loss(z, noise)], F.mse_loss, (noise,))
