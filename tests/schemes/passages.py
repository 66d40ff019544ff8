"""Passages about drugs and what they caused, for recipes: ``tests.schemes.passages:passages``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.data.language import load_tokens
from limbeck.data.language.anchored import anchored_source

DRUGS = ["adol", "brixin", "ceptum", "dorazole"]
EVENTS = ["rash", "fever", "deep sleep", "cough", "mild pain", "nausea"]
MARKS = ("<", ">")


def records(count: int = 120, known: bool = False) -> list[dict[str, Any]]:
    """Two drugs and an event, which one of the two caused; the words between say which."""
    found = []
    for i in range(count):
        one, other, event = DRUGS[i % 4], DRUGS[(i + 1 + i // 7 % 3) % 4], EVENTS[(5 * i + i // 4) % 6]
        first = (i // 3) % 2 == 0
        text = f"{one} caused {event} before {other}" if first else f"{one} preceded {event} from {other}"
        text = f"{text} on day {i}"
        pair = [one if first else other, event]
        found.append({"text": text, "pairs": [pair]} if known else {"text": text})
    return found


def passages(count: int = 40, half: bool = False, **options: Any) -> Any:
    """A source of them; the held-out part is known, and so is every second of the others where ``half``."""
    every = zip(records(count), records(count, known=half), strict=True)
    splits = {"train": [pair[n % 2] for n, pair in enumerate(every)], "validation": records(9, known=True)}
    return anchored_source(splits, **{"tokenizer": "bytes", "anchors": DRUGS, "marks": MARKS, **options})


class Tagger(nn.Module):
    """Tokens, a recurrent layer in both directions, three logits a token."""

    def __init__(self, vocabulary: int, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.reads = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * width, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.linear(self.reads(self.embedding(input_ids))[0])


def plain(student: nn.Module, folder: Path) -> None:
    """What a run left is a tagger of transformers, with its tokenizer."""
    assert student(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 3)
    assert type(student).__module__.startswith("transformers.models")
    assert load_tokens(folder / "student").size == 258
