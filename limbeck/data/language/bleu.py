"""BLEU of one text against another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def sentence_bleu(candidate: Sequence[Hashable], reference: Sequence[Hashable], order: int = 4) -> float:
    r"""Smoothed BLEU of a sentence, from 0 to 1.

    .. math:: \min\left(1, e^{1 - r / c}\right) \left( \prod_{n=1}^{N} \frac{m_n + s_n}{l_n + s_n} \right)^{1/N},
        \qquad s_1 = 0,\ s_{n > 1} = 1

    where :math:`m_n` of the candidate's :math:`l_n` n-grams stand in the reference, each as often as it does there, and
    c and r are both lengths. Adding one keeps texts apart that share no long n-gram.

    Args:
        candidate, reference: Words, tokens or any other units.
        order: N.

    Source: Lin and Och, ORANGE: a Method for Evaluating Automatic Evaluation Metrics for Machine Translation, 2004.

    >>> round(sentence_bleu("the cat sat".split(), "the cat sat down".split()), 4)
    0.7165
    >>> sentence_bleu([1, 2, 3], [1, 2, 3])
    1.0
    """
    if not candidate or not reference:
        return float(not candidate and not reference)
    total = 0.0
    for n in range(1, order + 1):
        own, other = (
            Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (candidate, reference)
        )
        smooth = int(n > 1)
        matches, length = (own & other).total() + smooth, max(len(candidate) - n + 1, 0) + smooth
        if not matches:
            return 0.0
        total += math.log(matches / length)
    return min(1.0, math.exp(1 - len(reference) / len(candidate))) * math.exp(total / order)
