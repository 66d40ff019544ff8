"""NormKD: every sample has its own temperature, in proportion to the spread of its logits."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import deviation, kl_rows, soften, standardise
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce
from limbeck.core.trace import Trace


def normkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD at temperatures that follow the deviation of the logits, sample by sample.

    .. math::
        L = \tau_T^2\, \mathrm{KL}\big(\mathrm{softmax}(z^T / \tau_T) \,\|\, \mathrm{softmax}(z^S / \tau_S)\big),
        \qquad \tau = T \sigma(z)

    Teacher and student each have their own :math:`\sigma`, over the classes, unbiased. Since :math:`\tau_T^2` weighs
    each place, samples on which the teacher's logits spread widely count most. Logits that do not vary pass no
    gradient.

    Args:
        student_logits: ``[B, *, C]``; the gradient runs through the deviation.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: T, how many deviations make a temperature; 2 in the authors' code, 1 for ImageNet.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: A temperature that is not above zero.

    Source:
        Chi et al., "NormKD: Normalized Logits for Knowledge Distillation", 2023, arXiv 2308.00520.

    Example:
        >>> import torch
        >>> normkd_loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 5.0, 1.0]]))
        tensor(20.4900)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    teacher_logits = teacher_logits.detach()
    # A softmax does not see the mean that standardising takes away.
    student, teacher = (soften(standardise(z), temperature) for z in (student_logits, teacher_logits))
    weight = (temperature * deviation(teacher_logits).squeeze(-1)).square()
    return reduce(weight * kl_rows(teacher, student), mask, reduction)


@register(
    Card(
        key="normkd",
        name="NormKD",
        title="NormKD: Normalized Logits for Knowledge Distillation",
        year=2023,
        arxiv="2308.00520",
        code="gizi1/NormKD",
        knowledge="response",
        equation=r"\tau_t^2\,\mathrm{KL}(\mathrm{softmax}(z_t/\tau_t)\,\|\,\mathrm{softmax}(z_s/\tau_s)), \quad "
        r"\tau = T \sigma(z)",
        use="In place of KD where one temperature does not suit all samples. Logit standardisation is the same without "
        "the weight by sample.",
        defaults={"temperature": "2, as in the authors' code for CIFAR-100; 1 for ImageNet"},
        evidence="parity",
        evidence_note="value and gradient of gizi1/NormKD@279371b (kd_loss_normal)",
        choices=("Logits that do not vary at all pass no gradient; in the released code they make it NaN.",),
        with_labels={"cross_entropy": 0.1},
        weight=0.9,
    ),
    normkd_loss,
)
class NormKD(Objective):
    """KD at temperatures that follow the deviation of the logits; see ``limbeck.functional.normkd_loss``.

    Args:
        temperature: How many deviations make a temperature.

    >>> loss = 0.9 * NormKD(temperature=1.0)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared")
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return normkd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=batch.mask)
