"""What has to be true of language models before they learn from one another; looked at once, before any step."""

from __future__ import annotations

from typing import Any

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.core.trace import logits_of
from limbeck.data.language.apart import check_packs
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.tokens import Tokens
from limbeck.data.language.vocabulary import compare_vocabularies, refuse_other


def check_language(distiller: Distiller, loader: LanguageLoader, example: Batch) -> int | None:
    """:func:`check_tokens` of what a loader gives; of texts whose tokens have classes nothing is compared."""
    if loader.classes is not None:
        return None
    split = loader.split
    return check_tokens(distiller, example, split.tokens, split.teacher_tokens, pack=loader.rows.layout.pack)


def check_tokens(
    distiller: Distiller, example: Batch, tokens: Tokens, teacher_tokens: Tokens | None = None, *, pack: bool = False
) -> int | None:
    """See that documents of a pack stay apart in both models, and that what is compared is of the same tokens.

    Args:
        distiller: On its device; it need not be set up.
        example: A small batch of what it will learn from, on the same device.
        tokens, teacher_tokens: The tokenizers; ``None``: the teacher's is the student's.
        pack: Its rows are packs.

    Returns:
        How many logits stand for the same tokens, where one model has more of them; else ``None``.

    Raises:
        ModelError: A model reads on from one document of a pack into the next.
        DataError: The tokenizers differ and a term compares models token by token, or a model has too few logits; the
            message names the methods that can cope.
    """
    judge, where = distiller.teacher, distiller._logits
    model = judge.model if isinstance(judge, FrozenTeacher) else None
    teacher_where = judge.where if isinstance(judge, FrozenTeacher) else None
    if pack:
        check_packs(distiller.student, example, logits=where)
        if model is not None:
            check_packs(model, example, logits=teacher_where, teacher=True)
    found = compare_vocabularies(
        tokens,
        teacher_tokens,
        student_width=width_of(distiller.student, example.inputs, where),
        teacher_width=None if model is None else width_of(model, teacher_inputs(example), teacher_where),
    )
    comparing = tuple(_key(name, o) for name, o, _ in distiller.loss.items() if o.teacher_taps)
    if comparing:
        refuse_other(found, comparing)
    return found.size if found.kind == "padded" else None


def width_of(model: nn.Module, inputs: Any, where: str | None = None) -> int:
    """How many logits a model has. One that has too few rows for its inputs is not run: devices do not survive that."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    table = getattr(embeddings, "weight", None)
    if table is not None and len(table) <= int(inputs["input_ids"].max()):
        return len(table)
    try:
        with dry(model):
            return logits_of(call_model(model, inputs), where).shape[-1]
    except IndexError as error:
        found, wanted = (
            f"{type(model).__name__}: {error}",
            f"a model of {int(inputs['input_ids'].max()) + 1} ids or more",
        )
        raise DataError("the model does not know a token", where="input_ids", found=found, wanted=wanted) from error


def _key(name: str, objective: nn.Module) -> str:
    card: Any = getattr(objective, "card", None)
    return name if card is None else card.key
