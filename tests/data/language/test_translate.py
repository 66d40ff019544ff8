"""Tokens of one vocabulary in another: shared ones, pieces of the rest."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import DataError
from limbeck.data.language import ByteTokens, LibraryTokens, train_bpe, translate
from tests.data.language.texts import LINES

tokenizers = pytest.importorskip("tokenizers")


def wordpiece(words: list[str]) -> LibraryTokens:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[unused1]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    return LibraryTokens(made, {"bos_token": "[CLS]", "eos_token": "[SEP]"}, name="wordpiece")


def spelled(found, student, teacher) -> dict[str, list[str]]:
    own = {token: text for text, token in student.table().items()}
    other = {token: text for text, token in teacher.table().items()}
    return {
        other[int(token)]: [own[int(p)] for p in row if p >= 0]
        for token, row in zip(found.source, found.pieces, strict=True)
    }


def test_pieces_put_together_are_the_token() -> None:
    small, large = train_bpe(LINES * 3, 300), train_bpe(LINES * 3, 420)
    found = translate(small, large)
    written = spelled(found, small, large)
    assert len(written) == large.size
    assert all("".join(pieces) == token for token, pieces in written.items())
    assert found.numbers.tolist() == sorted((len(p) for p in written.values()), reverse=True)
    assert found.numbers[0] > 1
    shared = dict(zip(found.teacher.tolist(), found.student.tolist(), strict=True))
    assert shared == {token: small.table()[text] for text, token in large.table().items() if text in small.table()}


def test_the_longest_prefix_is_taken() -> None:
    student, teacher = (
        wordpiece(["un", "una", "##a", "##ble", "##b", "##l"]),
        wordpiece(["unable", "##able", "x", "una"]),
    )
    written = spelled(translate(student, teacher), student, teacher)
    assert written == {
        "unable": ["una", "##ble"],
        "##able": ["##a", "##ble"],
        "x": ["[UNK]"],
        "una": ["una"],
        "[CLS]": ["[CLS]"],
        "[SEP]": ["[SEP]"],
    }  # and no unused one


def test_bytes_spell_everything(bpe: LibraryTokens) -> None:
    found = translate(ByteTokens(), bpe)
    own = ByteTokens()
    for token, row in zip(found.source.tolist(), found.pieces.tolist(), strict=True):
        pieces = [p for p in row if p >= 0]
        if token == bpe.eos:
            assert pieces == [own.eos]
        else:
            text = bpe.decode([token])
            assert "\ufffd" in text or own.decode(pieces) == text
    assert len(found.source) == bpe.size - 1


def test_the_same_tokenizer_is_itself(bpe: LibraryTokens) -> None:
    found = translate(bpe, bpe)
    assert torch.equal(found.pieces.squeeze(1), found.source)
    assert torch.equal(found.teacher, found.student)


def test_nothing_in_common() -> None:
    class Empty(ByteTokens):
        name = "empty"

        def table(self) -> dict[str, int]:
            return {}

    student = Empty()
    student.bos = student.eos = None
    with pytest.raises(DataError, match="no token of the teacher"):
        translate(student, ByteTokens())
