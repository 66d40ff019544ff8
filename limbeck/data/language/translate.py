"""What the tokens of one vocabulary are in another: those that both have, and the pieces of the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.language.tokens import Tokens

_BYTE, _UNUSED = re.compile(r"<0x([0-9A-Fa-f]{2})>"), re.compile(r"\[unused\d+\]")
_MARK, _SPACE = "##", "▁"  # of WordPiece, inside a word; of SentencePiece
_UNKNOWN = ("[UNK]", "<unk>", "<|unk|>")
Surface = tuple[bool, bytes]  # it goes on within a word (WordPiece tells), and what it says


@dataclass(frozen=True)
class Translation:
    """The teacher's tokens in the student's.

    Args:
        teacher: ``[M]``, tokens that are in both vocabularies, by the teacher's ids.
        student: ``[M]``, the same by the student's ids.
        source: ``[N]``, the teacher's tokens that can be written in the student's, those of more pieces first.
        pieces: ``[N, P]``, how, in the student's ids; -1 behind the last piece.
    """

    teacher: Tensor
    student: Tensor
    source: Tensor
    pieces: Tensor

    @property
    def numbers(self) -> Tensor:
        """How many pieces each has, ``[N]``, falling."""
        return (self.pieces >= 0).sum(dim=1)


def translate(student: Tokens, teacher: Tokens) -> Translation:
    """Write each token of the teacher's vocabulary in tokens of the student's.

    A token that both have is itself. Of others the longest prefix that the student has is taken, then the longest of
    the rest, and so on; what cannot be written so becomes the student's unknown token, or is left out where it has
    none. Special tokens go by their text or by what they stand for; unused ones are left out.

    Args:
        student: Of the smaller vocabulary, usually.
        teacher: Whose tokens are written.

    Raises:
        DataError: None can be written.

    >>> from limbeck.data.language import ByteTokens
    >>> found = translate(ByteTokens(), ByteTokens())
    >>> torch.equal(found.teacher, found.student), found.pieces.shape[1]
    (True, 1)
    """
    own, other = _surfaces(student), _surfaces(teacher)
    known = {surface: token for token, surface in sorted(own.items(), reverse=True)}
    longest = max((len(text) for _, text in known), default=0)
    table = student.table()
    marked = any(flag for flag, _ in known)
    unknown = next((table[name] for name in _UNKNOWN if name in table), None)
    shared = _special(student, teacher)
    written = {token: [own_token] for token, own_token in shared.items()}
    for token, (inside, text) in other.items():
        surface = (inside and marked, text)
        if surface in known:
            shared[token] = known[surface]
        pieces = _pieces(surface, known, longest, marked)
        if pieces is None and unknown is not None:
            pieces = [unknown]
        if pieces is not None:
            written[token] = pieces
    if not written:
        where = f"{student.name} and {teacher.name}"
        raise DataError("no token of the teacher can be written in the student's", where=where, found="none")
    order = sorted(written, key=lambda token: (-len(written[token]), token))
    width = len(written[order[0]])
    return Translation(
        torch.tensor(sorted(shared), dtype=torch.long),
        torch.tensor([shared[token] for token in sorted(shared)], dtype=torch.long),
        torch.tensor(order),
        torch.tensor([written[token] + [-1] * (width - len(written[token])) for token in order]),
    )


def _pieces(surface: Surface, known: Mapping[Surface, int], longest: int, marked: bool) -> list[int] | None:
    inside, text = surface
    found = []
    at = 0
    while at < len(text):
        flag = marked and (inside or at > 0)
        sizes = range(min(longest, len(text) - at), 0, -1)
        size = next((n for n in sizes if (flag, text[at : at + n]) in known), None)
        if size is None:
            return None
        found.append(known[flag, text[at : at + size]])
        at += size
    return found or None


def _surfaces(tokens: Tokens) -> dict[int, Surface]:
    """What each token that is no special one says, in bytes."""
    specials = _specials(tokens)
    alphabet = _alphabet() if "ByteLevel" in json.dumps(tokens.rules()) else None
    found = {}
    for text, token in tokens.table().items():
        if token in specials or _UNUSED.fullmatch(text) or text in _UNKNOWN:
            continue
        byte = _BYTE.fullmatch(text)
        if byte is not None:
            found[token] = False, bytes([int(byte[1], 16)])
        elif alphabet is not None and all(c in alphabet for c in text):
            found[token] = False, bytes(alphabet[c] for c in text)
        else:
            inside = text.startswith(_MARK) and len(text) > len(_MARK)
            said = text[len(_MARK) :] if inside else text.replace(_SPACE, " ")
            found[token] = inside, said.encode(errors="surrogatepass")
    return found


def _specials(tokens: Tokens) -> set[int]:
    table = tokens.table()
    named = {table[text] for text in getattr(tokens, "specials", ()) if text in table}
    return named | {token for token in (tokens.bos, tokens.eos) if token is not None}


def _special(student: Tokens, teacher: Tokens) -> dict[int, int]:
    """Special tokens of the teacher that the student has: of the same text, or of the same meaning."""
    own, other = student.table(), teacher.table()
    there, theirs = _specials(student), _specials(teacher)
    found = {token: own[text] for text, token in other.items() if token in theirs and own.get(text) in there}
    for mine, token in ((student.bos, teacher.bos), (student.eos, teacher.eos)):
        if mine is not None and token is not None:
            found.setdefault(token, mine)
    return found


def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level encodings (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
