"""Knowledge distillation from soft targets (Hinton, Vinyals and Dean, 2015)."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce
from limbeck.core.trace import Trace


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of the student's softened prediction from the teacher's.

    .. math:: L = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)

    The factor :math:`T^2` keeps the gradient's size when T changes. The mean runs over samples (or counted
    positions), never over classes: PyTorch's ``batchmean``, not its ``mean``.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; carries no gradient.
        labels: Not used; taken so that all response losses are called alike.
        temperature: T. Default 4, the CRD benchmark's value; the paper tries 1 to 20.
        mask: ``[B, *]`` booleans, True where a position counts.
        reduction: ``"mean"`` over counted positions, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats; ``[B, *]`` with ``reduction="none"``.

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: The temperature is not above zero.

    Source: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    >>> import torch
    >>> kd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=1.0)
    tensor(1.5232)
    """
    check_logits(student_logits, teacher_logits)
    check_positive(temperature, "temperature")
    divergence = kl_rows(soften(teacher_logits.detach(), temperature), soften(student_logits, temperature))
    return temperature**2 * reduce(divergence, mask, reduction)


@register(
    Card(
        key="kd",
        name="KD",
        title="Distilling the Knowledge in a Neural Network",
        year=2015,
        arxiv="1503.02531",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(z_s/T))",
        use="The first thing to try, and the control every other method has to beat: it needs nothing but logits.",
        defaults={"temperature": "4, the value of the CRD benchmark; the paper tries 1 to 20"},
        evidence="parity",
        evidence_note="value and gradient of HobbitLong/RepDistiller@b84f547 and megvii-research/mdistiller@a08d46f; "
        "the paper has no released code",
        choices=("The divergence where the paper writes the cross-entropy: the same gradient, and 0 at equality.",),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 0.1},
        weight=0.9,
    ),
    kd_loss,
)
class KD(Objective):
    """Knowledge distillation from soft targets; see ``limbeck.functional.kd_loss``.

    Args:
        temperature: T.

    >>> loss = 0.1 * KD() + 0.9 * KD(temperature=1.0)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=batch.mask)
