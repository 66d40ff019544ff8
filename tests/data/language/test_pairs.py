"""Two tokenizers: the same text in the tokens of both, and which characters each token covers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.core.errors import DataError
from limbeck.data.language import ByteTokens, LanguageLoader, LibraryTokens, language_source
from tests.data.language.texts import CHAT, CHATML, CHATML_MARKED, LINES, chat_tokens

TEXTS = [line * (1 + i % 3) for i, line in enumerate(LINES * 3)]
END = "\0"  # what stands for the end of a text below


def batch_of(records: list, student: Any, teacher: Any, **options: Any) -> Any:
    source = language_source(records, tokenizer=student, teacher_tokenizer=teacher, validation=0, **options)
    loader = LanguageLoader(source.train, batch_size=99, shuffle=False, drop_last=False)
    return next(iter(loader.batches()))


def spans(offsets: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor) -> list[tuple[int, int, int]]:
    """Token, first and last character of a row's places."""
    return [(int(i), *o) for i, o, k in zip(ids, offsets.tolist(), keep.tolist(), strict=True) if k]


def check_side(tokens: Any, found: list[tuple[int, int, int]], text: str) -> None:
    """Characters that tokens cover are those they stand for, one after the other, as far as they are whole."""
    read = 0
    for token, start, stop in found:
        assert start == read <= stop, (token, start, stop, read)
        said = tokens.decode([token])
        if "\ufffd" not in said and token not in (*tokens.front, *tokens.back):
            assert said == text[start:stop]
        read = stop


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("pack", [False, True])
def test_both_read_the_same_text(bpe: LibraryTokens, pack: bool, padding: str, flipped: bool) -> None:
    sides = [bpe, ByteTokens()] if flipped else [ByteTokens(), bpe]
    batch = batch_of(TEXTS, *sides, pack=pack, padding=padding, length=200)
    for row in range(batch.size):
        ids, other = batch.inputs["input_ids"][row], batch.teacher_inputs["input_ids"][row]
        keep = batch.inputs["attention_mask"][row] > 0 if not pack else batch.extras["document"][row] > 0
        own = spans(batch.extras["offsets"][row], ids, keep)
        theirs = spans(batch.extras["teacher_offsets"][row], other, other != sides[1].pad)
        whole = own[-1][2]
        assert theirs[-1][2] == whole
        if not pack:  # one text, and its end
            line = TEXTS[int(batch.index[row])]
            assert whole == len(line) + 1
            check_side(sides[0], own, line)
            check_side(sides[1], theirs, line)
        else:
            texts = [side.decode([t for t, _, _ in s if t != 1]) for side, s in zip(sides, (own, theirs), strict=True)]
            assert texts[0] == texts[1]
            ends = [[stop for token, _, stop in side if token == 1 and stop] for side in (own, theirs)]
            assert ends[0] == ends[1]  # documents begin and end at the same characters


def test_blocks_have_the_same_characters(bpe: LibraryTokens) -> None:
    text = "".join(LINES) * 5
    for student, teacher in ((ByteTokens(), bpe), (bpe, ByteTokens())):
        batch = batch_of([text], student, teacher, length=48, overlap=4)
        counted = [[], []]
        for row in range(batch.size):
            keep = batch.inputs["attention_mask"][row] > 0
            other = batch.teacher_inputs["attention_mask"][row] > 0
            own = spans(batch.extras["offsets"][row], batch.inputs["input_ids"][row], keep)
            theirs = spans(batch.extras["teacher_offsets"][row], batch.teacher_inputs["input_ids"][row], other)
            assert 0 <= own[-1][2] - theirs[-1][2] <= 8  # a token that a border runs through is left out
            assert own[0][1] == 0
            for side, labels, mask in (
                (0, batch.labels, batch.mask),
                (1, batch.extras["teacher_labels"], batch.extras["teacher_mask"]),
            ):
                counted[side] += labels[row][mask[row]].tolist()
        assert student.decode(counted[0][:-1]) == text  # every token once
        assert len(counted[1]) > 0.8 * len(teacher.encode([text])[0][0])
        assert len(counted[1]) <= len(teacher.encode([text])[0][0]) + 1


def test_teacher_labels_are_shifted_too(bpe: LibraryTokens) -> None:
    batch = batch_of(TEXTS, "bytes", bpe, length=400)
    ids, labels = batch.teacher_inputs["input_ids"], batch.extras["teacher_labels"]
    mask = batch.extras["teacher_mask"]
    assert torch.equal(labels[:, :-1][mask[:, :-1]], ids[:, 1:][mask[:, :-1]])
    assert mask.sum() == sum(len(i) + 1 for i, _ in bpe.encode(TEXTS))
    assert batch.count("teacher_mask") == mask.sum()


def test_equal_tokenizers_need_no_second_text(bpe: LibraryTokens) -> None:
    batch = batch_of(TEXTS, bpe, bpe, length=64)
    assert batch.teacher_inputs is None
    assert "offsets" not in batch.extras


def test_prompts_are_read_and_not_counted(bpe: LibraryTokens) -> None:
    records = [{"prompt": "Who walked?", "completion": " The daughter."}] * 3
    batch = batch_of(records, "bytes", bpe)
    prompt, whole = len("Who walked?"), len("Who walked? The daughter.")
    for offsets, mask in (
        (batch.extras["offsets"], batch.mask),
        (batch.extras["teacher_offsets"], batch.extras["teacher_mask"]),
    ):
        counted = offsets[:, 1:][mask[:, :-1]]  # of the tokens that are predicted
        assert counted[:, 0].min() == prompt
        assert counted[:, 1].max() == whole + 1


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefixes", "marks"])
def test_chats_are_counted_in_what_the_assistant_says(template: str, bpe: LibraryTokens) -> None:
    """Each side has its own template; their headers cover no characters."""
    other = chat_tokens(
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    chat = [*CHAT[:2], {"role": "assistant", "content": " The daughter. "}, *CHAT[3:]]
    batch = batch_of([{"messages": chat}] * 2, chat_tokens(template), other)
    turns = [" The daughter. ", "To the mill."]
    ends = [len(turns[0]) + 1, len(turns[0]) + 1 + len(turns[1]) + 1]
    said = turns[0] + END + turns[1] + END
    for tokens, ids, offsets, mask in (
        (chat_tokens(template), batch.inputs["input_ids"], batch.extras["offsets"], batch.mask),
        (other, batch.teacher_inputs["input_ids"], batch.extras["teacher_offsets"], batch.extras["teacher_mask"]),
    ):
        predicted = torch.zeros_like(mask)
        predicted[:, 1:] = mask[:, :-1]
        covered = offsets[0][predicted[0]]
        assert covered[:, 1].max() == ends[-1]
        assert set(ends) <= set(covered[:, 1].tolist())
        assert ((offsets[0, :, 1] > offsets[0, :, 0]) <= predicted[0]).all()  # headers are empty
        for token, (start, stop) in zip(ids[0][predicted[0]].tolist(), covered.tolist(), strict=True):
            text = tokens.decode([token])
            if END not in said[start:stop] and stop > start:
                assert text.strip() == said[start:stop].strip()


def test_templates_that_rewrite_contents_are_told(bpe: LibraryTokens) -> None:
    loud = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
    with pytest.raises(DataError, match="changes what the assistant says"):
        batch_of([{"messages": list(CHAT)}] * 2, "bytes", chat_tokens(loud))
    language_source([{"messages": list(CHAT)}] * 2, tokenizer=chat_tokens(loud), validation=0)  # alone it may
