"""`torch.compile`: steps that measure run eagerly, the others in the graphs of the model, without a recompilation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gradmaker as gm
from gradmaker.loops.eager import Eager
from tests.recipes.protocol import RECIPES, batches, close, network, same, weights

INTERVAL = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"curvature_interval": INTERVAL, "preconditioner_interval": INTERVAL, "warmup_steps": 0},
    "soap": {"preconditioner_interval": INTERVAL},
}
EAGER = {"kfac": {0, 1, 2, 3, 6, 9}, "soap": {0, 1, 2}}
"""Steps that measure passes, and the first three, at which ``.grad`` is watched."""
STEPS = 11


class Block(nn.Module):
    """A module of one's own: torch compiles none of its containers in place, and in 2.6 none behind a hook."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


def whole() -> Any:
    return Block(network())


class Backend:
    """Runs graphs as they are, and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return graph.forward(*arguments)

        return run


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks whether tensors between blocks have one


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph is left from before, and none afterwards; nor is the compiler left out."""
    torch._dynamo.reset()
    counters.clear()
    yield
    assert Eager.open == 0 and Eager.stance is None and Eager.compiler is None
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch._C._dynamo.eval_frame.get_eval_frame_callback() is None
    torch._dynamo.reset()


def made(method: str, model: nn.Module) -> gm.PreconditionedOptimizer:
    return gm.optimizer(model, method, **{**RECIPES[method], **OPTIONS[method]})


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def train(call: Any, optimizer: Any, steps: int = STEPS, start: int = 0, seen: Any = None) -> None:
    for x, t in batches(steps, start=start):
        F.cross_entropy(call(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
        if seen is not None:
            seen()


@pytest.mark.parametrize("how", ["before", "after", "in place before", "in place after"])
@pytest.mark.parametrize("method", OPTIONS)
def test_idle_steps_are_one_graph_and_the_others_eager(method: str, how: str) -> None:
    model, plain, backend = whole(), whole(), Backend()
    compiled: Any = None
    if "before" in how:
        compiled = in_place(model, backend) if "place" in how else torch.compile(model, backend=backend)
    optimizer = made(method, model)
    if "after" in how:
        compiled = in_place(model, backend) if "place" in how else torch.compile(model, backend=backend)
    calls: list[int] = []
    train(compiled, optimizer, seen=lambda: calls.append(backend.calls))
    compiled_steps = [j for j, (a, b) in enumerate(zip([0, *calls], calls, strict=False)) if b > a]
    assert compiled_steps == sorted(set(range(STEPS)) - EAGER[method])
    assert backend.graphs == 1 and backend.calls == len(compiled_steps)
    assert not counters["recompiles"] and counters["stats"]["unique_graphs"] == 1
    train(plain, made(method, plain))
    assert same(weights(model), weights(plain))


def test_a_compiled_function_that_calls_the_model() -> None:
    """What follows the model's call is compiled at every step."""
    model, plain, backend = whole(), whole(), Backend()
    optimizer, alone = made("kfac", model), made("kfac", plain)

    @torch.compile(backend=backend)
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(model(x), t)

    for j, (x, t) in enumerate(batches(STEPS)):
        before = backend.calls
        loss(x, t).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert backend.calls == before + (1 if j in EAGER["kfac"] else 2)
    assert backend.graphs == 2
    train(plain, alone)
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("method", OPTIONS)
def test_graphs_of_aot_autograd(method: str) -> None:
    """Its backward passes run once, and are not vectorised: what is measured must be eager."""
    model, plain = whole(), whole()
    optimizer = made(method, model)
    train(torch.compile(model, backend="aot_eager"), optimizer)
    train(plain, made(method, plain))
    close(model, plain)
    assert counters["stats"]["unique_graphs"] == 1


class Blocks(nn.Module):
    """A model whose blocks are compiled one by one, as large models are."""

    def __init__(self, backend: Any = None) -> None:
        super().__init__()
        layers = network()
        self.first, self.second = Block(layers[0:3]), Block(layers[3:])
        if backend is not None:
            for block in (self.first, self.second):
                block.compile(backend=backend)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


@pytest.mark.parametrize("method", OPTIONS)
def test_blocks_that_are_compiled_run_eagerly_in_steps_that_measure(method: str) -> None:
    backend = Backend()
    model, plain = Blocks(backend), Blocks()
    train(model, made(method, model))
    assert backend.graphs == 2 and backend.calls == 2 * (STEPS - len(EAGER[method]))
    train(plain, made(method, plain))
    assert same(weights(model), weights(plain))


def test_a_resumed_loop_that_begins_idle_measures_when_it_is_due() -> None:
    """Its first graph is made at a step without hooks on the layers."""
    model, other = whole(), whole()
    first, second = made("kfac", model), made("kfac", other)
    train(model, first, 5)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(torch.compile(other, backend=Backend()), second, 6, start=5)
    train(model, first, 6, start=5)
    assert same(weights(model), weights(other))


def test_an_evaluation_in_between_is_compiled() -> None:
    model, backend = whole(), Backend()
    optimizer, compiled = made("kfac", model), torch.compile(model, backend=backend)
    for x, t in batches(STEPS):
        with torch.no_grad():
            compiled(x)
        F.cross_entropy(compiled(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert backend.graphs == 2 and backend.calls == STEPS + STEPS - len(EAGER["kfac"])


def test_two_optimizers_on_parts_of_a_compiled_model() -> None:
    results = []
    for compiles in (True, False):
        model, backend = whole(), Backend()
        parts = [list(part.parameters()) for part in (model.layers[:3], model.layers[3:])]
        optimizers = [gm.optimizer(model, "kfac", part, **{**RECIPES["kfac"], **OPTIONS["kfac"]}) for part in parts]
        call: Any = torch.compile(model, backend=backend) if compiles else model
        for x, t in batches(STEPS):
            F.cross_entropy(call(x), t).backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
        assert backend.calls == (STEPS - len(EAGER["kfac"]) if compiles else 0) and backend.graphs == int(compiles)
        results.append(weights(model))
    assert same(*results)


def test_an_exception_in_a_measured_pass_leaves_the_compiler_as_it_was() -> None:
    model, backend = whole(), Backend()
    optimizer, compiled = made("kfac", model), torch.compile(model, backend=backend)
    with pytest.raises(RuntimeError, match="shape"):
        compiled(torch.zeros(4, 5, dtype=torch.float64))
    assert Eager.open == 0 and torch._dynamo.eval_frame._stance.stance == "default"
    train(compiled, optimizer)
    assert backend.graphs == 1


def test_a_module_that_was_called_before_is_measured() -> None:
    """Its own `forward` alone is compiled, and not the call with the hooks."""
    model, plain, backend = whole(), whole(), Backend()
    compiled = torch.compile(model, backend=backend)
    compiled(next(batches(1))[0]).sum().backward()
    model.zero_grad()
    train(compiled, made("kfac", model))
    train(plain, made("kfac", plain))
    assert same(weights(model), weights(plain)) and backend.calls == 1 + STEPS - len(EAGER["kfac"])


def test_a_container_that_was_called_before_is_refused_where_a_measurement_is_due() -> None:
    """Torch compiles the whole call of its own containers."""
    model, backend = network(), Backend()
    compiled = torch.compile(model, backend=backend)
    compiled(next(batches(1))[0]).sum().backward()
    model.zero_grad()
    optimizer = made("kfac", model)
    with pytest.raises(RuntimeError, match=r"torch._dynamo.reset\(\)"):
        train(compiled, optimizer, 1)
    optimizer.zero_grad()
    torch._dynamo.reset()
    train(compiled, optimizer)
    assert optimizer.maker.step == STEPS


def test_one_whole_graph_is_right_or_an_error_of_torch() -> None:
    """It asks for a graph in every call, also in those that are measured."""
    model, plain = whole(), whole()
    optimizer = made("kfac", model)
    try:
        train(torch.compile(model, backend=Backend(), fullgraph=True), optimizer)
    except RuntimeError as error:
        assert "fullgraph" in str(error) or isinstance(error, torch._dynamo.exc.Unsupported)
    else:
        train(plain, made("kfac", plain))
        assert same(weights(model), weights(plain))
