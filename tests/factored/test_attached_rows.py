"""In a loop that is not the maker's, rows are used where ``.grad`` is the gradient of one recorded call, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.front_door.optimizer import PreconditionedOptimizer
from tests.factored.counting import all_formed, counted
from tests.factored.test_declared import CLASSES, EVERY_OTHER, SCENES, D, H, N, Net, Scene, close

X = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.arange(N) % CLASSES
Loop = Callable[["Attached"], None]


class Attached:
    """A maker in a loop over one batch, whose weights do not move."""

    def __init__(self, method: str = "kfac", model: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = Net().double() if model is None else model
        self.maker: Any = from_config(self.model, {"method": method, **EVERY_OTHER, **options})
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.0)
        self.maker.attach(self.optimizer, "categorical")

    def backward(self, x: Tensor = X, scale: float = 1.0) -> None:
        (F.cross_entropy(self.model(x), T[: len(x)]) * scale).backward()

    def grads(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def plain(run: Attached) -> None:
    run.optimizer.zero_grad()
    run.backward()
    run.optimizer.step()


def zeroed(run: Attached) -> None:
    run.optimizer.zero_grad(set_to_none=False)
    run.backward()
    run.optimizer.step()


def clipped(run: Attached) -> None:
    run.optimizer.zero_grad()
    run.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.optimizer.step()


def clipped_data(run: Attached) -> None:
    """Writing to ``.data`` counts no version."""
    run.optimizer.zero_grad()
    run.backward()
    for p in run.model.parameters():
        p.grad.data.clamp_(-1e-3, 1e-3)
    run.optimizer.step()


def one_clipped_data(run: Attached) -> None:
    run.optimizer.zero_grad()
    run.backward()
    run.model.second.weight.grad.data.mul_(1 + 1e-9)
    run.optimizer.step()


def replaced(run: Attached) -> None:
    run.optimizer.zero_grad()
    run.backward()
    for p in run.model.parameters():
        p.grad = p.grad * 2
    run.optimizer.step()


def doubled(run: Attached) -> None:
    run.optimizer.zero_grad()
    run.backward(scale=0.5)
    run.model.head(run.model.act(run.model.second(torch.ones(2, H, dtype=X.dtype)))).sum().backward()
    run.optimizer.step()


def decayed(run: Attached) -> None:
    run.optimizer.zero_grad()
    run.backward()
    run.model.second.weight.square().sum().backward()
    run.optimizer.step()


def decayed_at_once(run: Attached) -> None:
    run.optimizer.zero_grad()
    loss = F.cross_entropy(run.model(X), T) + run.model.second.weight.square().sum()
    loss.backward()
    run.optimizer.step()


def thrown_away(run: Attached) -> None:
    """The memory of a gradient that was released is that of the next."""
    run.optimizer.zero_grad()
    run.backward()
    run.optimizer.zero_grad()
    run.model.second.weight.square().sum().backward()
    run.optimizer.step()


def reused_input(run: Attached) -> None:
    x = X.clone()
    run.optimizer.zero_grad()
    run.backward(x)
    x.fill_(7.0)
    run.optimizer.step()


def differentiated_first(run: Attached) -> None:
    run.optimizer.zero_grad()
    loss = F.cross_entropy(run.model(X), T)
    torch.autograd.grad(loss, [run.model.head.weight, run.model.first.weight], retain_graph=True)
    loss.backward()
    run.optimizer.step()


def with_graph(run: Attached) -> None:
    run.optimizer.zero_grad()
    loss = F.cross_entropy(run.model(X), T)
    loss.backward(create_graph=True)
    run.optimizer.step()


def closure(run: Attached) -> None:
    def evaluate() -> Tensor:
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(X), T)
        loss.backward()
        return loss

    run.optimizer.step(evaluate)


LOOPS: dict[str, tuple[Loop, int]] = {
    "plain": (plain, 2),
    "closure": (closure, 2),
    "differentiated first": (differentiated_first, 2),
    "zeroed in place": (zeroed, 0),
    "clipped": (clipped, 0),
    "clipped by .data": (clipped_data, 0),
    "one scaled by .data": (one_clipped_data, 1),
    "replaced": (replaced, 0),
    "another pass of a layer": (doubled, 1),
    "decay in a pass of its own": (decayed, 1),
    "decay in the loss": (decayed_at_once, 1),
    "thrown away": (thrown_away, 0),
    "input written since": (reused_input, 1),
}


@pytest.mark.filterwarnings("ignore::gradmaker.loops.attachment.ChangedGradientWarning")
@pytest.mark.parametrize("method", ["kfac", "shampoo"])
@pytest.mark.parametrize("name", LOOPS)
def test_rows_are_used_where_they_are_the_gradient(name: str, method: str) -> None:
    loop, held = LOOPS[name]
    found, counts = [], []
    for form in (False, True):
        run = Attached(method)
        for _ in range(3):
            plain(run)
        with counted() as taken, all_formed() if form else counted():
            loop(run)
        found.append(run.grads())
        counts.append(taken.solved)
    close([found[0]], [found[1]])
    assert counts == [held, 0]


@pytest.mark.filterwarnings("ignore::gradmaker.loops.attachment.ChangedGradientWarning")
@pytest.mark.parametrize("name", [name for name in LOOPS if ".data" not in name])
def test_versions_and_identities_prove_it_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where no product with a vector is compared."""
    monkeypatch.setattr("gradmaker.loops.written_rows._agrees", lambda *_: True)
    test_rows_are_used_where_they_are_the_gradient(name, "shampoo")


def test_a_pass_with_a_graph_of_its_own_is_formed() -> None:
    run = Attached("shampoo")
    for _ in range(3):
        plain(run)
    with counted() as taken, pytest.warns(UserWarning, match="create_graph"):
        with_graph(run)
    assert taken.solved == 0


@pytest.mark.parametrize("method", ["kfac", "shampoo"])
def test_accumulated_passes_are_formed(method: str) -> None:
    found = []
    for form in (False, True):
        run = Attached(method)
        for _ in range(3):
            plain(run)
        with counted() as taken, all_formed() if form else counted():
            run.optimizer.zero_grad()
            for part in (X[:2], X[2:]):
                run.backward(part, 0.5)
            run.optimizer.step()
        assert taken.solved == 0
        found.append(run.grads())
    close([found[0]], [found[1]])


def test_a_scaler_has_them_formed() -> None:
    found = []
    for form in (False, True):
        run = Attached("shampoo")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            plain(run)
        with counted() as taken, all_formed() if form else counted():
            run.optimizer.zero_grad()
            scaler.scale(F.cross_entropy(run.model(X), T)).backward()
            scaler.step(run.optimizer)
        assert taken.solved == 0
        found.append(run.grads())
    close([found[0]], [found[1]])


IN_LOOPS = [name for name, s in SCENES.items() if s.dtype is torch.float64 and "shampoo" in s.methods]


@pytest.mark.parametrize("name", IN_LOOPS)
def test_scenes_of_the_declared_protocol(name: str) -> None:
    scene = SCENES[name]
    found, counts = [], []
    for form in (False, True):
        torch.manual_seed(0)
        model = scene.build().double()
        scene.prepare(model)
        whole = Whole(model, scene)
        maker: Any = from_config(whole, {"method": "shampoo", **EVERY_OTHER, **scene.options})
        optimizer = torch.optim.SGD(whole.parameters(), 0.0)
        maker.attach(optimizer)
        x, t = torch.randn(scene.size).double(), torch.randint(CLASSES, scene.size[:1])
        steps = []
        with counted() as taken, all_formed() if form else counted():
            for k in range(4):
                optimizer.zero_grad()
                scene.loss(model, whole(x + 0.1 * k), t).backward()
                optimizer.step()
                steps.append([p.grad.clone() for p in whole.parameters() if p.grad is not None])
        found.append(steps)
        counts.append(taken.solved)
    close(found[0], found[1])
    assert counts[1] == 0
    assert counts[0] > 0 or not scene.held


class Whole(nn.Module):
    """A model whose call is that of a scene."""

    def __init__(self, model: Net, scene: Scene) -> None:
        super().__init__()
        self.model, self.scene = model, scene

    def forward(self, x: Tensor) -> Tensor:
        return self.scene.forward(self.model, x)


def test_the_front_door_and_its_clipping() -> None:
    """A bound on ``P g`` is after the maker's step."""
    found = []
    for form in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        maker: Any = from_config(model, {"method": "shampoo", **EVERY_OTHER})
        optimizer = PreconditionedOptimizer(maker, torch.optim.SGD(model.parameters(), 1e-3), max_norm=0.5)
        with counted() as taken, all_formed() if form else counted():
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(X), T).backward()
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
        assert (taken.solved > 0) == (not form)
    close([found[0]], [found[1]])


def test_an_exception_at_the_end_and_the_step_again() -> None:
    run, twin = Attached("shampoo"), Attached("shampoo")
    for each in (run, twin):
        for _ in range(3):
            plain(each)
    run.optimizer.zero_grad()
    run.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradmaker.maker._write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.optimizer.step()
    assert not run.maker.step_state.now.rows
    for p in run.model.parameters():
        p.grad.data.mul_(2.0)  # what the maker is given next is another gradient
    run.optimizer.step()
    twin.optimizer.zero_grad()
    twin.backward(scale=2.0)
    twin.optimizer.step()
    close([run.grads()], [twin.grads()])


def test_nothing_is_left_on_the_model() -> None:
    run = Attached("shampoo")
    hooks = [len(m._forward_hooks) for m in run.model.modules()]
    plain(run)
    assert [len(m._forward_hooks) for m in run.model.modules()] == hooks
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.model(torch.ones(2, 3, dtype=X.dtype))
    assert [len(m._forward_hooks) for m in run.model.modules()] == hooks
    run.model(X)
    copy.deepcopy(run.model)
    run.maker.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
