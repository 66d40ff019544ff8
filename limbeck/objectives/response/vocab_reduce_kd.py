"""Distillation into a smaller vocabulary: tokens that both models have, or the teacher's written in the student's."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, softened_divergence
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_floating, fit_mask, reduce, widen
from limbeck.core.trace import Trace
from limbeck.data.language.translate import Translation, translate
from limbeck.objectives.parts.paired_tokens import Chunks, chunks_of
from limbeck.objectives.parts.vocabularies import Alignment, Combine, check_options, matched_places, written


def vocab_reduce_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    translation: Translation | None = None,
    chunks: Chunks | None = None,
    alignment: Alignment = "reduce_map",
    combine: Combine = "sum",
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL divergence between predictions over two vocabularies, at places and tokens that stand for one another.

    .. math:: L = \frac{T^2} n \sum_i \mathrm{KL}\left( \mathrm{softmax}(z^T_i / T) \,\|\, \mathrm{softmax}(q_i / T)
        \right), \qquad q_{iv} = \sum_{s \in v} \sum_{t \in i} z^S_{ts}

    With ``"reduce_map"`` a place i of the teacher is the sum of the student's places t in which the same text is
    predicted, and a token v of the teacher that of the student's tokens s that it is written with. With ``"reduce"``
    only tokens that both vocabularies have are compared, with ``"match"`` only places too.

    Args:
        student_logits: ``[B, *, C]``; with chunks ``[B, L, C]``.
        teacher_logits: With chunks ``[B, L', C']``; without, of the student's shape. Detached.
        labels: Not used; taken so that all response losses are called alike.
        translation: The teacher's tokens in the student's (``limbeck.data.language.translate``).
        chunks: Which places tell of the same text; without it, and the translation, both have one tokenizer, and this
            is KD.
        alignment: ``"reduce_map"``, ``"reduce"`` or ``"match"``.
        combine: How logits of a token's pieces become its own: ``"sum"``, or ``"logsumexp"``.
        temperature: T; 2 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over the student's counted places, of which those without a partner add 0; ``"sum"``, or
            ``"none"`` (``[B, *]``, each pair at the student's first place).

    Raises:
        TensorError: Shapes that do not fit.
        ConfigError: An option that is not there, or a temperature that is not above zero.

    Source:
        Kolesnikova et al., "Knowledge Distillation of Russian Language Models with Reduction of Vocabulary", 2022,
        arXiv 2205.02340.

    >>> vocab_reduce_kd_loss(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), temperature=1.0)
    tensor(1.5232)
    """
    check_options(alignment, combine, temperature)
    if chunks is None or translation is None:
        logits = student_logits, teacher_logits, labels
        return softened_divergence(kl_rows, *logits, temperature=temperature, mask=mask, reduction=reduction)
    check_floating(student_logits, "student_logits", least=3)
    check_floating(teacher_logits, "teacher_logits", least=3)
    counts = torch.ones_like(chunks.student, dtype=torch.bool)
    counts = counts if mask is None else fit_mask(mask, counts)
    own, other = widen(student_logits), widen(teacher_logits.detach())
    own, other, paired = matched_places(own, other, counts, chunks, translation, single=alignment == "match")
    if alignment == "reduce_map":
        own, other = written(own, translation, combine), other[..., translation.source]
    else:
        own, other = own[..., translation.student], other[..., translation.teacher]
    values = softened_divergence(kl_rows, own, other, temperature=temperature, reduction="none")
    return reduce(values.masked_fill(~paired, 0.0), mask, reduction)


@register(
    Card(
        key="vocab_reduce_kd",
        name="Reduce-Map",
        title="Knowledge Distillation of Russian Language Models with Reduction of Vocabulary",
        year=2022,
        arxiv="2205.02340",
        code="ayeffkay/rubert-tiny",
        knowledge="response",
        equation=r"\frac{T^2} n \sum_i \mathrm{KL}(z^T_i \| q_i),\ q_{iv} = \sum_{s \in v} \sum_{t \in i} z^S_{ts}",
        use="For a student with a smaller vocabulary of the same kind, whose tokens are pieces of the teacher's. "
        "`match` where the two share most tokens, `reduce_map` where they share few.",
        defaults={
            "alignment": "the one that uses all places",
            "combine": "the authors'",
            "temperature": "the authors'",
        },
        evidence="parity",
        evidence_note="value and gradient of ayeffkay/rubert-tiny@c11c5ab (map_step, match_step and ce_step)",
        choices=(
            "For models that predict the next token: a place stands for the token that it predicts.",
            "Places count where one token of the teacher is whole tokens of the student; the authors cut texts by the "
            "teacher's tokenizer first, so that all are.",
            "The mean runs over the student's places; theirs over those compared, which are fewer.",
            "Without their optional losses on hidden states; the weights are theirs.",
        ),
        needs=("chunk", "teacher_labels"),
        tasks=("language", "cross-tokenizer"),
        with_labels={"cross_entropy": 0.5},
        weight=2.0,
    ),
    vocab_reduce_kd_loss,
)
class VocabReduceKD(Objective):
    """KD into a smaller vocabulary; see ``limbeck.functional.vocab_reduce_kd_loss`` for the options.

    >>> loss = VocabReduceKD(alignment="match")
    """

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, alignment: Alignment = "reduce_map", combine: Combine = "sum", temperature: float = 2.0) -> None:
        super().__init__()
        check_options(alignment, combine, temperature)
        self.alignment, self.combine, self.temperature = alignment, combine, temperature
        for name in ("teacher", "student", "source", "pieces"):
            self.register_buffer(f"_{name}", None, persistent=False)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if batch.teacher_inputs is None:
            return
        if data.tokenizers is None:
            remedy = "train with limbeck's engine, or give DataInfo(tokenizers=(student's, teacher's)) to setup"
            raise ConfigError("the tokenizers are not known", where="vocab_reduce_kd", remedy=remedy)
        for name, tensor in vars(translate(*data.tokenizers)).items():
            setattr(self, f"_{name}", tensor.to(student.logits.device))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        chunks, translation = chunks_of(batch, student.logits, teacher.logits), None
        if chunks is not None:
            tables = {n: self.ready(f"_{n}") for n in ("teacher", "student", "source", "pieces")}
            translation = Translation(**tables)
        options = {n: getattr(self, n) for n in ("alignment", "combine", "temperature")}
        logits = student.logits, teacher.logits
        return vocab_reduce_kd_loss(*logits, translation=translation, chunks=chunks, mask=batch.mask, **options)
