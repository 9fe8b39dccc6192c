"""Parameters that are not a layer's own: adapters on frozen bases, parametrised weights, weights tied across layer types."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gradmaker import METHODS
from gradmaker.curvature import FisherExact
from gradmaker.representations import Dense, Kron
from tests import models, oracles
from tests.coverage import LoRA, TiedLanguage, evaluated, spectral
from tests.measure import EXACT, blocks, compare, ggn, measure, setup
from tests.models import CLASSES, Case, build, build_tokens

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for weight norm
FULL = Dense(granularity="full")


# ------------------------------------------------------------------ adapters
def adapted() -> Case:
    def make() -> nn.Module:
        return nn.Sequential(LoRA(4, 5, 2), nn.Tanh(), LoRA(5, CLASSES, 2))

    return build(make, 6, 4)


def test_adapters_are_the_whole_matrix() -> None:
    """Frozen bases are no part of the curvature: its size is that of the adapters."""
    case = adapted()
    trained = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    maker = measure(case, FisherExact(), FULL)
    assert blocks(maker)["full"][0].shape == (1, trained, trained)
    compare(maker, ggn(adapted()))


@pytest.mark.parametrize("method", ["kfac", "ekfac", "unit_ng", "layer_ng", "full_ng", "diag_ng", "shampoo", "adam", "smw_ng"])
def test_frozen_bases_are_untouched_and_not_counted(method: str) -> None:
    case = adapted()
    bases = {k: p.detach().clone() for k, p in case.model.named_parameters() if "base" in k}
    maker = METHODS[method](case.model)
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        setup(maker, case)  # type: ignore[arg-type]
        maker.forward_and_backward()
        optimizer.step()
    named = dict(case.model.named_parameters())
    for name, before in bases.items():
        assert named[name].grad is None and torch.equal(named[name], before), name
    rows = maker.summary().rows  # type: ignore[attr-defined]
    assert rows and not any("base" in row[0] for row in rows)


def test_a_zero_adapter_starts() -> None:
    """``up`` starts at zero, so ``down`` has no gradient and no curvature at first: its block is zero, its step too."""
    case = adapted()
    with torch.no_grad():
        case.model.get_parameter("0.up.weight").zero_()
    maker = METHODS["kfac"](case.model)
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    found = {k: p.grad for k, p in case.model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in found.values())
    assert float(found["0.down.weight"].norm()) == 0 < float(found["0.up.weight"].norm())


# ------------------------------------------------------------------ parametrised weights
def parametrised(wrap: Callable[[nn.Module], nn.Module], layer: Callable[[], nn.Module], *size: int) -> Case:
    def make() -> nn.Module:
        return nn.Sequential(wrap(layer()), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))

    def ready() -> nn.Module:
        model = make()
        model.double()(torch.zeros(1, *size[1:], dtype=torch.float64))
        return model

    return build(ready, *size)


WRAPPED: dict[str, Callable[[], Case]] = {
    "weight_norm": partial(parametrised, parametrizations.weight_norm, lambda: nn.Linear(4, 3), 5, 4),
    "weight_norm_conv": partial(parametrised, parametrizations.weight_norm, lambda: nn.Conv1d(2, 3, 2), 4, 2, 5),
    "weight_norm_transposed": partial(parametrised, parametrizations.weight_norm, lambda: nn.ConvTranspose1d(2, 3, 2), 4, 2, 5),
    "orthogonal": partial(parametrised, parametrizations.orthogonal, lambda: nn.Linear(4, 3), 3, 4),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_parametrised_weights_are_exact(name: str) -> None:
    """Curvature is that of the parameters behind the weight, through the parametrisation."""
    for representation in (FULL, Dense(granularity="layer"), Dense(granularity="unit")):
        compare(measure(WRAPPED[name](), FisherExact(), representation), ggn(WRAPPED[name]()))


def test_a_spectral_norm_in_training_is_that_of_the_recorded_call() -> None:
    """A repeated call would move its singular vectors on, and the curvature with them."""
    oracle = ggn(evaluated(spectral()))
    case = spectral()
    maker = measure(case, FisherExact(), FULL)
    compare(maker, oracle)
    twin = spectral()
    twin.run()
    assert all(torch.equal(b, c) for b, c in zip(case.model.buffers(), twin.model.buffers(), strict=True))
    assert all(m.training for m in case.model.modules())
    case.run()
    assert oracles.relative_error(ggn(evaluated(case)), oracle) > 1e-6  # one more iteration does change it


def test_parametrised_weights_under_kfac_are_plain() -> None:
    """K-FAC leaves them to the fallback, and says so."""
    case, twin = models.weight_norm(), models.weight_norm()
    maker = METHODS["kfac"](case.model)
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    twin.run().backward()
    plain = {row[0] for row in maker.summary().rows if row[4] == "plain gradient"}  # type: ignore[attr-defined]
    assert plain == {f"0.parametrizations.weight.original{j}" for j in (0, 1)}
    for name, p in twin.model.named_parameters():
        assert torch.equal(p.grad, case.model.get_parameter(name).grad) == (name in plain), name  # type: ignore[arg-type]


# ------------------------------------------------------------------ tied weights, repeated calls, checkpoints
def test_an_embedding_tied_to_the_head_is_one_parameter() -> None:
    """Of two rules: the generic path sees both uses, as the sum that the gradient is; K-FAC holds factors of both."""
    make = partial(build_tokens, TiedLanguage, 5, 4, CLASSES, tags=False)
    for representation in (FULL, Dense(granularity="layer")):
        compare(measure(make(), FisherExact(), representation), ggn(make()))
    for method, plain in {"kfac": [], "ekfac": ["layer.weight"]}.items():
        maker = METHODS[method](make().model)
        assert [row[0] for row in maker.summary().rows if row[4] == "plain gradient"] == plain  # type: ignore[attr-defined]


class Twice(nn.Module):
    """A transposed convolution and an attention module, each called twice, in a checkpoint or not."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)  # so that a reentrant checkpoint has an input with a gradient
        self.spread, self.attention = nn.ConvTranspose1d(4, 4, 3, padding=1), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)
        self.use_reentrant = use_reentrant

    def body(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.spread(h.mT)).mT
        return h + torch.tanh(self.attention(h, h, h, need_weights=False)[0])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(2):
            h = self.body(h) if self.use_reentrant is None else checkpoint(self.body, h, use_reentrant=self.use_reentrant)
        z: Tensor = self.head(h.mean(1))
        return z


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["none", "reentrant", "saved"])
def test_layers_called_twice_in_checkpoints(use_reentrant: bool | None, training: bool) -> None:
    """In evaluation a reentrant checkpoint makes its calls without gradients, where torch would take its fused path."""

    def make(mode: bool | None) -> Case:
        case = build(lambda: Twice(mode), 4, 3, 4)
        case.model.train(training)
        return case

    oracle = ggn(make(None))
    for representation in (FULL, Dense(granularity="layer")):
        compare(measure(make(use_reentrant), FisherExact(), representation), oracle)
    plain = blocks(measure(make(None), FisherExact(), Kron(), max_dim=99))
    found = blocks(measure(make(use_reentrant), FisherExact(), Kron(), max_dim=99))
    assert set(found) == set(plain) and {"spread.weight", "spread.bias", "attention.query", "attention.out"} <= set(found)
    for name, (C, _) in plain.items():
        assert oracles.relative_error(found[name][0], C) < EXACT, name
