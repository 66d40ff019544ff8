"""Approximate likelihood matching (ALM): how likely both models find the same pieces of text, whatever their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows
from limbeck.core.errors import TensorError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_floating, check_positive, fit_mask, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.paired_tokens import Chunks, by_sample, chunk_sums, chunks_of

_EPSILON = 1e-6  # keeps a probability of 1 from being certain


def alm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    chunks: Chunks | None = None,
    temperature: float = 100.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between two yes-or-no questions for each chunk of text: is it what comes next?

    .. math:: L = \frac 1 B \sum_b \frac 1 {n_b} \sum_c D\left( p_c^{1 / \tau}, q_c^{1 / \tau} \right), \qquad
        D(p, q) = p \log \frac p q + (1 - p) \log \frac{1 - p}{1 - q}, \qquad q_c = \prod_{t \in c} q_t(y_t)

    A chunk is the shortest text that begins and ends with a token in both tokenizers. With one tokenizer that is each
    token. Nothing is asked of the tokens that are not in the text.

    Args:
        student_logits: ``[B, *, C]``; with chunks ``[B, L, C]``.
        teacher_logits: The same places, any number of classes; with chunks ``[B, L', C']``. Detached.
        labels: Integers ``[B, *]``: the token that each place predicts.
        chunks: Which places tell of which chunk, and what the teacher's predict; without it both have one tokenizer.
        temperature: :math:`\tau`; 100 in the authors' code. The larger, the more do improbable chunks count.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts; a chunk does if all its places do.
        reduction: ``"mean"`` over a sample's chunks, then samples; ``"sum"`` over chunks, or ``"none"`` (``[B, *]``,
            each chunk at its first place).

    Raises:
        TensorError: Shapes that do not fit, or a label that names no class.
        ConfigError: A temperature that is not above zero.

    Source:
        Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2025,
        arXiv 2503.20083.

    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.1, 0.1]]).log()
    >>> alm_loss(student, teacher, torch.tensor([0]), temperature=1.0)
    tensor(0.1927)
    """
    check_floating(student_logits, "student_logits", least=2)
    check_floating(teacher_logits, "teacher_logits", least=2)
    check_positive(temperature, "temperature")
    student, counts = _said(student_logits, labels, "labels")
    if mask is not None:
        counts = counts & fit_mask(mask, student)
    teacher, known = _said(teacher_logits.detach(), labels if chunks is None else chunks.labels, "teacher_labels")
    if chunks is None:
        counts = counts & known
    else:
        student, teacher, counts = chunk_sums(student, counts, teacher, known, chunks)
    # What does not count may be impossible, and then has no gradient.
    pair = [z.masked_fill(~counts, -1.0) / temperature - _EPSILON for z in (teacher, student)]
    values = kl_rows(*(torch.stack([z, (-z.expm1()).log()], dim=-1) for z in pair))
    return by_sample(values, counts, mask) if reduction == "mean" else reduce(values, counts, reduction)


def _said(logits: Tensor, labels: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Log-probability of each place's label, and where there is one."""
    label, labelled = class_labels(labels, logits.shape[-1], "ALM")
    if label.shape != logits.shape[:-1]:
        found, wanted = list(label.shape), list(logits.shape[:-1])
        raise TensorError("labels do not belong to these logits", where=name, found=found, wanted=wanted)
    return widen(logits).log_softmax(dim=-1).gather(-1, label.unsqueeze(-1)).squeeze(-1), labelled


@register(
    Card(
        key="alm",
        name="ALM",
        title="Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
        year=2025,
        arxiv="2503.20083",
        code="bminixhofer/tokenkit",
        knowledge="response",
        equation=r"\frac 1 n \sum_c D\big( p_c^{1/\tau}, q_c^{1/\tau} \big), \quad q_c = \prod_{t \in c} q_t(y_t)",
        use="For a teacher with another tokenizer: what it finds likely of the text at hand, chunk by chunk. Works "
        "alone, too. It says nothing of tokens that are not in the text, so with one tokenizer kd says more.",
        defaults={"temperature": "100, as in the authors' code"},
        evidence="parity",
        evidence_note="gradient of bminixhofer/tokenkit@bcacdef (docs/pytorch_alm_from_scratch.ipynb, in float64), and "
        "value up to the teacher's entropy, which the authors' cross-entropy has and no gradient sees",
        choices=(
            "The shortest chunks, as in the authors' guide to PyTorch; their JAX code joins chunks until the teacher "
            "expects a space with probability 0.1, and multiplies by that probability.",
            "The mean runs over a sample's chunks, then over samples; theirs over all chunks of a batch.",
            "The authors balance it against labels and hidden states by gradients; here each has weight 1.",
        ),
        needs=("labels", "teacher_labels", "chunk"),
        tasks=("language", "cross-tokenizer"),
        with_labels={"cross_entropy": 1.0},
    ),
    alm_loss,
)
class ALM(Objective):
    """Approximate likelihood matching; see ``limbeck.functional.alm_loss``.

    Args:
        temperature: :math:`\\tau`.

    >>> loss = ALM(temperature=10.0)
    """

    contract = Contract(normalizer="samples", mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 100.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        labels, chunks = batch.require("labels"), chunks_of(batch, student.logits, teacher.logits)
        return alm_loss(
            student.logits, teacher.logits, labels, chunks=chunks, temperature=self.temperature, mask=batch.mask
        )
