"""Teacher-free distillation (Tf-KD): a virtual teacher, made by hand, that is always right and otherwise undecided."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside, check_logits, check_positive, fit_mask, reduce
from limbeck.core.trace import Trace


def tf_kd_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    correct: float = 0.99,
    temperature: float = 20.0,
    soften_student: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of the student's prediction from a virtual teacher's.

    .. math::
        L = \mathrm{KL}\big(\mathrm{softmax}(p^d / T) \,\|\, \mathrm{softmax}(z^S)\big), \qquad
        p^d_c = \begin{cases} a & c = y \\ (1 - a) / (C - 1) & \text{otherwise} \end{cases}

    The temperature is high, so the virtual teacher is nearly undecided, with the true class a little ahead. With
    ``soften_student`` the student is softened too and the loss multiplied by :math:`T^2`.

    Args:
        student_logits: ``[B, *, C]`` with two classes or more.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        correct: :math:`a`, the share of the true class, above 1 / C; 0.99 in the authors' code.
        temperature: :math:`T`; 20 or more in the paper.
        soften_student: Take the student's prediction at the same temperature, as equation 9 of the paper writes it.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, or fewer than two classes.
        ConfigError: A temperature not above zero, or ``correct`` not between 0 and 1.

    Source:
        Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020, arXiv 1909.11723,
        equation 9.

    Example:
        >>> import torch
        >>> tf_kd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.4096)
    """
    check_logits(student_logits, labels=labels)
    check_positive(temperature, "temperature")
    check_inside(correct, "correct")
    classes = student_logits.shape[-1]
    target, labelled = class_labels(labels, classes, "Tf-KD", others=True)
    student = soften(student_logits, temperature if soften_student else 1.0)
    designed = student.new_full(student.shape, (1 - correct) / (classes - 1)).scatter(-1, target.unsqueeze(-1), correct)
    values = kl_rows(soften(designed, temperature), student) * (temperature**2 if soften_student else 1.0)
    mask = labelled if mask is None else labelled & fit_mask(mask, values)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="tf_kd",
        name="Tf-KD",
        title="Revisiting Knowledge Distillation via Label Smoothing Regularization",
        year=2020,
        arxiv="1909.11723",
        code="yuanli2333/Teacher-free-Knowledge-Distillation",
        knowledge="response",
        equation=r"\mathrm{KL}(\mathrm{softmax}(p^d / T) \,\|\, \mathrm{softmax}(z^S)), \quad p^d_y = a, \quad "
        r"p^d_{c \ne y} = \frac{1 - a}{C - 1}",
        use="Where there is no teacher, and as a control: what KD gains over it comes from knowledge, not from "
        "softening. The paper's other form, self-training, is KD from a copy of the student trained before.",
        defaults={
            "correct": "0.99, as in the authors' code",
            "temperature": "20, as in the authors' run of ResNet-18; others take 10 to 40",
            "soften_student": "no: the authors' numbers come from code that does not, and the paper's text speaks of "
            "softening the designed distribution",
        },
        evidence="parity",
        evidence_note="value and gradient of yuanli2333/Teacher-free-Knowledge-Distillation@d000ab3",
        choices=(
            "The designed probabilities are softened as if they were logits, as in the authors' code: softmax(p / T).",
            "Equation 9 softens the student too, the released code does not; soften_student does, with the T^2 of KD.",
            "The sum over classes; the authors' code takes the mean, and multiplies by 100 for 100 classes.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 0.9},
        weight=0.1,
    ),
    tf_kd_loss,
)
class TfKD(Objective):
    """Teacher-free distillation; see ``limbeck.functional.tf_kd_loss``.

    Args:
        correct: Share of the true class.
        temperature: T.
        soften_student: Take the student's prediction at the same temperature.

    >>> from limbeck.objectives import CrossEntropy
    >>> loss = 0.9 * CrossEntropy() + 0.1 * TfKD()
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    student_taps = ("logits",)

    def __init__(self, correct: float = 0.99, temperature: float = 20.0, soften_student: bool = False) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        check_inside(correct, "correct")
        self.correct, self.temperature, self.soften_student = correct, temperature, soften_student

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return tf_kd_loss(
            student.logits,
            batch.require("labels"),
            correct=self.correct,
            temperature=self.temperature,
            soften_student=self.soften_student,
            mask=batch.mask,
        )
