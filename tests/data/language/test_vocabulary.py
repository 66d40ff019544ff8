"""Same tokens, padded tokens, other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers

from limbeck.core import catalogue
from limbeck.core.catalogue import Card
from limbeck.core.errors import DataError
from limbeck.core.objective import Objective
from limbeck.data.language import ByteTokens, LibraryTokens, train_bpe
from limbeck.data.language.vocabulary import compare_vocabularies, coping, refuse_other
from tests.data.language.texts import LINES


def test_padded_rows_are_told_and_no_mistake(bpe: LibraryTokens) -> None:
    assert compare_vocabularies(bpe).kind == "same"
    assert compare_vocabularies(bpe, bpe, student_width=320, teacher_width=320).size == 320
    found = compare_vocabularies(bpe, student_width=384, teacher_width=352)
    assert (found.kind, found.size) == ("padded", 352)
    assert "384 logits of the student, 352 of the teacher: the first 352 count" in found.note
    refuse_other(found, ("kd",))
    both = compare_vocabularies(bpe, student_width=352, teacher_width=352)
    assert (both.kind, both.size) == ("same", 352)


def test_too_narrow_a_model_is_told(bpe: LibraryTokens) -> None:
    with pytest.raises(DataError, match="the teacher has fewer logits.*found 300 logits, 320 tokens of bpe of 320"):
        compare_vocabularies(bpe, student_width=320, teacher_width=300)


def test_special_tokens_and_templates_may_differ(bpe: LibraryTokens) -> None:
    library = tokenizers.Tokenizer.from_str(bpe.tokenizer.to_str())
    library.add_special_tokens(["<|im_end|>"])
    named = {**bpe.named, "eos_token": "<|im_end|>"}
    other = LibraryTokens(library, named, template="{{ messages }}")
    assert other.fingerprint != bpe.fingerprint  # documents end otherwise
    found = compare_vocabularies(bpe, other)
    assert (found.kind, found.size) == ("padded", 320)


def test_other_tokens_are_refused_with_a_way_out(bpe: LibraryTokens, metaspace: Any) -> None:
    found = compare_vocabularies(ByteTokens(), bpe)
    assert (found.kind, found.size) == ("other", 0)
    assert "bytes with 258 tokens and bpe of 320 with 320; id" in found.note
    with pytest.raises(
        DataError, match="kd: teacher and student have different tokenizers.*data.options.teacher_token"
    ):
        refuse_other(found, ("kd",))
    assert compare_vocabularies(bpe, LibraryTokens(metaspace)).kind == "other"
    assert compare_vocabularies(bpe, train_bpe(LINES[::2], 320)).kind == "other"
    library = tokenizers.Tokenizer.from_str(bpe.tokenizer.to_str())
    library.normalizer = tokenizers.normalizers.Lowercase()
    assert "they cut texts differently" in compare_vocabularies(bpe, LibraryTokens(library)).note


def test_methods_that_can_cope_are_named(bpe: LibraryTokens) -> None:
    before = coping()

    @catalogue.register(
        Card("span_kd", "Spans", "None", 2026, "response", "x", "For this test.", needs=("offsets", "teacher_offsets"))
    )
    class Spans(Objective):
        pass

    try:
        assert set(coping()) == {*before, "span_kd"}
        found = compare_vocabularies(ByteTokens(), bpe)
        refuse_other(found, ("span_kd",))
        with pytest.raises(DataError, match=r"^kd: .*use .*span_kd"):
            refuse_other(found, ("kd", "span_kd"))
    finally:
        del catalogue._methods["span_kd"]
