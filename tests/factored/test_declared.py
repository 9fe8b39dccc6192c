"""Declared steps with gradients by rows give the gradients of steps without, and hold none by rows that has another use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmaker import from_config
from tests.factored.counting import all_formed, counted
from tests.models import CLASSES

N, D, H = 5, 12, 14
EVERY_OTHER: dict[str, Any] = {"curvature_interval": 2, "preconditioner_interval": 2, "warmup_steps": 0, "damping": 1e-2}


class Net(nn.Module):
    """Two layers that rows pay for; a third is too narrow for them."""

    def __init__(self, bias: bool = True, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, H, bias=bias), nn.Linear(H, H - 3, bias=bias)
        self.act, self.head = nn.ReLU(inplace=inplace), nn.Linear(H - 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(self.second(self.act(self.first(x)))))
        return out


Forward = Callable[[Net, Tensor], Tensor]
Loss = Callable[[Net, Tensor, Tensor], Tensor]


def plain_forward(model: Net, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def cross_entropy(model: Net, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t)


@dataclass
class Scene:
    """A model and a declared step, and how many of its layers are held by rows in a step that does not measure.

    checked: how many by kfac, whose self-checks give parameters with other uses to other methods; None: as many.
    """

    held: int
    checked: int | None = None
    folds: bool = False  # whether a statistic of the gradient takes rows where no solver does
    methods: tuple[str, ...] = ("kfac", "shampoo")
    build: Callable[[], Net] = Net
    forward: Forward = plain_forward
    loss: Loss = cross_entropy
    prepare: Callable[[Net], Any] = field(default=lambda model: None)
    size: tuple[int, ...] = (N, D)
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)


def twice(model: Net, x: Tensor) -> Tensor:
    return model(x) + model.head(model.second(model.first(x).tanh()))


def penalised(model: Net, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t) + 0.1 * model.second.weight.square().sum()


def biased(model: Net, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t) + model.second.bias.square().sum()


def smooth(model: Net, x: Tensor) -> Tensor:
    """A penalty on the derivatives of the outputs in the inputs, whose gradient goes through the weights again."""
    x = x.detach().requires_grad_()
    y: Tensor = model.head(model.second(model.first(x).tanh()).tanh())
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y * (1 + slope.square().mean())


def replaced(model: Net, x: Tensor) -> Tensor:
    other = {"first.weight": 2 * model.first.weight, "first.bias": model.first.bias}
    return torch.func.functional_call(model, other, (x,))  # type: ignore[no-any-return]


def hooked_output(model: Net, x: Tensor) -> Tensor:
    y = model.second(model.act(model.first(x)))
    y.register_hook(lambda g: 3 * g)
    return model.head(y.tanh())  # type: ignore[no-any-return]


def checkpointed(reentrant: bool) -> Forward:
    def forward(model: Net, x: Tensor) -> Tensor:
        y = checkpoint(model.second, model.act(model.first(x)), use_reentrant=reentrant)
        return model.head(y.tanh())  # type: ignore[no-any-return]

    return forward


def sequences(model: Net, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.mean(1), t)


def transposed(model: Net, x: Tensor) -> Tensor:
    return model(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


def share(model: Net) -> None:
    model.extra = nn.Linear(H, H - 3)
    model.extra.weight, model.extra.bias = model.second.weight, model.second.bias


def through_both(model: Net, x: Tensor) -> Tensor:
    h = model.act(model.first(x))
    return model.head(model.second(h) + model.extra(h.tanh()))  # type: ignore[no-any-return, operator]


def own_forward(model: Net) -> None:
    model.second.forward = lambda x: 2 * F.linear(x, model.second.weight, model.second.bias)  # type: ignore[method-assign]


def wide_loss(model: Net, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.float(), t)


def autocast(model: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)  # type: ignore[no-any-return]


def detour(model: Net) -> None:
    model.second.register_forward_hook(lambda module, args, out: 2 * out)


SCENES: dict[str, Scene] = {
    "plain": Scene(2),
    "in place": Scene(2, build=lambda: Net(inplace=True)),
    "no bias": Scene(2, build=lambda: Net(bias=False)),
    "bias apart": Scene(2, methods=("kfac",), options={"bias": "separate", "fallback": "adam"}),
    "sequences": Scene(2, size=(2, 3, D), loss=sequences),
    "not contiguous": Scene(2, forward=transposed, size=(2, 3, D), loss=sequences),
    "length kept": Scene(2, options={"grafting": "keep"}),
    "length of adam": Scene(0, folds=True, options={"grafting": "adam"}),
    "average": Scene(0, folds=True, options={"beta1": 0.9}),
    "not started": Scene(0, options={"start_step": 9}),
    "clipped": Scene(0, methods=("kfac",), options={"clip": 1e-3, "clip_learning_rate": 0.1}),
    "called twice": Scene(0, forward=twice),
    "used outside": Scene(1, loss=penalised),
    "bias used outside": Scene(2, 1, loss=biased),
    "differentiated twice": Scene(0, methods=("shampoo",), forward=smooth),
    "other tensors": Scene(1, forward=replaced),
    "hook on the output": Scene(2, 1, forward=hooked_output),
    "checkpoint": Scene(1, forward=checkpointed(False)),
    "reentrant checkpoint": Scene(0, forward=checkpointed(True)),
    "tied": Scene(1, prepare=share, forward=through_both),
    "hook on the weight": Scene(1, prepare=lambda m: m.second.weight.register_hook(lambda g: 2 * g)),
    "hook after the weight": Scene(1, prepare=lambda m: m.second.weight.register_post_accumulate_grad_hook(lambda p: None)),
    "hook on the bias": Scene(2, 1, prepare=lambda m: m.first.bias.register_hook(lambda g: 2 * g)),
    "backward hook": Scene(1, prepare=lambda m: m.second.register_full_backward_hook(lambda *_: None)),
    "hook that replaces": Scene(2, 1, prepare=detour),
    "a forward of its own": Scene(1, prepare=own_forward),
    "autocast": Scene(0, forward=autocast, loss=wide_loss, dtype=torch.float32),
    "half": Scene(0, loss=wide_loss, dtype=torch.bfloat16),
    "frozen": Scene(1, prepare=lambda m: m.first.requires_grad_(False)),
    "too many rows": Scene(0, size=(40, D)),
}


def gradients(scene: Scene, method: str, options: dict[str, Any], steps: int = 4) -> list[list[Tensor]]:
    """``.grad`` after each of some steps at the same weights."""
    torch.manual_seed(0)
    model = scene.build().to(scene.dtype)
    scene.prepare(model)
    x, t = torch.randn(scene.size).to(scene.dtype), torch.randint(CLASSES, scene.size[:1])
    maker = from_config(model, {"method": method, **options, **scene.options})
    found = []
    for k in range(steps):
        model.zero_grad()
        y = maker.setup_model_call(scene.forward, model, x + 0.1 * k)
        maker.setup_loss_call(scene.loss, model, y, t)
        maker.forward_and_backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    return found


def close(found: list[list[Tensor]], expected: list[list[Tensor]], bound: float = 1e-12) -> None:
    for own, other in zip(found, expected, strict=True):
        assert len(own) == len(other)
        for a, b in zip(own, other, strict=True):
            assert float((a - b).norm()) <= bound * float(b.norm())


RUNS = [(name, method) for name, scene in SCENES.items() for method in scene.methods]


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize(("name", "method"), RUNS)
def test_rows_give_the_formed_gradients(name: str, method: str) -> None:
    scene = SCENES[name]
    with counted() as taken:
        found = gradients(scene, method, EVERY_OTHER)
    with all_formed(), counted() as none:
        expected = gradients(scene, method, EVERY_OTHER)
    close(found, expected)
    held = scene.checked if method == "kfac" and scene.checked is not None else scene.held
    assert none.solved == none.folded == 0
    assert 2 * held <= taken.solved <= 4 * held
    assert (taken.folded > 0) == (method == "shampoo" and (held > 0 or scene.folds))
