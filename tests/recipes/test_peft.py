"""PEFT: low-rank adapters of a frozen model, in a plain loop and with Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gradmaker as gm
from tests.recipes.watched import METHODS, Micro, Watch, close, equal
from tests.test_state import equal_states


def base(dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 9}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
        return GPT2LMHeadModel(config).to(dtype)


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Adapters of all of the block's matrices; as always, ``B`` begins at zero."""
    made = base(dtype)
    targets = ["c_attn", "c_proj", "c_fc"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM", **options)
        return get_peft_model(made, config)


def texts() -> Tensor:
    return torch.randint(32, (10, 9), generator=torch.Generator().manual_seed(5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[list[Micro]]:
    rows, seen = texts(), []
    for j in steps:
        batch = {"input_ids": rows.roll(j, 0)[:6], "labels": rows.roll(j, 0)[:6]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append([Micro(batch, 1.0)])
    return seen


def inside(maker: Any, model: nn.Module, batch: Any) -> None:
    maker.setup_loss_repr(maker.setup_model_call(model, **batch).loss)


# --- the same steps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_adapters_alone_are_trained(method: str) -> None:
    model = adapted()
    optimizer = gm.optimizer(model, method, **METHODS[method])
    found, frozen = Watch(optimizer), base()
    seen = train(model, optimizer, range(5))
    close(found.gradients, found.declared(seen, inside))
    assert all(".lora_A." in name or ".lora_B." in name for name in found.gradients[-1]) and len(found.gradients[-1]) == 8
    assert optimizer.maker.plan.blocks and not optimizer.maker.silent()
    with model.disable_adapter():
        rows = texts()
        assert torch.equal(model(rows).logits, frozen(rows).logits)
    assert not torch.equal(model(rows).logits, frozen(rows).logits)


@pytest.mark.parametrize("method", ["kfac", "soap", "muon"])
def test_the_method_treats_all_matrices(method: str) -> None:
    """No adapter is the last layer of the model, which methods for hidden weights leave to Adam."""
    optimizer = gm.optimizer(adapted(), method, **METHODS[method])
    assert {group["method"] for group in optimizer.param_groups} == {method}


@pytest.mark.parametrize("method", ["kfac", "soap"])
def test_a_model_in_bfloat16(method: str) -> None:
    """PEFT keeps the adapters in float32."""
    model = adapted(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = gm.optimizer(model, method, **METHODS[method])
    found = Watch(optimizer)
    seen = train(model, optimizer, range(4))
    close(found.gradients, found.declared(seen, inside), 1e-4)


# --- saved and resumed ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["kfac", "soap"])
def test_saved_adapters_and_optimizer_go_on_bitwise(method: str, tmp_path: Path) -> None:
    whole = adapted()
    first = gm.optimizer(whole, method, **METHODS[method])
    train(whole, first, range(3))
    whole.save_pretrained(tmp_path)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    train(whole, first, range(3, 6))
    resumed = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    second = gm.optimizer(resumed, method, **METHODS[method])
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, second, range(3, 6))
    assert equal(resumed, whole) and equal_states(second.state_dict(), first.state_dict())


def trainer(method: str, folder: Path, steps: int = 4) -> tuple[Trainer, Any]:
    model = adapted(lora_dropout=0.2)
    optimizer = gm.optimizer(model, method, max_norm=0.5, **METHODS[method])
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_steps": 2}
    sizes = {"max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    data: Any = [{"input_ids": row, "labels": row} for row in texts()]
    made = TrainingArguments(str(folder), **quiet, **sizes)
    return Trainer(model, made, train_dataset=data, optimizers=(optimizer, None)), optimizer


@pytest.mark.parametrize("method", ["kfac", "soap"])
def test_trainer_on_top(method: str, tmp_path: Path) -> None:
    """Its checkpoints hold the adapters alone, beside the state of the optimizer."""
    whole, expected = trainer(method, tmp_path)
    whole.train()
    resumed, found = trainer(method, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert resumed.state.global_step == 4 and equal(resumed.model, whole.model)
    assert equal_states(found.state_dict(), expected.state_dict())
