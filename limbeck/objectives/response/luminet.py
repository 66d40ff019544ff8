"""LumiNet: logits as they stand out among the batch, class by class, are what is compared."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften, standardise
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce
from limbeck.core.schedules import WarmUp
from limbeck.core.trace import Trace


def luminet_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between predictions made from logits that are standardised over the batch.

    .. math::
        L = \mathrm{KL}\big(\mathrm{softmax}(h^T / \tau) \,\|\, \mathrm{softmax}(h^S / \tau)\big), \qquad
        h_{b,c} = \frac{z_{b,c} - \mu_c}{\sqrt{v_c + \epsilon}}

    Mean and (biased) variance are taken of each class over the rows of the batch: all places that count. So a sample is
    told by how it differs from the others, and the loss of a batch is not the mean of the losses of its parts. The
    gradient runs through both statistics. A single row gives 0.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: :math:`\tau`; 4 in most of the authors' CIFAR-100 runs.
        eps: :math:`\epsilon`, added to the variance.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts; the others take no part in the statistics.
        reduction: ``"mean"`` over counted places, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: The temperature or ``eps`` is not above zero.

    Source:
        Hossain et al., "LumiNet: The Bright Side of Perceptual Knowledge Distillation", 2023, arXiv 2310.03669.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> luminet_loss(logits, -logits, temperature=1.0)
        tensor(0.4621)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    check_positive(eps, "eps")
    counts = None if mask is None else fit_mask(mask, student_logits[..., 0]).unsqueeze(-1)

    def perception(logits: Tensor) -> Tensor:
        rows = logits.flatten(0, -2)
        counted = None if counts is None else counts.flatten(0, -2)
        return standardise(rows, 0, correction=0, variance_eps=eps, mask=counted).reshape(logits.shape)

    teacher = soften(perception(teacher_logits.detach()), temperature)
    return reduce(kl_rows(teacher, soften(perception(student_logits), temperature)), mask, reduction)


@register(
    Card(
        key="luminet",
        name="LumiNet",
        title="LumiNet: The Bright Side of Perceptual Knowledge Distillation",
        year=2023,
        arxiv="2310.03669",
        code="ismail31416/LumiNet",
        knowledge="response",
        equation=r"\mathrm{KL}(\mathrm{softmax}(h^T / \tau) \,\|\, \mathrm{softmax}(h^S / \tau)), \quad "
        r"h_{b,c} = (z_{b,c} - \mu_c) / \sqrt{v_c + \epsilon}",
        use="Where teacher and student differ in the scale or bias of their logits: every class is rescaled within the "
        "batch. Wants batches of 64 or so, and a large weight.",
        defaults={
            "temperature": "4, as in the authors' CIFAR-100 runs; 8 into MobileNetV2, 0.7 on ImageNet",
            "eps": "1e-5, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of ismail31416/LumiNet@8cf749b",
        choices=(
            "The authors' factor alpha^2 is the weight: 33^2 in their run of ResNet-8x4, beside cross-entropy twice, "
            "with a warm-up over 20 of 240 epochs.",
            "Statistics over all counted places of the batch; on several ranks each has its own, as in the authors' "
            "code.",
        ),
        with_labels={"cross_entropy": 2.0},
        weight=1089.0 * WarmUp(0.083),
    ),
    luminet_loss,
)
class LumiNet(Objective):
    """LumiNet; see ``limbeck.functional.luminet_loss``.

    Args:
        temperature: Of the standardised logits.
        eps: Added to the variance.

    >>> from limbeck.core.schedules import WarmUp
    >>> from limbeck.objectives import CrossEntropy
    >>> loss = 1089.0 * WarmUp(0.083) * LumiNet() + 2.0 * CrossEntropy()
    """

    contract = Contract(normalizer="positions", mask=True, decomposes=False)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 4.0, eps: float = 1e-5) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        check_positive(eps, "eps")
        self.temperature, self.eps = temperature, eps

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return luminet_loss(student.logits, teacher.logits, temperature=self.temperature, eps=self.eps, mask=batch.mask)
