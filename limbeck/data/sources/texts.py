"""Texts in tables, tokenized by a vocabulary that the training split tells."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.sources.source import SPLITS, DataSource, complete
from limbeck.data.sources.split import Split, TensorSplit
from limbeck.data.tokenizer import Tokenizer


@dataclass(eq=False)
class TextSplit(TensorSplit):
    """Tokenized texts: ``input_ids`` and ``attention_mask``, with the tokenizer that made them."""

    tokenizer: Tokenizer = field(kw_only=True)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.tokenizer.size


@dataclass(eq=False)
class _Texts(Split):
    """Texts as they are, from which samples can be held out before the vocabulary is told."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: Tensor) -> _Texts:
        return replace(self, texts=[self.texts[row] for row in rows.tolist()], labels=self._labels_at(rows))


def text_source(
    name: str,
    splits: dict[str, tuple[list[str], Tensor]],
    *,
    classes: tuple[str, ...] | None,
    held_out: dict[str, Any],
    **tokens: Any,
) -> DataSource:
    """A source of tokenized texts; words are those of what is left to train on.

    Args:
        name: Of the source.
        splits: Texts and their classes.
        classes: Names.
        held_out: ``test``, ``validation`` and ``seed`` of ``complete``.
        tokens: Of ``Tokenizer.fit``.
    """
    plain: dict[str, Split] = {
        key: _Texts(texts, labels=labels, classes=classes) for key, (texts, labels) in splits.items()
    }
    source = complete(name, plain, **held_out)
    train = source.train
    assert isinstance(train, _Texts)
    tokenizer = Tokenizer.fit(train.texts, **tokens)
    parts: dict[str, Any] = {}
    for key in SPLITS:
        split = getattr(source, key)
        if split is not None:
            parts[key] = TextSplit(
                tokenizer(split.texts), labels=split.labels, classes=split.classes, tokenizer=tokenizer
            )
    unit = "words" if tokenizer.tokens == "words" else "bytes"
    note = f"{tokenizer.size} ids of {unit} told by the training split, {tokenizer.length} tokens a text"
    return replace(source, **parts, note="; ".join(filter(None, [source.note, note])))


def strings(table: pa.Table, column: str, where: str) -> list[str]:
    """A column of a table as texts.

    Raises:
        DataError: It holds something else, or a cell is empty.
    """
    values = table.column(column)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) or values.null_count:
        found = f"{values.null_count} missing of {values.type}" if values.null_count else str(values.type)
        raise DataError("these are no texts", where=f"{where}, column {column!r}", found=found, wanted="strings")
    return values.to_pylist()
