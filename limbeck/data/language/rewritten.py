"""A split whose completions are others: what a teacher wrote in the place of what stood there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.core.plain import canonical, digest
from limbeck.data.language.arrange import arrange
from limbeck.data.language.corpus import Corpus, encode
from limbeck.data.language.records import Record
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.language.written import prompts_of

_ROWS = 1024  # of a batch that is only read

Ids = tuple[int, ...]


def parted(split: LanguageSplit, least: int = 1) -> Iterator[tuple[Ids, Ids]]:
    """Each row's prompt and what stands after it, both as tokens.

    Args:
        split: Not packed.
        least: Tokens of a prompt at least; see :func:`~limbeck.data.language.written.prompts_of`.

    >>> from limbeck.data.language import language_source
    >>> pair = {"prompt": "ab", "completion": "c"}
    >>> list(parted(language_source([pair], tokenizer="bytes", validation=0).train))
    [((1, 99, 100), (101, 1))]
    """
    for first in range(0, len(split), _ROWS):
        batch = split.rows.batch(torch.arange(first, min(first + _ROWS, len(split))))
        prompts, mask = prompts_of(batch, least)
        there = batch.inputs["attention_mask"] > 0
        for prompt, own, ids, some in zip(prompts, mask, batch.inputs["input_ids"], there, strict=True):
            begin = tuple(prompt[own].tolist())
            yield begin, tuple(ids[some].tolist())[len(begin) :]


def text_of(tokens: Tokens, prompt: Sequence[int]) -> str:
    """A prompt's text, without the marks that a tokenizer puts before a document.

    >>> from limbeck.data.language import ByteTokens
    >>> text_of(ByteTokens(), [1, 99, 100])
    'ab'
    """
    front = list(tokens.front)
    ids = list(prompt)
    return tokens.decode(ids[len(front) :] if front and ids[: len(front)] == front else ids)


def marked(tokens: Tokens, prompt: str) -> Ids:
    """The tokens of a prompt that begins a document.

    >>> from limbeck.data.language import ByteTokens
    >>> marked(ByteTokens(), "ab")
    (1, 99, 100)
    """
    return (*tokens.front, *tokens.encode([prompt])[0][0].tolist())


def after(tokens: Tokens, texts: Sequence[str], finished: Sequence[bool]) -> list[Ids]:
    """The tokens of texts that follow prompts; those that came to an end are followed by the marks of one."""
    cut = tokens.continued(texts) if texts else []
    return [(*own.tolist(), *(tokens.back if done else ())) for (own, _), done in zip(cut, finished, strict=True)]


def unended(ids: Ids, end: Sequence[int]) -> Ids:
    """Tokens without the marks of an end.

    >>> unended((7, 8, 1), (1,)), unended((7, 8), (1,))
    ((7, 8), (7, 8))
    """
    return ids[: -len(end)] if end and ids[-len(end) :] == tuple(end) else ids


def rewritten(
    split: LanguageSplit, rows: Sequence[int], prompts: Sequence[Ids], written: Sequence[Ids], *, teacher: bool = False
) -> LanguageSplit:
    """Prompts with what was written after them as a split of its own, laid out as another one.

    Args:
        split: Tells tokenizers, layout and tags.
        rows: Of it, the row that each prompt is of.
        prompts, written: Tokens of the student.
        teacher: Its batches hold the same texts in the teacher's tokens, too; texts then have to have ended.

    Raises:
        DataError: Nothing of it can be learned.
    """
    own, layout, other, found = split.tokens, split.rows.layout, None, None
    if teacher and split.teacher_tokens is not None:
        found = split.teacher_tokens
        records = [_record(own, prompt, said) for prompt, said in zip(prompts, written, strict=True)]
        corpus, other = encode(records, own, positions=True), encode(records, found, positions=True)
    else:
        corpus = _corpus(prompts, written)
    made, _ = arrange(
        corpus,
        layout,
        pad=own.pad,
        long="truncate",
        tags=None if split.rows.tag is None else split.rows.tag[torch.tensor(rows, dtype=torch.long)],
        teacher=other,
        teacher_pad=0 if found is None else found.pad,
        where="what the teacher wrote",
    )
    settings = {**split.settings, "written": _print(corpus)}
    return replace(split, rows=made, teacher_tokens=found, settings=settings)


def places(split: LanguageSplit, rows: Sequence[int], samples: int) -> Tensor:
    """For each row ``[samples]`` of the split that was rewritten its place in what came of it; -1: it has none."""
    found = torch.full((samples,), -1)
    document = split.rows.student.pieces.document
    found[torch.tensor(rows, dtype=torch.long)[document]] = torch.arange(len(document))
    return found


def _record(tokens: Tokens, prompt: Ids, said: Ids) -> Record:
    return Record(((text_of(tokens, prompt), False), (tokens.decode(unended(said, tokens.back)), True)))


def _corpus(prompts: Sequence[Ids], written: Sequence[Ids]) -> Corpus:
    pairs = list(zip(prompts, written, strict=True))
    ids = [token for prompt, said in pairs for token in (*prompt, *said)]
    learned = [mark for prompt, said in pairs for mark in (*[False] * len(prompt), *[True] * len(said))]
    sizes = torch.tensor([len(prompt) + len(said) for prompt, said in pairs], dtype=torch.long)
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    return Corpus(torch.tensor(ids, dtype=torch.int32), torch.tensor(learned, dtype=torch.bool), starts)


def _print(corpus: Corpus) -> str:
    parts = (corpus.ids, corpus.learned.byte(), corpus.starts)
    return digest(canonical(len(corpus)), *(part.numpy().tobytes() for part in parts))
