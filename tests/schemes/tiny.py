"""Language models and texts as small as they can be, for schemes; recipes name them ``tests.schemes.tiny:llama``."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language import LanguageLoader, language_source
from limbeck.engine import TrainConfig
from limbeck.schemes import Cast

WORDS = ["to be", "or not", "to", "that is", "the question", "whether", "it is", "nobler"]


def llama(vocabulary: int = 258, width: int = 16, layers: int = 1, seed: int | None = None, sharp: float = 1.0) -> Any:
    """A Llama of a few thousand weights; ``sharp`` makes it sure of what it says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes, **marks)
        model = LlamaForCausalLM(config)
        model.lm_head.weight.data *= sharp
    return model


def mixtral(vocabulary: int = 258, width: int = 16, layers: int = 2, experts: int = 4, seed: int | None = None) -> Any:
    """A mixture of experts, two of which each token asks; its routers have their likes and dislikes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=vocabulary, num_local_experts=experts, num_experts_per_tok=2, **sizes, **marks
        )
        config._experts_implementation = "eager"
        model = MixtralForCausalLM(config)
        for name, parameter in model.named_parameters():
            parameter.data *= 20.0 if "gate.weight" in name else 5.0 if "experts" in name else 1.0
        model.lm_head.weight.data *= 6.0
    return model


def records(count: int = 60) -> list[dict[str, str]]:
    """Prompts with completions."""
    return [{"prompt": WORDS[i % 8][: 2 + i % 5], "completion": " " + WORDS[(3 * i) % 7]} for i in range(count)]


def pairs(**options: Any) -> Any:
    """A source of them, for recipes."""
    return language_source(records(), **{"tokenizer": "bytes", "length": 32, "validation": 0.1, **options})


def tagged(**options: Any) -> Any:
    """A source of texts of two domains, a third of which is held out: words, and the far more numbers."""
    words = [{"text": f"{WORDS[i % 8]}, {WORDS[(3 * i) % 7]}", "tag": "words"} for i in range(24)]
    numbers = [{"text": f"{i} and {7 * i % 50}", "tag": "numbers"} for i in range(48)]
    return language_source(words + numbers, **{"tokenizer": "bytes", "length": 32, "validation": 0.3, **options})


def cast(loss: Objective | Terms, *, batch_size: int = 6, steps: int = 3, data: Any = None, **changes: Any) -> Cast:
    """Student, teacher and texts in double precision, for comparisons to the last digit."""
    options = changes.pop("options", {})
    split = pairs(**{"validation": 0, **options}).train if data is None else data
    loader = LanguageLoader(split, batch_size=batch_size, seed=1)
    settings = {"optimizer": "sgd", "lr": 0.1, "compile": "off", "device": "cpu", "log_every": 1}
    config = TrainConfig(steps=steps, **{**settings, **changes.pop("config", {})})
    known = {"train": loader, "seed": 5, **changes}
    student, teacher = llama(seed=1, sharp=6.0).double(), FrozenTeacher(llama(width=24, seed=2, sharp=8.0).double())
    return Cast(student, Terms.of(loss), known.pop("teacher", teacher), config, **known)


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All of a model's weights in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
