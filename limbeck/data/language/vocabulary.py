"""Whether two models speak of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from limbeck.core import catalogue
from limbeck.core.errors import DataError
from limbeck.data.language.tokens import Tokens

#: What a batch holds for two tokenizers; methods whose cards name one of these among their needs can cope with them.
ALIGNED = ("offsets", "teacher_offsets", "teacher_mask", "teacher_labels", "chunk", "teacher_chunk")


@dataclass(frozen=True)
class Vocabularies:
    """What two tokenizers, and the widths of two models' logits, have to do with each other.

    Args:
        kind: ``same``: every logit stands for the same token in both; ``padded``: so it is in the first ``size``, and
            one model has more rows than that; ``other``: the tokenizers differ.
        size: How many logits can be compared; 0 where none can.
        note: What was found, in a sentence.
    """

    kind: Literal["same", "padded", "other"]
    size: int
    note: str


def compare_vocabularies(
    student: Tokens,
    teacher: Tokens | None = None,
    *,
    student_width: int | None = None,
    teacher_width: int | None = None,
) -> Vocabularies:
    """Compare what two models' logits stand for.

    Tokenizers are the same where they cut texts alike and no id stands for two tokens; one may have some tokens more.
    Their special tokens and chat templates may differ. Models are often wider than their tokenizer, and by different
    numbers of rows (Qwen2.5 has 151,936 or 152,064 for the same tokens): that is told, and nothing is wrong with it.

    Args:
        student, teacher: Their tokenizers; ``None``: the teacher's is the student's.
        student_width, teacher_width: How many logits each model has, where known.

    Raises:
        DataError: A model has fewer logits than its tokenizer has tokens.

    >>> from limbeck.data.language import ByteTokens
    >>> compare_vocabularies(ByteTokens(), student_width=258, teacher_width=320).kind
    'padded'
    """
    other = student if teacher is None else teacher
    for name, tokens, width in (("student", student, student_width), ("teacher", other, teacher_width)):
        if width is not None and width < tokens.size:
            raise DataError(
                f"the {name} has fewer logits than its tokenizer has tokens",
                where=f"{name}'s vocabulary",
                found=f"{width} logits, {tokens.size} tokens of {tokens.name}",
                remedy="use the tokenizer that the model was made for (data.options.teacher_tokenizer, if it is the "
                "teacher's own), or resize its embeddings",
            )
    apart = _difference(student, other)
    if apart is not None:
        return Vocabularies("other", 0, apart)
    widths = [width or tokens.size for tokens, width in ((student, student_width), (other, teacher_width))]
    if widths[0] == widths[1]:
        return Vocabularies("same", widths[0], f"{widths[0]} logits for the same tokens")
    size = min(widths)
    note = f"the same tokens, but {widths[0]} logits of the student, {widths[1]} of the teacher: the first {size} count"
    return Vocabularies("padded", size, note)


def refuse_other(found: Vocabularies, methods: tuple[str, ...] = ()) -> None:
    """Raise where two tokenizers differ and a method compares models token by token.

    Args:
        found: What :func:`compare_vocabularies` said.
        methods: Keys of the loss; those that can cope with two tokenizers are passed over. None: all are meant.

    Raises:
        DataError: The message names the methods that can cope.
    """
    able = coping()
    wrong = [key for key in methods if key not in able]
    if found.kind != "other" or (methods and not wrong):
        return
    names = ", ".join(able) or "methods that align spans, sort probabilities or compare hidden states"
    raise DataError(
        "teacher and student have different tokenizers, so they cannot be compared token by token",
        where=", ".join(wrong) or "teacher",
        found=found.note,
        wanted="the same tokens",
        remedy=f"use {names}, with data.options.teacher_tokenizer; or give the student the teacher's tokenizer",
    )


def coping() -> list[str]:
    """Methods that compare models with different tokenizers."""
    return sorted(key for key, method in catalogue.methods().items() if set(method.card.needs) & set(ALIGNED))


def _difference(student: Tokens, teacher: Tokens) -> str | None:
    """Where two tokenizers differ, or ``None``."""
    if student is teacher or student.fingerprint == teacher.fingerprint:
        return None
    sizes = f"{student.name} with {student.size} tokens and {teacher.name} with {teacher.size}"
    own, other = ({i: token for token, i in tokens.table().items()} for tokens in (student, teacher))
    clash = next((i for i in sorted(own.keys() & other.keys()) if own[i] != other[i]), None)
    if clash is not None:
        return f"{sizes}; id {clash} is {own[clash]!r} in one and {other[clash]!r} in the other"
    if student.probe != teacher.probe:
        return f"{sizes}; they cut texts differently"
    return None
