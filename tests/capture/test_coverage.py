"""Which layers are covered: every cell of docs/coverage.md is what `tests/coverage.py` measures; and the newer rows, closer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import KfacGradientConfig, KfacGradientMaker
from gradmaker.curvature import FisherExact
from gradmaker.representations import Dense, Kron
from tests import oracles
from tests.coverage import ATTENTION, ROWS, Attend, Hand, agree, attention, embedding, encoder_layer, measured
from tests.measure import EXACT, blocks, ggn, measure, setup
from tests.models import CLASSES, Case, build

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for weight norm


def page_rows() -> dict[str, list[str]]:
    from tests.docs.test_docs import ROOT, script

    text = script(ROOT / "docs" / "make_coverage.py").PAGE.read_text(encoding="utf-8")
    lines = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {label.strip().strip("`"): [c.strip() for c in cells] for label, *cells in lines}


@pytest.mark.parametrize("label", ROWS)
def test_cells_are_as_on_the_page(label: str) -> None:
    """Run python docs/make_coverage.py where this fails after a change that is meant."""
    from tests.docs.test_docs import ROOT, script

    page = script(ROOT / "docs" / "make_coverage.py")
    assert page_rows()[label] == page.cells(ROWS[label], measured(label))


def test_the_page_is_whole() -> None:
    assert list(page_rows()) == list(ROWS)


# ------------------------------------------------------------------ attention
def grads(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def stepped(case: Case, **options: Any) -> dict[str, Tensor]:
    """Gradients after one step of K-FAC."""
    maker = KfacGradientMaker(case.model, KfacGradientConfig(fisher=FisherExact(), **options))
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    return grads(case.model)


def split_attention(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of `Hand`."""
    out: dict[str, Tensor] = {}
    for name, g in found.items():
        path, _, last = name.rpartition(".")
        kind = "weight" if last.endswith("weight") else "bias"
        if last in ("in_proj_weight", "in_proj_bias"):
            out |= {f"{path}.{part}.{kind}": v for part, v in zip(("query", "key", "value"), g.chunk(3), strict=True)}
        elif last.endswith("_proj_weight"):
            out[f"{path}.{ {'q': 'query', 'k': 'key', 'v': 'value'}[last[0]] }.weight"] = g
        else:
            out[name.replace("out_proj", "out")] = g
    return out


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Each parameter to 1e-9; the gradient of the keys' bias is zero, but for rounding: softmax does not see a shift."""
    floor = 1e-6 * float(torch.stack([g.norm() for g in expected.values()]).max())
    errors = [float((found[k] - g).norm()) / max(floor, float(g.norm())) for k, g in expected.items()]
    return set(found) == set(expected) and max(errors) < 1e-9


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("label", ATTENTION)
def test_attention_steps_as_linear_layers(label: str, sharing: str) -> None:
    """Preconditioned gradients of the module are those of four Linear layers."""
    by_hand = stepped(ATTENTION[label](hand=True), sharing=sharing)
    found = split_attention(stepped(ATTENTION[label](), sharing=sharing))
    assert same(found, by_hand)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("first", [True, False], ids=["pre", "post"])
def test_encoder_layer_steps_as_linear_layers(training: bool, first: bool) -> None:
    """Also in evaluation, where torch has a fused path for the whole layer that calls none of its parts."""

    class ByHand(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.self_attn, self.linear1, self.linear2 = Hand(layer.self_attn), layer.linear1, layer.linear2
            self.norm1, self.norm2 = layer.norm1, layer.norm2

        def forward(self, x: Tensor) -> Tensor:
            def mixed(v: Tensor) -> Tensor:
                y: Tensor = self.self_attn(v, v, v)[0]
                return y

            def fed(v: Tensor) -> Tensor:
                y: Tensor = self.linear2(torch.relu(self.linear1(v)))
                return y

            if first:
                x = x + mixed(self.norm1(x))
                return x + fed(self.norm2(x))
            x = self.norm1(x + mixed(x))
            y: Tensor = self.norm2(x + fed(x))
            return y

    def case(hand: bool) -> Case:
        made = build(lambda: nn.Sequential(encoder_layer(norm_first=first), nn.Flatten(), nn.Linear(12, CLASSES)), 4, 3, 4)
        assert isinstance(made.model, nn.Sequential)
        if hand:
            made.model[0] = ByHand(made.model[0])
        made.model.train(training)
        return made

    by_hand, found = stepped(case(True)), split_attention(stepped(case(False)))
    assert same(found, by_hand)


@pytest.mark.parametrize("label", ATTENTION)
def test_recorded_attention_is_bitwise_the_module(label: str) -> None:
    """Outputs and gradients, with dropout from the same random numbers."""
    case, twin = ATTENTION[label](), ATTENTION[label]()
    for model in (case.model, twin.model):
        model.layer.dropout = 0.5  # type: ignore[assignment]
    torch.manual_seed(3)
    loss = twin.run()
    loss.backward()
    torch.manual_seed(3)
    maker = KfacGradientMaker(case.model, KfacGradientConfig(start_step=1))
    setup(maker, case)  # type: ignore[arg-type]
    assert torch.equal(maker.forward_and_backward()[1], loss)
    for name, g in grads(twin.model).items():
        assert torch.equal(grads(case.model)[name], g), name


class Fragile(nn.Module):
    """Attention whose input stops it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.layer(x, x, x[:, :2])[0].mean(1))
        return z


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_listens_after_a_pass(fails: bool) -> None:
    """Nor after one that raised inside of the attention."""
    stack = torch.overrides._get_current_function_mode_stack
    case = build(Fragile, 3, 5, 4) if fails else attention()
    if fails:
        with pytest.raises(AssertionError, match="does not match value shape"):
            measure(case, FisherExact(), Kron())
    else:
        measure(case, FisherExact(), Kron())
    assert stack() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_attention_without_gradients_is_frozen() -> None:
    """Every subset of trained parts is claimed, and blocks are those of the module trained whole."""
    whole = blocks(measure(attention(), FisherExact(), Dense(granularity="layer")))
    for pattern in ("in_proj", "out_proj", "bias"):
        case = attention()
        for name, p in case.model.layer.named_parameters():  # type: ignore[union-attr]
            p.requires_grad_(pattern not in name)
        part = blocks(measure(case, FisherExact(), Dense(granularity="layer")))
        assert {k.split(".")[1] for k in part if k.startswith("layer")} == {
            "in_proj": {"out"}, "out_proj": {"query", "key", "value"}, "bias": {"query", "key", "value", "out"},
        }[pattern]  # fmt: skip
        for name, (C, _) in part.items():
            expected = whole[name.removesuffix(".weight")][0]
            if name.endswith(".weight"):  # without the column of the bias
                keep = torch.arange(20).reshape(4, 5)[:, :4].reshape(-1)
                expected = expected[:, keep][:, :, keep]
            assert oracles.relative_error(C, expected) < EXACT, name


class OwnAttention(nn.MultiheadAttention):
    """A subclass with a forward of its own is left to the generic path."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, w = super().forward(*args, **kwargs)
        return 2 * y, w


def test_attention_with_its_own_forward_is_generic() -> None:
    def make() -> Case:
        return build(lambda: Attend(OwnAttention(4, 2, batch_first=True), lambda x: (x, x, x), False, False), 3, 5, 4)

    oracle = ggn(make())
    maker = measure(make(), FisherExact(), Dense(granularity="layer"))
    names = {s.name for b in maker.plan.blocks for s in b.sites if s.kind == "generic"}
    assert names == {f"layer.{k}" for k in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
    for name, (C, where) in blocks(maker).items():
        assert agree(C, torch.stack([oracle[r][:, r] for r in where]), oracle), name


@pytest.mark.parametrize("windows", [1, 2])
def test_attention_over_windows(windows: int) -> None:
    """Windows of an image folded into the batch are positions of their example, even where they look like time."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            w = x.unflatten(1, (windows, -1)).flatten(0, 1)
            y = torch.tanh(self.layer(w, w, w, need_weights=False)[0])
            z: Tensor = self.head(y.unflatten(0, (len(x), -1)).flatten(1, 2).mean(1))
            return z

    make = partial(build, Windowed, 3, 3 * windows, 4)
    oracle = ggn(make())
    for name, (C, where) in blocks(measure(make(), FisherExact(), Dense(granularity="layer"))).items():
        assert agree(C, torch.stack([oracle[r][:, r] for r in where]), oracle), name


# ------------------------------------------------------------------ convolutions over windows, norms of the embedding
def test_convolution_over_windows_whose_positions_look_like_examples() -> None:
    """Two windows an example, and as many positions as examples."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv1d(2, 3, 2), nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.layer(x.unflatten(2, (2, -1)).movedim(2, 1).flatten(0, 1)))  # (2 n, 3, 4)
            z: Tensor = self.head(y.unflatten(0, (len(x), 2)).mean((1, 3)))
            return z

    make = partial(build, Windowed, 4, 2, 10)
    oracle = ggn(make())
    for name, (C, where) in blocks(measure(make(), FisherExact(), Dense(granularity="layer"))).items():
        assert agree(C, torch.stack([oracle[r][:, r] for r in where]), oracle), name


def test_max_norm_shortens_as_without_a_maker() -> None:
    case, twin = embedding(max_norm=1.0), embedding(max_norm=1.0)
    twin.run()
    measure(case, FisherExact(), Dense(granularity="layer"))
    weight, expected = case.model.embedding.weight, twin.model.embedding.weight  # type: ignore[union-attr]
    assert float(embedding().model.embedding.weight.detach().norm(dim=1).max()) > 1.1  # type: ignore[union-attr, operator]
    assert torch.equal(weight, expected)  # type: ignore[arg-type]


def test_output_size_of_a_transposed_convolution() -> None:
    """Given at the call, it pads the output as ``output_padding`` does."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.ConvTranspose1d(2, 3, 3, stride=3), nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.layer(x, output_size=[14]))
            z: Tensor = self.head((y * torch.arange(14.0)).mean(2))
            return z

    make = partial(build, Sized, 4, 2, 4)
    oracle = ggn(make())
    for name, (C, where) in blocks(measure(make(), FisherExact(), Dense(granularity="layer"))).items():
        assert agree(C, torch.stack([oracle[r][:, r] for r in where]), oracle), name


# ------------------------------------------------------------------ memory of the exact Fisher
def wide() -> Case:
    return build(lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, CLASSES)), 256, 64)


def pulled(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[int], dict[str, Tensor]]:
    """Cotangents of each pass, and the blocks."""
    from gradmaker.capture.tape import Tape

    sizes: list[int] = []
    original = Tape.vjp

    def vjp(tape: Tape, outputs: Any, cotangents: Any, modules: Any = None) -> Any:
        sizes.append(len(cotangents[0]))
        return original(tape, outputs, cotangents, modules)

    monkeypatch.setattr(Tape, "vjp", vjp)
    maker = measure(wide(), FisherExact(**options), Kron(), self_check="off")
    return sizes, {f"{b.name} {k}": v for b in maker.plan.blocks for k, v in b.state.items()}


def test_chunks_follow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers of 64 and one of 3, 256 examples, 8 bytes: 792 KiB of output gradients for each cotangent."""
    one = 256 * (6 * 64 + CLASSES) * 8
    whole, expected = pulled(monkeypatch)
    assert whole == [3]
    for memory, sizes in ((1, [1, 1, 1]), (2 * one, [2, 1]), (3 * one - 1, [2, 1]), (3 * one, [3])):
        found, C = pulled(monkeypatch, memory=memory)
        assert found == sizes
        for name in expected:
            assert oracles.relative_error(C[name], expected[name]) < EXACT
    with pytest.raises(ValueError, match="memory=0: expected an integer"):
        FisherExact(memory=0)


def test_the_budget_bounds_the_memory() -> None:
    """Peak of live tensors during a step, seen below autograd."""
    from tests.live import Live

    def peak(**options: Any) -> int:
        case = wide()
        with Live() as live:
            measure(case, FisherExact(**options), Kron(), self_check="off")
        return live.peak

    one = 256 * (6 * 64 + CLASSES) * 8
    small, large = peak(memory=one), peak(memory=3 * one)
    assert large - small > 1.5 * one  # two further cotangents were alive
    assert small < 5.5 * one  # activations, their gradients, one cotangent's and not those of the last chunk, one layer's rows


def test_evidence_is_made_layer_by_layer() -> None:
    """The patches of twelve convolutions are never there at once."""
    from tests.live import Live

    def peak(depth: int) -> int:
        layers = [nn.Conv1d(4, 4, 31, padding=15) for _ in range(depth)]
        case = build(lambda: nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, CLASSES)), 16, 4, 256)
        with Live() as live:
            measure(case, FisherExact(), Kron())
        return live.peak

    patches = 16 * 256 * 4 * 31 * 8
    assert peak(12) - peak(4) < 3 * patches


def test_copies_are_independent() -> None:
    """A model can be copied while a maker watches its attention."""
    case = attention()
    maker = KfacGradientMaker(case.model, KfacGradientConfig(fisher=FisherExact()))
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    twin = copy.deepcopy(case.model)
    assert torch.equal(twin(case.x), case.model(case.x))


def test_randomised_norms_differ() -> None:
    """The rows of the table with a norm do not start at scale 1 and shift 0."""
    for label, row in ROWS.items():
        if "Norm" in label and "scale 0" not in label and "Transformer" not in label:
            layer = row.make().model.get_submodule(row.layer)
            assert not torch.allclose(layer.weight, torch.ones_like(layer.weight)), label  # type: ignore[arg-type, call-overload]
