"""Tokenizers: ids, how far tokens read, marks, fingerprints, and what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import Tokenizer
from limbeck.data.language import (
    PLAIN,
    ByteTokens,
    LibraryTokens,
    Tokens,
    TransformersTokens,
    encode,
    load_tokens,
    train_bpe,
)
from limbeck.data.language.records import Record
from limbeck.data.language.tokens import ends_of
from tests.data.language.texts import LINES


def kinds(bpe: LibraryTokens, metaspace: Any) -> list[Tokens]:
    return [ByteTokens(), bpe, LibraryTokens(metaspace)]


def test_bytes_are_those_of_limbecks_own_tokenizer() -> None:
    tokens = ByteTokens()
    for line, (ids, ends) in zip(LINES, tokens.encode(LINES), strict=True):
        own = Tokenizer("bytes", 200)([line])
        assert ids.tolist() == own["input_ids"][0][own["attention_mask"][0] > 0].tolist()
        assert tokens.decode(ids) == line
        read = [len(bytes(i - 2 for i in ids[: n + 1]).decode(errors="ignore")) for n in range(len(ids))]
        assert ends.tolist() == read
    assert tokens.encode([""])[0][0].tolist() == []


def test_tokens_read_a_text_from_end_to_end(bpe: LibraryTokens, metaspace: Any) -> None:
    for tokens in kinds(bpe, metaspace):
        for line, (ids, ends) in zip(LINES, tokens.encode(LINES), strict=True):
            assert len(ids) == len(ends)
            assert ends[-1] == len(line)
            assert (np.diff(ends, prepend=0) >= 0).all()
            assert ids.dtype == ends.dtype == np.int32
    # every token of a text without split characters has its own characters
    for tokens in kinds(bpe, metaspace)[:2]:
        ids, ends = tokens.encode([LINES[0]])[0]
        pieces = [LINES[0][a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        assert [tokens.decode([i]) for i in ids] == pieces


def test_ends_of_shared_and_trimmed_characters() -> None:
    assert ends_of(np.array([[0, 3], [4, 6], [5, 6]]), 6).tolist() == [3, 3, 6]
    assert ends_of(np.array([[0, 1], [0, 1], [0, 1], [1, 2]]), 2).tolist() == [0, 0, 1, 2]
    assert ends_of(np.zeros((0, 2), np.int64), 0).tolist() == []


def test_bpe_is_trained_and_the_same_every_time(bpe: LibraryTokens) -> None:
    again = train_bpe([line for line in LINES for _ in range(3)], 320)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.size == 320
    assert (bpe.eos, bpe.bos, bpe.front, bpe.back) == (1, 1, (1,), (1,))
    assert bpe.pad == 0
    for line, (ids, _) in zip(LINES, bpe.encode(LINES), strict=True):
        assert bpe.decode(ids) == line
        assert len(ids) < len(line.encode())
    assert bpe.decode(bpe.encode(["\x00ÿ∀"])[0][0]) == "\x00ÿ∀"  # anything can be written in it
    with pytest.raises(ConfigError, match="258 or more"):
        train_bpe(LINES, 257)


def test_fingerprints_tell_ids_apart(bpe: LibraryTokens, metaspace: Any) -> None:
    prints = {tokens.fingerprint for tokens in kinds(bpe, metaspace)}
    assert len(prints) == 3
    assert train_bpe(LINES, 319).fingerprint not in prints
    assert load_tokens("bytes").fingerprint == ByteTokens().fingerprint
    library = tokenizers.Tokenizer.from_str(bpe.tokenizer.to_str())
    assert LibraryTokens(library).fingerprint == bpe.fingerprint
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.decoder = tokenizers.decoders.Fuse()
    other = LibraryTokens(library)
    assert other.fingerprint == bpe.fingerprint  # none of these changes an id of a text
    assert other.encode(LINES)[0][0].tolist() == bpe.encode(LINES)[0][0].tolist()
    assert library.truncation is not None  # what was given is left as it was
    for change in (
        lambda t: setattr(t, "normalizer", tokenizers.normalizers.Lowercase()),
        lambda t: t.add_tokens(["daughter"]),
        lambda t: t.add_special_tokens(["<x>"]),
    ):
        changed = tokenizers.Tokenizer.from_str(bpe.tokenizer.to_str())
        change(changed)
        assert LibraryTokens(changed).fingerprint != bpe.fingerprint
    ended = copy.copy(bpe)
    ended.__dict__.pop("fingerprint", None)
    ended.back = ()
    assert ended.fingerprint != bpe.fingerprint  # documents would end otherwise
    assert (bpe.template_print, ByteTokens().template_print) == (
        load_tokens(bpe, template="plain").template_print,
        None,
    )


def test_what_follows_a_text_gets_no_space(bpe: LibraryTokens, metaspace: Any) -> None:
    spaced = LibraryTokens(metaspace)
    first, second = "The miller", "'s daughter walked"
    apart = [spaced.encode([first])[0][0].tolist(), spaced.continued([second])[0][0].tolist()]
    assert spaced.decode(apart[0] + apart[1]) == first + second
    assert spaced.decode([*apart[0], *spaced.encode([second])[0][0].tolist()]) == first + " " + second  # were it naive
    assert spaced.decode(spaced.encode([first + second])[0][0].tolist()) == first + second
    assert spaced.continued([second])[0][1].tolist()[-1] == len(second)
    for tokens in kinds(bpe, metaspace):
        for text in ("\nnew line", "  two spaces", "", "."):
            (ids, ends), (before, _) = tokens.continued([text])[0], tokens.encode(["mill"])[0]
            assert tokens.decode([*before.tolist(), *ids.tolist()]) == "mill" + text
            assert not len(ends) or ends[-1] == len(text)
    assert bpe.continued([second])[0][0].tolist() == bpe.encode([second])[0][0].tolist()


def test_prompts_and_completions_are_cut_apart(bpe: LibraryTokens, metaspace: Any) -> None:
    record = Record((("The mil", False), ("ler walked", True)))
    for tokens in kinds(bpe, metaspace):
        corpus = encode([record], tokens)
        ids, learned = corpus.ids.tolist(), corpus.learned.tolist()
        prompt = [*tokens.front, *tokens.encode(["The mil"])[0][0].tolist()]
        assert ids[: len(prompt)] == prompt  # what a model is given to go on from
        assert learned == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert tokens.decode([i for i in ids if i not in (*tokens.front, *tokens.back)]) == "The miller walked"
        assert ids[-1] == tokens.eos
    joint = bpe.encode(["The miller walked"])[0][0].tolist()
    assert joint != encode([record], bpe).ids[1:-1].tolist()  # a token of these straddles the border


def test_a_folder_of_transformers(bpe: LibraryTokens, tmp_path: Path) -> None:
    made = train_bpe(LINES * 3, 320, template=PLAIN)
    made.save(tmp_path)
    read = load_tokens(str(tmp_path))
    assert isinstance(read, TransformersTokens)
    assert (read.front, read.back, read.pad, read.size) == (bpe.front, bpe.back, bpe.pad, bpe.size)
    assert read.fingerprint == made.fingerprint
    assert read.template == PLAIN
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for line, (ids, ends) in zip(LINES, read.encode(LINES), strict=True):
        assert theirs(line)["input_ids"] == [1, *ids.tolist()]
        assert ids.tolist() == bpe.encode([line])[0][0].tolist()
        assert ends.tolist() == bpe.encode([line])[0][1].tolist()
    assert theirs.decode(theirs(LINES[2])["input_ids"], skip_special_tokens=True) == LINES[2]
    read.save(tmp_path / "again")
    assert load_tokens(tmp_path / "again").fingerprint == made.fingerprint
    assert load_tokens(theirs).fingerprint == made.fingerprint
    assert load_tokens(tmp_path / "tokenizer.json").fingerprint == made.fingerprint
    assert load_tokens(made.tokenizer).fingerprint == made.fingerprint


def test_other_tokenizers(tmp_path: Path, metaspace: Any) -> None:
    ByteTokens().save(tmp_path)
    assert load_tokens(tmp_path).fingerprint == ByteTokens().fingerprint
    assert load_tokens(Tokenizer("bytes", 9)).size == 258
    assert load_tokens(metaspace).front == (1,)
    assert load_tokens(metaspace).back == (2,)
    from transformers import ByT5Tokenizer

    for spec, message in (
        (Tokenizer("words", 9, ("a",)), "words cannot be put together again"),
        (3, "no such tokenizer; found int"),
        ("no/such/folder", "no such tokenizer; found 'no/such/folder'"),
        (ByT5Tokenizer(), "does not tell where its tokens stand"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            load_tokens(spec)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="this file holds no tokenizer"):
        load_tokens(tmp_path / "x.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        load_tokens(tmp_path / "empty")
