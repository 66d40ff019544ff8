"""From documents to rows: cut, leave out what says nothing, pack, and find the same text in the teacher's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.language.corpus import Corpus
from limbeck.data.language.pieces import Long, Pieces, Told, best_fit, cut, predicted, told
from limbeck.data.language.rows import Layout, Rows, Side


def arrange(
    corpus: Corpus,
    layout: Layout,
    *,
    pad: int,
    long: Long,
    overlap: int = 1,
    seed: int = 0,
    tags: Tensor | None = None,
    teacher: Corpus | None = None,
    teacher_pad: int = 0,
    where: str = "data",
) -> tuple[Rows, Told]:
    """Put documents into rows.

    Args:
        corpus: Documents in the student's tokens.
        layout: Of rows.
        pad, teacher_pad: Ids that fill up.
        long, overlap: What becomes of documents longer than a row; see :func:`~limbeck.data.language.pieces.cut`.
        seed: Of packing.
        tags: ``[D]``, the domain of each document; a pack holds one domain only.
        teacher: The same documents in the teacher's tokens.
        where: For messages.

    Raises:
        DataError: No document has anything to predict.
    """
    pieces = cut(corpus.starts, layout.length, long, overlap)
    says = predicted(pieces, corpus.learned) > 0
    other = None
    if teacher is not None:
        other = matching(pieces, corpus, teacher)
        says &= predicted(other, teacher.learned) > 0
    rows = says.nonzero().flatten()
    if not len(rows):
        raise DataError(
            "there is nothing to learn: no document has a token to predict",
            where=where,
            found=f"{len(corpus)} documents, rows of {layout.length}",
            remedy="check the columns, a larger length, or long: cut",
        )
    kept, domains = pieces.of(rows), None if tags is None else tags[pieces.document[rows]]
    order, first = torch.arange(len(rows)), torch.arange(len(rows) + 1)
    if layout.pack:
        assert layout.length is not None
        groups = torch.zeros(len(rows), dtype=torch.long) if domains is None else domains
        order, first = best_fit(kept.lengths, layout.length, groups, seed)
    made = Rows(
        Side(corpus, kept.of(order), pad),
        first,
        layout,
        None if teacher is None or other is None else Side(teacher, other.of(rows[order]), teacher_pad),
        None if domains is None else domains[order[first[:-1]]],
    )
    return made, told(corpus, pieces, kept, len(made), layout.length)


def matching(pieces: Pieces, student: Corpus, teacher: Corpus) -> Pieces:
    """The teacher's tokens that lie within the characters of each piece.

    A token that a border runs through is in neither piece. Of what a block reads again nothing is predicted twice.
    """
    assert student.ends is not None
    assert teacher.ends is not None
    starts, ends, document = teacher.starts, teacher.ends.long(), pieces.document
    # Characters counted through all documents, so that one search serves all of them.
    reach = torch.maximum(_last(student), _last(teacher)) + 1
    base = reach.cumsum(0) - reach
    through = ends + base.repeat_interleave(starts.diff())

    def after(characters: Tensor, own: Tensor) -> Tensor:
        """The first token of a document that begins at or behind this many characters."""
        return torch.searchsorted(through, base[own] + characters) + 1

    opens, closes = pieces.start == student.starts[document], pieces.stop == student.starts[document + 1]
    read = student.ends.long()
    begin = torch.where(opens, starts[document], after(read[(pieces.start - 1).clamp(min=0)], document))
    begin = torch.minimum(begin, starts[document + 1])
    last = read[(pieces.stop - 1).clamp(min=0)]
    close = torch.minimum(after(last, document), torch.searchsorted(through, base[document] + last, right=True))
    stop = torch.where(closes, starts[document + 1], close)
    stop = torch.maximum(stop, begin)
    fresh = after(read[(pieces.start + pieces.fresh - 1).clamp(min=0)], document) - begin
    fresh = torch.minimum(torch.where(pieces.fresh > 0, fresh.clamp(min=0), 0), stop - begin)
    return Pieces(begin, stop, fresh, document)


def _last(corpus: Corpus) -> Tensor:
    """How many characters each document has, ``[D]``."""
    assert corpus.ends is not None
    if not len(corpus.ends):
        return torch.zeros(len(corpus), dtype=torch.long)
    last = corpus.ends[(corpus.starts[1:] - 1).clamp(min=0)].long()
    return torch.where(corpus.starts.diff() > 0, last, 0)
