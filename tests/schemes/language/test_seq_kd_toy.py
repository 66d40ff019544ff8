"""A toy translation with noisy references: students that learn these, or what their teacher made of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language import LanguageLoader, Tokens, language_source
from limbeck.engine import TrainConfig
from limbeck.models.generating import Decoding, write
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, Offline, SeqKD, perform
from tests.schemes.tiny import llama

LETTERS, NOISE = "abcdef", 0.35


def words(count: int, seed: int) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choice(LETTERS) for _ in range(4)) for _ in range(count)]


def translated(word: str) -> str:
    """A word's letters, each three further on."""
    return "".join(LETTERS[(LETTERS.index(c) + 3) % 6] for c in word)


def noisy(word: str, dice: random.Random) -> dict[str, str]:
    said = "".join(dice.choice(LETTERS) if dice.random() < NOISE else c for c in translated(word))
    return {"prompt": f"{word}:", "completion": said}


def right(model: Any, tokens: Tokens, beams: int) -> float:
    """The share of words that are translated without a mistake."""
    held = words(200, seed=9)
    ids = torch.tensor([[1, *tokens.encode([f"{word}:"])[0][0].tolist()] for word in held])
    decoding = Decoding(6, 0.0, beams=beams)
    found = write(model, ids, torch.ones_like(ids, dtype=torch.bool), decoding, ends=[1], pad=0)
    texts = [tokens.decode(row[:size].tolist()) for row, size in zip(found.ids, found.lengths, strict=True)]
    return sum(text == translated(w) for text, w in zip(texts, held, strict=True)) / len(held)


@pytest.mark.slow
def test_the_student_is_better_and_needs_no_search() -> None:
    dice = random.Random(1)
    data = [noisy(word, dice) for word in words(600, seed=2)]
    split = language_source(data, tokenizer="bytes", length=16, validation=0).train
    tokens = split.tokens

    def cast(model: Any, steps: int, teacher: Any = None) -> Cast:
        loader = LanguageLoader(split, batch_size=50, seed=1)
        config = TrainConfig(steps=steps, optimizer="adamw", lr=0.01, compile="off", device="cpu", clip=1.0)
        return Cast(model, Terms.of(CrossEntropy()), teacher, config, loader, seed=3)

    teacher = llama(width=48, layers=2, seed=4)
    perform(Offline(), cast(teacher, 300), quiet=True)
    students = []
    for scheme in (Offline(), SeqKD(max_new_tokens=8)):
        student = llama(width=24, layers=2, seed=5)
        perform(scheme, cast(student, 70, FrozenTeacher(teacher)), quiet=True)
        students.append([right(student, tokens, beams) for beams in (1, 5)])
    (plain, _), (greedy, beam) = students
    assert greedy > plain + 0.2
    assert abs(greedy - beam) <= 0.03
