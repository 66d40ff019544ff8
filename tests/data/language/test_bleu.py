"""Smoothed BLEU of a sentence, against its formula in plain loops."""

from __future__ import annotations

import math
import random

from limbeck.data.language.bleu import sentence_bleu


def counted(text: list[int], gram: tuple[int, ...]) -> int:
    return sum(tuple(text[i : i + len(gram)]) == gram for i in range(len(text) - len(gram) + 1))


def plain(candidate: list[int], reference: list[int]) -> float:
    product = 1.0
    for n in (1, 2, 3, 4):
        grams = [tuple(candidate[i : i + n]) for i in range(len(candidate) - n + 1)]
        matches = sum(min(counted(candidate, gram), counted(reference, gram)) for gram in set(grams))
        product *= (matches + (n > 1)) / (len(grams) + (n > 1))
    penalty = 1.0 if len(candidate) > len(reference) else math.exp(1 - len(reference) / len(candidate))
    return penalty * product**0.25


def test_it_is_the_formula() -> None:
    dice = random.Random(0)
    for _ in range(200):
        candidate, reference = ([dice.randrange(4) for _ in range(dice.randrange(1, 12))] for _ in range(2))
        found = sentence_bleu(candidate, reference)
        assert math.isclose(found, plain(candidate, reference), rel_tol=1e-12, abs_tol=1e-15)
        assert 0 <= found <= 1
        assert sentence_bleu(candidate, candidate) == 1.0
        if candidate != reference and sorted(candidate) != sorted(reference):
            assert found < 1


def test_nothing_is_like_nothing_only() -> None:
    assert sentence_bleu([], []) == 1.0
    assert sentence_bleu([], [1]) == sentence_bleu([1], []) == sentence_bleu([1], [2]) == 0.0
