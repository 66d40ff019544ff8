"""Documents in tokens: one long row of ids, and where each document begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.language.chat import Segment
from limbeck.data.language.records import Record, said
from limbeck.data.language.tokens import Encoded, Tokens


@dataclass
class Corpus:
    """Documents one after the other.

    Args:
        ids: ``[T]`` int32, tokens of all documents.
        learned: ``[T]``, True where a token is to be predicted.
        starts: ``[D + 1]``, where each document begins.
        ends: ``[T]`` int32: how far each token reads, counted in characters of what both tokenizers of a pair read:
            the texts of a record, or the turns of its assistant, each of these with one more for its end. ``None``
            where there is no other tokenizer.
    """

    ids: Tensor
    learned: Tensor
    starts: Tensor
    ends: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        held = (self.ids, self.learned, self.starts, self.ends)
        return sum(t.nbytes for t in held if t is not None)


@dataclass(slots=True)
class _Part:
    """A text to be cut, with what becomes of it.

    Args:
        document: Which it is of.
        text: What is cut.
        learned: Whether its tokens are predicted.
        base: Characters read before it.
        lead: Its characters that are not counted: what a template puts before the content.
        width: Its characters that are counted.
        after: Characters read once all of it is.
        marks: Ids after it.
    """

    document: int
    text: str
    learned: bool
    base: int
    lead: int
    width: int
    after: int
    marks: tuple[int, ...] = ()


def encode(records: Sequence[Record], tokens: Tokens, *, positions: bool = False) -> Corpus:
    """Cut records into tokens.

    Texts that follow each other in a record, such as a prompt and its completion, are cut apart: a model that is given
    the prompt alone starts from these very tokens. No token straddles the border.

    Args:
        records: In order.
        tokens: The tokenizer.
        positions: Keep how far each token reads, to compare with another tokenizer.

    Raises:
        DataError: A conversation that the template does not take.
    """
    parts: list[_Part] = []
    for number, record in enumerate(records):
        parts += _conversation(number, record, tokens, positions) if record.messages else _texts(number, record, tokens)
    found = _cut(parts, tokens)
    front, ids, learned, ends = _marks(tokens.front), [], [], []
    counts = np.zeros(len(records), np.int64)
    last = -1
    for part, (own, read) in zip(parts, found, strict=True):
        opens = part.document != last and not records[part.document].messages
        head = front if opens else front[:0]
        tail = _marks(part.marks)
        ids += [head, own, tail]
        learned += [np.zeros(len(head), bool), np.full(len(own) + len(tail), part.learned)]
        if positions:
            inside = np.clip(read.astype(np.int64) - part.lead, 0, part.width) + part.base
            inside = np.where(read > part.lead + part.width, part.after, inside)
            ends += [np.full(len(head), part.base), inside, np.full(len(tail), part.after)]
        counts[part.document] += len(head) + len(own) + len(tail)
        last = part.document
    return Corpus(
        torch.from_numpy(_joined(ids, np.int32)),
        torch.from_numpy(_joined(learned, np.bool_)),
        torch.from_numpy(np.concatenate([np.zeros(1, np.int64), counts.cumsum()])),
        torch.from_numpy(_joined(ends, np.int32)) if positions else None,
    )


def _texts(number: int, record: Record, tokens: Tokens) -> list[_Part]:
    parts, base = [], 0
    for text, learned in record.pieces:
        parts.append(_Part(number, text, learned, base, 0, len(text), base + len(text)))
        base += len(text)
    parts[-1].marks, parts[-1].after = tokens.back, base + 1
    return parts


def _conversation(number: int, record: Record, tokens: Tokens, positions: bool) -> list[_Part]:
    parts, base = [], 0
    for segment in tokens.turns(record.messages, record.first, record.place):
        text, content = segment.text, segment.content or ""
        if not segment.learned:
            parts.append(_Part(number, text, False, base, len(text), 0, base, segment.marks))
            continue
        lead, width = _content(segment, record) if positions else (0, len(text))
        skipped = len(content) - len(content.lstrip()) if width < len(content) else 0
        after = base + len(content) + 1
        parts.append(_Part(number, text, True, base + skipped, lead, width, after, segment.marks))
        base = after
    return parts


def _content(segment: Segment, record: Record) -> tuple[int, int]:
    """Where a turn's content stands in it, and how long it is; a template may strip it."""
    content = segment.content or ""
    for written in (content, content.strip()):
        at = segment.text.find(written)
        if at >= 0:
            return at, len(written)
    raise DataError(
        "the chat template changes what the assistant says, so two tokenizers cannot be compared on it",
        where=said(record.place),
        found=f"{segment.text[:60]!r} for {content[:60]!r}",
        remedy="use a template that writes contents as they are",
    )


def _cut(parts: Sequence[_Part], tokens: Tokens) -> list[Encoded]:
    """All texts in two calls: those that open a document, and those that follow another text."""
    opens = [i for i, part in enumerate(parts) if i == 0 or parts[i - 1].document != part.document]
    first = set(opens)
    later = [i for i in range(len(parts)) if i not in first]
    found: dict[int, Encoded] = {}
    for places, cut in ((opens, tokens.encode), (later, tokens.continued)):
        found |= zip(places, cut([parts[i].text for i in places]) if places else [], strict=True)
    return [found[i] for i in range(len(parts))]


def _marks(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array(ids, np.int32)


def _joined(arrays: list[NDArray], kind: type) -> NDArray:
    return np.concatenate(arrays).astype(kind, copy=False) if arrays else np.zeros(0, kind)
