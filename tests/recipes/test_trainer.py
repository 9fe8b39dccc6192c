"""Hugging Face Trainer: its ways to make an optimizer, its scales of the loss, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import gradmaker as gm
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.recipes.watched import METHODS, Micro, Watch, close, equal
from tests.test_state import equal_states

VOCABULARY, LENGTH, ROWS = 32, 9, 14


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    """One block in float64, the same each time."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
        return GPT2LMHeadModel(config).double()


def texts() -> list[dict[str, Tensor]]:
    """Rows whose labels are shifted by the model, and masked for some of their tokens."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = [row.masked_fill(torch.arange(LENGTH) < j % 5, -100) for j, row in enumerate(rows)]
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


class Classifier(nn.Module):
    """Takes no `num_items_in_batch`: Trainer divides its mean loss by the number of micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Classifier().double()


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(56, 6, generator=generator, dtype=torch.float64), torch.randint(3, (56,), generator=generator)
    t[::5] = -100
    return [{"x": row, "labels": label} for row, label in zip(x, t, strict=True)]


def arguments(folder: Path, accumulation: int = 1, steps: int = 4, **options: Any) -> TrainingArguments:
    """Seven batches of two texts, or of eight examples: the last group of four is a short one."""
    plain = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    sizes = {"max_steps": steps, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{"per_device_train_batch_size": 2, "seed": 1, **plain, **sizes, **options})


class Watched(Trainer):
    """Keeps the micro-batches of every step, each with the number of items and of micro-batches of its step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[dict[str, Tensor], Any, int]] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        kept = {name: value.clone() for name, value in inputs.items()}
        self.seen.append((kept, num_items_in_batch, self.current_gradient_accumulation_steps))
        return super().training_step(model, inputs, num_items_in_batch)

    def steps(self) -> list[list[tuple[dict[str, Tensor], Any, int]]]:
        found, seen = [], list(self.seen)
        while seen:
            found.append([seen.pop(0) for _ in range(seen[0][2])])
        return found


def run(model: nn.Module, method: str, arguments: TrainingArguments, data: Any, **options: Any) -> tuple[Any, Watch]:
    optimizer = gm.optimizer(model, method, **METHODS[method])
    found = Watch(optimizer)
    trainer = Watched(model, arguments, train_dataset=data, optimizers=(optimizer, None), **options)
    trainer.train()
    assert optimizer.metrics()["skipped"] == 0
    return trainer, found


def inside(maker: Any, model: nn.Module, batch: Any) -> None:
    maker.setup_loss_repr(maker.setup_model_call(model, **batch)["loss"])


# --- the same steps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_language_model_is_divided_by_its_tokens(method: str, accumulation: int, tmp_path: Path) -> None:
    """The model gets the number of tokens of all micro-batches: its losses add up to that of the step."""
    trainer, found = run(gpt2(), method, arguments(tmp_path, accumulation), texts())
    steps = trainer.steps()
    assert [len(step) for step in steps] == ([1] * 4 if accumulation == 1 else [4, 3, 4, 3])
    micros = [[Micro({**batch, "num_items_in_batch": n}, 1.0) for batch, n, _ in step] for step in steps]
    close(found.gradients, found.declared(micros, inside))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_ones_own_is_divided_by_its_micro_batches(method: str, accumulation: int, tmp_path: Path) -> None:
    options = arguments(tmp_path, accumulation, per_device_train_batch_size=8)
    trainer, found = run(classifier(), method, options, examples())
    steps = trainer.steps()
    assert [len(step) for step in steps] == ([1] * 4 if accumulation == 1 else [4, 3, 4, 3])
    close(found.gradients, found.declared([[Micro(batch, 1 / k) for batch, _, k in step] for step in steps], inside))


def test_a_model_that_is_not_divided(tmp_path: Path) -> None:
    """It takes the number of items, and does not use it: the loss of a step is the sum of the means."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **rates)).double()
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 2} for row in texts()]
    trainer, found = run(model, "kfac", arguments(tmp_path, 4), data)
    micros = [[Micro(batch, 1.0) for batch, _, _ in step] for step in trainer.steps()]
    close(found.gradients, found.declared(micros, inside), 1e-9)


def over_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def outside(maker: Any, model: nn.Module, batch: Any) -> None:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, batch["x"])["logits"], batch["labels"])


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_outside_of_the_model(method: str, tmp_path: Path) -> None:
    """The weights of its terms are read: a sum over the items of all micro-batches, some of which are masked."""
    options = arguments(tmp_path, 4, per_device_train_batch_size=8)
    trainer, found = run(classifier(), method, options, examples(), compute_loss_func=over_items)
    micros = [[Micro(b, int((b["labels"] >= 0).sum()) / int(n)) for b, n, _ in step] for step in trainer.steps()]
    close(found.gradients, found.declared(micros, outside))


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, tmp_path: Path) -> None:
    trainer, found = run(gpt2().float(), method, arguments(tmp_path, 4, bf16=True), texts())

    def declare(maker: Any, model: nn.Module, batch: Any) -> None:
        call = torch.autocast("cpu", torch.bfloat16)(model.__call__)
        maker.setup_loss_repr(maker.setup_model_call(call, **batch)["loss"])

    micros = [[Micro({**batch, "num_items_in_batch": n}, 1.0) for batch, n, _ in step] for step in trainer.steps()]
    close(found.gradients, found.declared(micros, declare), 1e-5)
    assert not found.optimizer.maker.silent()


def test_checkpoints_of_activations_and_evaluation_change_nothing(tmp_path: Path) -> None:
    plain, model = gpt2(), gpt2()
    run(plain, "kfac", arguments(tmp_path, 2), texts())
    extra = {"activation_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
    run(model, "kfac", arguments(tmp_path, 2, **extra), texts(), eval_dataset=texts()[:3])
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-12)


# --- clipping -------------------------------------------------------------------------------------------------------------
def test_clipping_of_the_trainer_is_that_of_raw_gradients(tmp_path: Path) -> None:
    with pytest.warns(ChangedGradientWarning, match="as by clipping"):
        run(classifier(), "soap", arguments(tmp_path, max_grad_norm=1e-3), examples())


def test_clipping_of_the_step(tmp_path: Path) -> None:
    model = classifier()
    optimizer = gm.optimizer(model, "soap", max_norm=0.5, **METHODS["soap"])
    found = Watch(optimizer)
    Trainer(model, arguments(tmp_path), train_dataset=examples(), optimizers=(optimizer, None)).train()
    norms = [torch.stack([g.norm() for g in step.values()]).norm() for step in found.gradients]
    torch.testing.assert_close(torch.stack(norms), torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-4, atol=0.0)


def test_smoothed_labels_are_asked_for(tmp_path: Path) -> None:
    options = {"label_smoothing_factor": 0.1}
    with pytest.raises(RuntimeError, match="label smoothing"):
        run(gpt2(), "kfac", arguments(tmp_path, **options), texts())
    run(gpt2(), "soap", arguments(tmp_path, **options), texts())
    optimizer = gm.optimizer(gpt2(), "kfac", likelihood="categorical", accumulation=2, **METHODS["kfac"])
    made = arguments(tmp_path, 2, **options)
    Trainer(optimizer.maker.model, made, train_dataset=texts(), optimizers=(optimizer, None)).train()
    assert optimizer.maker.step == 4


# --- how the optimizer is made --------------------------------------------------------------------------------------------
LINE: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "damping": 0.1, "max_norm": 1.0}


class Made(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = gm.optimizer(model or self.model, "kfac", **LINE)
        return self.optimizer


def test_all_ways_to_make_the_optimizer(tmp_path: Path) -> None:
    """Given, made by a factory, made in a method of a subclass: also from `model_init`, which makes the model late."""
    models = [gpt2() for _ in range(3)]
    given = gm.optimizer(models[0], "kfac", **LINE)
    factory: Any = (lambda: gm.optimizer, {"method": "kfac", **LINE})
    trainers = [
        Trainer(models[0], arguments(tmp_path), train_dataset=texts(), optimizers=(given, None)),
        Trainer(models[1], arguments(tmp_path), train_dataset=texts(), optimizer_cls_and_kwargs=factory),
        Made(models[2], arguments(tmp_path), train_dataset=texts()),
        Trainer(None, arguments(tmp_path), train_dataset=texts(), optimizer_cls_and_kwargs=factory, model_init=lambda: gpt2()),
    ]
    for trainer in trainers:
        trainer.train()
    assert all(equal(trainer.model, models[0]) for trainer in trainers)
    assert not equal(models[0], gpt2())


# --- saved and resumed ----------------------------------------------------------------------------------------------------
class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3


def saving(method: str, folder: Path, **options: Any) -> tuple[Trainer, Any]:
    """Dropout, a schedule, momentum or decay, clipping: all of it has to go on where it was."""
    model = gpt2(dropout=0.2)
    line = {"max_norm": 0.5, **METHODS[method]}
    optimizer = gm.optimizer(model, method, **line)
    saved = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    made = Trainer(model, arguments(folder, 2, 6, **saved), train_dataset=texts(), optimizers=(optimizer, None), **options)
    return made, optimizer


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_bitwise(method: str, tmp_path: Path) -> None:
    whole, expected = saving(method, tmp_path / "whole")
    whole.train()
    stopped, _ = saving(method, tmp_path / "stopped", callbacks=[Stop()])
    stopped.train()
    resumed, found = saving(method, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and equal(resumed.model, whole.model)
    assert found.maker.step == 6 and equal_states(found.state_dict(), expected.state_dict())
