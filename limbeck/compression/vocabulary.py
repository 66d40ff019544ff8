"""Smaller vocabularies: which tokens stay, and what becomes of ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.data.language.translate import Translation

_FILE = "vocabulary.json"


class Vocabulary:
    """The teacher's tokens that a student keeps, and the way between the ids of the two.

    The student's id i is the teacher's ``kept[i]``. Not every tokenizer can be rebuilt for fewer tokens; this maps what
    the teacher's tokenizer gives.

    Args:
        kept: Teacher ids that stay, in the student's order.
        size: Size of the teacher's vocabulary.
        unknown: The teacher's id that stands for every token that was dropped; one of ``kept``.

    Raises:
        ConfigError: Ids that are not the teacher's, or twice there.

    Example:
        >>> words = Vocabulary([0, 2, 5], size=6, unknown=0)
        >>> words.to_student(torch.tensor([[5, 4, 2, -100]]))
        tensor([[   2,    0,    1, -100]])
        >>> words.to_teacher(torch.tensor([2, 1]))
        tensor([5, 2])
    """

    def __init__(self, kept: Sequence[int] | Tensor, size: int, unknown: int | None = None) -> None:
        ids = torch.as_tensor(kept)
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ConfigError("not token ids", where="vocabulary", found=f"{list(ids.shape)} {ids.dtype}", wanted="ids")
        self.kept, self.size, self.unknown = ids.long().cpu(), size, unknown
        wrong = self.kept[(self.kept < 0) | (self.kept >= size)]
        if len(wrong):
            raise ConfigError(
                "no such token", where="vocabulary", found=int(wrong[0]), wanted=f"ids from 0 to {size - 1}"
            )
        values, counts = self.kept.unique(return_counts=True)
        if len(values) < len(self.kept):
            raise ConfigError("a token is kept twice", where="vocabulary", found=int(values[counts > 1][0]))
        self._new = torch.full((size,), -1)
        self._new[self.kept] = torch.arange(len(self.kept))
        self._stays = self._new >= 0
        if unknown is not None:
            if unknown not in self:
                raise ConfigError("the token for unknown ones is not kept", where="unknown", found=unknown)
            self._new[self._new < 0] = self._new[unknown].clone()

    def __len__(self) -> int:
        return len(self.kept)

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and 0 <= token < self.size and bool(self._stays[token])

    def to_student(self, ids: Tensor) -> Tensor:
        """Student ids for teacher ids ``[*]``; negative ones (places without a label) stay as they are.

        Raises:
            DataError: A dropped token, and no ``unknown`` to stand for it; or an id beyond the teacher's vocabulary.
        """
        if ids.numel() and int(ids.max()) >= self.size:
            raise DataError("no such token", where="input_ids", found=int(ids.max()), wanted=f"below {self.size}")
        found = torch.where(ids < 0, ids, self._new.to(ids.device)[ids.clamp(min=0)])
        lost = ids[(found < 0) & (ids >= 0)]
        if len(lost):
            raise DataError(
                "a token was dropped from the vocabulary",
                where="input_ids",
                found=int(lost[0]),
                remedy="keep it, or name the token that stands for dropped ones: unknown=ID",
            )
        return found

    def to_teacher(self, ids: Tensor) -> Tensor:
        """Teacher ids for student ids ``[*]``; negative ones stay as they are."""
        return torch.where(ids < 0, ids, self.kept.to(ids.device)[ids.clamp(min=0)])

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A model's keywords with every tensor of ids mapped: ``input_ids``, ``decoder_input_ids``, ``labels``."""
        ids = ("input_ids", "decoder_input_ids", "labels")
        return {name: self.to_student(value) if name in ids else value for name, value in inputs.items()}

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``vocabulary.json`` beside the student."""
        values = {"kept": self.kept.tolist(), "teacher_size": self.size, "unknown": self.unknown}
        write_json(Path(folder) / _FILE, values)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Vocabulary:
        """Read it again.

        Raises:
            DataError: There is none, or it is damaged.
        """
        file = Path(folder) / _FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(values["kept"], values["teacher_size"], values["unknown"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"no vocabulary can be read here: {error}", where=str(file)) from error


def pieced_rows(rows: Tensor, translation: Translation, size: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows for a student's tokens out of those of the teacher's tokens that are written with them: their mean.

    Of embeddings, of the weight of the last layer, or of its bias.

    Args:
        rows: ``[V, D]`` or ``[V]``, the teacher's.
        translation: The teacher's tokens in the student's (``limbeck.data.language.translate``).
        size: How many rows the student has.
        width: Of the student's rows: the first of the teacher's; ``None``: all.

    Returns:
        ``[size, width]`` or ``[size]``, zeros where no token of the teacher is written with it; and where one is.

    Source: ayeffkay/rubert-tiny, preprocessing/init_weights.py (arXiv 2205.02340).

    >>> ids = torch.arange(2)
    >>> words = Translation(ids, ids, torch.tensor([2, 0, 1]), torch.tensor([[0, 1], [0, -1], [1, -1]]))
    >>> pieced_rows(torch.tensor([1.0, 2.0, 5.0]), words, 3)
    (tensor([3.0000, 3.5000, 0.0000]), tensor([ True,  True, False]))
    """
    source, pieces = translation.source.unsqueeze(1).expand_as(translation.pieces), translation.pieces
    pairs = torch.stack([pieces[pieces >= 0], source[pieces >= 0]], dim=1).unique(dim=0).to(rows.device)
    kept = rows if rows.ndim == 1 or width is None else rows[:, :width]
    total = kept.new_zeros(size, *kept.shape[1:]).index_add_(0, pairs[:, 0], kept[pairs[:, 1]])
    number = torch.bincount(pairs[:, 0], minlength=size)
    return total / number.clamp(min=1).reshape(-1, *[1] * (kept.ndim - 1)), number > 0


def token_frequencies(batches: Iterable[Mapping[str, Any]], size: int) -> Tensor:
    """How often each token comes in ``input_ids``, ``decoder_input_ids`` and ``labels``, ``[size]``; padding that an
    attention mask marks is not counted.

    Args:
        batches: Keywords for a model.
        size: Of the vocabulary.

    Raises:
        DataError: An id beyond the vocabulary.

    >>> token_frequencies([{"input_ids": torch.tensor([[1, 1, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}], 3)
    tensor([0, 2, 0])
    """
    total = torch.zeros(size, dtype=torch.long)
    for batch in batches:
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", ""), ("labels", "")):
            ids = batch.get(name)
            if not isinstance(ids, Tensor):
                continue
            counts = batch.get(mask)
            ids = ids[ids >= 0] if counts is None else ids[(counts > 0) & (ids >= 0)]
            if ids.numel() and int(ids.max()) >= size:
                raise DataError("no such token", where=name, found=int(ids.max()), wanted=f"below {size}")
            total += torch.bincount(ids.flatten().cpu(), minlength=size)
    return total


def most_frequent(frequencies: Tensor, number: int, always: Iterable[int] = ()) -> Tensor:
    """The ids of the most frequent tokens, rising; of equal ones the lower ids.

    Args:
        frequencies: ``[V]`` counts.
        number: How many stay.
        always: Tokens that stay however rare they are, such as those with a meaning of their own.

    Raises:
        ConfigError: More tokens must stay than may.

    >>> most_frequent(torch.tensor([0, 9, 3, 5]), 2, always=[0])
    tensor([0, 1])
    """
    forced = torch.zeros_like(frequencies, dtype=torch.bool)
    forced[sorted(set(always))] = True
    if int(forced.sum()) > number:
        raise ConfigError(
            "the tokens with a meaning of their own are more than that",
            where="vocabulary",
            found=number,
            wanted=f"at least {int(forced.sum())}",
        )
    ranked = torch.where(forced, frequencies.max() + 1, frequencies)
    return ranked.argsort(descending=True, stable=True)[:number].sort().values


def special_tokens(config: Any, size: int) -> dict[str, list[int]]:
    """Tokens a configuration (or a generation configuration) names, by entry: ``eos_token_id`` and its like."""
    found = {}
    for name, value in config.to_dict().items():
        if not name.endswith(("token_id", "token_ids")):
            continue
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and 0 <= i < size]
        if ids:
            found[name] = ids
    return found


def renamed_tokens(config: Any, words: Vocabulary) -> dict[str, Any]:
    """What to change in a configuration so that it names the same tokens by the student's ids.

    Raises:
        ConfigError: One of them was dropped.
    """
    changes: dict[str, Any] = {}
    for name, ids in special_tokens(config, words.size).items():
        lost = [i for i in ids if i not in words]
        if lost:
            raise ConfigError(
                f"{name} is not among the tokens kept",
                where="vocabulary",
                found=f"{name}={lost[0]}",
                remedy=f"keep token {lost[0]}, or set {name} to None in the teacher's configuration first",
            )
        new = words.to_student(torch.tensor(ids)).tolist()
        changes[name] = new if isinstance(getattr(config, name), list) else new[0]
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        listed = getattr(config, name, None)
        if isinstance(listed, list):
            changes[name] = [int(words.to_student(torch.tensor(i))) for i in listed if i in words]
    return changes
