"""MIX-KD: part of each batch is mixed up, and logits are divided by their deviation instead of a temperature."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import cross_entropy_rows, kl_rows, soften, standardise
from limbeck.core.errors import TensorError
from limbeck.core.labels import soft_labels
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_inside, check_logits, check_positive, reduce
from limbeck.core.trace import Trace
from limbeck.objectives.parts.mixup import check_mixable, partial_mixup


def mixkd_std_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.9,
    gamma: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Labels and teacher against the student's logits, each divided by its standard deviation over the classes.

    .. math::
        L = -\gamma \sum_c y_c \log q_c + \alpha\, \mathrm{KL}(p \| q), \qquad
        p = \mathrm{softmax}(z^T / \sigma(z^T)),\ q = \mathrm{softmax}(z^S / \sigma(z^S))

    Neither part sees the size of the logits, and there is no temperature. The gradient runs through the student's
    deviation (unbiased); logits that do not vary pass none.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Soft labels ``[B, *, C]``, or integers ``[B, *]``; a negative one leaves a place without its first part.
        alpha: :math:`\alpha`; 0.9 in the authors' code.
        gamma: :math:`\gamma`; 0.1 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, or shapes and dtypes that do not fit.

    Source:
        Choi et al., "Understanding the Role of Mixup in Knowledge Distillation", 2022, arXiv 2211.03946.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 5.0, 1.0]])
        >>> mixkd_std_loss(student, teacher, torch.tensor([[0.3, 0.0, 0.7]]))
        tensor(1.1361)
    """
    check_logits(student_logits, teacher_logits, labels)
    if labels is None:
        raise TensorError("MIX-KD needs labels", where="labels", found="none", wanted="integers or soft labels")
    log_p, log_q = (soften(standardise(z)) for z in (teacher_logits.detach(), student_logits))
    shares = soft_labels(labels, log_q.shape[-1]).to(log_q.dtype)
    return reduce(gamma * cross_entropy_rows(shares, log_q) + alpha * kl_rows(log_p, log_q), mask, reduction)


@register(
    Card(
        key="mixkd_std",
        name="MIX-KD",
        title="Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study",
        year=2023,
        arxiv="2211.03946",
        code="hchoi71/MIX-KD",
        knowledge="response",
        equation=r"-\gamma \sum_c y_c \log q_c + \alpha\, \mathrm{KL}(p \| q), \quad "
        r"p = \mathrm{softmax}(z / \sigma(z))",
        use="For images where the temperature is not to be tuned: mixing smooths what the student learns. Take a "
        "teacher that was trained without mixup. It holds the labels itself, so nothing is added; the size of the "
        "student's logits is left open, so calibrate it afterwards.",
        defaults={
            "alpha": "0.9, as in the authors' code",
            "gamma": "0.1, as in the authors' code",
            "clean": "0.9, as in the authors' code: a tenth of the batch is mixed",
            "beta": "1, as in the authors' code; 0.2 and 0.4 were tried",
        },
        evidence="parity",
        evidence_note="value and gradient of hchoi71/MIX-KD@6e8c149 (MIXSTDLoss)",
        choices=(
            "Exactly the share clean stays as it is; the released code draws which with repetition, and mixes more.",
            "A sample keeps its place and is mixed with a random other; the released code shuffles both sides.",
            "Nothing is mixed in evaluation, nor before set-up, which tells the number of classes.",
        ),
        needs=("labels",),
    ),
    mixkd_std_loss,
)
class MixKDStd(Objective):
    """Partial mixup and KD of logits divided by their deviation; see ``limbeck.functional.mixkd_std_loss``.

    Mixed labels are soft, and other losses beside it see the mixed batch too.

    Args:
        alpha: Weight of the teacher.
        gamma: Weight of the labels.
        clean: The share of each batch that is not mixed.
        beta: Of the Beta distribution that shares are drawn from.

    >>> loss = MixKDStd(clean=0.5)
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, alpha: float = 0.9, gamma: float = 0.1, clean: float = 0.9, beta: float = 1.0) -> None:
        super().__init__()
        check_positive(beta, "beta")
        check_inside(clean, "clean", closed=True)
        self.alpha, self.gamma, self.clean, self.beta = alpha, gamma, clean, beta
        self.classes: int | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        check_mixable(batch.inputs, "batch.inputs")
        self.classes = student.logits.shape[-1]

    def prepare(self, batch: Batch) -> Batch:
        if self.classes is None or not self.training:
            return batch
        return partial_mixup(batch, self.classes, clean=self.clean, beta=self.beta)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        labels = batch.require("labels")
        return mixkd_std_loss(
            student.logits, teacher.logits, labels, alpha=self.alpha, gamma=self.gamma, mask=batch.mask
        )
