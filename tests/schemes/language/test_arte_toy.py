"""A teacher that writes well and badly by turns, and a student that answers rightly after what is well written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language import LanguageLoader, language_source
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import ARTE, Cast, Offline, perform
from limbeck.schemes.language import tailor
from limbeck.schemes.language.authors import ModelAuthor
from tests.schemes.tiny import llama

LETTERS = "abcdefghijkl"


def letters(count: int, dice: random.Random) -> list[str]:
    return [dice.choice(LETTERS) for _ in range(count)]


def trained(model: Any, data: list[dict[str, str]], steps: int) -> Any:
    split = language_source(data, tokenizer="bytes", validation=0).train
    config = TrainConfig(steps=steps, optimizer="adamw", lr=0.005, compile="off", device="cpu", clip=1.0)
    cast = Cast(model, Terms.of(CrossEntropy()), None, config, LanguageLoader(split, batch_size=32, seed=1), seed=3)
    return perform(Offline(), cast, quiet=True).student


def shares(model: Any, tokens: Any, prompts: Sequence[str]) -> float:
    """How many answers that a model draws are right."""
    rows = ModelAuthor(model, tokens).generate(prompts, max_tokens=3, temperature=1.0, n=4, seed=77)
    marks = [answer.text == p[0].upper() for p, row in zip(prompts, rows, strict=True) for answer in row]
    return sum(marks) / len(marks)


@pytest.mark.slow
def test_what_the_student_likes_becomes_what_the_teacher_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alignment raises the share of the preferred way of writing; what is written then teaches better."""
    dice = random.Random(1)
    known = [
        {"prompt": f"{start}{c}", "completion": c.upper()} for c in LETTERS * 12 for start in ("", "!", "!!", "!!!")
    ]
    known = [{**record, "completion": "-"} if dice.random() < 0.5 else record for record in known]
    known += [{"prompt": f"{letters(1, dice)[0]}?", "completion": c} for c in letters(200, dice)]
    teacher = trained(llama(width=48, layers=1, seed=4), known, 250)
    labelled = [{"prompt": c, "completion": c.upper()} for c in LETTERS[:3] * 3]
    split = language_source(labelled, tokenizer="bytes", validation=0).train

    def liked(model: Any, tokens: Any, prompts: Sequence[str], answers: Sequence[str], size: int) -> torch.Tensor:
        """A student that is helped by an example that is right."""
        shown = [prompt.split("\n\n")[0] for prompt in prompts]
        return torch.tensor([float(text[1:] == text[0].upper()) for text in shown])

    monkeypatch.setattr(tailor, "likelihoods", liked)
    asked = list(LETTERS[3:])
    options: dict[str, Any] = {"drafts": 9, "questions": 9, "seeds": 1, "candidates": 2, "score": "likelihood"}
    options |= {"plain": "{question}", "techniques": [f"{m}{{question}}" for m in ("!", "!!", "!!!")]}
    options |= {"question": "{questions}?", "question_tokens": 3, "rationale_tokens": 3, "beta": 0.5}
    options["question_pairs"] = 0  # of so few letters all are wanted
    scores = []
    for lr in (1e-9, 1e-3):
        student = llama(width=24, layers=1, seed=5)
        config = TrainConfig(steps=60, optimizer="adamw", lr=0.01, compile="off", device="cpu")
        loader = LanguageLoader(split, batch_size=4, seed=1)
        cast = Cast(student, Terms.of(CrossEntropy()), FrozenTeacher(teacher), config, loader, seed=3)
        align = {"lr": lr, "epochs": 25, "batch_size": 8}
        first, last = ARTE(**options, align=align).trainings(cast)
        policy = first.student
        made = first.train()
        perform(_Only(first), Cast(policy, Terms.of(CrossEntropy()), None, config, made, seed=3), quiet=True)
        made = last.train()
        perform(_Only(last), Cast(student, Terms.of(CrossEntropy()), None, config, made, seed=3), quiet=True)
        tokens = made.split.tokens
        scores.append((shares(policy, tokens, asked), shares(student, tokens, asked)))
    (before, plain), (after, tailored) = scores
    assert after > before + 0.2
    assert tailored > plain + 0.1


class _Only(Offline):
    """One training that is there."""

    def __init__(self, training: Any) -> None:
        self.training = training

    def trainings(self, cast: Cast) -> Any:
        from dataclasses import replace

        yield replace(self.training, name="", train=cast.train)
