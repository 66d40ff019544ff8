"""Documents cut to the length of a row, and pieces put together in rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.data.language.corpus import Corpus
from limbeck.data.order import epoch_order

Long = Literal["cut", "truncate", "drop"]


@dataclass
class Pieces:
    """Parts of documents, in the order of the documents.

    Args:
        start, stop: ``[P]``, where each lies in the corpus.
        fresh: ``[P]``, its tokens before this one were predicted by the piece before it: they are only read.
        document: ``[P]``, what it is of.
    """

    start: Tensor
    stop: Tensor
    fresh: Tensor
    document: Tensor

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each."""
        return self.stop - self.start

    def of(self, rows: Tensor) -> Pieces:
        """Some of them, in this order."""
        return Pieces(self.start[rows], self.stop[rows], self.fresh[rows], self.document[rows])


def cut(starts: Tensor, length: int | None, long: Long, overlap: int) -> Pieces:
    """Documents as pieces of at most ``length`` tokens.

    Cut blocks overlap, so that every token but a document's first is predicted once: a block reads the last
    ``overlap`` tokens of the block before it again, and predicts what comes after them.

    Args:
        starts: ``[D + 1]``, where documents begin.
        length: Of a piece at most; ``None``: documents stay whole.
        long: What becomes of longer documents: ``cut`` in blocks, ``truncate`` to their beginning, or ``drop``.
        overlap: At least 1, and less than ``length``.

    >>> pieces = cut(torch.tensor([0, 7]), 4, "cut", 1)
    >>> pieces.start.tolist(), pieces.stop.tolist(), pieces.fresh.tolist()
    ([0, 3], [4, 7], [0, 1])

    Raises:
        ConfigError: Numbers that cannot be.
    """
    if length is not None and (length < 2 or not 1 <= overlap < length):
        found = f"length {length}, overlap {overlap}"
        wanted = "1 <= overlap < length"
        raise ConfigError("a row reads more than it repeats", where="length", found=found, wanted=wanted)
    if long not in ("cut", "truncate", "drop"):
        raise ConfigError("no such choice", where="long", found=repr(long), wanted="cut, truncate or drop")
    first, size = starts[:-1], starts.diff()
    document = torch.arange(len(size))
    if length is None:
        return Pieces(first, starts[1:], torch.zeros_like(first), document)
    if long != "cut":
        stays = size <= length if long == "drop" else torch.ones_like(size, dtype=torch.bool)
        first, size, document = first[stays], size[stays].clamp(max=length), document[stays]
        return Pieces(first, first + size, torch.zeros_like(first), document)
    step = length - overlap
    blocks = (-(-(size - overlap) // step)).clamp(min=1)
    owner = torch.arange(len(size)).repeat_interleave(blocks)
    number = torch.arange(len(owner)) - (blocks.cumsum(0) - blocks)[owner]
    start = first[owner] + number * step
    stop = torch.minimum(start + length, (first + size)[owner])
    return Pieces(start, stop, torch.where(number > 0, overlap, 0), document[owner])


def predicted(pieces: Pieces, learned: Tensor) -> Tensor:
    """How many tokens each piece has to predict, ``[P]``: learned ones, from the second and the first fresh one on."""
    before = torch.nn.functional.pad(learned.long().cumsum(0), (1, 0))
    begin = torch.minimum(pieces.start + pieces.fresh.clamp(min=1), pieces.stop)
    return before[pieces.stop] - before[begin]


def best_fit(lengths: Tensor, capacity: int, groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Put pieces into rows of a capacity: best fit, the longest first; equals in an order that the seed draws.

    It needs at most 11/9 of the fewest possible rows, and four more (Johnson et al., Worst-case performance bounds for
    simple one-dimensional packing algorithms, 1974). A row holds pieces of one group only. The same pieces and seed
    give the same rows.

    Args:
        lengths: ``[P]``, none above ``capacity``.
        capacity: Of a row.
        groups: ``[P]`` integers.
        seed: Of the order among equals.

    Returns:
        The pieces row by row ``[P]``, and where each row begins ``[N + 1]``. Rows are numbered by their first piece.

    >>> order, first = best_fit(torch.tensor([3, 5, 2, 3]), 6, torch.zeros(4, dtype=torch.long), seed=0)
    >>> [sorted(row.tolist()) for row in order.tensor_split(first[1:-1])]
    [[0, 3], [1], [2]]
    """
    mixed = epoch_order(len(lengths), seed, 0)
    by_size = mixed[lengths[mixed].argsort(descending=True, stable=True)]
    order = by_size[groups[by_size].argsort(stable=True)]
    row_of = torch.empty(len(lengths), dtype=torch.long)
    rows, group = 0, None
    free: list[int] = []  # room that some row has, ascending
    open_: dict[int, list[int]] = {}  # rows by their room
    found = []
    for piece, size, own in zip(order.tolist(), lengths[order].tolist(), groups[order].tolist(), strict=True):
        if own != group:
            group, free, open_ = own, [], {}
        place = bisect_left(free, size)
        if place == len(free):
            row, room, rows = rows, capacity, rows + 1
        else:
            room = free[place]
            row = open_[room].pop()
            if not open_[room]:
                del open_[room], free[place]
        found.append((piece, row))
        if room > size:
            if room - size not in open_:
                insort(free, room - size)
            open_.setdefault(room - size, []).append(row)
    if found:
        pieces, placed = torch.tensor(found).T
        row_of[pieces] = placed
    lowest = torch.full((rows,), len(lengths)).scatter_reduce_(0, row_of, torch.arange(len(lengths)), "amin")
    number = lowest.argsort().argsort()[row_of]
    return number.argsort(stable=True), torch.nn.functional.pad(number.bincount(minlength=rows).cumsum(0), (1, 0))


@dataclass
class Told:
    """What became of documents on their way into rows.

    Args:
        documents: How many there were.
        longer: Of these longer than a row.
        silent: Pieces that had nothing to predict, and were left out.
        rows: How many rows came of them.
        tokens: In all rows.
        counted: Predictions that count.
        room: Tokens that would have fit.
    """

    documents: int
    longer: int
    silent: int
    rows: int
    tokens: int
    counted: int
    room: int

    def note(self, split: str, length: int | None, long: Long, pack: bool) -> str:
        """In a sentence."""
        rows, some = ("packs" if pack else "rows"), "document" + "s" * (self.documents != 1)
        fill = f" of {length}, {self.tokens / max(self.room, 1):.0%} full" if pack else ""
        text = f"{split}: {self.documents} {some} in {self.rows} {rows}{fill}, "
        text += f"{self.counted} of {self.tokens} tokens predicted"
        done = {"cut": "cut in blocks", "truncate": "truncated", "drop": "dropped"}[long]
        if self.longer:
            text += f", {self.longer} longer than {length} {done}"
        return text + (f", {self.silent} with nothing to predict left out" if self.silent else "")


def told(corpus: Corpus, pieces: Pieces, kept: Pieces, rows: int, length: int | None) -> Told:
    """Count what became of documents."""
    tokens = int(kept.lengths.sum())
    longer = 0 if length is None else int((corpus.starts.diff() > length).sum())
    counted = int(predicted(kept, corpus.learned).sum())
    room = rows * (length or 0)
    return Told(len(corpus), longer, len(pieces) - len(kept), rows, tokens, counted, room)
