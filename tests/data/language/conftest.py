"""Tokenizers that tests of language data share."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.data.language import LibraryTokens, train_bpe
from tests.data.language.texts import LINES


@pytest.fixture(scope="session")
def bpe() -> LibraryTokens:
    """A byte-pair encoding of 320 ids."""
    return train_bpe(LINES * 3, 320)


@pytest.fixture(scope="session")
def metaspace() -> Any:
    """A tokenizer that puts a space before every text, as SentencePiece does."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted({c for line in LINES[:2] + LINES[3:5] for c in line})
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*LINES[:2], *LINES[3:5]] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
