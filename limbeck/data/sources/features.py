"""Parquet files of numbers: feature vectors with a class, or a yes or no for each of several classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.normalise import Normalisation
from limbeck.data.sources.source import SPLITS, DataSource, complete
from limbeck.data.sources.split import Split, TensorSplit

Columns = str | Sequence[str]


def feature_source(
    name: str,
    splits: dict[str, tuple[Tensor, Tensor]],
    *,
    classes: tuple[str, ...] | None,
    task: str,
    standardise: bool,
    **held_out: Any,
) -> DataSource:
    """A source of feature vectors, standardised by what is left to train on.

    Args:
        name: Of the source.
        splits: Features ``[N, D]`` and labels of each.
        classes: Names.
        task: What the labels mean.
        standardise: Shift and scale each feature to mean 0 and variance 1 over the training split.
        held_out: ``test``, ``validation`` and ``seed`` of ``complete``.
    """
    made: dict[str, Split] = {
        key: TensorSplit(features, labels=labels, classes=classes, task=task)
        for key, (features, labels) in splits.items()
    }
    source = complete(name, made, **held_out)
    if not standardise:
        return source
    normalise = Normalisation.of(source.train.load())
    parts = {key: part for key in SPLITS if (part := getattr(source, key)) is not None}
    note = "; ".join(filter(None, [source.note, "features standardised by the training split"]))
    return replace(source, **{k: replace(part, normalise=normalise) for k, part in parts.items()}, note=note)


def numbers(table: pa.Table, columns: Columns, where: str) -> Tensor:
    """Columns of a table as ``[N, D]`` floats: one column of lists of one length, or several of numbers.

    Args:
        table: Has the columns.
        columns: Which.
        where: The file, for messages.

    Raises:
        DataError: A column holds something else, or a cell is empty.
    """
    names = [columns] if isinstance(columns, str) else list(columns)
    parts = [_column(table.column(name), f"{where}, column {name!r}") for name in names]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()


def _column(column: pa.ChunkedArray, where: str) -> np.ndarray[Any, Any]:
    """``[N, D]``; a cell without a value becomes NaN, which is refused."""
    values, kind, rows = column.combine_chunks(), column.type, len(column)
    fixed = pa.types.is_fixed_size_list(kind)
    if fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = {kind.list_size} if fixed else set(values.value_lengths().drop_null().to_pylist())
        if len(lengths) != 1 or values.null_count:
            found = "an empty cell" if values.null_count else f"lengths {min(lengths)} to {max(lengths)}"
            raise DataError("lists of one length were expected", where=where, found=found)
        values, kind = values.flatten(), kind.value_type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError("these are no numbers", where=where, found=str(column.type), wanted="numbers, or lists of them")
    values = values.cast(pa.int8()) if pa.types.is_boolean(kind) else values
    table = values.cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(rows, -1)
    if not np.isfinite(table).all():
        row = int(np.argwhere(~np.isfinite(table))[0, 0])
        raise DataError("a number is missing or not finite", where=f"{where}, row {row}", remedy="fill or drop its row")
    return table
