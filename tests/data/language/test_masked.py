"""Texts with gaps: how many, of what kind, where; and that two tokenizers have them under the same characters."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.data.language import LanguageLoader, load_tokens
from limbeck.data.language.masked import Masking, covered, masked_source, masking_of

LINES = ["to be or not to be, that is the question", "whether it is nobler in the mind", "to suffer"] * 20


def test_shares_are_those_that_were_asked_for() -> None:
    torch.manual_seed(0)
    masking = Masking(mask=3, size=50, special=(0, 1), share=0.2, random=0.1, kept=0.3)
    ids = torch.randint(4, 50, (200, 100))
    dice, words = torch.rand(200, 100, 2), torch.full_like(ids, 2)
    said, chosen = masking.hide(ids, torch.ones_like(ids) > 0, dice, words)
    assert float(chosen.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(said[~chosen], ids[~chosen])
    for value, share in ((3, 0.6), (2, 0.1)):
        assert float((said[chosen] == value).float().mean()) == pytest.approx(share, abs=0.02)
    assert float((said[chosen] == ids[chosen]).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_marks_and_padding_are_never_hidden() -> None:
    masking = Masking(mask=3, size=50, special=(0, 1, 3), share=0.999)
    ids, there = torch.tensor([[1, 7, 8, 1, 0]]), torch.tensor([[True, True, True, True, False]])
    assert masking.candidates(ids, there).tolist() == [[False, True, True, False, False]]


def test_batches_tell_what_is_hidden_and_are_the_same_each_time() -> None:
    source = masked_source(LINES, tokenizer="bytes", mask=1, length=40, validation=0.1, share=0.3)
    loader = LanguageLoader(source.train, batch_size=8, seed=0)
    share = []
    for batch in loader.batches():
        ids, whole, extras = batch.inputs["input_ids"], batch.extras["whole"], batch.extras
        assert torch.equal(batch.labels >= 0, batch.mask)
        assert torch.equal(batch.labels[batch.mask], whole[batch.mask])
        assert torch.equal(ids[~batch.mask], whole[~batch.mask])
        assert bool((extras["candidates"] >= batch.mask).all())
        assert torch.equal(extras["attended"], batch.inputs["attention_mask"] > 0)
        share.append(batch.mask.sum() / extras["candidates"].sum())
    assert float(torch.stack(share).mean()) == pytest.approx(0.3, abs=0.04)
    rows = source.train.rows
    first, second = rows.batch(torch.tensor([3, 5])), rows.batch(torch.tensor([5, 9]))
    width = min(first.labels.shape[1], second.labels.shape[1])
    assert torch.equal(first.inputs["input_ids"][1, :width], second.inputs["input_ids"][0, :width])
    assert source.validation.rows.masking == rows.masking


def test_other_gaps_are_made_of_the_whole() -> None:
    rows = masked_source(LINES, tokenizer="bytes", mask=1, length=40).train.rows
    batch = rows.batch(torch.arange(4))
    shape = batch.extras["whole"].shape
    nothing = rows.hidden(batch, torch.ones(*shape, 2), torch.zeros(shape, dtype=torch.long))
    assert torch.equal(nothing.inputs["input_ids"], batch.extras["whole"])
    assert not nothing.mask.any()
    every = rows.hidden(batch, torch.zeros(*shape, 2), torch.full(shape, 7))
    assert torch.equal(every.mask, batch.extras["candidates"])
    assert bool((every.inputs["input_ids"][every.mask] == 7).all())


def test_another_tokenizer_has_gaps_under_the_same_characters() -> None:
    other = {"bpe": 300}
    source = masked_source(
        LINES, tokenizer="bytes", mask=1, teacher_tokenizer=other, teacher_mask=2, length=40, random=0.0, kept=0.0
    )
    batch = source.train.rows.batch(torch.arange(12))
    spans, theirs = batch.extras["offsets"], batch.extras["teacher_offsets"]
    ids, said = batch.extras["teacher_whole"], batch.teacher_inputs["input_ids"]
    hidden = 0
    for row in range(12):
        gone = {c for s, m in zip(spans[row].tolist(), batch.mask[row].tolist(), strict=True) if m for c in range(*s)}
        for token, before, span in zip(said[row].tolist(), ids[row].tolist(), theirs[row].tolist(), strict=True):
            wanted = 2 if gone & set(range(*span)) else before
            assert token == wanted
            hidden += token != before
    assert hidden > 5


def test_covered_looks_at_characters() -> None:
    spans = torch.tensor([[[0, 2], [2, 4], [4, 4], [4, 9]]])
    other = torch.tensor([[[0, 1], [1, 3], [3, 4], [4, 4], [4, 5], [5, 9]]])
    found = covered(spans, torch.tensor([[False, True, True, False]]), other)
    assert found.tolist() == [[False, True, True, False, False, False]]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="no token for what is hidden"):
        masking_of(load_tokens("bytes"))
    with pytest.raises(ConfigError, match="one text a row"):
        masked_source(LINES, tokenizer="bytes", mask=1, pack=True, length=40)
    with pytest.raises(ConfigError, match="no shares"):
        Masking(mask=1, size=5, share=1.5)
