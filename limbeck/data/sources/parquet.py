"""Parquet files of images, as the Hugging Face hub lays them out, and of feature vectors."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError, did_you_mean
from limbeck.data.sources.features import Columns, feature_source, numbers
from limbeck.data.sources.files import files_by_split
from limbeck.data.sources.images import image_size
from limbeck.data.sources.source import VALIDATION, DataSource, complete
from limbeck.data.sources.split import ImageSplit, Split, check_labels
from limbeck.data.sources.texts import strings, text_source
from limbeck.data.tokenizer import Tokens


class ParquetImages:
    """A column of encoded images over one or more files: ``struct{bytes, path}`` or plain bytes.

    The encoded bytes are read into memory once, and again in worker processes that do not share memory.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column, self.name = list(files), column, str(files[0].parent)
        self._columns: list[pa.ChunkedArray] | None = None
        self._ends = list(accumulate(len(c) for c in self._read()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}

    def read(self, row: int) -> bytes:
        """The image file in a row."""
        file, place = self._find(row)
        data = self._read()[file][place].as_py()
        if data is None:
            raise DataError(
                "there is no image",
                where=self.where(row),
                found="an empty cell, or a path without bytes",
                remedy="store the images' bytes, or use a folder of images",
            )
        return data

    def where(self, row: int) -> str:
        """File and row, for messages."""
        file, place = self._find(row)
        return f"{self.files[file]}, row {place}"

    def _find(self, row: int) -> tuple[int, int]:
        file = bisect_right(self._ends, row)
        return file, row - (self._ends[file - 1] if file else 0)

    def _read(self) -> list[pa.ChunkedArray]:
        if self._columns is None:
            self._columns = [_bytes_column(file, self.column) for file in self.files]
        return self._columns


def parquet(
    path: str | Path,
    *,
    image: str | None = None,
    features: Columns | None = None,
    text: str | None = None,
    label: str = "label",
    labels: Columns | None = None,
    mode: str = "RGB",
    size: int | Sequence[int] | None = None,
    standardise: bool = True,
    tokens: Tokens = "words",
    vocabulary: int = 20_000,
    least: int = 2,
    length: int | None = None,
    test: float = 0.0,
    validation: float = VALIDATION,
    seed: int = 0,
) -> DataSource:
    """Images, feature vectors or texts in Parquet files; the latter two also in CSV files.

    A folder holds ``train.parquet``, ``validation.parquet`` (or ``val``, ``valid``, ``dev``) and ``test.parquet``, in
    itself or in its ``data`` folder; shards are called ``train-00000-of-00004.parquet`` and so on. A single file is
    the training set. Class names come from the schema's metadata: the hub's ``ClassLabel``, or a JSON list under
    ``<label>_names``. Encoded images are held in memory; for sets larger than that use ``hf:FOLDER``, which maps
    files into memory.

    Args:
        path: The folder or file.
        image: Column of images; by default the only one that holds ``{bytes, path}``.
        features: In the place of images: a column of lists of numbers, or several columns of numbers.
        text: In the place of images: a column of texts. Each becomes ``input_ids`` and ``attention_mask``, by a
            :class:`~limbeck.data.Tokenizer` that is fitted to the training split and ships with the student.
        label: Column of integer classes.
        labels: In the place of classes, of feature vectors that may have any number of labels (the task
            ``"multilabel"``): a column of lists of zeros and ones, or one such column a class; -1 is not known.
        mode: ``"RGB"`` or ``"L"`` (grey).
        size: Resize and crop every image to this size; needed where sizes differ.
        standardise: Shift and scale each feature to mean 0 and variance 1 over the training split.
        tokens: Of texts: ``"words"`` or ``"bytes"``.
        vocabulary: Ids of words at most.
        least: Words that come less often in training are not known.
        length: Tokens of a text; default that of the longest, at most 128.
        test: Fraction of train held out where there is no test file; 0 holds out nothing.
        validation: Fraction of the rest held out where there is no validation file; 0 holds out nothing.
        seed: Of what is held out.
    """
    path = Path(path)
    held_out: dict[str, Any] = {"test": test, "validation": validation, "seed": seed}
    name_ = path.stem if path.is_file() else path.name
    kinds = {"images": ("image", image), "features": ("features", features), "texts": ("text", text)}
    said = {kind: option for kind, (option, column) in kinds.items() if column is not None}
    if len(said) > 1:
        raise ConfigError(f"samples are {' or '.join(said)}", where=next(iter(said.values())), found="both")
    if text is not None and labels is None:
        cut = {"tokens": tokens, "vocabulary": vocabulary, "least": least, "length": length}
        return _texts(path, name_, text, label, held_out, cut)
    if features is not None:
        return _features(path, name_, features, label, labels, standardise, held_out)
    if labels is not None:
        raise ConfigError("several labels a sample are read of feature vectors", where="labels", remedy="name features")
    splits: dict[str, Split] = {}
    for name, files in _files(path).items():
        schema = _schema(files[0])
        column = image or _image_column(schema, files[0])
        images = ParquetImages(files, column)
        classes = _class_names(schema, label)
        splits[name] = ImageSplit(
            images,
            torch.arange(len(images)),
            mode,
            image_size(size),
            labels=torch.cat([_labels(file, label, classes) for file in files]),
            classes=classes,
            normalise="imagenet" if mode == "RGB" else "none",
        )
    return complete(name_, splits, **held_out)


def _features(
    path: Path,
    name: str,
    features: Columns,
    label: str,
    labels: Columns | None,
    standardise: bool,
    held_out: dict[str, Any],
) -> DataSource:
    """A source of feature vectors."""
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    classes: tuple[str, ...] | None = None
    for key, files in _files(path).items():
        named = _class_names(_schema(files[0]), label if labels is None else str(labels))
        several = None if labels is None or isinstance(labels, str) else tuple(labels)
        classes = classes or named or several
        parts = [
            (
                numbers(_table(file, _names(features)), features, str(file)),
                _labels(file, label, named) if labels is None else _yes_or_no(file, labels),
            )
            for file in files
        ]
        splits[key] = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    task = "classification" if labels is None else "multilabel"
    return feature_source(name, splits, classes=classes, task=task, standardise=standardise, **held_out)


def _texts(
    path: Path, name: str, text: str, label: str, held_out: dict[str, Any], tokens: dict[str, Any]
) -> DataSource:
    """A source of texts."""
    splits: dict[str, tuple[list[str], Tensor]] = {}
    classes: tuple[str, ...] | None = None
    for key, files in _files(path).items():
        named = _class_names(_schema(files[0]), label)
        classes = classes or named
        found = [line for file in files for line in strings(_table(file, [text]), text, str(file))]
        splits[key] = found, torch.cat([_labels(file, label, named) for file in files])
    return text_source(name, splits, classes=classes, held_out=held_out, **tokens)


def _yes_or_no(file: Path, columns: Columns) -> Tensor:
    found = numbers(_table(file, _names(columns)), columns, str(file))
    if bool(((found != 0) & (found != 1) & (found != -1)).any()):
        wanted = "1 and 0, or -1 where it is not known"
        raise DataError("a label is neither yes nor no", where=f"{file}, column {columns!r}", wanted=wanted)
    return found


def _names(columns: Columns) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _files(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {"train": [path]}
    found = files_by_split(path, ("parquet", "csv"))
    if "train" not in found:
        kind = "parquet" if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")) else "csv"
        files = ", ".join(f.name for f in sorted(path.glob(f"*.{kind}"))) or "no Parquet file"
        raise DataError(f"there is no train.{kind}", where=str(path), found=files, remedy="rename the training file")
    return found


def _schema(file: Path) -> pa.Schema:
    try:
        return csv.read_csv(file).schema if file.suffix == ".csv" else pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from error


def _table(file: Path, columns: list[str]) -> pa.Table:
    names = _schema(file).names
    for column in columns:
        if column not in names:
            raise DataError(
                "there is no such column",
                where=str(file),
                found=", ".join(names),
                wanted=repr(column),
                remedy=did_you_mean(column, names) or "name the columns with image, features or text, and label",
            )
    try:
        return csv.read_csv(file).select(columns) if file.suffix == ".csv" else pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from error


def _bytes_column(file: Path, column: str) -> pa.ChunkedArray:
    values = _table(file, [column]).column(0)
    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        values = values.flatten()[values.type.get_field_index("bytes")]
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        raise DataError("this is no column of images", where=f"{file}, column {column!r}", found=values.type)
    return values


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"this {'CSV' if file.suffix == '.csv' else 'Parquet'} file cannot be read",
        where=str(file),
        found=str(error).splitlines()[0],
        remedy="fetch it again",
    )


def _image_column(schema: pa.Schema, file: Path) -> str:
    images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    if len(images) != 1:
        raise DataError(
            "one column of images was expected",
            where=str(file),
            found=f"{len(images)} of {{bytes, path}} among {', '.join(schema.names)}",
            remedy="name it with image",
        )
    return images[0]


def _labels(file: Path, column: str, classes: tuple[str, ...] | None) -> Tensor:
    values = _table(file, [column]).column(0)
    if not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(
            "labels must be integers",
            where=f"{file}, column {column!r}",
            found=f"{values.null_count} missing of {values.type}" if values.null_count else values.type,
            remedy="name the column of classes with label",
        )
    labels = torch.from_numpy(values.to_numpy().astype(np.int64))
    if classes is not None:
        check_labels(labels, len(classes), f"{file}, column {column!r}")
    return labels


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    metadata = schema.metadata or {}
    try:
        names = json.loads(metadata.get(f"{column}_names".encode(), b"null"))
        if names is None:
            features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            names = features.get(column, {}).get("names")
    except (ValueError, AttributeError):
        return None  # somebody else's metadata under these keys
    return tuple(str(n) for n in names) if isinstance(names, list) and names else None
