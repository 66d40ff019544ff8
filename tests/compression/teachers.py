"""Tiny random teachers of several families, in float64 so that equal means equal."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}

#: Configuration class, model class, options.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "attention_bias": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {k: v for k, v in _SIZES.items() if k != "intermediate_size"}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _SIZES),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _SIZES),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": 40, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 40,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 4,
            "num_decoder_layers": 3,
            "num_heads": 4,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {k: v for k, v in _SIZES.items() if not k.endswith(("_id", "vocab_size", "embeddings"))}
        | {"image_size": 16, "patch_size": 8},
    ),
}
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "opt")
#: Families whose heads have a width of their own.
FREE_HEADS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "t5")


@functools.cache
def teacher_of(family: str, **options: Any) -> Any:
    """A random teacher, always the same; biases and norms are random too, so that a place mixed up shows."""
    transformers = importlib.import_module("transformers")
    config_class, model_class, given = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**given, **options})
    model = getattr(transformers, model_class)(config).double().eval()
    scramble(model)
    return model


def scramble(model: Any) -> None:
    """Draw every weight anew, large enough for units to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 and (parameter == 1).all() else 0.15 * noise)


def inputs_for(model: Any, samples: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs; the last sample of texts is padded."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 40, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 40, (samples, length - 2), generator=generator)
    return inputs


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model answers."""
    return model(**inputs).logits


def silence(model: Any, reader: str, units: Tensor, count: int) -> None:
    """Zero what a module makes of the units that are not listed."""
    module = model.get_submodule(reader)
    weight = module.weight.data if type(module).__name__ == "Conv1D" else module.weight.data.T  # [inputs, outputs]
    stays = torch.zeros(count, dtype=weight.dtype).index_fill_(0, units, 1).repeat_interleave(len(weight) // count)
    weight.mul_(stays.unsqueeze(1))
