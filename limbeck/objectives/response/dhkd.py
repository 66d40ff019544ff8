"""Dual-head distillation (DHKD): the teacher's logits go to a head of their own, the labels keep the student's."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import binary_kl_rows
from limbeck.core.errors import ConfigError
from limbeck.core.heads import BatchNorm
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape, reduce, widen
from limbeck.core.trace import Trace


def dhkd_loss(
    auxiliary_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    norm: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance of an auxiliary head's logits from the teacher's, class by class (BinaryKL-Norm, BinaryKL).

    .. math::
        L_\mathrm{norm} &= T^2 \sum_c \mathrm{KL}\big(\tfrac 1 2 \,\|\, \sigma((a_c - z^T_c) / T)\big)
            = T^2 \sum_c \log \cosh \frac{a_c - z^T_c}{2 T} \\
        L_\mathrm{binary} &= T^2 \sum_c \mathrm{KL}\big(\sigma(z^T_c / T) \,\|\, \sigma(a_c / T)\big)

    where KL is that of two Bernoulli variables. The gradient of the first is :math:`\frac T 2 \tanh \frac{a - z}{2T}`:
    bounded, and 0 only where logits agree, however sure the teacher is.

    Args:
        auxiliary_logits: ``[B, *, C]``: what the student's second head says.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: :math:`T`; 2 in the authors' runs.
        norm: BinaryKL-Norm, the paper's proposal; else BinaryKL.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: The temperature is not above zero.

    Source:
        Yang et al., "Dual-Head Knowledge Distillation", 2024, arXiv 2411.08937.

    Example:
        >>> dhkd_loss(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2))
        tensor(2.5430)
    """
    check_floating(auxiliary_logits, "auxiliary_logits", least=2)
    check_floating(teacher_logits, "teacher_logits", least=2)
    check_same_shape(auxiliary_logits, teacher_logits, "auxiliary_logits", "teacher_logits")
    check_positive(temperature, "temperature")
    own, teacher = widen(auxiliary_logits), widen(teacher_logits.detach())
    if norm:
        own, teacher = own - teacher, torch.zeros_like(own)
    return temperature**2 * reduce(binary_kl_rows(teacher / temperature, own / temperature), mask, reduction)


@register(
    Card(
        key="dhkd",
        name="DHKD",
        title="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        year=2024,
        arxiv="2411.08937",
        code="penghui-yang/DHKD",
        knowledge="response",
        equation=r"T^2 \sum_c \log \cosh \frac{a_c - z^T_c}{2 T}, \quad a = \mathrm{head}_2(f^S)",
        use="To pass on the whole of the teacher's logits beside the labels: on one head the two spoil each other, on "
        "two they meet in the backbone only. The second head is dropped after training.",
        defaults={
            "head": "nonlinear, as in the authors' CIFAR-100 runs; linear in those on ImageNet",
            "temperature": "2, as in the authors' runs",
            "norm": "BinaryKL-Norm, the paper's proposal",
        },
        evidence="parity",
        evidence_note="value and gradient of penghui-yang/DHKD@7976c69, whose sigmoid is clamped at 1e-8",
        choices=(
            "No gradient alignment: it changes how the gradients of two terms are added over all of the student's "
            "weights, which is the training loop's matter; the authors' ImageNet runs are without it too.",
            "The head normalises by the batch alone: it never runs outside training.",
            "Exact logarithms where the authors' code clamps a saturated sigmoid.",
        ),
        with_labels={"cross_entropy": 1.0},
    ),
    dhkd_loss,
)
class DHKD(Objective):
    """Dual-head distillation; see ``limbeck.functional.dhkd_loss``.

    Args:
        head: The second head: one linear layer, or two with 200 units between them, dropout of 0.1, batch
            normalisation and ReLU.
        temperature: T.
        norm: BinaryKL-Norm, else BinaryKL.
        tap: What the heads read.

    >>> from limbeck.objectives import CrossEntropy
    >>> loss = CrossEntropy() + 0.1 * DHKD(head="linear")  # the authors' ImageNet run
    """

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, permutation=False, least_samples=2)
    teacher_taps = ("logits",)
    auxiliary: nn.Module | None

    def __init__(
        self,
        head: Literal["nonlinear", "linear"] = "nonlinear",
        temperature: float = 2.0,
        norm: bool = True,
        tap: str = "penultimate",
    ) -> None:
        super().__init__()
        if head not in ("nonlinear", "linear"):
            raise ConfigError("no such head", where="head", found=repr(head), wanted="'nonlinear' or 'linear'")
        check_positive(temperature, "temperature")
        self.head, self.temperature, self.norm, self.tap = head, temperature, norm, tap
        self.student_taps, self.auxiliary = (tap,), None
        if head == "linear":  # nothing ties the samples of a batch together
            self.contract = replace(  # type: ignore[misc]
                self.contract, mask=True, decomposes=True, permutation=True, least_samples=1, temperature="squared"
            )

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature, classes = student[self.tap], teacher.logits.shape[-1]
        width = feature.shape[-1]
        layers: list[nn.Module] = [LinearProjector(width, classes)]
        if self.head == "nonlinear":
            rest = nn.Dropout(0.1), BatchNorm(200), nn.ReLU(), nn.Linear(200, classes)
            layers = [LinearProjector(width, 200), *rest]
        self.auxiliary = nn.Sequential(*layers).to(feature.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        feature = student[self.tap]
        check_floating(feature, "student_feature", least=2)
        said = self.ready("auxiliary")(feature.flatten(0, -2)).unflatten(0, feature.shape[:-1])
        return dhkd_loss(said, teacher.logits, temperature=self.temperature, norm=self.norm, mask=batch.mask)
