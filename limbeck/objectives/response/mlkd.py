"""Multi-level logit distillation (MLKD): predictions, and how samples and classes go together, at several T."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce
from limbeck.core.trace import Trace

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


@without_autocast
def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperatures: list[float] | tuple[float, ...] = TEMPERATURES,
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD, and the squared distance of the predictions' Gram matrices, summed over temperatures.

    .. math::
        L = \sum_T \left( \frac{w_i}{N} \sum_n T^2\, \mathrm{KL}(P^T_n \| P^S_n)
        + \frac{w_b}{N} \left\| P^T P^{T\top} - P^S P^{S\top} \right\|_F^2
        + \frac{w_c}{C} \left\| P^{T\top} P^T - P^{S\top} P^S \right\|_F^2 \right), \qquad
        P = \mathrm{softmax}(z / T) \in \mathbb{R}^{N \times C}

    The second part says which samples the teacher finds alike, the third which classes occur together. The ``N`` rows
    are all places that count, so memory grows with :math:`N^2 + C^2`; a weight of 0 leaves a part out. The third part
    is not divided by N: its size grows with the square of the batch, as in the authors' code.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperatures: 2 to 6 in the authors' code.
        instance_weight, batch_weight, class_weight: :math:`w_i, w_b, w_c`; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places; ``"sum"``, the mean times the count; ``"none"``, ``[B, *]``, each
            place with its row of the second part and the whole third part, so that their mean is the loss.

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: No temperature, or one that is not above zero.

    Source:
        Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023.

    Example:
        >>> import torch
        >>> mlkd_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]]))
        tensor(5.3064)
    """
    check_logits(student_logits, teacher_logits, labels)
    _check(temperatures)
    places, classes = student_logits.shape[:-1], student_logits.shape[-1]
    counts = None if mask is None else fit_mask(mask, student_logits[..., 0]).unsqueeze(-1)
    total = student_logits.new_zeros(()).to(soften(student_logits[:0]).dtype)
    for temperature in temperatures:
        log_p, log_q = (soften(z, temperature) for z in (teacher_logits.detach(), student_logits))
        if instance_weight:
            total = total + instance_weight * temperature**2 * kl_rows(log_p, log_q)
        # A place that does not count is a row of zeros, which no entry of either matrix sees.
        p, q = (x.exp() if counts is None else x.exp().masked_fill(~counts, 0.0) for x in (log_p, log_q))
        p, q = p.reshape(-1, classes), q.reshape(-1, classes)
        if batch_weight:
            total = total + batch_weight * (p @ p.T - q @ q.T).square().sum(dim=1).reshape(places)
        if class_weight:
            total = total + class_weight * (p.T @ p - q.T @ q).square().sum() / classes
    return reduce(total.expand(places), mask, reduction)


def _check(temperatures: list[float] | tuple[float, ...]) -> None:
    if not temperatures:
        raise ConfigError("wants one temperature or more", where="temperatures", found=list(temperatures))
    for temperature in temperatures:
        check_positive(temperature, "temperatures")


@register(
    Card(
        key="mlkd",
        name="MLKD",
        title="Multi-Level Logit Distillation",
        year=2023,
        code="Jin-Ying/Multi-Level-Logit-Distillation",
        knowledge="response",
        equation=r"\sum_T T^2\, \mathrm{KL}(P^T \| P^S) + \frac 1 N \| P^T P^{T\top} - P^S P^{S\top} \|_F^2 "
        r"+ \frac 1 C \| P^{T\top} P^T - P^{S\top} P^S \|_F^2",
        use="Where KD leaves something on the table and only logits are at hand: several temperatures at once, and "
        "relations of samples and classes. Wants batches in which classes repeat.",
        defaults={"temperatures": "2, 3, 4, 5 and 6, as in the authors' code"},
        evidence="parity",
        evidence_note="value and gradient of Jin-Ying/Multi-Level-Logit-Distillation@5ee473f (kd_loss, bc_loss and "
        "cc_loss, summed over the temperatures)",
        choices=(
            "One view of each sample: the authors train on a weak and a strong one, twice the cost. With views stacked "
            "into one batch (limbeck.core.views) the loss takes both, and relates them.",
            "All samples and classes count alike. The released code has masks of low confidence, but multiplies them "
            "with losses that are numbers already, so that they only halve the weak view's.",
            "The weights 0.1 and 0.9 are the defaults of the released configuration.",
        ),
        with_labels={"cross_entropy": 0.1},
        weight=0.9,
    ),
    mlkd_loss,
)
class MLKD(Objective):
    """Multi-level logit distillation; see ``limbeck.functional.mlkd_loss``.

    Args:
        temperatures: 2 to 6 by default.
        instance_weight: Weight of the predictions themselves; 1, as in the paper.
        batch_weight: Weight of the samples' Gram matrix; 1, as in the paper.
        class_weight: Weight of the classes' Gram matrix; 1, as in the paper.

    >>> loss = 0.9 * MLKD(temperatures=[2.0, 4.0])
    """

    contract = Contract(normalizer="positions", mask=True, decomposes=False)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self,
        temperatures: list[float] | None = None,
        instance_weight: float = 1.0,
        batch_weight: float = 1.0,
        class_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperatures = list(TEMPERATURES) if temperatures is None else temperatures
        _check(self.temperatures)
        self.instance_weight, self.batch_weight, self.class_weight = instance_weight, batch_weight, class_weight

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("temperatures", "instance_weight", "batch_weight", "class_weight")}
        return mlkd_loss(student.logits, teacher.logits, mask=batch.mask, **options)
