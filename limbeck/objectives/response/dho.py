"""DHO: labels and teacher each teach a classifier of their own, on one shared feature."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, softened_divergence
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive
from limbeck.core.trace import Trace


def dho_loss(
    kd_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""What the teacher's head of the student learns: KD, on all samples, labelled or not.

    .. math:: L_{kd} = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_{kd} / T)\big), \qquad
        L = \lambda \, \mathrm{CE}(z_{ce}, y) + (1 - \lambda) L_{kd}

    The labels' part is a term of its own, ``cross_entropy``: in training the student's output is :math:`z_{ce}`.

    Args:
        kd_logits: :math:`z_{kd}`, ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; carries no gradient.
        labels: Not used.
        temperature: T. Default 2, as in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a position counts.
        reduction: ``"mean"`` over counted positions, ``"sum"`` or ``"none"``.

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: The temperature is not above zero.

    Source:
        Kang et al., "Simple Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head
        Optimization", 2025, arXiv 2505.07675, equations 3 and 4.

    Example:
        >>> import torch
        >>> dho_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=1.0)
        tensor(1.5232)
    """
    return softened_divergence(
        kl_rows, kd_logits, teacher_logits, labels, temperature=temperature, mask=mask, reduction=reduction
    )


@register(
    Card(
        key="dho",
        name="DHO",
        title="Simple Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head Optimization",
        year=2025,
        arxiv="2505.07675",
        code="erjui/DHO",
        knowledge="response",
        equation=r"\lambda\,\mathrm{CE}(z_{ce}, y) + "
        r"(1 - \lambda)\,T^2\,\mathrm{KL}(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(z_{kd}/T))",
        use="When labels and teacher disagree, or few samples have labels: the two no longer pull at one classifier. "
        "Samples without a label (-1) teach the other head all the same. The student ships both heads.",
        defaults={"temperature": "2, as in the authors' code"},
        evidence="parity",
        evidence_note="loss and gradients of one step of erjui/DHO@846de75, its prediction, and its search for alpha "
        "and beta",
        choices=(
            "One mean over all samples, where the code adds the means over labelled and unlabelled ones: with as many "
            "of each its sum is `{cross_entropy: 0.5, dho: 1.0}`; with labels for all `dho: 0.5`, the usual sum here.",
            "Both heads are plain linear layers; the paper's scaled cosine heads belong to students that are CLIP's.",
            "Alpha and beta are chosen after training, on validation data that nothing is reported on; the paper "
            "chooses them anew in every epoch, and by them the epoch. Without such data they are 0.5 and 0.5, the "
            "values of its ImageNet runs.",
        ),
        with_labels={"cross_entropy": 0.5},
        weight=0.5,
        head="dual",
    ),
    dho_loss,
)
class DHO(Objective):
    """KD of a head beside that of the labels; see ``limbeck.functional.dho_loss``.

    The student has the head ``dual`` (``limbeck.models.put_head``), which recipes, comparisons and ``limbeck.distill``
    put on by themselves.

    Args:
        temperature: T.

    >>> from limbeck.objectives import CrossEntropy
    >>> loss = 0.5 * CrossEntropy() + 0.5 * DHO()
    """

    # A twin of the student has the mixture of both heads for logits, so no value goes with equality.
    contract = Contract(normalizer="positions", at_equal=None, mask=True, temperature="squared", spare_class=True)
    student_taps = ("head.kd",)
    teacher_taps = ("logits",)

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return dho_loss(student["head.kd"], teacher.logits, temperature=self.temperature, mask=batch.mask)
