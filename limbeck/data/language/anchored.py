"""Passages in which one name is marked, and each word is tagged by what it has to do with that name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.plain import canonical, digest
from limbeck.data.language.corpus import Corpus
from limbeck.data.language.load import load_tokens
from limbeck.data.language.pieces import cut
from limbeck.data.language.read import tables
from limbeck.data.language.records import said, text_of
from limbeck.data.language.rows import Layout, Rows, Side
from limbeck.data.language.spans import Pair, Span, mentions, tags_of, words_of
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.sources.source import SPLITS, VALIDATION, DataSource, complete
from limbeck.data.sources.split import Split

TAGS = ("outside", "begins", "inside")


@dataclass(frozen=True)
class Passage:
    """A text, and which pairs of names it tells of; ``None``: nobody has said."""

    text: str
    pairs: tuple[Pair, ...] | None = None


@dataclass(frozen=True)
class Instance:
    """A passage with one name marked.

    Args:
        passage: Its number.
        anchor: The name, as it stands there.
        text: With the marks.
        words: Where words stand in the passage.
        shifted: Where they stand in ``text``.
        tags: Of words; ``None``: nobody has said.
    """

    passage: int
    anchor: str
    text: str
    words: list[Span]
    shifted: list[Span]
    tags: list[int] | None


def instances(number: int, passage: Passage, anchors: Sequence[str], marks: tuple[str, str]) -> Iterator[Instance]:
    """One for each place where an anchor stands; names that the passage's own pairs begin with are anchors too.

    >>> told = Passage("A and B made me ill.", (("a", "ill"),))
    >>> [(found.text, found.tags) for found in instances(0, told, ["b"], ("<", ">"))]
    [('<A> and B made me ill.', [0, 0, 0, 0, 0, 1, 0]), ('A and <B> made me ill.', [0, 0, 0, 0, 0, 0, 0])]
    """
    text, words = passage.text, words_of(passage.text)
    pairs = passage.pairs or ()
    for start, stop in mentions(text, [*anchors, *(first for first, _ in pairs)]):
        anchor = " ".join(text[start:stop].split())
        tags = None
        if passage.pairs is not None:
            own = [second for first, second in pairs if " ".join(first.split()).casefold() == anchor.casefold()]
            spans = [(a, b) for a, b in mentions(text, own) if b <= start or a >= stop]
            tags = tags_of(words, spans)
        opened, closed = len(marks[0]), len(marks[0]) + len(marks[1])
        moves = [opened * (a >= start) + (closed - opened) * (a >= stop) for a, _ in words]
        shifted = [(a + move, b + move) for (a, b), move in zip(words, moves, strict=True)]
        marked = f"{text[:start]}{marks[0]}{text[start:stop]}{marks[1]}{text[stop:]}"
        yield Instance(number, anchor, marked, words, shifted, tags)


@dataclass
class TaggedRows(Rows):
    """Rows whose labels are tags of the tokens themselves: each word's at its first token, -1 elsewhere.

    Args:
        tags: ``[T]`` int32 of all tokens, one more than the tag; 0: there is none.
    """

    tags: Tensor = field(kw_only=True)

    def of(self, rows: Tensor) -> TaggedRows:
        """Some rows, numbered anew from 0."""
        found = super().of(rows)
        return TaggedRows(found.student, found.first, found.layout, tags=self.tags)

    def batch(self, index: Tensor) -> Batch:
        """``inputs`` as of other rows; ``labels [B, L]`` are tags, -1 where a token has none, and ``mask`` the rest."""
        grid = self._grid(self.student, index)
        beside = replace(self.student, corpus=replace(self.student.corpus, ids=self.tags), pad=0)
        labels = self._grid(beside, index).ids.long() - 1
        return Batch(self._inputs(grid), labels, index, labels >= 0)


@dataclass(eq=False)
class AnchoredSplit(LanguageSplit):
    """Passages as rows of marked text with tags.

    Args:
        passages: What the rows are of.
        anchors: Names that are looked for in every passage.
        marks: What stands before and after the marked name.
        made: The row's instances, in order, and where the first token of each of their words stands.
    """

    passages: tuple[Passage, ...] = field(default=(), kw_only=True)
    anchors: tuple[str, ...] = field(default=(), kw_only=True)
    marks: tuple[str, str] = field(default=("", ""), kw_only=True)
    made: list[tuple[Instance, list[int]]] = field(default_factory=list, kw_only=True)

    def told(self, passages: Sequence[Passage], anchors: Sequence[str] | None = None) -> AnchoredSplit:
        """The same with other passages, such as those that a teacher has annotated, and anchors."""
        names = self.anchors if anchors is None else tuple(anchors)
        return anchored(passages, self.tokens, names, self.marks, self.rows.layout, self.settings)

    def subset(self, rows: Tensor) -> AnchoredSplit:
        return replace(self, rows=self.rows.of(rows), made=[self.made[row] for row in rows.tolist()])


def anchored(
    passages: Sequence[Passage],
    tokens: Tokens,
    anchors: Sequence[str],
    marks: tuple[str, str],
    layout: Layout,
    settings: Mapping[str, Any],
) -> AnchoredSplit:
    """Passages as a split.

    Raises:
        DataError: No anchor stands in any of them.
    """
    found = [one for n, passage in enumerate(passages) for one in instances(n, passage, anchors, marks)]
    if not found:
        remedy = "name those that are meant: anchors"
        raise DataError(
            "no name stands in any passage", where="anchors", found=f"{len(passages)} passages", remedy=remedy
        )
    front, back = np.array(tokens.front, np.int32), np.array(tokens.back, np.int32)
    ids, tags, sizes, made = [], [], [], []
    for one, (own, read) in zip(found, tokens.encode([one.text for one in found]), strict=True):
        firsts = np.searchsorted(read, [start for start, _ in one.shifted], side="right") + len(front)
        beside = np.zeros(len(front) + len(own) + len(back), np.int32)
        if one.tags is not None:
            for place, tag in reversed(list(zip(firsts.tolist(), one.tags, strict=True))):
                beside[place] = tag + 1
        ids += [front, own, back]
        tags.append(beside)
        sizes.append(len(beside))
        made.append((one, firsts.tolist()))
    starts = torch.nn.functional.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    every = torch.from_numpy(np.concatenate(tags))
    corpus = Corpus(torch.from_numpy(np.concatenate(ids).astype(np.int32)), every > 0, starts)
    side = Side(corpus, cut(starts, layout.length, "truncate", 1), tokens.pad)
    rows = TaggedRows(side, torch.arange(len(found) + 1), layout, tags=every)
    told = digest(corpus.ids.numpy().tobytes(), every.numpy().tobytes(), canonical(list(marks)))
    return AnchoredSplit(
        rows,
        tokens=tokens,
        settings={**settings, "anchored": told},
        passages=tuple(passages),
        anchors=tuple(anchors),
        marks=marks,
        made=made,
        classes=TAGS,
    )


def anchored_source(
    passages: Any,
    *,
    tokenizer: Any,
    anchors: Sequence[str] = (),
    marks: Sequence[str] = ("[DRUG] ", " [/DRUG]"),
    length: int | None = None,
    test: float = 0.0,
    validation: float = VALIDATION,
    seed: int = 0,
) -> DataSource:
    """Passages for a student that tags words: those that belong to the marked name.

    Recipes name it ``limbeck.data.language.anchored:anchored_source``. A model gives ``[B, L, 3]``: outside, begins,
    inside.

    Args:
        passages: A ``.jsonl`` or ``.parquet`` file, a folder of such, or a list of records ``{text, pairs}``, by split
            or not; ``pairs`` is a list of two names each, and may be missing where a teacher will say.
        tokenizer: See :func:`~limbeck.data.language.load_tokens`.
        anchors: Names that are marked wherever they stand, such as drugs.
        marks: Before and after the marked name.
        length: Tokens of a row at most.
        test, validation: Fractions that are held out where there is no such split.
        seed: Of what is held out.

    Raises:
        ConfigError: The marks are not two.
        DataError: No passages, or no anchor in them.

    >>> record = {"text": "Aspirin made me ill.", "pairs": [["aspirin", "ill"]]}
    >>> source = anchored_source([record] * 4, tokenizer="bytes", validation=0)
    >>> (source.train.rows.batch(torch.tensor([0])).labels[0] + 1).bincount()  # no tag, outside, begins
    tensor([35,  4,  1])
    """
    if isinstance(marks, str) or len(marks) != 2:
        raise ConfigError("one mark before and one after", where="marks", found=repr(marks))
    found: dict[str, list[Passage]] = {}
    for split, name, unit, rows in tables(passages):
        for row, number in rows:
            place = (name, unit, number)
            if not isinstance(row, Mapping) or "text" not in row:
                raise DataError("this is no passage", where=said(place), wanted="{text: ..., pairs: ...}")
            pairs = row.get("pairs")
            if pairs is not None and not all(len(p) == 2 and all(isinstance(s, str) for s in p) for p in pairs):
                raise DataError("these are no pairs of names", where=said(place), found=repr(pairs)[:80])
            told = None if pairs is None else tuple((str(a), str(b)) for a, b in pairs)
            found.setdefault(split, []).append(Passage(text_of(row["text"], place, "text"), told))
    parts = complete(
        "passages", {n: _Passages(p) for n, p in found.items()}, test=test, validation=validation, seed=seed
    )
    known: list[Passage] = parts.train.passages  # type: ignore[attr-defined]
    tokens = load_tokens(tokenizer, texts=lambda: [passage.text for passage in known])
    settings = {"tokenizer": tokens.fingerprint, "anchors": digest(canonical(list(anchors)))}
    made: dict[str, Any] = {}
    for split in SPLITS:
        part: Any = getattr(parts, split)
        if part is not None:
            made[split] = anchored(
                part.passages, tokens, tuple(anchors), (marks[0], marks[1]), Layout(length=length), settings
            )
    return replace(parts, **made)


@dataclass(eq=False)
class _Passages(Split):
    passages: list[Passage]

    def __len__(self) -> int:
        return len(self.passages)

    def subset(self, rows: Tensor) -> _Passages:
        return replace(self, passages=[self.passages[row] for row in rows.tolist()])
