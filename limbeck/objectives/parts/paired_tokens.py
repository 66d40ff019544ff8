"""Which place of a teacher belongs to which of a student whose tokenizer cuts the same text otherwise."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, TensorError
from limbeck.core.reduction import check_floating, fit_mask, reduce
from limbeck.core.relations import pooled

Pairing = Literal["order", "text"]


def pairs_of(batch: Batch, pairing: Pairing, student: Tensor, teacher: Tensor) -> Tensor | None:
    """The teacher's place ``[B, L]`` for each of the student's, -1 where it has none or does not count.

    A batch without ``extras["teacher_mask"]`` has one tokenizer: every place is its own partner, and nothing is given.

    Args:
        batch: ``mask [B, L]`` and ``extras["teacher_mask"] [B, L']``; for ``"text"`` also ``extras["offsets"]
            [B, L, 2]`` and ``extras["teacher_offsets"] [B, L', 2]``, as batches of two tokenizers have them.
        pairing: ``"order"``: the first that counts with the first that counts, and so on; ``"text"``: those that have
            read equally far.
        student: Logits ``[B, L, C]``.
        teacher: ``[B, L', C']``.

    Raises:
        DataError: Places cannot be paired by what the batch holds.
        TensorError: A mask or offsets of other shapes.
    """
    other = batch.extras.get("teacher_mask")
    check_floating(student, "student_logits", least=2 if other is None else 3)
    check_floating(teacher, "teacher_logits", least=2 if other is None else 3)
    if other is None:
        if student.shape[:-1] != teacher.shape[:-1]:
            raise DataError(
                "teacher and student have other places, and the batch does not say which of the teacher's count",
                where="batch.extras['teacher_mask']",
                found=f"{list(student.shape[:-1])} and {list(teacher.shape[:-1])} places",
                remedy="use data of limbeck.data.language with the teacher's tokenizer",
            )
        return None
    _check_shape(other, teacher.shape[:2], "teacher_mask")
    counts = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    if batch.mask is not None:
        counts = fit_mask(batch.mask, counts)
    if pairing == "order":
        return pairs_by_order(counts, other)
    offsets, teacher_offsets = (batch.extras.get(name) for name in ("offsets", "teacher_offsets"))
    if offsets is None or teacher_offsets is None:
        raise DataError(
            "the batch does not say which characters each token covers",
            where="batch.extras['offsets']",
            remedy="use data of limbeck.data.language with the teacher's tokenizer, or pairing='order'",
        )
    _check_shape(offsets, (*student.shape[:2], 2), "offsets")
    _check_shape(teacher_offsets, (*teacher.shape[:2], 2), "teacher_offsets")
    return pairs_by_text(offsets[..., 1], teacher_offsets[..., 1], counts, other)


def pairs_by_order(counts: Tensor, teacher_counts: Tensor) -> Tensor:
    """The k-th place that counts with the teacher's k-th, as far as both go: ``[B, L]``, -1 for the others.

    >>> pairs_by_order(torch.tensor([[False, True, True]]), torch.tensor([[True, False, True, True]]))
    tensor([[-1,  0,  2]])
    """
    order = (~teacher_counts).to(torch.uint8).argsort(dim=1, stable=True)  # those that count first, as they stand
    rank = counts.cumsum(dim=1) - 1
    found = order.gather(1, rank.clamp(0, order.shape[1] - 1))
    return torch.where(counts & (rank < teacher_counts.sum(dim=1, keepdim=True)), found, -1)


def pairs_by_text(ends: Tensor, teacher_ends: Tensor, counts: Tensor, teacher_counts: Tensor) -> Tensor:
    """The place at which the teacher has read exactly as much of the text: ``[B, L]``, -1 where there is none.

    What two such places predict goes on from the same text. Of several that count and end at one character, those
    behind the first have read a part of the next one.

    Args:
        ends: ``[B, L]``, how many characters of the row are read up to each place.
        teacher_ends: ``[B, L']``.
        counts, teacher_counts: Which places count.

    >>> ends, teacher_ends = torch.tensor([[2, 5, 9]]), torch.tensor([[1, 2, 7, 9]])
    >>> pairs_by_text(ends, teacher_ends, ends > 0, teacher_ends > 0)
    tensor([[ 1, -1,  3]])
    """
    found, own = _first(teacher_ends, teacher_counts, ends), _first(ends, counts, ends)
    return torch.where(counts & (own == torch.arange(ends.shape[1], device=ends.device)), found, -1)


def partners(values: Tensor, pairs: Tensor | None) -> Tensor:
    """The teacher's values ``[B, L', *]`` at the student's places, ``[B, L, *]``; where none is paired, any of them."""
    if pairs is None:
        return values
    index = pairs.clamp(min=0).reshape(*pairs.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*pairs.shape, *values.shape[2:]))


class Chunks(NamedTuple):
    """Which places tell of which chunk of text; see ``limbeck.data.language.aligned_chunks``.

    Args:
        student: ``[B, L]``, the number of each place's chunk: the student's first place in it; -1 where there is none.
        teacher: ``[B, L']``, the same of the teacher's places.
        labels: ``[B, L']``, the token that each place of the teacher predicts; negative where that does not count.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor


def chunks_of(batch: Batch, student: Tensor, teacher: Tensor) -> Chunks | None:
    """The chunks of a batch of two tokenizers; ``None`` where it has one.

    Args:
        batch: With ``extras`` ``chunk [B, L]``, ``teacher_chunk`` and ``teacher_labels [B, L']``, if of two.
        student: Logits ``[B, L, C]``.
        teacher: ``[B, L', C']``.

    Raises:
        DataError: Models that answer at other places, and a batch that does not say of what.
        TensorError: Chunks of other shapes.
    """
    found = [batch.extras.get(name) for name in ("chunk", "teacher_chunk", "teacher_labels")]
    if found[1] is None or found[0] is None or found[2] is None:
        if batch.teacher_inputs is None and student.shape[:-1] == teacher.shape[:-1]:
            return None
        raise DataError(
            "the batch does not say which tokens of the two tokenizers are the same text",
            where="batch.extras['chunk']",
            remedy="use data of limbeck.data.language with the teacher's tokenizer, or aligned_chunks of it",
        )
    check_floating(student, "student_logits", least=3)
    check_floating(teacher, "teacher_logits", least=3)
    _check_shape(found[0], student.shape[:2], "chunk")
    _check_shape(found[1], teacher.shape[:2], "teacher_chunk")
    _check_shape(found[2], teacher.shape[:2], "teacher_labels")
    return Chunks(found[0], found[1], found[2])


def chunk_sums(
    values: Tensor, counts: Tensor, teacher_values: Tensor, teacher_counts: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the places of each chunk, at its number: the student's, the teacher's, and whether the chunk is whole.

    Args:
        values, counts: ``[B, L, *]`` and ``[B, L]`` of the student's places.
        teacher_values, teacher_counts: ``[B, L', *]`` and ``[B, L']`` of the teacher's.
        chunks: Which places are of which.

    >>> chunks = Chunks(torch.tensor([[0, 0, -1]]), torch.tensor([[-1, 0]]), torch.zeros(1, 2))
    >>> every, ones = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3)
    >>> chunk_sums(ones, every, 5 * ones[:, 1:], every[:, 1:], chunks)[:2]
    (tensor([[2., 0., 0.]]), tensor([[5., 0., 0.]]))
    """
    sums, whole = [], torch.ones_like(counts)
    for of, each, counted in (
        (chunks.student, values, counts),
        (chunks.teacher, teacher_values, teacher_counts),
    ):
        inside, place = of >= 0, of.clamp(min=0)
        ones = (1,) * (each.ndim - 2)
        kept = each.masked_fill(~(inside & counted).reshape(*counted.shape, *ones), 0)
        start = each.new_zeros(*counts.shape, *each.shape[2:])
        sums.append(start.scatter_add(1, place.reshape(*place.shape, *ones).expand(each.shape), kept))
        number = torch.zeros_like(chunks.student).scatter_add(1, place, inside.long())
        known = torch.zeros_like(chunks.student).scatter_add(1, place, (inside & counted).long())
        whole = whole & (number == known) & (number > 0)
    return sums[0], sums[1], whole


def by_sample(values: Tensor, counts: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of ``[B, *]`` over what counts in each sample, then over the samples of which the mask leaves a place.

    A sample of which nothing counts adds 0.
    """
    samples = None if mask is None else mask.reshape(len(mask), -1).any(dim=1)
    each, _ = pooled(values.flatten(1).unsqueeze(2), counts.flatten(1)) if values.ndim > 1 else (values, None)
    return reduce(each.reshape(len(values)).masked_fill(~counts.reshape(len(values), -1).any(dim=1), 0.0), samples)


def _first(ends: Tensor, counts: Tensor, wanted: Tensor) -> Tensor:
    """The first place that counts and ends at each wanted character, -1 where there is none."""
    keys, order = torch.where(counts, ends, torch.iinfo(ends.dtype).max).sort(dim=1, stable=True)
    place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=keys.shape[1] - 1)
    hit = (keys.gather(1, place) == wanted) & counts.gather(1, order.gather(1, place))
    return torch.where(hit, order.gather(1, place), -1)


def _check_shape(tensor: Tensor, wanted: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        where = f"batch.extras[{name!r}]"
        raise TensorError("does not belong to these logits", where=where, found=list(tensor.shape), wanted=list(wanted))
