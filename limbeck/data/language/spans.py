"""Pairs of names in a text: read from an answer, found in the text, written as tags of words, read from tags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Pair = tuple[str, str]
Span = tuple[int, int]

OUTSIDE, BEGINS, INSIDE = 0, 1, 2  # tags of words
_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[Span]:
    """Where words and single marks stand.

    >>> words_of("So it is.")
    [(0, 2), (3, 5), (6, 8), (8, 9)]
    """
    return [found.span() for found in _WORD.finditer(text)]


def mentions(text: str, names: Iterable[str]) -> list[Span]:
    """Where names stand in a text as whole words, whatever their case; the longest where several begin.

    >>> mentions("Heart attack or ATTACK, not attacks", ["attack", "heart attack"])
    [(0, 12), (16, 22)]
    """
    known = sorted({" ".join(name.split()) for name in names} - {""}, key=lambda name: (-len(name), name))
    if not known:
        return []
    either = "|".join(r"\s+".join(map(re.escape, name.split())) for name in known)
    return [found.span() for found in re.finditer(rf"(?<!\w)(?:{either})(?!\w)", text, re.IGNORECASE)]


def read_pairs(answer: str, between: str = "|") -> list[Pair] | None:
    """Pairs of an answer with one in each line; other lines are nothing.

    Args:
        answer: Such as ``"aspirin | nausea"``; ``none`` says that there is no pair.
        between: What stands between the two.

    Returns:
        Each pair once; ``None`` where there is neither a pair nor a word of none.

    >>> read_pairs("- Aspirin | nausea\\n- aspirin | nausea"), read_pairs("None."), read_pairs("I cannot say")
    ([('Aspirin', 'nausea')], [], None)
    """
    found = dict[Pair, Pair]()
    for line in answer.splitlines():
        sides = [side.strip().lstrip("-*•").strip(" \t\"'") for side in line.split(between)]
        if len(sides) == 2 and all(sides):
            found.setdefault((sides[0].casefold(), sides[1].casefold()), (sides[0], sides[1]))
    if not found and not re.search(r"\bnone\b", answer, re.IGNORECASE):
        return None
    return list(found.values())


def verbatim(pairs: Iterable[Pair], text: str) -> list[Pair]:
    """The pairs of which both sides stand in a text.

    >>> verbatim([("Aspirin", "nausea"), ("aspirin", "death")], "Nausea after aspirin")
    [('Aspirin', 'nausea')]
    """
    return [pair for pair in pairs if all(mentions(text, [side]) for side in pair)]


def tags_of(words: Sequence[Span], spans: Iterable[Span]) -> list[int]:
    """A tag for each word: outside of all spans, at the beginning of one, or inside; of overlapping ones the longest.

    >>> tags_of([(0, 2), (3, 5), (6, 8), (8, 9)], [(3, 8)])
    [0, 1, 2, 0]
    """
    tags = [OUTSIDE] * len(words)
    for start, stop in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        own = [n for n, (first, last) in enumerate(words) if first < stop and start < last]
        if own and all(tags[n] == OUTSIDE for n in own):
            tags[own[0]] = BEGINS
            for n in own[1:]:
                tags[n] = INSIDE
    return tags


def spans_of(words: Sequence[Span], tags: Sequence[int]) -> list[Span]:
    """What :func:`tags_of` wrote; a word inside of nothing begins a span.

    >>> spans_of([(0, 2), (3, 5), (6, 8), (8, 9)], [0, 1, 2, 2])
    [(3, 9)]
    """
    found, last = list[Span](), OUTSIDE
    for (start, stop), tag in zip(words, tags, strict=True):
        if tag == BEGINS or (tag == INSIDE and last == OUTSIDE):
            found.append((start, stop))
        elif tag == INSIDE:
            found[-1] = (found[-1][0], stop)
        last = tag
    return found


def pair_f1(
    texts: Sequence[str], said: Sequence[Sequence[Pair]], gold: Sequence[Sequence[Pair]], *, lenient: bool = True
) -> dict[str, float]:
    """Precision, recall and F1 of pairs, over all texts.

    Args:
        texts: In which they stand.
        said: What was found in each.
        gold: What is there.
        lenient: Pairs are the same where both sides overlap in the text; else where they read the same.

    >>> texts, gold = ["Severe nausea after aspirin"], [[("aspirin", "severe nausea")]]
    >>> pair_f1(texts, [[("Aspirin", "nausea")]], gold)["f1"]
    1.0
    >>> pair_f1(texts, [[("Aspirin", "nausea")]], gold, lenient=False)["f1"]
    0.0
    """

    def same(text: str, one: Pair, other: Pair) -> bool:
        if not lenient:
            return all(a.casefold() == b.casefold() for a, b in zip(one, other, strict=True))
        return all(
            any(a[0] < b[1] and b[0] < a[1] for a in mentions(text, [x]) for b in mentions(text, [y]))
            for x, y in zip(one, other, strict=True)
        )

    right = there = hit = told = 0
    for text, ours, theirs in zip(texts, said, gold, strict=True):
        told, there = told + len(ours), there + len(theirs)
        right += sum(any(same(text, own, other) for other in theirs) for own in ours)
        hit += sum(any(same(text, own, other) for own in ours) for other in theirs)
    precision, recall = right / max(1, told), hit / max(1, there)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-12, precision + recall)}
