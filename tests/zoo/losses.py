"""Losses: several heads, pairs of examples, derivatives by the input, and coupling between examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, alone, entry
from tests.zoo.vision import classified


def encoder(i: int = 4, d: int = 5, o: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, d), nn.Tanh(), nn.Linear(d, o))


# ------------------------------------------------------------------ contrastive
class Contrasted(nn.Module):
    """Similarities of all pairs of a batch: the negatives of an example are the others."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.normalize(self.encoder(x), dim=1) for x in (a, b))
        return a @ b.T / 0.5


@entry("InfoNCE", "contrastive", independent=False)
def info_nce() -> Case:
    a, b = torch.randn(2, 5, 4)
    t = torch.arange(5)
    return Case(Contrasted(), (a, b), alone, [lambda z: F.cross_entropy(z, t)], F.cross_entropy, (t,))


class SimSiam(nn.Module):
    """Two views one after the other in one batch; each predicts the other's features, which are held fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder(), encoder(3, 4, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(torch.cat([a, b]))
        return self.predictor(features), features.detach()


def swapped(y: tuple[Tensor, Tensor]) -> Tensor:
    p, f = y
    n = len(p) // 2
    return 0.5 * F.mse_loss(p[:n], f[n:]) + 0.5 * F.mse_loss(p[n:], f[:n])


@entry("SimSiam, views concatenated", "contrastive", independent=False)
def sim_siam() -> Case:
    a, b = torch.randn(2, 4, 4)

    def errors(y: tuple[Tensor, Tensor]) -> list[Tensor]:
        p, f = y
        return [p[:4] - f[4:], p[4:] - f[:4]]

    terms = [lambda z: 0.5 * z.square().mean()] * 2
    return Case(SimSiam(), (a, b), errors, terms, swapped)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(a), self.encoder(b)


def between(y: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(y[0], y[1])


@entry("siamese, both sides in the graph", "contrastive")
def siamese() -> Case:
    a, b = torch.randn(2, 5, 4)
    return Case(Siamese(), (a, b), lambda y: [y[0] - y[1]], [lambda z: z.square().mean()], between)


# ------------------------------------------------------------------ several losses
class Detector(nn.Module):
    """A trunk with a head for the class and one for the box."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.label, self.box = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"label": self.label(h), "box": self.box(h)}


def detection(y: dict[str, Tensor], t: Tensor, box: Tensor) -> Tensor:
    return F.cross_entropy(y["label"], t) + 0.5 * F.mse_loss(y["box"], box)


@entry("two heads, two losses", "detection")
def detector() -> Case:
    x, t, box = torch.randn(5, 4), torch.randint(3, (5,)), torch.randn(5, 4)
    terms = [lambda z: F.cross_entropy(z, t), lambda z: 0.5 * F.mse_loss(z, box)]
    return Case(Detector(), (x,), lambda y: [y["label"], y["box"]], terms, detection, (t, box))


# ------------------------------------------------------------------ derivatives by the input
class Burgers(nn.Module):
    """The residual ``u_t + u u_x - 0.1 u_xx`` of a network at points (x, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        u = self.net(points)
        (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
        return first[:, 1:] + u * first[:, :1] - 0.1 * second[:, :1]


@entry("physics-informed, u_xx", "physics-informed", seen=False)
def burgers() -> Case:
    points, zero = torch.randn(6, 2), torch.zeros(6, 1)
    return Case(Burgers(), (points,), alone, [lambda z: F.mse_loss(z, zero)], F.mse_loss, (zero,))


class Critic(nn.Module):
    """A score, and the length of its derivative by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        score = self.net(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return score, slope.square().sum(1).sqrt()


def penalised(y: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    score, length = y
    return F.binary_cross_entropy_with_logits(score, t) + 0.3 * F.mse_loss(length, torch.ones_like(length))


@entry("gradient penalty", "adversarial", seen=False)
def critic() -> Case:
    x, t = torch.randn(6, 3), torch.randint(2, (6, 1)).to(torch.get_default_dtype())
    ones = torch.ones(6)
    terms = [lambda z: F.binary_cross_entropy_with_logits(z, t), lambda z: 0.3 * F.mse_loss(z, ones)]
    return Case(Critic(), (x,), list, terms, penalised, (t,))


# ------------------------------------------------------------------ coupling, noise
class Centred(nn.Module):
    """Features less their mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        z: Tensor = self.b(torch.tanh(h - h.mean(0)))
        return z


@entry("x - x.mean(0)", "coupled", independent=False)
def centred() -> Case:
    return classified(Centred(), torch.randn(5, 4))


@entry("dropout in training", "noise")
def dropout() -> Case:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)
    )
    return classified(model, torch.randn(6, 4))
