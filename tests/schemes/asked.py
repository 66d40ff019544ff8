"""Questions for encoder-decoders as small as they can be; recipes name them ``tests.schemes.asked:asked``."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.data.language.pairs import seq2seq_source
from tests.schemes.tiny import records


def asked(**options: Any) -> Any:
    """A source of prompts and what follows them."""
    return seq2seq_source(records(), **{"tokenizer": "bytes", "validation": 0.1, **options})


def t5(vocabulary: int = 258, width: int = 16, seed: int = 1) -> Any:
    """An encoder-decoder of a few thousand weights, without dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": width, "d_kv": 8, "d_ff": width, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, dropout_rate=0.0, **sizes, **marks))
