from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, TensorError
from limbeck.data.language import ByteTokens, LanguageSplit, language_source, train_bpe
from limbeck.objectives.parts.paired_tokens import pairs_by_order, pairs_by_text, pairs_of, partners

TEXTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind — façade, 東京 —", "to suffer"]


def plain_order(counts: list[bool], others: list[bool]) -> list[int]:
    own = [j for j, counted in enumerate(others) if counted]
    found, k = [], 0
    for counted in counts:
        found.append(own[k] if counted and k < len(own) else -1)
        k += counted
    return found


def plain_text(ends: list[int], others: list[int], counts: list[bool], other_counts: list[bool]) -> list[int]:
    found = []
    for i, end in enumerate(ends):
        before = any(counts[k] and ends[k] == end for k in range(i))
        there = [j for j in range(len(others)) if other_counts[j] and others[j] == end]
        found.append(there[0] if counts[i] and not before and there else -1)
    return found


@given(seed=st.integers(0, 60))
def test_pairs_are_those_of_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts, others = (torch.rand(3, n, generator=generator) < 0.6 for n in (6, 9))
    ends, other_ends = (torch.randint(0, 9, (3, n), generator=generator).sort(dim=1).values for n in (6, 9))
    by_order, by_text = pairs_by_order(counts, others), pairs_by_text(ends, other_ends, counts, others)
    for row in range(3):
        assert by_order[row].tolist() == plain_order(counts[row].tolist(), others[row].tolist())
        arguments = (t[row].tolist() for t in (ends, other_ends, counts, others))
        assert by_text[row].tolist() == plain_text(*arguments)


def test_left_padding_and_a_longer_student() -> None:
    counts = torch.tensor([[False, False, True, True, True], [True] * 5])
    others = torch.tensor([[False, True, True], [False] * 3])
    assert pairs_by_order(counts, others).tolist() == [[-1, -1, 1, 2, -1], [-1] * 5]


@pytest.mark.parametrize("pack", [False, True])
def test_pairs_on_real_texts_have_read_the_same(pack: bool) -> None:
    """Bytes and a trained BPE over texts with characters of several bytes: what both have read is one string."""
    bpe = train_bpe(TEXTS * 3, 300)
    source = language_source(
        TEXTS * 3, tokenizer=ByteTokens(), teacher_tokenizer=bpe, length=48, pack=pack, validation=0
    )
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(len(source.train.rows)))
    ids, other = batch.inputs["input_ids"], batch.teacher_inputs["input_ids"]
    student, teacher = torch.zeros(*ids.shape, 1), torch.zeros(*other.shape, 1)
    pairs = pairs_of(batch, "text", student, teacher)
    assert pairs is not None
    ends, other_ends = batch.extras["offsets"][..., 1], batch.extras["teacher_offsets"][..., 1]
    there = pairs >= 0
    assert int(there.sum()) > 0.8 * int(batch.extras["teacher_mask"].sum())  # nearly every place of the BPE's
    assert torch.equal(partners(other_ends.unsqueeze(2), pairs).squeeze(2)[there], ends[there])
    assert bool(batch.require("mask")[there].all())
    assert bool(partners(batch.extras["teacher_mask"].unsqueeze(2), pairs).squeeze(2)[there].all())


def test_within_a_character_nothing_is_paired() -> None:
    """A byte in the middle of a character has read less than the token that is all of it."""
    bpe = train_bpe(TEXTS * 3, 300)
    source = language_source(["xéx"] * 2, tokenizer="bytes", teacher_tokenizer=bpe, validation=0)
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(1))
    logits = torch.zeros(*batch.inputs["input_ids"].shape, 1)
    pairs = pairs_of(batch, "text", logits, torch.zeros(*batch.teacher_inputs["input_ids"].shape, 1))
    assert pairs is not None
    assert (pairs[0, :5] >= 0).tolist() == [True, True, False, True, True]


def test_one_tokenizer_needs_no_pairs() -> None:
    logits: Tensor = torch.zeros(2, 3, 4)
    assert pairs_of(Batch(logits), "text", logits, logits) is None
    assert partners(logits, None) is logits


def test_what_it_refuses() -> None:
    logits, other = torch.zeros(2, 3, 4), torch.zeros(2, 5, 7)
    with pytest.raises(DataError, match="teacher_mask"):
        pairs_of(Batch(logits), "order", logits, other)
    counted = Batch(logits, extras={"teacher_mask": torch.ones(2, 5, dtype=torch.bool)})
    with pytest.raises(DataError, match=r"offsets.*pairing='order'"):
        pairs_of(counted, "text", logits, other)
    with pytest.raises(TensorError, match=r"teacher_mask.*found \[2, 5\]; wanted \[2, 4\]"):
        pairs_of(counted, "order", logits, other[:, :4])
