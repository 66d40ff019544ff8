"""Prompts of rows, and rows of what was written after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.data.language import language_source
from limbeck.data.language.written import along, continued, of_the_second, prompts_of, together

PAIRS = [{"prompt": "what is " + "x" * i, "completion": "answer"[: 1 + i % 6]} for i in range(12)]


def split(records: Any = PAIRS, **options: Any) -> Any:
    return language_source(records, **{"tokenizer": "bytes", "validation": 0, **options}).train


@pytest.mark.parametrize("padding", ["right", "left"])
def test_prompts_are_what_stands_before_the_completion(padding: str) -> None:
    data = split(padding=padding)
    ids, mask = prompts_of(data.rows.batch(torch.arange(12)), pad=data.tokens.pad)
    for row, pair in enumerate(PAIRS):
        assert ids[row][mask[row]].tolist() == [1, *data.tokens.encode([pair["prompt"]])[0][0].tolist()]
        assert mask[row].int().diff().min() >= 0  # padding is on the left only
        assert (ids[row][~mask[row]] == data.tokens.pad).all()
    assert mask.any(dim=0).all()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_was_written_is_learned_as_data_are(padding: str) -> None:
    """The completions of the data themselves, cut off and put back, give the batch that was read."""
    data = split()
    wanted = data.rows.batch(torch.arange(12)).replace(progress=0.25)
    read = split(padding=padding).rows.batch(torch.arange(12)).replace(progress=0.25)
    ids, mask = prompts_of(read, pad=data.tokens.pad)
    lengths = torch.tensor([len(pair["completion"]) + 1 for pair in PAIRS])
    written = torch.zeros(12, 7, dtype=torch.long)
    for row, pair in enumerate(PAIRS):
        written[row, : lengths[row]] = torch.tensor([*data.tokens.encode([pair["completion"]])[0][0].tolist(), 1])
    kept = torch.arange(7) < lengths.unsqueeze(1)
    made = continued(read, ids, mask, written, kept, data.tokens.pad)
    width = made.labels.shape[1]
    assert torch.equal(made.inputs["input_ids"], wanted.inputs["input_ids"][:, :width])
    assert torch.equal(made.inputs["attention_mask"], wanted.inputs["attention_mask"][:, :width])
    assert torch.equal(made.mask, wanted.mask[:, :width])
    assert torch.equal(made.labels[made.mask], wanted.labels[wanted.mask])
    assert torch.equal(made.index, wanted.index)
    assert (made.progress, made.teacher_inputs) == (0.25, None)
    numbers = torch.arange(84.0).view(12, 7)
    spread = along(numbers, made.mask)
    assert torch.equal(spread[made.mask], numbers[kept])
    assert not spread[~made.mask].any()


def test_a_whole_text_has_the_prompt_it_is_given() -> None:
    data = split(["abcdefgh", "ab", "abcd"])
    batch = data.rows.batch(torch.arange(3))
    ids, mask = prompts_of(batch)
    assert mask.sum(dim=1).tolist() == [1, 1, 1]
    ids, mask = prompts_of(batch, least=4)
    assert mask.sum(dim=1).tolist() == [4, 3, 4]  # of the shortest, all but its end
    assert data.tokens.decode(ids[0][mask[0]].tolist()) == "abc"


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"data.options.pack: a pack holds several texts.*set pack: false"):
        prompts_of(split(pack=True, length=64).rows.batch(torch.arange(2)))
    with pytest.raises(DataError, match="these are no texts to go on with; found Tensor; wanted input_ids"):
        prompts_of(Batch(torch.zeros(2, 3)))


def test_two_batches_as_one() -> None:
    """Of the first all is as it was, wherever its padding stood; of the second only the tokens."""
    first, second = split(padding="left").rows.batch(torch.arange(4)), split().rows.batch(torch.arange(5, 9))
    made = together(first, second, pad=0)
    wanted = split().rows.batch(torch.arange(4))
    for row in range(4):
        there = wanted.inputs["attention_mask"][row].bool()
        size = int(there.sum())
        assert torch.equal(made.inputs["input_ids"][row, :size], wanted.inputs["input_ids"][row][there])
        assert torch.equal(made.labels[row, :size], wanted.labels[row, :size])
        assert torch.equal(made.mask[row, :size], wanted.mask[row, :size])
    assert not made.mask[4:].any()
    assert (made.labels[4:] == -1).all()
    assert made.index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert int(made.inputs["attention_mask"].sum()) == sum(
        int(b.inputs["attention_mask"].sum()) for b in (first, second)
    )
    spread = of_the_second(second.labels, made)
    assert torch.equal(spread[4:], second.labels[:, : spread.shape[1]])
    assert (second.labels[:, spread.shape[1] :] == -1).all()
    assert not spread[:4].any()
