"""What a tokenizer is here: ids of texts, how far each token reads, and the marks around a document."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import DataError
from limbeck.core.files import write_json
from limbeck.core.plain import canonical, digest
from limbeck.data.language.chat import Segment, plain_turns
from limbeck.data.language.records import Message, Place
from limbeck.data.tokenizer import FIRST, PADDING, UNKNOWN, Tokenizer

Encoded = tuple[NDArray[np.int32], NDArray[np.int32]]

#: What a fingerprint is also taken of: tokenizers that cut these alike and have the same rules are the same.
PROBE = (
    "The quick brown fox's 1,234.5 jumps\n\n\tover  the lazy dog!  ",
    " leading space, trailing space ",
    "naïve café – Größe 漢字かな 😀 \u0301 \u200b",
    "def f(x):\n    return x**2  # ünï\r\n",
    "<s></s><|endoftext|><|im_start|>user\n<pad>[UNK]",
)
_GUARDS = ("\n", "|", ".")


class Tokens(ABC):
    """A tokenizer, and all that training data need to know of it.

    Attributes:
        name: For messages.
        size: Ids run from 0 to ``size - 1``. A model may have more rows than that, never fewer.
        pad: The id that fills rows up; what it is changes nothing.
        bos, eos: The tokens that begin and end a document; ``None``: it has none.
        front, back: What stands before and after a document: what the tokenizer itself puts there, and ``eos``.
        template: Of conversations, in Jinja; ``None``: it has none.
    """

    name: str
    size: int
    pad: int
    bos: int | None
    eos: int | None
    front: tuple[int, ...]
    back: tuple[int, ...]
    template: str | None

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """For each text its ids ``[n]``, and how many of its characters have been read after each token ``[n]``.

        Nothing is put around it. A token that ends within a character has read nothing: who completes it has.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def bytes_in(self, ids: Sequence[int]) -> int:
        """Bytes of UTF-8 that a run of tokens stands for; marks stand for none, part of a character for one.

        >>> from limbeck.data.language import load_tokens
        >>> tokens = load_tokens("bytes")
        >>> (ids, _), = tokens.encode(["naïve"])
        >>> tokens.bytes_in([*ids, tokens.eos])
        6
        """
        marks = {self.bos, self.eos, self.pad, *self.front, *self.back}
        return len(self.decode([i for i in ids if i not in marks]).replace("\ufffd", "?").encode())

    @abstractmethod
    def turns(self, messages: Sequence[Message], first: int, place: Place) -> list[Segment]:
        """A conversation as it is written for the model, cut where turns of the assistant begin and end.

        Args:
            messages: Of the conversation.
            first: Turns before this message are not learned.
            place: Where it was found, for messages.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it beside a student."""

    @abstractmethod
    def rules(self) -> dict[str, Any]:
        """Plain values that settle which ids a text becomes."""

    @abstractmethod
    def table(self) -> dict[str, int]:
        """Every token with its id."""

    @cached_property
    def fingerprint(self) -> str:
        """Tokenizers of one fingerprint give the same ids, marks around a document included.

        Any rule of theirs that differs makes another; decoders, templates, truncation and padding are no such rules.
        """
        marks = {"bos": self.bos, "eos": self.eos, "front": list(self.front), "back": list(self.back)}
        return digest(canonical({"rules": self.rules(), "probe": self.probe, "marks": marks, "size": self.size}))

    @cached_property
    def probe(self) -> list[list[int]]:
        """The ids of a few texts on which tokenizers differ."""
        return [ids.tolist() for ids, _ in self.encode(PROBE)]

    @property
    def template_print(self) -> str | None:
        """A hash of the template, or ``None``."""
        return None if self.template is None else digest(self.template.encode())

    def continued(self, texts: Sequence[str]) -> list[Encoded]:
        """Like :meth:`encode`, for texts that follow another one.

        Some tokenizers put a space before every text they are given; what follows something must not get one. Such a
        text is cut behind a guard, whose tokens are then taken off.
        """
        guard = self._guard
        if guard is None:
            return self.encode(texts)
        mark, head = guard
        found, plain = [], None
        for place, (ids, ends) in enumerate(self.encode([mark + text for text in texts])):
            if ids[: len(head)].tolist() == head:
                found.append((ids[len(head) :], ends[len(head) :] - len(mark)))
            else:  # the guard grew together with the text
                plain = self.encode(texts) if plain is None else plain
                found.append(plain[place])
        return found

    @cached_property
    def _guard(self) -> tuple[str, list[int]] | None:
        """What to put before a text so that no space is; ``None`` where none is anyway."""
        for mark in _GUARDS:
            (head, _), (alone, _), (both, _) = self.encode([mark, "a", mark + "a"])
            if both.tolist() == [*head.tolist(), *alone.tolist()]:
                return None
            if both[: len(head)].tolist() == head.tolist() and len(both) > len(head):
                return mark, head.tolist()
        return None


class ByteTokens(Tokens):
    """Bytes of UTF-8 by limbeck's own :class:`~limbeck.data.Tokenizer`; its id 1 begins and ends a document.

    Conversations are written as ``role: content``, each message ended by that id.

    >>> tokens = ByteTokens()
    >>> (ids, ends), = tokens.encode(["né"])
    >>> ids.tolist(), ends.tolist(), tokens.decode(ids)
    ([112, 197, 171], [1, 1, 2], 'né')
    """

    name = "bytes"
    template = None

    def __init__(self) -> None:
        self.tokenizer = Tokenizer("bytes", 1)
        self.size, self.pad = self.tokenizer.size, PADDING
        self.bos = self.eos = UNKNOWN  # no byte is unknown, so the id is free
        self.front = self.back = (UNKNOWN,)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        found = []
        for text in texts:
            raw = np.frombuffer(text.encode(), np.uint8)
            follows = np.append(raw[1:] & 0xC0 == 0x80, False)[: len(raw)]  # the next byte is of the same character
            found.append((raw.astype(np.int32) + FIRST, np.cumsum(~follows, dtype=np.int32)))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - FIRST for i in ids if i >= FIRST).decode("utf-8", errors="replace")

    def turns(self, messages: Sequence[Message], first: int, place: Place) -> list[Segment]:
        return plain_turns(messages, first, (UNKNOWN,))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``'s like for bytes: ``bytes.json``, which :meth:`Tokenizer.read` reads."""
        write_json(Path(folder) / "bytes.json", self.tokenizer.written())

    def table(self) -> dict[str, int]:
        return {f"<0x{byte:02X}>": byte + FIRST for byte in range(256)}

    def rules(self) -> dict[str, Any]:
        return {"tokens": "bytes", "first": FIRST, "padding": PADDING, "chat": "role: content"}


def ends_of(offsets: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """How far each token reads, from the first and last character that it touches.

    A token that ends within a character counts together with those that complete it: it has not read anything before
    them. What lies between two tokens, such as a space that a tokenizer trims off, belongs to the second.

    Args:
        offsets: ``[n, 2]``.
        length: Of the text; nothing reads beyond it.

    >>> ends_of(np.array([[0, 3], [4, 6], [5, 6]]), 6).tolist()
    [3, 3, 6]
    """
    ends = offsets[:, 1].copy()
    ends[:-1][ends[:-1] > offsets[1:, 0]] = 0
    return np.clip(np.maximum.accumulate(ends), 0, length).astype(np.int32)


def marked(found: Mapping[str, int | None], size: int, where: str) -> None:
    """Raise where a mark is no id of the vocabulary."""
    for name, value in found.items():
        if value is not None and not 0 <= value < size:
            raise DataError("a mark is no token", where=f"{where}: {name}", found=value, wanted=f"0 to {size - 1}")
