"""What has to be true of models and data before a trainer of another library takes its first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.data.language.load import load_tokens
from limbeck.data.language.tokens import Tokens
from limbeck.data.language.vocabulary import compare_vocabularies, refuse_other
from limbeck.engine.language import check_tokens, width_of
from limbeck.integrations.reading import core_of

_MARKS = ("seq_lengths", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")  # what packing writes beside tokens
_PADDED, _ROUND = 1.1, 1024  # no model is padded by more than a tenth, but for small vocabularies


def check_models(
    distiller: Distiller,
    example: Batch,
    raw: Mapping[str, Any],
    *,
    language: bool,
    tokens: Tokens | None = None,
    teacher_tokens: Tokens | None = None,
    runs: bool = True,
) -> int | None:
    """See that student, teacher, data and loss fit each other.

    Args:
        distiller: On its device; it need not be set up.
        example: A small batch, on the same device.
        raw: What is known of it before it was read: names of columns and of what the collator made.
        language: Logits are of tokens.
        tokens, teacher_tokens: The tokenizers, where known.
        runs: Both models can be run; where weights are sharded they cannot be yet.

    Returns:
        How many logits stand for the same tokens, where one model has more of them; else ``None``.

    Raises:
        ConfigError: A term knows no masks.
        ModelError: A model reads on from one document of a pack into the next.
        DataError: Vocabularies, classes or packs do not fit.
    """
    _check_masks(distiller, example)
    check_marks(raw, example)
    judge = distiller.teacher
    model = judge.model if isinstance(judge, FrozenTeacher) else None
    _check_classes(distiller.student, model)
    if not isinstance(example.inputs, Mapping) or "input_ids" not in example.inputs:
        return None
    compares = [name for name, objective, _ in distiller.loss.items() if objective.teacher_taps]
    if not language or not runs:
        if tokens is not None and compares:
            _check_reading(example, tokens, teacher_tokens, model)
        return None
    if model is not None and compares and teacher_tokens is None and example.teacher_inputs is None:
        _check_widths(distiller, model, example, tokens)
    document = example.extras.get("document")
    pack = document is not None and int(document.max()) > 1
    if tokens is not None:
        return check_tokens(distiller, example, tokens, teacher_tokens, pack=pack)
    if model is None or not compares:
        return None
    widths = _widths(distiller, model, example)
    return min(widths) if widths[0] != widths[1] else None


def tokens_of(processing: Any, where: str) -> Tokens | None:
    """What a trainer was given for texts, as a tokenizer; ``None`` where it is none that tells its rules."""
    if isinstance(processing, Tokens):
        return processing
    processing = getattr(processing, "tokenizer", processing)  # of a processor of several kinds of data
    return load_tokens(processing, where=where) if getattr(processing, "is_fast", False) else None


def check_marks(raw: Mapping[str, Any], batch: Batch) -> None:
    """Raise where rows are said to be packs, and nothing tells the models where a document begins.

    Raises:
        DataError: Positions do not begin anew.
    """
    marks = [name for name in _MARKS if name in raw]
    document = batch.extras.get("document")
    if marks and (document is None or int(document.max()) < 2):
        raise DataError(
            "these rows are packs of several documents, and no positions tell where one begins",
            where=", ".join(marks),
            found="no position_ids" if document is None else "position_ids that run on",
            wanted="position_ids that begin anew with each document",
            remedy="use transformers.DataCollatorWithFlattening, or limbeck.data.language with pack: true",
        )


def _check_masks(distiller: Distiller, example: Batch) -> None:
    blind = [name for name, o, _ in distiller.loss.items() if not o.contract.mask]
    if example.mask is not None and blind:
        raise ConfigError(
            "this objective knows no mask, and would count padding and prompts",
            where=f"loss.{blind[0]}",
            found="labels of single tokens",
            remedy="limbeck show NAME says whether a method is made for tokens",
        )


def _check_classes(student: nn.Module, teacher: nn.Module | None) -> None:
    """Classes of one name have to have one number."""
    own, other = (getattr(getattr(core_of(m), "config", None), "label2id", None) or {} for m in (student, teacher))
    if own.keys() == other.keys() and own != other:
        odd = next(name for name in own if own[name] != other[name])
        raise DataError(
            "teacher and student number their classes differently",
            where="config.label2id",
            found=f"{odd!r} is {own[odd]} of the student, {other[odd]} of the teacher",
            remedy="make the student with the teacher's id2label and label2id, and map the labels",
        )


def _check_reading(example: Batch, tokens: Tokens, teacher_tokens: Tokens | None, teacher: nn.Module | None) -> None:
    """Where logits are of classes, the teacher must still know the ids that it reads."""
    if example.teacher_inputs is not None and "input_ids" in example.teacher_inputs:
        return
    refuse_other(compare_vocabularies(tokens, teacher_tokens))
    table = getattr(getattr(core_of(teacher), "get_input_embeddings", lambda: None)(), "weight", None)
    if table is not None and len(table) < tokens.size:
        raise _unknown(f"{len(table)} ids of the teacher", f"{tokens.size} of {tokens.name}")


def _check_widths(distiller: Distiller, teacher: nn.Module, example: Batch, tokens: Tokens | None) -> None:
    """Without the teacher's tokenizer only the models' sizes tell whether it can be the student's."""
    widths = _widths(distiller, teacher, example)
    size = min(widths) if tokens is None else tokens.size
    if widths[0] == widths[1]:
        return
    if max(widths) > _PADDED * size + _ROUND or (tokens is None and min(widths) <= int(_ids(example).max())):
        raise _unknown(f"{widths[0]} logits of the student, {widths[1]} of the teacher", f"about {size} of both")


def _widths(distiller: Distiller, teacher: nn.Module, example: Batch) -> tuple[int, int]:
    own = width_of(distiller.student, example.inputs, distiller._logits)
    judge = distiller.teacher
    return own, width_of(teacher, teacher_inputs(example), judge.where if isinstance(judge, FrozenTeacher) else None)


def _ids(example: Batch) -> Any:
    return example.inputs["input_ids"]


def _unknown(found: str, wanted: str) -> DataError:
    return DataError(
        "these models cannot have one vocabulary",
        where="teacher",
        found=found,
        wanted=wanted,
        remedy="give teacher_processing_class, the teacher's tokenizer, to be told which methods can cope",
    )
