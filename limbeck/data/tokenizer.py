"""Texts as numbers: a vocabulary of words told from the training texts, or bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError

PADDING, UNKNOWN, FIRST = 0, 1, 2  # ids; words and bytes count from FIRST
_WORD = re.compile(r"\w+(?:'\w+)*|'\w+|[^\w\s]")

Tokens = Literal["words", "bytes"]


@dataclass(frozen=True)
class Tokenizer:
    """Cuts texts into tokens and gives each its id: 0 is padding, 1 a word that is not known.

    A trained student's is in its ``student.json`` under ``text``: ``Tokenizer.read(read_student(folder)["text"])``.

    Args:
        tokens: ``"words"``, in small letters, and single punctuation marks; or ``"bytes"`` of UTF-8.
        length: Tokens of a text; what is longer is cut off, what is shorter padded.
        words: Those that are known, by id from 2 on; none where tokens are bytes.

    >>> Tokenizer.fit(["A good film.", "a bad film"], least=2)(["A film!"])["input_ids"]
    tensor([[2, 3, 1, 0]])
    """

    tokens: Tokens
    length: int
    words: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        *,
        tokens: Tokens = "words",
        vocabulary: int = 20_000,
        least: int = 2,
        length: int | None = None,
    ) -> Tokenizer:
        """Tell a vocabulary from texts: the most frequent words, equals by the alphabet; the same every time.

        Args:
            texts: Of the training split only.
            tokens: ``"words"`` or ``"bytes"``.
            vocabulary: Ids at most.
            least: Words that come less often are not known.
            length: Tokens of a text; ``None``: of the longest, at most 128.

        Raises:
            ConfigError: A number that cannot be.
        """
        for name, value, smallest in (
            ("vocabulary", vocabulary, FIRST + 1),
            ("least", least, 1),
            ("length", length, 1),
        ):
            if value is not None and value < smallest:
                raise ConfigError("too small", where=name, found=value, wanted=f"{smallest} or more")
        found = [_cut(text, tokens) for text in texts]
        if length is None:
            length = min(max(map(len, found), default=1) or 1, 128)
        if tokens == "bytes":
            return cls(tokens, length)
        count = Counter(word for words in found for word in words)
        known = sorted((w for w, n in count.items() if n >= least), key=lambda word: (-count[word], word))
        return cls(tokens, length, tuple(known[: vocabulary - FIRST]))

    @property
    def size(self) -> int:
        """How many ids there are."""
        return FIRST + (256 if self.tokens == "bytes" else len(self.words))

    @cached_property
    def _ids(self) -> dict[Any, int]:
        return {token: i for i, token in enumerate(range(256) if self.tokens == "bytes" else self.words, start=FIRST)}

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, ``[N, length]`` integers; the mask is 0 where a text has ended."""
        ids = torch.full((len(texts), self.length), PADDING)
        for row, text in zip(ids, texts, strict=True):
            found = [self._ids.get(token, UNKNOWN) for token in _cut(text, self.tokens)[: self.length]] or [UNKNOWN]
            row[: len(found)] = torch.tensor(found)
        return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}

    def written(self) -> dict[str, Any]:
        """As plain values, from which :meth:`read` makes it again."""
        return {**asdict(self), "words": list(self.words)}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Tokenizer:
        """Make one of plain values.

        Raises:
            DataError: They are no tokenizer's.

        >>> Tokenizer.read({"tokens": "bytes", "length": 4, "words": []})(["Hi"])["input_ids"]
        tensor([[ 74, 107,   0,   0]])
        """
        try:
            return cls(written["tokens"], int(written["length"]), tuple(str(word) for word in written["words"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("this describes no tokenizer", where="text", found=repr(error)) from error


def _cut(text: str, tokens: Tokens) -> Sequence[Any]:
    return text.encode() if tokens == "bytes" else _WORD.findall(text.lower())
