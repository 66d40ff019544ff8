"""Sources of text for causal language models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from limbeck.core.errors import ConfigError
from limbeck.data.language.arrange import arrange
from limbeck.data.language.chat import PLAIN
from limbeck.data.language.corpus import encode
from limbeck.data.language.load import load_tokens
from limbeck.data.language.pieces import Long
from limbeck.data.language.read import RecordSplit, read_records
from limbeck.data.language.records import Fields, Record
from limbeck.data.language.rows import Layout
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.sources.source import SPLITS, VALIDATION, DataSource, complete

_FEW = 20  # texts; of fewer the ends are held out, not whole ones


def language_source(
    source: Any,
    *,
    tokenizer: Any,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    tag: str | None = None,
    split: str | None = None,
    chat: bool = False,
    template: str | os.PathLike[str] | None = None,
    teacher_tokenizer: Any = None,
    teacher_template: str | os.PathLike[str] | None = None,
    length: int | None = None,
    pack: bool = False,
    long: Long | None = None,
    overlap: int = 1,
    padding: Literal["right", "left"] = "right",
    multiple: int = 8,
    bucket: int = 16,
    config: str | None = None,
    test: float = 0.0,
    validation: float = VALIDATION,
    seed: int = 0,
) -> DataSource:
    r"""Text to learn from, in tokens: plain, prompts with completions, or conversations.

    =============================  ==================================================================================
    a record                       of which is learned
    =============================  ==================================================================================
    ``{"text"}``                   all of it
    ``{"prompt", "completion"}``   the completion and its end; the two are cut into tokens apart
    ``{"messages"}``               every turn of the assistant with its end token, as the tokenizer's chat template
                                   writes it
    =============================  ==================================================================================

    Args:
        source: A ``.jsonl``, ``.parquet`` or ``.txt`` file, a folder of such (``train.jsonl``, ``validation.jsonl`` and
            so on; files that are not called so are all for training), a list of files, ``"hf:NAME"``, a ``datasets``
            set, a list of records or of texts; or a mapping of these by split.
        tokenizer: See :func:`~limbeck.data.language.load_tokens`; ``{"bpe": SIZE}`` is trained on the training split.
        text, prompt, completion, messages, tag: Columns, where they have other names; or texts with columns in
            braces: ``prompt="{instruction}\n{input}\n"``.
        split: The column that says which split a record is of; default ``split``, where it says so.
        chat: Write a prompt and its completion as a conversation.
        template: Of conversations, in the place of the tokenizer's: ``plain``, Jinja, or a file.
        teacher_tokenizer, teacher_template: The teacher's, where it is another one: batches then hold the same texts
            in its tokens too.
        length: Tokens of a row at most; ``None``: documents stay whole.
        pack: Put several documents into a row, where they do not see each other.
        long: What becomes of documents longer than a row: ``cut`` in blocks (default for plain texts), ``truncate``
            (default for others) or ``drop``.
        overlap: Tokens that a block reads again of the one before it.
        padding: The side on which rows are filled up.
        multiple: Of which a batch's length is one.
        bucket: Batches that are sorted by length together; 0: none.
        config: Of a set of the hub.
        test: Fraction of train held out where there is no test split; 0 holds out nothing.
        validation: Fraction of the rest held out where there is no validation split; 0 holds out nothing. Of a few
            long texts the ends are held out.
        seed: Of what is held out, and of packing.

    Raises:
        ConfigError: Options that cannot be.
        DataError: Records that cannot be read, or have nothing to learn.

    >>> source = language_source([{"prompt": "2+2=", "completion": "4"}] * 20, tokenizer="bytes", length=16, pack=True)
    >>> source.samples, source.train.vocabulary
    ({'train': 9, 'validation': 1}, 258)
    """
    if pack and length is None:
        raise ConfigError("a pack has a length", where="length", found="none", remedy="length: 512, say")
    if padding not in ("right", "left"):
        raise ConfigError("no such side", where="padding", found=repr(padding), wanted="right or left")
    for name, value, least in (("multiple", multiple, 1), ("bucket", bucket, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError("must be a whole number", where=name, found=repr(value), wanted=f"{least} or more")
    fields = Fields(text, prompt, completion, messages, tag, split, chat)
    found = _held_out(_name(source), read_records(source, fields, config), test, validation, seed)
    train: Any = found.train
    own = load_tokens(tokenizer, texts=lambda: _texts(train.records), template=_template(template, tokenizer, train))
    other = None
    if teacher_tokenizer is not None:
        jinja = _template(teacher_template, teacher_tokenizer, train)
        name = "teacher_tokenizer"
        other = load_tokens(teacher_tokenizer, texts=lambda: _texts(train.records), template=jinja, where=name)
        if other.fingerprint == own.fingerprint and other.template_print == own.template_print:
            other = None  # the same ids: the teacher reads what the student reads
    if long is None:
        plain = all(len(r.pieces) == 1 for r in train.records)
        long = "cut" if plain else "truncate"
    layout = Layout(length, pack, padding, multiple, bucket)
    tags = tuple(sorted({r.tag for r in train.records if r.tag is not None}))
    settings = _settings(own, other, long, overlap, seed)
    parts, notes = {}, [found.note]
    for key in SPLITS:
        part = getattr(found, key)
        if part is None:
            continue
        rows, told = _rows(part, own, other, layout, long, overlap, seed, tags, key)
        parts[key] = LanguageSplit(rows, tokens=own, teacher_tokens=other, tags=tags, settings=settings)
        notes.append(told.note(key, length, long, pack))
    note = "; ".join(filter(None, [f"{own.size} ids of {own.name}", *notes]))
    return DataSource(found.name, parts["train"], parts.get("validation"), parts.get("test"), note)


def _rows(
    part: RecordSplit,
    own: Tokens,
    other: Tokens | None,
    layout: Layout,
    long: Long,
    overlap: int,
    seed: int,
    tags: tuple[str, ...],
    where: str,
) -> Any:
    numbers = {tag: number for number, tag in enumerate(tags)}
    records = part.records
    return arrange(
        encode(records, own, positions=other is not None),
        layout,
        pad=own.pad,
        long=long,
        overlap=overlap,
        seed=seed,
        tags=torch.tensor([numbers.get(r.tag, -1) if r.tag else -1 for r in records]) if tags else None,
        teacher=None if other is None else encode(records, other, positions=True),
        teacher_pad=0 if other is None else other.pad,
        where=f"the {where} split",
    )


def _settings(own: Tokens, other: Tokens | None, long: Long, overlap: int, seed: int) -> dict[str, Any]:
    """What settles rows beside data and layout, as plain values."""
    return {
        "tokenizer": own.fingerprint,
        "template": own.template_print,
        "teacher_tokenizer": None if other is None else other.fingerprint,
        "teacher_template": None if other is None else other.template_print,
        "long": long,
        "overlap": overlap,
        "pack_seed": seed,
    }


def _texts(records: list[Record]) -> list[str]:
    return [text for record in records for text in record.texts]


def _template(said: Any, tokenizer: Any, train: RecordSplit) -> Any:
    """A tokenizer that is trained here has the plain template, where there are conversations."""
    trained = isinstance(tokenizer, Mapping) and any(r.messages for r in train.records)
    return PLAIN if said is None and trained else said


def _held_out(name: str, splits: dict[str, RecordSplit], test: float, validation: float, seed: int) -> DataSource:
    """Splits with what is held out of train: records, or the ends of a few long texts."""
    train = splits.get("train")
    wanted = [(s, f) for s, f in (("test", test), ("validation", validation)) if f and s not in splits]
    plain = train is not None and all(len(r.pieces) == 1 for r in train.records)
    if train is None or not plain or len(train) >= _FEW or not wanted:
        return complete(name, dict(splits), test=test, validation=validation, seed=seed)
    notes, held = [], dict(splits)
    for split, fraction in wanted:
        if not 0 < fraction < 1:
            raise ConfigError("no fraction", where=split, found=fraction, wanted="between 0 and 1")
        cut = [_cut(record, fraction) for record in held["train"].records]
        held["train"] = RecordSplit([a for a, _ in cut])
        held[split] = RecordSplit([b for _, b in cut])
        notes.append(f"{split}: the last {fraction:.0%} of each text of train")
    return complete(name, dict(held), validation=0, note="; ".join(notes))


def _cut(record: Record, fraction: float) -> tuple[Record, Record]:
    """A text in two, at the end of a line where there is one near."""
    ((text, learned),) = record.pieces
    at = len(text) - max(1, round(len(text) * fraction))
    line = text.find("\n", at, at + 200) + 1
    at = line if 0 < line < len(text) else at
    return (
        replace(record, pieces=((text[:at], learned),)),
        replace(record, pieces=((text[at:], learned),)),
    )


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source) if str(source).startswith("hf:") else Path(source).stem
    return "texts"
