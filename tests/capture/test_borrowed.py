"""A model that was borrowed, for calls at other weights or for one example, is given back: object for object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from gradmaker import METHODS
from gradmaker.capture.exchange import call_with, copies, exchanged
from gradmaker.passes.replay import Replay
from gradmaker.reports.spectrum import hvp

pytestmark = pytest.mark.usefixtures("double")

WIDE, CLASSES = 4, 3


class Shared(nn.Module):
    """One layer under three names, and a bare parameter for which a call is repeated example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDE, WIDE)] * 3)
        self.scale = nn.Parameter(torch.rand(WIDE) + 0.5)
        self.head = nn.Linear(WIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        y: Tensor = self.head(x * self.scale)
        return y


class TwoNames(Shared):
    """A module of one's own, without a rule, under two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Affine()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(torch.tanh(self.first(x))))


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDE, WIDE)), nn.Parameter(torch.randn(WIDE))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x @ self.w + self.b


class Tied(Shared):
    """One parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDE, WIDE, bias=False)
        self.other.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.other(x))


class Listed(Shared):
    """Parameters that are used out of a plain list, a dictionary and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.w = (nn.Parameter(torch.randn(WIDE, WIDE)) for _ in range(3))
        self.by_order, self.by_name, self.for_good = [self.u], {"v": self.v}, (self.w, "fixed")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.by_order[0] @ self.by_name["v"] @ self.for_good[0])


class Recurrent(Shared):
    """Torch's own recurrent layers hold their weights in a list besides."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(WIDE, WIDE, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.cell(x.unsqueeze(1))[0].squeeze(1))


class Remembering(Shared):
    """A model that keeps what it has seen: attributes, lists, buffers in place and anew."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDE)
        self.losses: list[Tensor] = []
        self.seen: dict[str, Any] = {}
        self.calls = 0
        self.register_buffer("sum", torch.zeros(WIDE))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x = self.norm(x)
        self.losses.append(x.mean())
        self.seen[f"call {self.calls}"] = x
        self.sum = self.sum + x.detach().sum(0)
        return super().forward(x)


def _parametrized() -> nn.Module:
    model = Shared()
    parametrizations.orthogonal(model.layers[0])
    parametrize.register_parametrization(model.head, "weight", Halved())
    return model


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


def _pruned() -> nn.Module:
    """Pruning sets the weight as a plain attribute before every call."""
    model = Shared()
    prune.l1_unstructured(model.layers[0], "weight", 0.5)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "three names": Shared,
    "two attributes": TwoNames,
    "tied": Tied,
    "plain containers": Listed,
    "recurrent": Recurrent,
    "remembering": Remembering,
    "parametrized": _parametrized,
    "pruned": _pruned,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def objects(value: Any) -> Any:
    """Identities of all that a model holds, through containers; numbers are none."""
    if isinstance(value, nn.Module):
        return {id(m): {k: objects(v) for k, v in vars(m).items()} for m in value.modules()}
    if isinstance(value, Mapping):
        return {k: id(v) if isinstance(v, nn.Module) else objects(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [objects(v) for v in value]
    return None if isinstance(value, (int, float)) else value if isinstance(value, str) else id(value)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, WIDE, generator=generator), torch.arange(n) % CLASSES


def moved(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {p: p.detach() + 0.3 * torch.randn(p.shape, generator=generator) for p in model.parameters()}


def at(name: str, model: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> nn.Module:
    """Another such model, whose own parameters have these values."""
    twin = made(name)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.copy_(values[mine])
    return twin


# --- the exchange itself --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_call_with_other_tensors_is_that_of_a_model_with_these_weights(name: str) -> None:
    model, (x, _) = made(name), batch()
    model(x)
    values, before = moved(model), objects(model)
    expected = at(name, model, values)(x)
    assert torch.allclose(call_with(model, {**values, **copies(model)}, (x,), {}), expected, rtol=0, atol=1e-12)
    assert objects(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_an_exception_inside_leaves_no_other_tensor_behind(name: str) -> None:
    model, (x, _) = made(name), batch()
    model(x)
    before, version = objects(model), [b._version for b in model.buffers()]
    with pytest.raises(KeyboardInterrupt), exchanged(model, {**moved(model), **copies(model)}):
        model(x)
        model.extra = torch.ones(1)
        raise KeyboardInterrupt
    assert objects(model) == before and [b._version for b in model.buffers()] == version


@pytest.mark.parametrize("name", [name for name in MODELS if name != "remembering"])
def test_the_exchange_goes_through_the_transforms_of_torch_func(name: str) -> None:
    model, (x, t) = made(name), batch()
    model(x)
    before, values, parameters = objects(model), moved(model), list(model.parameters())

    def loss(tensors: list[Tensor], x: Tensor = x, t: Tensor = t) -> Tensor:
        given: dict[Any, Tensor] = {**copies(model), **dict(zip(parameters, tensors, strict=True))}
        return F.cross_entropy(call_with(model, given, (x,), {}), t)

    twin, point = at(name, model, values), list(values.values())
    F.cross_entropy(twin(x), t).backward()
    expected = [p.grad for p in twin.parameters()]
    for found, truth in zip(grad(loss)(point), expected, strict=True):
        assert torch.allclose(found, truth, rtol=0, atol=1e-12)
    ones = [torch.ones_like(v) for v in point]
    slope = jvp(loss, (point,), (ones,))[1]
    assert torch.allclose(slope, sum(g.sum() for g in expected), rtol=0, atol=1e-11)  # type: ignore[union-attr]
    if name != "recurrent":  # which vmap does not enter
        by_example = vmap(grad(loss), in_dims=(None, 0, 0))(point, x.unsqueeze(1), t.unsqueeze(1))
        for found, truth in zip(by_example, expected, strict=True):
            assert torch.allclose(found.mean(0), truth, rtol=0, atol=1e-12)
    assert objects(model) == before


def test_values_that_a_parametrization_has_cached_belong_to_the_weights_before() -> None:
    name = "parametrized"
    model, (x, _) = made(name), batch()
    values = moved(model)
    expected = at(name, model, values)(x)
    with parametrize.cached():
        first = model(x)
        assert torch.allclose(call_with(model, values, (x,), {}), expected, rtol=0, atol=1e-12)
        assert torch.equal(model(x), first)


def test_a_replay_leaves_no_trace_of_what_the_model_remembers() -> None:
    model, (x, t) = made("remembering"), batch()

    def evaluate() -> tuple[Any, Tensor]:
        y = model(x)
        return y, F.cross_entropy(y, t)

    replay = Replay(model, evaluate)
    evaluate()
    before, values = objects(model), [b.clone() for b in model.buffers()]
    replay.loss_and_gradient_at({p: torch.ones_like(p) for p in model.parameters()})
    replay.loss_at({})
    assert objects(model) == before
    assert all(torch.equal(b, v) for b, v in zip(model.buffers(), values, strict=True))


# --- makers ---------------------------------------------------------------------------------------------------------------
def _steps(method: str, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, count: int = 3) -> Any:
    maker, (x, t) = METHODS[method](model), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(count):
        optimizer.zero_grad()
        maker.setup_loss_call(loss, maker.setup_model_call(model, x), t)
        maker.forward_and_backward()
        optimizer.step()
    return maker


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("custom", "gradient", "kfra")])
def test_a_layer_under_several_names_stays_itself_and_trains(method: str) -> None:
    model = made("three names")
    held, start = objects(model), {k: p.detach().clone() for k, p in model.named_parameters()}
    _steps(method, model)
    assert objects(model) == held
    assert not [k for k, p in model.named_parameters() if torch.equal(p, start[k])], "these stood still"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["unit_ng", "hessian_free", "ksd", "lbfgs"])
def test_makers_give_back_whatever_the_model_is_made_of(method: str, name: str) -> None:
    model = made(name)
    held = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    maker = _steps(method, model, count=2)
    assert {id(p): n for n, p in model.named_parameters(remove_duplicate=False)} == held
    assert not maker.silent()


@pytest.mark.parametrize("name", ["three names", "two attributes", "remembering"])
@pytest.mark.parametrize("method", ["hessian_free", "lbfgs"])
def test_a_second_evaluation_that_fails_gives_the_model_back(method: str, name: str) -> None:
    model, calls = made(name), 0

    def loss(y: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return F.cross_entropy(y, t)

    held = [id(p) for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        _steps(method, model, loss)
    assert calls == 2 and [id(p) for p in model.parameters()] == held
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("parametrized", "recurrent")])
def test_products_forwards_are_those_backwards(name: str) -> None:
    model, (x, t) = made(name), batch()
    held, v = [id(p) for p in model.parameters()], torch.randn(sum(p.numel() for p in model.parameters()))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), t)

    # the reference differentiates twice without the library
    parameters = list(model.parameters())
    pieces = [p.reshape(q.shape) for p, q in zip(v.split([q.numel() for q in parameters]), parameters, strict=True)]
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    truth = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradients, pieces, strict=True)), parameters)  # type: ignore[arg-type]
    expected = torch.cat([h.reshape(-1) for h in truth])
    for mode in ("reverse", "forward"):
        assert torch.allclose(hvp(model, loss, v, mode=mode), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))  # type: ignore[arg-type]
    assert [id(p) for p in model.parameters()] == held
