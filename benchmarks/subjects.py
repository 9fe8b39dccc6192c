"""The models of `models.py`: their true sizes, and narrow ones of the same structure with a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: all weights are random

import torch
import transformers as hf
from torch import Tensor, nn

try:
    import timm
except Exception:  # it is not installed, or its torchvision does not fit this torch
    timm = None

__all__ = ["Batch", "Subject", "subjects", "timm"]

VOCABULARY = 200
Batch = Mapping[str, Tensor]


class Subject(NamedTuple):
    """A model in its true size and narrow, and a batch of the narrow one."""

    size: str
    true: Callable[[], nn.Module]
    narrow: Callable[[], nn.Module]
    batch: Callable[[], Batch]


# ------------------------------------------------------------------ the models
def subjects() -> Iterator[tuple[str, Subject]]:
    """The models by name."""
    yield from hugging_face().items()
    if timm is not None:
        yield from of_timm().items()


def hugging_face() -> dict[str, Subject]:
    """Models of transformers, from their configs."""
    small = {"vocab_size": VOCABULARY}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    bert = {
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
        **{"max_position_embeddings": 32},
    }
    llama = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176}
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    vit = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "num_labels": 10}
    whisper = {
        **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 256))},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64, "num_mel_bins": 16},
        **{"max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    true_llama = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    start = {"decoder_start_token_id": 0}
    return {
        "GPT-2": Subject(
            "small",
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config()),
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**small, **gpt2)),
            causal,
        ),
        "BERT, classifier": Subject(
            "base",
            lambda: hf.BertForSequenceClassification(hf.BertConfig()),
            lambda: hf.BertForSequenceClassification(hf.BertConfig(**small, **bert)),
            lambda: {"input_ids": tokens(), "attention_mask": padding(), "labels": torch.randint(2, (8,))},
        ),
        "BERT, masked tokens": Subject(
            "base",
            lambda: hf.BertForMaskedLM(hf.BertConfig()),
            lambda: hf.BertForMaskedLM(hf.BertConfig(**small, **bert)),
            lambda: {"input_ids": tokens(), "labels": tokens().masked_fill(torch.rand(8, 24) > 0.3, -100)},
        ),
        "Llama": Subject(
            "12 layers of 768",
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**true_llama, num_key_value_heads=4)),
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small, **llama, num_key_value_heads=2)),
            causal,
        ),
        "T5": Subject(
            "small",
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(**start)),
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(**small, **t5, **start)),
            lambda: {"input_ids": tokens(), "labels": tokens(12)},
        ),
        "ViT": Subject(
            "base, 224 x 224",
            lambda: hf.ViTForImageClassification(hf.ViTConfig()),
            lambda: hf.ViTForImageClassification(hf.ViTConfig(**vit, image_size=32, patch_size=8)),
            lambda: {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(10, (8,))},
        ),
        "Whisper": Subject(
            "tiny",
            lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig()),
            lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**small, **whisper)),
            lambda: {"input_features": torch.randn(8, 16, 32), "labels": tokens(12)},
        ),
    }


def of_timm() -> dict[str, Subject]:
    """Models of timm; their loss is declared outside of the model."""
    convnext, resnet = timm.models.convnext.ConvNeXt, timm.models.resnet.ResNet
    bottleneck, widths = timm.models.resnet.Bottleneck, (16, 32, 48, 64)
    return {
        "ConvNeXt": Subject(
            "tiny",
            lambda: timm.create_model("convnext_tiny"),
            lambda: convnext(depths=(1, 1, 2, 1), dims=widths, num_classes=10),
            images,
        ),
        "ResNet": Subject(
            "50",
            lambda: timm.create_model("resnet50"),
            lambda: resnet(bottleneck, (1, 1, 1, 1), channels=widths, num_classes=10),
            images,
        ),
    }


def tokens(length: int = 24) -> Tensor:
    """Random tokens of eight examples, without the special ones."""
    return torch.randint(3, VOCABULARY, (8, length))


def padding() -> Tensor:
    """A mask of sequences of different lengths."""
    return (torch.arange(24) < torch.randint(12, 25, (8, 1))).long()


def causal() -> Batch:
    """Sequences of different lengths as their own labels, shifted by the model."""
    ids, mask = tokens(), padding()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def images() -> Batch:
    """Images for a model that takes them alone."""
    return {"images": torch.randn(8, 3, 64, 64), "targets": torch.randint(10, (8,))}
