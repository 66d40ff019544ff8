"""Masked language models and texts with gaps: ``tests.schemes.gaps:texts`` and ``tests.schemes.gaps:bert``."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.data.language.masked import masked_source
from tests.schemes.tiny import WORDS


def texts(**options: Any) -> Any:
    """Short lines."""
    lines = [f"{WORDS[i % 8]} {WORDS[(3 * i + 1) % 7]} {i % 10}" for i in range(60)]
    return masked_source(lines, **{"tokenizer": "bytes", "mask": 1, "length": 24, "validation": 0.1, **options})


def bert(vocabulary: int = 258, width: int = 16, layers: int = 1, seed: int | None = None) -> Any:
    """A BERT of a few thousand weights."""
    from transformers import BertConfig, BertForMaskedLM

    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
        config = BertConfig(
            vocab_size=vocabulary, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, **sizes
        )
        return BertForMaskedLM(config)
