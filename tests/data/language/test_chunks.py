"""Chunks: the shortest texts that begin and end with a token in both tokenizers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data.language import ByteTokens, LanguageSplit, LibraryTokens, language_source, train_bpe
from limbeck.data.language.chunks import aligned_chunks

TEXTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind — façade, 東京 —", "to suffer"]
Line = list[int]


def plain(ends: Line, counts: list[bool], others: Line, other_counts: list[bool]) -> tuple[Line, Line]:
    """By the definition, in loops: between neighbours among the shared borders, where both begin and end there."""

    def places(reads: Line, counted: list[bool]) -> tuple[set[int], set[int]]:
        those = [t for t in range(len(reads)) if counted[t]]
        return {reads[t] for t in those}, {reads[t + 1] for t in those}

    (begun, ended), (other_begun, other_ended) = places(ends, counts), places(others, other_counts)
    opens, closes = begun & other_begun, ended & other_ended
    borders = sorted(opens | closes)
    own, theirs = [-1] * len(ends), [-1] * len(others)
    for begin, end in pairwise(borders):
        if begin in opens and end in closes:
            number = next(t for t in range(len(ends)) if counts[t] and ends[t] == begin)
            for reads, counted, found in ((ends, counts, own), (others, other_counts, theirs)):
                for t, read in enumerate(reads):
                    if counted[t] and begin <= read < end:
                        found[t] = number
    return own, theirs


@given(seed=st.integers(0, 80))
def test_they_are_those_of_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for length in (9, 12):
        ends = torch.randint(0, 14, (4, length), generator=generator).sort(dim=1).values
        counts = torch.rand(4, length, generator=generator) < 0.85
        counts[:, -1] = False  # a row's last position has nothing to predict
        sides += [ends, counts]
    own, theirs = aligned_chunks(*sides)
    for row in range(4):
        wanted = plain(*(side[row].tolist() for side in sides))
        assert (own[row].tolist(), theirs[row].tolist()) == wanted


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("pack", [False, True])
def test_both_tokenizers_say_the_same_in_a_chunk(pack: bool, padding: str, flipped: bool) -> None:
    bpe = train_bpe(TEXTS * 3, 300)
    sides = [bpe, ByteTokens()] if flipped else [ByteTokens(), bpe]
    source = language_source(TEXTS * 3, tokenizer=sides[0], teacher_tokenizer=sides[1], length=64, pack=pack,
                             padding=padding, validation=0)  # fmt: skip
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(len(source.train.rows)))
    labels = batch.require("labels"), batch.extras["teacher_labels"]
    chunks = batch.extras["chunk"], batch.extras["teacher_chunk"]
    masks = batch.require("mask"), batch.extras["teacher_mask"]
    seen = 0
    for row in range(batch.size):
        numbers = sorted(set(chunks[0][row].tolist()) - {-1})
        assert numbers == sorted(set(chunks[1][row].tolist()) - {-1})
        for number in numbers:
            said = []
            for tokens, label, chunk in zip(sides, labels, chunks, strict=True):
                ids = label[row][chunk[row] == number].tolist()
                said.append("<end>" if ids == [tokens.eos] else tokens.decode(ids))
            assert said[0] == said[1]
            seen += len(said[0]) if said[0] != "<end>" else 1
        for chunk, mask in zip(chunks, masks, strict=True):
            assert bool(mask[row][chunk[row] >= 0].all())
    assert seen > 0.95 * sum(len(text) + 1 for text in TEXTS * 3)


def test_a_character_of_several_tokens_is_one_chunk(bpe: LibraryTokens) -> None:
    source = language_source(["aéb"] * 2, tokenizer="bytes", teacher_tokenizer=bpe, validation=0)
    assert isinstance(source.train, LanguageSplit)
    chunk = source.train.rows.batch(torch.arange(1)).extras["chunk"][0]
    assert chunk[:5].tolist() == [0, 1, 1, 3, 4]


def test_one_tokenizer_has_none() -> None:
    source = language_source(TEXTS * 3, tokenizer="bytes", teacher_tokenizer="bytes", validation=0)
    assert isinstance(source.train, LanguageSplit)
    assert "chunk" not in source.train.rows.batch(torch.arange(1)).extras
