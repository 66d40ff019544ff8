"""Everything worth knowing about a trained student, beside its teacher, from one pass over the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.analysis.calibration import Calibration
from limbeck.analysis.fidelity import Fidelity
from limbeck.analysis.layers import Ear, Layers
from limbeck.analysis.multilabel import MultiLabel
from limbeck.analysis.per_class import PerClass
from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.core.survey import dry
from limbeck.core.teacher import FrozenTeacher, Teacher, as_teacher, teacher_inputs
from limbeck.core.trace import Trace
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.tokens import Tokens
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.engine.metrics import Metrics, judged
from limbeck.models import describe

_MOST_CLASSES = 1000  # above it a table by class is neither read nor cheap


def assess(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    loader: Loader,
    *,
    taps: Sequence[str] | None = None,
    latency: bool = True,
    bins: int = 15,
    cka_samples: int = 2048,
    logits: str | None = None,
    teacher_logits: str | None = None,
    said: Tensor | None = None,
) -> dict[str, Any]:
    """What a student can do, what it costs, and how much of its teacher is in it.

    One pass over the data in evaluation mode; each model sees each batch once. Memory is that of a batch: nothing is
    kept but sums. Both models' modes are as before afterwards, and no random state is touched.

    ====================================  ==============================================================================
    key                                   holds
    ====================================  ==============================================================================
    ``samples``, ``places``, ``classes``  of the data; places are samples, or tokens or pixels that count
    ``accuracy``, ``nll``, ``brier``,     of the student, against the labels; absent where there are none
    ``ece``, ``reliability``
    ``per_class``                         ``accuracy`` and ``support`` by class, and ``names`` where known; absent above
                                          1000 classes
    ``parameters``, ``flops``,            of the student; operations and time of one forward of one sample
    ``latency_ms``
    ``teacher``                           the same of the teacher, or ``None``
    ``agreement``, ``kl``, ``js``         of student and teacher; absent without a teacher, of regression, and where the
                                          two have different tokens
    ``perplexity``, ``acceptance``        of language: ``exp(nll)``; see :func:`~limbeck.analysis.fidelity.acceptance`
    ``bits_per_byte``                     of language: what a byte of the predicted text costs, whatever its tokens are;
                                          by it models of different tokenizers are compared
    ``cka``                               ``student`` and ``teacher`` name layers, ``matrix[i][j]`` compares the i-th
                                          with the j-th; ``samples`` entered. ``None`` where the teacher is no module
    ====================================  ==============================================================================

    Of multi-label data (``loader.task``) ``map_macro``, ``map_micro``, ``f1_macro``, ``f1_micro`` and ``hamming`` stand
    in the place of ``accuracy``, ``average_precision`` in that of the accuracy by class, and all else is of yes or no
    for each class; every prediction is kept for the average precision. Of regression there are ``mse`` and ``mae``.

    Args:
        student: The trained model.
        teacher: Its teacher, or ``None``.
        loader: Of held-out data. One that can shuffle is shuffled: CKA wants minibatches of mixed classes.
        taps: What CKA compares. Default: the stages and the penultimate feature, or the blocks where a model has fewer
            than two stages.
        latency: Measure time and operations.
        bins: Of the reliability diagram.
        cka_samples: At most so many samples enter CKA. 0: none.
        logits: Where logits stand in the student's output (see ``logits_of``).
        teacher_logits: The same for a teacher given as a module.
        said: The teacher's logits by sample id, where they are known: it then runs for CKA only.

    Returns:
        Plain values that JSON can hold.

    Raises:
        DataError: There is no data.
        TapError: A tap in ``taps`` names no place.

    Example:
        >>> from limbeck.data import ResidentLoader
        >>> loader = ResidentLoader(torch.randn(40, 4), torch.arange(40) % 3, batch_size=20)
        >>> facts = assess(nn.Linear(4, 3), nn.Linear(4, 3), loader)
        >>> facts["samples"], facts["parameters"], facts["cka"]["student"]
        (40, 15, ['penultimate'])
    """
    if isinstance(loader, IndexedLoader) and not (loader.shuffle and not loader.drop_last):
        loader = copy.copy(loader)
        loader.shuffle, loader.drop_last = True, False
    example = loader.example(1)
    teaching, where = (
        (teacher.model, teacher.where) if isinstance(teacher, FrozenTeacher) else (teacher, teacher_logits)
    )
    with ExitStack() as stack:
        stack.enter_context(dry(student))
        own = Ear(student, logits, lambda batch: batch.inputs)
        stack.callback(own.close)
        teach: Callable[[Batch], Trace] | None = None
        layers = None
        if isinstance(teaching, nn.Module):  # with a listener of our own: the one a frozen teacher has may be in use
            stack.enter_context(dry(teaching))
            teach = other = Ear(teaching, where, teacher_inputs)
            stack.callback(other.close)
            layers = Layers(own, other, taps, example) if cka_samples > 0 else None
        elif teaching is not None:
            teach = as_teacher(teaching)
            teach.attach(("logits",), example)
        facts = _walk(own, teach, loader, layers, cka_samples, bins, said)
    facts.update(_cost(student, example.inputs, latency))
    if isinstance(teaching, nn.Module):
        facts["teacher"].update(_cost(teaching, teacher_inputs(example), latency))
    return _plain(facts)


def _plain(value: Any) -> Any:
    """What JSON can hold: a number that is none, such as a divergence from a certain teacher, becomes ``None``."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _walk(
    own: Ear,
    teach: Callable[[Batch], Trace] | None,
    loader: Loader,
    layers: Layers | None,
    cka_samples: int,
    bins: int,
    said: Tensor | None,
) -> dict[str, Any]:
    kind: Callable[[int, Loader], Any] = {"multilabel": MultiLabel, "regression": _Errors}.get(loader.task, _Scores)
    scores, teacher_scores, fidelity = kind(bins, loader), kind(bins, loader), Fidelity(loader.task)
    if isinstance(loader, LanguageLoader):
        scores.tokens, teacher_scores.tokens = loader.tokenizers
    samples = places = classes = 0
    for batch in loader.batches():
        student = own(batch)
        teacher = None
        if teach is not None:
            listening = layers is not None and layers.cka.samples < cka_samples
            known = said is not None and batch.index is not None and not listening
            teacher = Trace(None, {"logits": _of(said, batch, student.logits)}) if known else teach(batch)
        counted, labelled = _places(student.logits, batch)
        scores.update(student.logits, batch, labelled)
        if teacher is not None and "teacher_labels" in batch.extras:  # other tokens: nothing to hold side by side
            own_tokens = batch.replace(labels=batch.extras["teacher_labels"], mask=batch.extras["teacher_mask"])
            teacher_scores.update(teacher.logits, own_tokens, _places(teacher.logits, own_tokens)[1])
        elif teacher is not None:
            teacher_scores.update(teacher.logits, batch, labelled)
            fidelity.update(*_common(student.logits[counted], teacher.logits[counted], loader.task))
        if layers is not None and teacher is not None and layers.cka.samples < cka_samples:
            layers.update(student, teacher, batch)
            if layers.cka.samples >= cka_samples:
                layers.rest()
        samples, places, classes = samples + batch.size, places + int(counted.sum()), student.logits.shape[-1]
    if not places:
        raise DataError("there is nothing to assess a student on", where="loader", found=f"{samples} samples")
    facts: dict[str, Any] = {"samples": samples, "places": places, "classes": classes}
    facts.update(scores.compute())
    facts["teacher"] = None if teach is None else teacher_scores.compute()
    if teach is not None and fidelity.places:
        facts.update(fidelity.compute())
    facts["cka"] = None if layers is None else layers.compute()
    return facts


def _common(student: Tensor, teacher: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Logits that both have: language models may be wider than their tokenizer, and not by the same."""
    size = min(student.shape[-1], teacher.shape[-1]) if task == "language" else None
    return student[..., :size], teacher[..., :size]


def _of(said: Tensor | None, batch: Batch, like: Tensor) -> Tensor:
    assert said is not None
    return said[batch.require("index").to(said.device)].to(like.device)


def _places(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Which places of ``[B, *]`` count, and which of them have a class as label."""
    counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if batch.mask is not None and batch.mask.shape == counted.shape:
        counted = counted & batch.mask
    labels = batch.labels
    if labels is None or labels.is_floating_point():
        return counted, None
    if labels.shape != counted.shape:
        raise DataError(
            "labels do not belong to these logits",
            where="batch.labels",
            found=list(labels.shape),
            wanted=f"{list(counted.shape)} integers",
        )
    return counted, counted & (labels >= 0)


class _Scores:
    """One model's answers against the labels."""

    def __init__(self, bins: int, loader: Loader) -> None:
        self.calibration, self.names, self.task = Calibration(bins), loader.class_names, loader.task
        self.per_class: PerClass | None = None
        self.tokens: Tokens | None = None  # of texts, whose bytes are then counted
        self.places = self.bytes = 0
        self.seen = False

    def update(self, logits: Tensor, batch: Batch, labelled: Tensor | None) -> None:
        if labelled is None or not bool(labelled.any()):
            return
        assert batch.labels is not None
        if self.tokens is not None:
            own = [row[known].tolist() for row, known in zip(batch.labels.cpu(), labelled.cpu(), strict=True)]
            self.bytes += sum(self.tokens.bytes_in(ids) for ids in own)
        logits, labels = logits[labelled], batch.labels[labelled]
        self.places += len(labels)
        self.calibration.update(logits, labels)
        if logits.shape[-1] <= _MOST_CLASSES and self.task != "language":
            self.per_class = self.per_class or PerClass(logits.shape[-1])
            self.per_class.update(logits, labels)
        self.seen = True

    def compute(self) -> dict[str, Any]:
        if not self.seen:
            return {}
        facts = self.calibration.compute()
        if self.task == "language":
            facts["perplexity"] = math.exp(facts["nll"])
        if self.bytes:
            facts["bits_per_byte"] = facts["nll"] * self.places / math.log(2) / self.bytes
        if self.per_class is not None:
            facts["per_class"] = self.per_class.compute()
            if self.names is not None:
                facts["per_class"]["names"] = list(self.names)
        return facts


class _Errors:
    """One model's predicted numbers against the true ones."""

    def __init__(self, bins: int, loader: Loader) -> None:
        self.metrics: Metrics | None = None

    def update(self, logits: Tensor, batch: Batch, labelled: Tensor | None) -> None:
        if batch.labels is not None:
            guesses, labels = judged(logits, batch, "regression")
            self.metrics = self.metrics or Metrics("regression", guesses.shape[-1], guesses.device, 1)
            self.metrics.update(guesses, labels)

    def compute(self) -> dict[str, Any]:
        return {} if self.metrics is None else self.metrics.compute()


def _cost(model: nn.Module, inputs: Any, latency: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"parameters": describe.parameters(model)}
    if latency:
        facts["flops"] = describe.flops(model, inputs)
        facts["latency_ms"] = describe.latency(model, inputs)
    return facts
