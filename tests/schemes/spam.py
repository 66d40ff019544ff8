"""Texts with a rare class, for recipes: ``tests.schemes.spam:spam``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.data.sources.texts import text_source
from limbeck.models.student import read_student

SPAM = ["prize", "cheap", "winner", "loan", "casino", "miracle", "discount", "lottery"]
HAM = ["meeting", "lunch", "report", "weather", "garden", "school", "train", "letter"]


def text(words: list[str], number: int) -> str:
    """Four words, the first of which decides."""
    return f"{words[number % 8]} {HAM[(number // 8) % 8]} {HAM[(3 * number) % 8]} {HAM[(5 * number + 1) % 8]}"


def spam(ham: int = 90, rare: int = 10, known: int = 2, **options: Any) -> Any:
    """Many harmless texts, and a few of the rare class that use ``known`` of its eight words; tests use all."""
    few = [text([*SPAM[:known]] * 8, i) for i in range(rare)]
    train = [text(HAM, i) for i in range(ham)] + few
    test = [text(HAM, i) for i in range(64)] + [text(SPAM, i) for i in range(64)]
    labels = torch.tensor([0] * ham + [1] * rare), torch.tensor([0] * 64 + [1] * 64)
    vocabulary = {"tokens": "bytes", "length": 24} if options.pop("bytes", False) else {"least": 1, "length": 6}
    splits = {"train": (train, labels[0]), "test": (test, labels[1])}
    held = {"test": 0.0, "validation": 0.2, "seed": 0, **options}
    return text_source("spam", splits, classes=("ham", "spam"), held_out=held, **vocabulary)


class Bag(nn.Module):
    """The mean of a text's token vectors, and a linear layer."""

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(vocabulary, width, padding_idx=0), nn.Linear(width, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(input_ids).sum(1) / attention_mask.sum(1, keepdim=True))


def plain(student: nn.Module, folder: Path) -> None:
    """What a run left is a text model that comes with its tokenizer."""
    ids = torch.full((2, 24), 5)
    assert student(ids, torch.ones_like(ids)).shape == (2, 2)
    assert type(student).__module__.startswith("limbeck.models")
    assert read_student(folder)["text"]["tokens"] == "bytes"
