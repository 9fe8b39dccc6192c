"""Layers of other libraries, by name: the blocks and steps of the layers that they are, and no rule for what looks alike."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, KfacGradientConfig, KfacGradientMaker, from_config
from gradmaker.capture.finding import layer_sites
from gradmaker.capture.rules.calls import LayerRule
from gradmaker.capture.rules.layers import rule_for
from gradmaker.capture.rules.named import NamedImageNormRule, NamedNormRule
from gradmaker.capture.rules.normalisations import GroupNormRule, LayerNormRule, RMSNormRule
from gradmaker.curvature import FisherExact
from gradmaker.representations import Dense, Diagonal, Representation
from tests.measure import compare, ggn, measure, setup
from tests.models import Case
from tests.named import NAMED, OTHERS, Conv1D, LayerNorm2d, LayerScale, LlamaRMSNorm, as_linear, layered

GRAINS: dict[str, Representation] = {
    "full": Dense(granularity="full"),
    "layer": Dense(granularity="layer"),
    "unit": Dense(granularity="unit"),
    "diagonal": Diagonal(granularity="layer"),
}


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", NAMED | OTHERS)
def test_blocks_are_those_of_the_oracle(name: str, grain: str) -> None:
    """Every number of the Gauss-Newton matrix, also of what has no rule."""
    make = (NAMED | OTHERS)[name]
    maker = measure(make(), FisherExact(), GRAINS[grain], self_check="error")
    compare(maker, ggn(make()))
    kinds = {s.kind for b in maker.plan.blocks for s in b.sites if s.name.startswith("layer")}
    expected = "generic" if name in OTHERS else "matrix" if name.startswith("Conv1D") else "scale"
    assert kinds == {expected}


@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_left_on_the_layer(name: str) -> None:
    """Its parameters are the same objects with the same numbers, and it has no hooks."""
    case, twin = NAMED[name](), NAMED[name]()
    before = dict(case.model.named_parameters())
    measure(case, FisherExact(), GRAINS["layer"])
    assert all(p is before[k] for k, p in case.model.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert "forward" not in vars(case.model.layer)


# ------------------------------------------------------------------ Conv1D is Linear
def stepped(case: Case, method: str, **options: Any) -> dict[str, Tensor]:
    """What two steps leave in ``.grad``, by parameter."""
    maker = from_config(case.model, {"method": method, **options})
    for _ in range(2):
        for p in case.model.parameters():
            p.grad = None
        setup(maker, case)  # type: ignore[arg-type]
        maker.forward_and_backward()
    return {k: p.grad for k, p in case.model.named_parameters() if p.grad is not None}


FISHER = {"fisher": {"FisherExact": {}}}
METHODS_OF_LAYERS: dict[str, dict[str, Any]] = {
    "kfac": FISHER,
    "ekfac": FISHER,
    "unit_ng": FISHER,
    "layer_ng": FISHER,
    "full_ng": FISHER,
    "skfac": {},
    "kbfgs": {},
    "hessian_free": {},
}


@pytest.mark.parametrize("method", METHODS_OF_LAYERS)
def test_conv1d_steps_as_linear(method: str) -> None:
    """The transpose of what `nn.Linear` on the same map would get, by each method."""
    assert method in METHODS
    case, twin = NAMED["Conv1D of GPT-2"](), NAMED["Conv1D of GPT-2"]()
    twin.model.layer = as_linear(twin.model.get_submodule("layer"))
    found, expected = (stepped(c, method, **METHODS_OF_LAYERS[method]) for c in (case, twin))
    assert set(found) == set(expected)
    for name, g in expected.items():
        g = g.mT if name == "layer.weight" else g
        assert torch.allclose(found[name], g, rtol=1e-9, atol=1e-12), name
    assert found["layer.weight"].shape == (4, 5)


def test_conv1d_with_a_frozen_part() -> None:
    for frozen, left in (("weight", "bias"), ("bias", "weight")):

        def make(frozen: str = frozen) -> Case:
            case = NAMED["Conv1D of GPT-2"]()
            case.model.get_submodule("layer").get_parameter(frozen).requires_grad_(False)
            return case

        maker = measure(make(), FisherExact(), Dense(granularity="layer"))
        compare(maker, ggn(make()))
        assert f"layer.{left}" in {s.name for b in maker.plan.blocks for s in b.sites}


# ------------------------------------------------------------------ a model without storage
@pytest.mark.parametrize("name", NAMED | OTHERS)
def test_a_plan_on_the_meta_device_is_that_of_the_model(name: str) -> None:
    """Nothing is known of it but shapes: the same sites and parts, as for an estimate before a model is made."""
    case = (NAMED | OTHERS)[name]()
    bare = copy.deepcopy(case.model).to("meta")
    found, expected = ([(s.name, s.kind, s.shape) for s in layer_sites(m)] for m in (bare, case.model))
    assert found == expected
    assert all(p.is_meta for p in bare.parameters())


@pytest.mark.parametrize("name", NAMED)
def test_rules_do_not_depend_on_the_default_device(name: str) -> None:
    """As after ``torch.set_default_device("cuda")``."""
    layer = NAMED[name]().model.get_submodule("layer")
    with torch.device("meta"):
        assert rule_for(layer) is not None


def test_a_rule_with_tensors_of_its_own_does_not_depend_on_the_default_device() -> None:
    class AllocatingRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.ones(x.shape[-1])

    layer = AllocatingRMSNorm(4)
    with torch.device("meta"):
        assert rule_for(layer) is not None


def test_a_rule_on_the_meta_device_does_not_depend_on_what_memory_held() -> None:
    class ScaledRMSNorm(LlamaRMSNorm):
        def __init__(self, d: int) -> None:
            super().__init__(d)
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.get_buffer("scale")

    assert rule_for(ScaledRMSNorm(4)) is not None
    assert rule_for(ScaledRMSNorm(4).to("meta")) is not None


# ------------------------------------------------------------------ what is no such layer
def test_a_forward_of_the_instance_has_no_rule() -> None:
    for layer in (Conv1D(3, 4), LlamaRMSNorm(4), LayerNorm2d(4)):
        assert rule_for(layer) is not None
        layer.forward = partial(type(layer).forward, layer)  # type: ignore[method-assign]
        assert rule_for(layer) is None


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
def test_a_layer_that_overwrites_its_input_has_no_rule() -> None:
    def make() -> Case:
        return layered(lambda: LayerScale(4, inplace=True))

    assert rule_for(make().model.get_submodule("layer")) is None
    compare(measure(make(), FisherExact(), GRAINS["layer"]), ggn(make()))


def test_another_conv1d_has_no_rule() -> None:
    """The name is that of one class of one library."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))

    assert rule_for(Conv1D()) is None


def test_a_subclass_without_a_forward_is_the_layer() -> None:
    class Mine(LlamaRMSNorm):
        pass

    class More(Conv1D):
        pass

    assert type(rule_for(Mine(4))) is type(rule_for(LlamaRMSNorm(4)))
    assert rule_for(More(5, 4)) is rule_for(Conv1D(5, 4))


@pytest.mark.parametrize("width", [1, 4])
def test_a_layer_of_torch_has_the_rule_of_its_type(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is one of a family too, of which nothing is asked then, as that runs the layer."""

    def refuse(*args: Any) -> bool:
        raise AssertionError("no rule by name is needed")

    monkeypatch.setattr(NamedNormRule, "accepts", refuse)
    layers: dict[nn.Module, type[LayerRule]] = {
        nn.LayerNorm(width): LayerNormRule,
        nn.RMSNorm(width): RMSNormRule,
        nn.GroupNorm(1, width): GroupNormRule,
    }
    assert all(type(rule_for(layer)) is rule for layer, rule in layers.items())


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_layouts_are_told_apart_at_any_width(width: int) -> None:
    last, second = rule_for(LlamaRMSNorm(width)), rule_for(LayerNorm2d(width))
    assert type(last) is NamedNormRule and type(second) is NamedImageNormRule


# ------------------------------------------------------------------ the real ones
def real(module: str, name: str) -> Any:
    """A class of transformers."""
    return getattr(importlib.import_module(f"transformers.{module}"), name)


REAL: dict[str, Callable[[], Case]] = {
    "Conv1D": lambda: layered(lambda: real("pytorch_utils", "Conv1D")(5, 4), 5),
    "Llama": lambda: layered(lambda: real("models.llama.modeling_llama", "LlamaRMSNorm")(4)),
    "Qwen3": lambda: layered(lambda: real("models.qwen3.modeling_qwen3", "Qwen3RMSNorm")(4)),
    "T5": lambda: layered(lambda: real("models.t5.modeling_t5", "T5LayerNorm")(4)),
    "Gemma": lambda: layered(lambda: real("models.gemma.modeling_gemma", "GemmaRMSNorm")(4)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REAL)
def test_real_layers(name: str) -> None:
    """Norm layers compute in float32, whatever comes in."""
    for representation in GRAINS.values():
        maker = measure(REAL[name](), FisherExact(), representation, self_check="error")
        assert not [s.name for b in maker.plan.blocks for s in b.sites if s.kind == "generic"]
        compare(maker, ggn(REAL[name]()), tolerance=1e-10 if name == "Conv1D" else 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REAL)
def test_real_layers_are_verified(name: str) -> None:
    """In float64, in which the norm layers do not compute."""
    maker = measure(REAL[name](), FisherExact(), GRAINS["layer"], self_check="error")
    result = maker.verify()
    assert result.passed and result.complete, str(result)


def gpt2() -> nn.Module:
    config = real("models.gpt2.configuration_gpt2", "GPT2Config")
    return real("models.gpt2.modeling_gpt2", "GPT2LMHeadModel")(  # type: ignore[no-any-return]
        config(
            vocab_size=11,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def llama() -> nn.Module:
    config = real("models.llama.configuration_llama", "LlamaConfig")
    return real("models.llama.modeling_llama", "LlamaForCausalLM")(  # type: ignore[no-any-return]
        config(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    )


def t5() -> nn.Module:
    config = real("models.t5.configuration_t5", "T5Config")
    return real("models.t5.modeling_t5", "T5ForConditionalGeneration")(  # type: ignore[no-any-return]
        config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0)
    )


def bert() -> nn.Module:
    config = real("models.bert.configuration_bert", "BertConfig")
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return real("models.bert.modeling_bert", "BertForMaskedLM")(  # type: ignore[no-any-return]
        config(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def gemma() -> nn.Module:
    """Its table is scaled where it is looked up, and tied to the head."""
    config = real("models.gemma2.configuration_gemma2", "Gemma2Config")
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "head_dim": 4,
        "pad_token_id": 0,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return real("models.gemma2.modeling_gemma2", "Gemma2ForCausalLM")(config(**sizes, **heads))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "GPT-2": (gpt2, set()),
    "Llama": (llama, set()),
    "T5": (t5, set()),
    "Gemma": (gemma, set()),
    "BERT": (bert, {"cls.predictions.bias"}),  # the decoder's bias, which another module holds as well
}
"""Models without dropout, the heads of all but Llama tied to their tables, and what K-FAC leaves to its fallback."""


class MyScaledWordEmbedding(nn.Embedding):
    """A scaled embedding as transformers has them, which may also shift."""

    embed_scale, shift = 3.0, 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale + self.shift


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_scaled_embeddings_are_proven(shift: float) -> None:
    """One that does more than its name says has no rule."""

    def case() -> Case:
        model = nn.Sequential(MyScaledWordEmbedding(7, 3, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
        model[0].shift = shift
        return Case(model, torch.arange(12).reshape(4, 3) % 7, torch.tensor([0, 1, 2, 0]), F.cross_entropy)

    torch.manual_seed(0)
    made = case()
    maker = measure(made, FisherExact(), Dense(granularity="layer"))
    assert next(s.kind for b in maker.plan.blocks for s in b.sites) == ("generic" if shift else "embedding")
    compare(maker, ggn(made))


class Logits(nn.Module):
    """A model of transformers as a function of its tokens, with a class for each of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor) -> Tensor:
        further = {"decoder_input_ids": tokens} if self.model.config.is_encoder_decoder else {}
        z: Tensor = self.model(input_ids=tokens, **further).logits
        return z.flatten(0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str) -> None:
    make, left = MODELS[name]
    torch.manual_seed(0)
    model = Logits(make()).train()
    case = Case(model, torch.randint(11, (3, 5)), torch.randint(11, (15,)), F.cross_entropy)
    maker = KfacGradientMaker(model, KfacGradientConfig(fallback="adam"))
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    own = {k for b in maker.plan.blocks if b.options.method == "method" for s in b.sites for k in s.parameters}
    assert {k for k, _ in model.named_parameters() if k not in own} == {f"model.{k}" for k in left}
    result = maker.verify()
    assert result.passed and result.complete, str(result)
