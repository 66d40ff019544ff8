"""From rows of a batch to prompts, and from what was written after them to rows that can be learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.data.language.shift import next_tokens


def prompts_of(batch: Batch, least: int = 1, pad: int = 0) -> tuple[Tensor, Tensor]:
    """What stands before the first thing that each row is to predict.

    Args:
        batch: As :class:`~limbeck.data.language.LanguageLoader` gives it.
        least: A prompt has so many tokens at least, where its row has more than that: of whole texts everything is
            learned, and nothing stands before.
        pad: The id that fills up.

    Returns:
        Tokens ``[B, P]``, padded on the left, and True ``[B, P]`` where there is one.

    Raises:
        DataError: The batch is of packs, or of something else than texts.

    >>> ids = torch.tensor([[5, 6, 7, 8], [5, 9, 9, 0]])
    >>> batch = Batch({"input_ids": ids, "attention_mask": (ids > 0).long()}, mask=torch.tensor(
    ...     [[False, True, True, False], [True, True, False, False]]))
    >>> prompts_of(batch)[0].tolist()
    [[5, 6], [0, 5]]
    """
    inputs = batch.inputs
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        found = f"keys {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise DataError("these are no texts to go on with", where="batch.inputs", found=found, wanted="input_ids")
    if "document" in batch.extras:
        raise DataError(
            "a pack holds several texts, of which none can be gone on with",
            where="data.options.pack",
            found="true",
            wanted="false",
            remedy="set pack: false",
        )
    ids = inputs["input_ids"]
    there = inputs.get("attention_mask")
    there = torch.ones_like(ids, dtype=torch.bool) if there is None else there > 0
    counts = batch.mask if batch.mask is not None else batch.require("labels") >= 0
    start, size = there.int().argmax(dim=1), there.sum(dim=1)
    first = torch.where(counts.any(dim=1), counts.int().argmax(dim=1) - start + 1, size)
    length = torch.maximum(first, (size - 1).clamp(min=1, max=least))
    width = int(length.max())
    column = torch.arange(width, device=ids.device) - (width - length).unsqueeze(1)  # of the prompt; below 0: padding
    found = ids.gather(1, (column.clamp(min=0) + start.unsqueeze(1)))
    return found.masked_fill(column < 0, pad), column >= 0


def continued(batch: Batch, prompts: Tensor, mask: Tensor, written: Tensor, kept: Tensor, pad: int = 0) -> Batch:
    """Prompts with what was written after them as a batch that is to learn what was written.

    Rows are padded on the right. Labels and mask are those of
    :func:`~limbeck.data.language.shift.next_tokens`. Ids, views, progress and tags are the batch's; what the teacher
    reads is what the student reads.

    Args:
        batch: Whose rows the prompts are of.
        prompts, mask: ``[B, P]``, padded on the left.
        written, kept: ``[B, N]``, padded on the right; True where there is a token.
        pad: The id that fills up.

    >>> batch = Batch({}, index=torch.tensor([3]))
    >>> made = continued(batch, torch.tensor([[0, 5]]), torch.tensor([[False, True]]), torch.tensor([[6, 1]]),
    ...     torch.tensor([[True, True]]))
    >>> made.inputs["input_ids"].tolist(), made.labels.tolist(), made.mask.int().tolist()
    ([[5, 6, 1]], [[6, 1, -1]], [[1, 1, 0]])
    """
    whole, there = torch.cat([prompts, written], dim=1), torch.cat([mask, kept], dim=1)
    learned = torch.cat([torch.zeros_like(mask), kept], dim=1)
    order = (~there).int().argsort(dim=1, stable=True)[:, : int(there.sum(dim=1).max())]
    ids, there, learned = whole.gather(1, order), there.gather(1, order), learned.gather(1, order)
    ids = ids.masked_fill(~there, pad)
    labels, counts = next_tokens(ids, there.long(), learned)
    extras = {name: batch.extras[name] for name in ("tag",) if name in batch.extras}
    inputs = {"input_ids": ids, "attention_mask": there.long()}
    return Batch(inputs, labels, batch.index, counts, batch.progress, extras=extras, view=batch.view)


def along(values: Tensor, mask: Tensor) -> Tensor:
    """One number for each token that was written, ``[B, N]``, at the places ``[B, L]`` that predict them; 0 elsewhere.

    Args:
        values: In the order in which the tokens were written.
        mask: Of a batch that :func:`continued` made.

    >>> along(torch.tensor([[0.5, 0.25]]), torch.tensor([[False, True, True, False]]))
    tensor([[0.0000, 0.5000, 0.2500, 0.0000]])
    """
    place = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return values.gather(1, place).masked_fill(~mask, 0.0)


def together(first: Batch, second: Batch, pad: int = 0) -> Batch:
    """The rows of two batches in one, padded on the right; of the second none counts, and none has a label.

    Ids, views and tags go along where both have them, progress is the first's. Whoever wants something of the second
    puts into ``extras`` what :func:`of_the_second` makes for it.

    >>> ids = torch.tensor([[0, 5, 6]])
    >>> read = Batch({"input_ids": ids, "attention_mask": (ids > 0).long()}, ids, mask=ids == 5)
    >>> made = together(read, read)
    >>> made.inputs["input_ids"].tolist(), made.labels.tolist(), made.mask.int().tolist()
    ([[5, 6], [5, 6]], [[5, 6], [-1, -1]], [[1, 0], [0, 0]])
    """
    sides = [_right(batch, pad) for batch in (first, second)]
    width = max(ids.shape[1] for ids, *_ in sides)

    def joined(place: int, fill: int, second_too: bool) -> Tensor:
        own, other = (torch.nn.functional.pad(s[place], (0, width - s[place].shape[1]), value=fill) for s in sides)
        return torch.cat([own, other if second_too else torch.full_like(other, fill)])

    inputs = {"input_ids": joined(0, pad, True), "attention_mask": joined(1, 0, True).long()}
    labels, mask = joined(2, -1, False), joined(3, 0, False)
    beside: dict[str, Any] = {}
    for name in ("index", "view"):
        both = getattr(first, name), getattr(second, name)
        beside[name] = torch.cat(both) if all(isinstance(t, Tensor) for t in both) else both[0]
    extras = {"tag": torch.cat([b.extras["tag"] for b in (first, second)])} if "tag" in first.extras else {}
    return Batch(inputs, labels, mask=mask, progress=first.progress, extras=extras, **beside)


def of_the_second(values: Tensor, batch: Batch) -> Tensor:
    """Values ``[B, L]`` of the second of two batches, one that :func:`continued` made, in what :func:`together` made.

    They are 0 at the places of the first.
    """
    rows, width = batch.require("labels").shape
    return torch.nn.functional.pad(values, (0, width - values.shape[1], rows - len(values), 0))


def _right(batch: Batch, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, where there are some, labels and mask, with all padding moved to the right."""
    ids, there = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    there = torch.ones_like(ids, dtype=torch.bool) if there is None else there > 0
    labels = batch.require("labels")
    mask = labels >= 0 if batch.mask is None else batch.mask
    order = (~there).int().argsort(dim=1, stable=True)[:, : int(there.sum(dim=1).max())]
    ids, there, labels, mask = (values.gather(1, order) for values in (ids, there, labels, mask))
    return ids.masked_fill(~there, pad), there, labels, mask
