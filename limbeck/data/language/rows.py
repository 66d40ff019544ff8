"""Rows of pieces as batches of tensors, each made by a few operations on all of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.language.chunks import aligned_chunks
from limbeck.data.language.corpus import Corpus
from limbeck.data.language.pieces import Pieces
from limbeck.data.language.shift import next_tokens


@dataclass(frozen=True)
class Layout:
    """How rows become tensors.

    Args:
        length: Tokens of a row at most; ``None``: as many as it has.
        pack: A row holds several documents that do not see each other.
        padding: The side that is filled up.
        multiple: Rows of a batch are as long as its longest, rounded up to a multiple of this, ``length`` at most.
        bucket: Batches whose rows are sorted by length together, so that those of a batch are alike; 0: none are.
    """

    length: int | None = None
    pack: bool = False
    padding: Literal["right", "left"] = "right"
    multiple: int = 8
    bucket: int = 16


@dataclass
class Side:
    """The pieces of all rows in one tokenizer's tokens.

    Args:
        corpus: Holds the tokens.
        pieces: Row by row.
        pad: The id that fills rows up.
    """

    corpus: Corpus
    pieces: Pieces
    pad: int


@dataclass
class Grid:
    """A batch of rows ``[B, L]``: tokens, the number of each one's document in its row (0 is padding), its position in
    that document, whether it is to be predicted, and the characters ``[B, L, 2]`` that it covers."""

    ids: Tensor
    document: Tensor
    position: Tensor
    learned: Tensor
    spans: Tensor | None


@dataclass
class Rows:
    """Rows of pieces of documents, for one tokenizer or a pair of them.

    Args:
        student: Tokens of the student.
        first: ``[N + 1]``, where the pieces of each row begin.
        layout: How they become tensors.
        teacher: The same pieces in the teacher's tokens, where those are others.
        tag: ``[N]``, the domain of each row; ``None``: there are none.
    """

    student: Side
    first: Tensor
    layout: Layout
    teacher: Side | None = None
    tag: Tensor | None = None
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        before = torch.nn.functional.pad(self.student.pieces.lengths.cumsum(0), (1, 0))
        self.lengths = before[self.first].diff()

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens."""
        return self.student.corpus.nbytes + (0 if self.teacher is None else self.teacher.corpus.nbytes)

    def of(self, rows: Tensor) -> Rows:
        """Some rows, numbered anew from 0."""
        count = self.first.diff()[rows]
        pieces = _ranges(self.first[rows], count)
        return Rows(
            replace(self.student, pieces=self.student.pieces.of(pieces)),
            torch.nn.functional.pad(count.cumsum(0), (1, 0)),
            self.layout,
            None if self.teacher is None else replace(self.teacher, pieces=self.teacher.pieces.of(pieces)),
            None if self.tag is None else self.tag[rows],
        )

    def batch(self, index: Tensor) -> Batch:
        """Rows as a batch.

        ``inputs`` are ``input_ids [B, L]`` with ``attention_mask [B, L]``, and ``position_ids [B, L]`` where padding is
        on the left. Packs have ``position_ids`` that begin anew with each document, and no mask: that is how
        transformers tells documents apart, and only where no cache is made of them (``use_cache``). ``labels`` and
        ``mask`` are those of :func:`~limbeck.data.language.shift.next_tokens`.

        ``extras`` hold ``tag [B]`` where records have tags, and ``document [B, L]`` of packs. With another tokenizer of
        the teacher there are ``teacher_inputs`` with ``teacher_mask`` and ``teacher_labels [B, L']``, and which
        characters of the row each token covers: ``offsets [B, L, 2]`` and ``teacher_offsets [B, L', 2]``; and ``chunk
        [B, L]`` and ``teacher_chunk [B, L']`` of :func:`~limbeck.data.language.chunks.aligned_chunks`.
        """
        grid = self._grid(self.student, index)
        labels, mask = next_tokens(grid.ids, grid.document, grid.learned)
        batch = Batch(self._inputs(grid), labels, index, mask)
        if self.layout.pack:
            batch.extras["document"] = grid.document
        if self.tag is not None:
            batch.extras["tag"] = self.tag[index]
        if self.teacher is not None:
            other = self._grid(self.teacher, index)
            batch.teacher_inputs = self._inputs(other)
            found = next_tokens(other.ids, other.document, other.learned)
            batch.extras["teacher_labels"], batch.extras["teacher_mask"] = found
            batch.extras["offsets"], batch.extras["teacher_offsets"] = grid.spans, other.spans
            assert grid.spans is not None
            assert other.spans is not None
            # One more character for each document: the next one begins behind the end of the one before.
            read, other_read = grid.spans[..., 1] + grid.document, other.spans[..., 1] + other.document
            chunks = aligned_chunks(read, mask, other_read, batch.extras["teacher_mask"])
            batch.extras["chunk"], batch.extras["teacher_chunk"] = chunks
        return batch

    def _inputs(self, grid: Grid) -> dict[str, Any]:
        if self.layout.pack:
            return {"input_ids": grid.ids, "position_ids": grid.position, "use_cache": False}
        inputs = {"input_ids": grid.ids, "attention_mask": (grid.document > 0).long()}
        if self.layout.padding == "left":
            inputs["position_ids"] = grid.position
        return inputs

    def _grid(self, side: Side, index: Tensor) -> Grid:
        """The tokens of some rows in their places."""
        pieces, layout = side.pieces, self.layout
        count = self.first.diff()[index]
        own = _ranges(self.first[index], count)
        row = torch.arange(len(index)).repeat_interleave(count)  # of each piece
        size = pieces.lengths[own]
        before = size.cumsum(0) - size  # tokens of the batch before each piece
        sizes = torch.zeros_like(index).index_add_(0, row, size)
        width = _width(int(sizes.max()) if len(index) else 0, layout)
        token = torch.arange(int(size.sum()))
        piece = torch.arange(len(own)).repeat_interleave(size)
        within = token - before[piece]
        source, place = pieces.start[own][piece] + within, row[piece]
        column = token - (sizes.cumsum(0) - sizes)[place]
        if layout.padding == "left":
            column = column + (width - sizes)[place]
        flat = place * width + column

        def spread(values: Tensor, fill: int) -> Tensor:
            grid = values.new_full((len(index) * width, *values.shape[1:]), fill)
            return grid.index_copy_(0, flat, values).view(len(index), width, *values.shape[1:])

        number = torch.arange(len(own)) - (count.cumsum(0) - count)[row] + 1
        document = spread(number[piece], 0)
        position = spread(within, -1)
        if layout.pack:  # padding is one more document, which nothing looks at
            ramp = torch.arange(width) - (sizes.unsqueeze(1) if layout.padding == "right" else 0)
            position = torch.where(position < 0, ramp, position)
        learned = side.corpus.learned[source] & (within >= pieces.fresh[own][piece])
        spans = None
        if self.teacher is not None:
            assert side.corpus.ends is not None
            floor, shift = self._characters(index, own, row)
            ends = side.corpus.ends[source].long()
            starts = torch.where(within > 0, side.corpus.ends[(source - 1).clamp(min=0)].long(), floor[piece])
            spans = torch.stack([torch.maximum(starts, floor[piece]), ends], dim=1) + shift[piece].unsqueeze(1)
            spans = spread(spans, 0)
        ids = spread(side.corpus.ids[source].long(), side.pad)
        return Grid(ids, document, position.clamp(min=0), spread(learned, 0), spans)

    def _characters(self, index: Tensor, own: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """For each piece the characters of its document before it, and what is added to count along its row.

        Both sides are told by the student's tokens, whose pieces these are.
        """
        pieces, ends = self.student.pieces, self.student.corpus.ends
        assert ends is not None
        start, opens = pieces.start[own], self.student.corpus.starts[pieces.document[own]]
        floor = torch.where(start > opens, ends[(start - 1).clamp(min=0)].long(), 0)
        width = ends[pieces.stop[own] - 1].long() - floor
        before = width.cumsum(0) - width
        rows = torch.zeros_like(index).index_add_(0, row, width)
        return floor, before - (rows.cumsum(0) - rows)[row] - floor


def _width(longest: int, layout: Layout) -> int:
    """How long the rows of a batch are."""
    width = -(-longest // layout.multiple) * layout.multiple
    return width if layout.length is None else max(longest, min(width, layout.length))


def _ranges(start: Tensor, count: Tensor) -> Tensor:
    """``start[i], ..., start[i] + count[i] - 1`` for each i, one after the other.

    >>> _ranges(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    total = int(count.sum())
    steps = torch.arange(total)
    return steps + (start - (count.cumsum(0) - count)).repeat_interleave(count)
