"""Parameters, modules and batches that are none of the usual: treated as they should be, or refused by name."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.reports.spectrum import hvp
from tests.registry import from_the_first

pytestmark = pytest.mark.usefixtures("double")

ALL = [m for m in METHODS if m not in ("custom", "gradient")]
ANY = [m for m in ALL if m != "kfra"]  # which takes chains of known modules alone
CLASSES = 3


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1)), torch.arange(n) % CLASSES


def total(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t, reduction="sum")


def unrecognised(y: Tensor, t: Tensor) -> Tensor:
    return -(y - y.logsumexp(-1, keepdim=True)).gather(1, t.unsqueeze(1)).sum()


def make(method: str, model: nn.Module, **options: Any) -> Any:
    return METHODS[method](model, METHODS[method].Config(**options))


def step(maker: Any, model: Any, x: Tensor, t: Tensor, loss: Any = F.cross_entropy) -> Tensor:
    """The loss; ``.grad`` is that of this step alone."""
    model.zero_grad()
    maker.setup_loss_call(loss, maker.setup_model_call(model, x), t)
    value: Tensor = maker.forward_and_backward()[1]
    return value


def run(method: str, model: nn.Module, count: int = 3, **options: Any) -> Tensor:
    """What the last of some steps leaves in ``.grad``, as real numbers.  # (P,)"""
    maker, optimizer = make(method, model, **options), torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(count):
        step(maker, model, *batch())
        optimizer.step()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([(torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).reshape(-1) for g in gradients])


def plain_mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))


# --- lazy modules ---------------------------------------------------------------------------------------------------------
LAZY: dict[str, Any] = {
    "all": lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(CLASSES)),
    "head": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LazyLinear(CLASSES)),
    "norm": lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, CLASSES)),
    "statistics": lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(4, CLASSES)),
}


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("method", ANY)
def test_a_lazy_module_is_refused_before_its_first_call(method: str, kind: str) -> None:
    model = LAZY[kind]()
    with pytest.raises(ValueError, match="run one forward pass of the model first"):
        make(method, model)
    model(batch()[0])
    if METHODS[method].refuse(model) is None:
        assert step(make(method, model), model, *batch()).isfinite()


@pytest.mark.parametrize("method", ["kfac", "adam", "shampoo", "unit_ng", "full_ng", "lbfgs"])
def test_a_lazy_module_may_be_left_out(method: str) -> None:
    model: Any = LAZY["head"]()
    maker, (x, t) = make(method, model, ignore=("2",)), batch()
    for _ in range(2):
        step(maker, model, x, t)
    truth = torch.autograd.grad(F.cross_entropy(model(x), t), list(model.parameters()))
    assert torch.allclose(model[2].weight.grad, truth[2]) and not torch.allclose(model[0].weight.grad, truth[0])


# --- parameters without elements ------------------------------------------------------------------------------------------
class Empty(nn.Module):
    """A layer of no inputs, one of no outputs, and a bare parameter, all without elements."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.used = used
        if used:
            self.extra, self.bare = nn.Linear(0, 5, bias=False), nn.Parameter(torch.zeros(0))
            self.none = nn.Linear(4, 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.used:
            y = y + self.extra(x[:, :0]) + self.bare.sum() + self.none(x).sum(-1, keepdim=True)
        z: Tensor = self.head(torch.tanh(y))
        return z


@pytest.mark.parametrize("method", ANY)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_elements_change_nothing(method: str) -> None:
    model = Empty(used=True)
    found = run(method, model, seed=0) if hasattr(METHODS[method].Config(), "seed") else run(method, model)
    expected = run(method, Empty(used=False))
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_summary_says_that_they_are_empty() -> None:
    maker = make("kfac", Empty(used=True))
    assert {k: v for k, v in maker.plan.plain.items() if v == "empty"}.keys() == {
        "extra.weight", "bare", "none.weight", "none.bias"
    }  # fmt: skip


# --- complex parameters ---------------------------------------------------------------------------------------------------
class Phases(nn.Module):
    """A complex layer, held as complex numbers or as their real pairs, before a real head."""

    def __init__(self, real: bool, layer: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        w, b = torch.randn(5, 4, dtype=torch.cdouble), torch.randn(5, dtype=torch.cdouble)
        held = [nn.Parameter(torch.view_as_real(v).clone() if real else v.clone()) for v in (w, b)]
        if not layer:
            self.w, self.b = held
        self.layer, self.head = None, nn.Linear(5, CLASSES)
        if layer:
            self.layer = nn.Linear(4, 5, dtype=torch.cdouble)
            self.layer.weight, self.layer.bias = held

    def forward(self, x: Tensor) -> Tensor:
        held = (self.w, self.b) if self.layer is None else (self.layer.weight, self.layer.bias)
        w, b = (p if p.is_complex() else torch.view_as_complex(p) for p in held)
        y = (x.to(w.dtype) @ w.conj().mT + b) if self.layer is None else self.layer(x.to(w.dtype))
        z: Tensor = self.head(y.abs())
        return z


@pytest.mark.parametrize("method", ANY)
def test_complex_parameters_are_their_real_pairs_or_refused(method: str) -> None:
    try:
        maker = make(method, Phases(real=False))
    except ValueError as error:
        assert "w is complex" in str(error) and "ignore=" in str(error)
        left_out = run(method, Phases(real=False), ignore=("w", "b"))
        plain = run(method, Phases(real=True), ignore=("w", "b"))
        assert torch.allclose(left_out, plain, rtol=0, atol=1e-9 * float(plain.abs().max()))
        return
    assert maker.plan.blocks
    found, expected = run(method, Phases(real=False)), run(method, Phases(real=True))
    assert torch.allclose(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["adam", "shampoo", "soap", "newton", "lbfgs", "esgd"])
def test_a_complex_layer_is_its_real_pairs_too(method: str) -> None:
    real = Phases(real=True)
    found = run(method, Phases(real=False, layer=True), count=1)

    def forward(x: Tensor) -> Tensor:  # as nn.Linear has it, without the conjugate
        w, b = torch.view_as_complex(real.w), torch.view_as_complex(real.b)
        z: Tensor = real.head((x.to(w.dtype) @ w.mT + b).abs())
        return z

    real.forward = forward  # type: ignore[method-assign]
    expected = run(method, real, count=1)
    if method != "esgd":  # whose probes go by the names of parameters
        head = 5 * CLASSES + CLASSES  # it comes first, before the layer
        expected = torch.cat([expected[-head:], expected[:-head]])
        assert torch.allclose(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    assert found.isfinite().all()


def test_blocks_of_a_complex_tensor_are_written_back_to_their_places() -> None:
    model = Phases(real=False)
    found = run("shampoo", model, block_size=2)
    expected = run("shampoo", Phases(real=True), block_size=2)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
def test_products_with_complex_parameters_are_those_of_their_pairs(mode: Any) -> None:
    found, (x, t) = [], batch()
    for real in (True, False):
        model = Phases(real)
        v = torch.linspace(-1, 1, sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters()))
        found.append(hvp(model, partial(_loss_at, model, x, t), v, mode=mode))
    assert torch.allclose(*found, rtol=0, atol=(1e-5 if mode == "difference" else 1e-12))


def _loss_at(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(model(x), t)


# --- scripted and sharded ones --------------------------------------------------------------------------------------------
class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(5, 5), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.shift)


def around(scripted: bool) -> nn.Module:
    torch.manual_seed(0)
    inner = Inner()
    return nn.Sequential(nn.Linear(4, 5), torch.jit.script(inner) if scripted else inner, nn.Linear(5, CLASSES))


@pytest.fixture(scope="module")
def script() -> None:
    """Scripting warns that it is old."""
    if sys.version_info >= (3, 14):
        pytest.skip("torch has no scripting there")


@pytest.mark.usefixtures("script")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("method", ["adam", "shampoo", "soap", "newton", "lbfgs", "lissa", "mfac", "unit_ng", "hessian_free"])
def test_a_scripted_part_is_as_it_was_or_refused(method: str) -> None:
    model = around(scripted=True)
    try:
        make(method, model)
    except ValueError as error:
        assert "on which torch allows no hooks" in str(error) and "1." in str(error)
        run(method, model, ignore=("1",))
        return
    held = [id(p) for p in model.parameters()]
    options = from_the_first(method)
    found, expected = run(method, model, **options), run(method, around(scripted=False), **options)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    assert [id(p) for p in model.parameters()] == held


@pytest.mark.usefixtures("script")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_scripted_models_and_forward_mode_through_them_are_refused() -> None:
    with pytest.raises(ValueError, match=r"put it inside of an nn\.Module"):
        make("adam", torch.jit.script(Inner()))
    model, (x, t) = around(scripted=True), batch()
    v = torch.ones(sum(p.numel() for p in model.parameters()))
    with pytest.raises(RuntimeError, match=r"forward mode goes through 1 \("):
        hvp(model, lambda: F.cross_entropy(model(x), t), v, mode="forward")


def test_sharded_parameters_are_refused_by_name() -> None:
    class DTensor(nn.Parameter):
        pass

    model: Any = plain_mlp()
    model[2].weight.__class__ = DTensor
    with pytest.raises(ValueError, match=r"2\.weight is a DTensor.*fully_shard.*compute with shards are not supported"):
        make("adam", model)
    assert make("adam", model, ignore=("2",)).plan.plain.keys() == {"2.weight", "2.bias"}


def test_a_model_that_is_sharded_later_has_other_parameters() -> None:
    distributed = pytest.importorskip("torch.distributed")
    shard = pytest.importorskip("torch.distributed.fsdp")
    mesh = pytest.importorskip("torch.distributed.device_mesh")
    if not hasattr(shard, "fully_shard") or not distributed.is_gloo_available():
        pytest.skip("this torch cannot shard a module")
    model = plain_mlp()
    maker = make("kfac", model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        shard.fully_shard(model, mesh=mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"0\.weight was replaced by another DTensor"):
            step(maker, model, *batch())
        step(make("kfac", model), model, *batch())
    finally:
        distributed.destroy_process_group()


# --- empty batches --------------------------------------------------------------------------------------------------------
LOSSES = {"sum": total, "mean": F.cross_entropy, "unrecognised sum": unrecognised}


def told(method: str, loss: Any) -> bool:
    """Whether the method does without a loss that it knows."""
    model = plain_mlp()
    try:
        step(make(method, model), model, *batch(), loss)
    except ValueError:
        return False
    return True


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(v) for k, v in value.items() if k != "diagnosis")  # the condition of zeros is infinite
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


def gathered(maker: Any) -> dict[str, Any]:
    """The statistics, without the basis that a refresh turns and what is held in it: that is due with or without evidence."""
    turned = ("basis", "moments")
    sites = maker.state_dict()["sites"]
    return {k: {name: x for name, x in v["state"].items() if not name.startswith(turned)} for k, v in sites.items()}


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("method", ALL)
def test_an_empty_batch_adds_nothing(method: str, name: str) -> None:
    loss = LOSSES[name]
    if name == "unrecognised sum" and not told(method, loss):
        pytest.skip("it needs a loss that it knows")
    model = plain_mlp()
    maker = make(method, model)
    curvatures = [b.triple.curvature for b in maker.plan.blocks]
    still = not maker.plan.per_step and all(c.of_passes and "previous" not in c.needs for c in curvatures)
    for n in (0, 6, 0, 6):
        before = str(maker.state_dict()["sites"])
        statistics = str(gathered(maker))
        x, t = batch(n)
        step(maker, model, x, t, loss)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients) and finite(maker.state_dict())
        if n == 0 and still:
            assert str(gathered(maker)) == statistics
        if name == "mean" and n == 0 and maker.skipped:
            assert str(maker.state_dict()["sites"]) == before
            assert not any(g.any() for g in gradients)
    assert any(g.any() for g in gradients)


@pytest.mark.parametrize("method", ["kfac", "unit_ng", "smw_ng", "seng", "hessian_free", "kbfgs", "adam", "shampoo"])
def test_an_empty_micro_batch_is_none(method: str) -> None:
    results = []
    for sizes in ((6,), (6, 0)):
        model = plain_mlp()
        maker = make(method, model)
        for n in sizes:
            x, t = batch(n)
            maker.setup_loss_call(total, maker.setup_model_call(model, x), t)
            maker.accumulate()
        maker.precondition()
        results.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*results, rtol=0, atol=1e-9 * float(results[0].abs().max()))


def test_a_pass_without_a_tensor_is_one_example() -> None:
    """Nobody says how many examples there are, and for what goes by terms of the loss nobody has to."""
    x, t = batch()
    found, first = [], plain_mlp()
    for declared in (False, True):
        model: Any = copy.deepcopy(first)
        maker = make("kfac", model, fisher=FisherExact())
        function = model.forward
        call = maker.setup_model_call(function, x) if declared else maker.setup_model_call(lambda f=function: f(x))
        maker.setup_loss_call(F.cross_entropy, call, t)
        maker.forward_and_backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    model = plain_mlp()
    maker = make("kfac", model, fisher=FisherEmp())
    maker.setup_loss_call(lambda z: z.square().mean(), maker.setup_model_call(lambda: model[4](model[2](model[0](x)))))
    with pytest.raises(ValueError, match="FisherEmp needs the gradients of"):
        maker.forward_and_backward()


# --- a training step as the declared call ----------------------------------------------------------------------------------
class Trained(nn.Module):
    """A model with the methods that training frameworks ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, index: int = 0) -> Tensor:
        x, t = batch
        return F.cross_entropy(self(x), t)

    def of_parts(self, batch: Any) -> dict[str, Any]:
        """The model's own call is never made, as where an encoder and a decoder are called."""
        return {"loss": F.cross_entropy(self.net(batch["x"]), batch["t"]), "count": len(batch["t"])}


class Task(nn.Module):
    """A wrapper that makes the loss; the maker is of what it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), t)


def declare(maker: Any, model: Any, how: str) -> None:
    x, t = batch()
    if how == "tuple":
        maker.setup_loss_repr(maker.setup_model_call(model.training_step, (x, t), 0))
    elif how == "list by name":
        maker.setup_loss_repr(maker.setup_model_call(model.training_step, batch=[x, t]))
    elif how == "parts, targets first":
        maker.setup_loss_repr(maker.setup_model_call(model.of_parts, {"t": t, "x": x})["loss"])
    elif how == "wrapper":
        maker.setup_loss_repr(maker.setup_model_call(Task(model), x, t))
    else:
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)


@pytest.mark.parametrize("method", ANY)
def test_a_training_step_is_a_call_of_the_model(method: str) -> None:
    results = []
    for how in ("model", "tuple", "list by name", "parts, targets first", "wrapper"):
        model = Trained()
        maker, optimizer = make(method, model), torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            declare(maker, model, how)
            maker.forward_and_backward()
            optimizer.step()
        assert not maker.silent()
        results.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=0, atol=1e-9 * float(results[0].abs().max()))
