"""Records from JSON lines, Parquet, text files, sets of the hub and Python lists, by split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.language.records import Fields, Form, Record, said, text_of
from limbeck.data.sources.files import files_by_split
from limbeck.data.sources.hub import load_hub
from limbeck.data.sources.source import SPLITS, split_name
from limbeck.data.sources.split import Split

KINDS = ("jsonl", "parquet", "txt")  # of files; the first of which a folder has some counts
_SPLIT = "split"  # the column that is looked for where none is named
_ROWS = 1024  # of a table at a time

Row = tuple[Mapping[str, Any], int]


@dataclass(eq=False)
class RecordSplit(Split):
    """Records as they are, from which some can be held out before a tokenizer is trained."""

    records: list[Record]

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, rows: Tensor) -> RecordSplit:
        return replace(self, records=[self.records[row] for row in rows.tolist()])


def read_records(spec: Any, fields: Fields, config: str | None = None) -> dict[str, RecordSplit]:
    """Records by split.

    Args:
        spec: A ``.jsonl``, ``.parquet`` or ``.txt`` file, a folder or list of such, ``"hf:NAME"``, a ``datasets`` set,
            a list of mappings or of texts; or a mapping of these by split.
        fields: Which columns are what.
        config: Of a set of the hub.

    Raises:
        DataError: There is nothing to read, or a record is broken; the message names file, line and field.
    """
    found: dict[str, list[Record]] = {}
    for split, name, unit, rows in tables(spec, config):
        for own, record in _records(rows, name, unit, fields):
            found.setdefault(own or split, []).append(record)
    if not found:
        raise DataError("there are no records", where=_name(spec))
    return {name: RecordSplit(found[name]) for name in SPLITS if name in found}


def _records(rows: Iterable[Row], name: str, unit: str, fields: Fields) -> Iterator[tuple[str | None, Record]]:
    """Records of one table, each with the split that its row names."""
    form: Form | None = None
    by_row = fields.split
    for row, number in rows:
        place = (name, unit, number)
        if not isinstance(row, Mapping):
            raise DataError("this is no record", where=said(place), found=type(row).__name__, wanted="named fields")
        if form is None:
            form = fields.form(list(row), name)
            value = row.get(_SPLIT)
            if by_row is None and isinstance(value, str) and split_name(value):  # else tests would be trained on
                by_row = _SPLIT
        own = None
        if by_row is not None:
            value = text_of(row.get(by_row), place, by_row)
            own = split_name(value)
            if own is None:
                where = f"{said(place)}, field {by_row!r}"
                raise DataError("no split is called so", where=where, found=repr(value), wanted=", ".join(SPLITS))
        yield own, form(row, place)


def tables(spec: Any, config: str | None = None) -> Iterator[tuple[str, str, str, Iterable[Row]]]:
    """Split, name, unit and rows of every table; see :func:`read_records`."""
    if isinstance(spec, Mapping) and spec and all(isinstance(k, str) and split_name(k) for k in spec):
        for key, part in spec.items():
            for _, name, unit, rows in tables(part, config):
                yield split_name(key) or key, name, unit, rows
    elif isinstance(spec, str) and spec.startswith("hf:"):
        for key, part in load_hub(spec[3:], config).items():
            if split_name(key):
                yield split_name(key) or key, f"{spec} {key}", "row", _dataset(part)
    elif isinstance(spec, (str, Path)):
        for split, files in _files(Path(spec).expanduser()).items():
            for file in files:
                yield split, str(file), "line" if file.suffix == ".jsonl" else "row", _file(file)
    elif _is_paths(spec):
        for path in spec:
            yield from tables(path, config)
    elif hasattr(spec, "column_names") and hasattr(spec, "select_columns"):
        yield "train", "data", "row", _dataset(spec)
    elif isinstance(spec, Iterable) and not isinstance(spec, (bytes, Mapping)):
        yield "train", "data", "row", _listed(spec)
    else:
        wanted = f"a file or folder of {', '.join(KINDS)}, 'hf:NAME', a datasets.Dataset, or a list of records"
        raise DataError("there are no records of text here", where="data", found=type(spec).__name__, wanted=wanted)


def _is_paths(spec: Any) -> bool:
    """Whether a list names files; else its strings are texts."""
    if not isinstance(spec, Sequence) or isinstance(spec, (str, bytes)) or not spec:
        return False
    return all(
        isinstance(p, Path) or (isinstance(p, str) and p.endswith(tuple(f".{k}" for k in KINDS)) and Path(p).is_file())
        for p in spec
    )


def _listed(rows: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield ({"text": row} if isinstance(row, str) else row), number


def _dataset(data: Any) -> Iterator[Row]:
    """Rows of a set of the ``datasets`` library, as plain values."""
    return _listed(data.with_format(None))


def _files(path: Path) -> dict[str, list[Path]]:
    """Files of a path by split; those of a folder that are not called so are all for training."""
    if path.is_file():
        if path.suffix[1:] not in KINDS:
            wanted = ", ".join(f".{kind}" for kind in KINDS)
            raise DataError("no such kind of file", where=str(path), found=path.suffix or "no ending", wanted=wanted)
        return {"train": [path]}
    if not path.is_dir():
        raise DataError("there is no such file or folder", where="data", found=str(path), remedy="check the path")
    found = files_by_split(path, KINDS)
    if "train" in found:
        return found
    for kind in KINDS:
        files = sorted(path.glob(f"*.{kind}"))
        if files and not found:
            return {"train": files}
    there = ", ".join(f.name for files in found.values() for f in files) or "no such file"
    wanted = f"train.jsonl or other files of {', '.join(KINDS)}"
    raise DataError("nothing to train on in this folder", where=str(path), found=there, wanted=wanted)


def _file(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        return _parquet(file)
    return _json_lines(file) if file.suffix == ".jsonl" else _text(file)


def _text(file: Path) -> Iterator[Row]:
    try:
        yield {"text": file.read_text(encoding="utf-8")}, 0
    except UnicodeDecodeError as error:
        raise DataError("this file is not UTF-8", where=str(file), found=f"byte {error.start}") from error


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:  # by bytes: a text stream would also break lines inside strings
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    "this line is no JSON",
                    where=f"{file}, line {number}",
                    found=str(error),
                    wanted="one record a line, in UTF-8",
                ) from error
            yield row, number


def _parquet(file: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    yield row, number
                    number += 1
    except (OSError, pa.ArrowException) as error:
        found = str(error).splitlines()[0]
        raise DataError("this Parquet file cannot be read", where=str(file), found=found) from error


def _name(spec: Any) -> str:
    return str(spec) if isinstance(spec, (str, Path)) else "data"
