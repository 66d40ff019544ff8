"""Top-scaled distillation (TopKD): the teacher's foremost logits are raised, and directions matched by group."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import unit
from limbeck.core.trace import Trace
from limbeck.objectives.parts.contrast import crd_loss


def topkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    k: int | None = None,
    alpha: float = 2.0,
    beta: float = 1.0,
    tau: float = 0.1,
    scale: float = 1.0,
    delta: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cosine distance to scaled teacher logits, in three groups of classes, plus contrast within the batch.

    .. math::
        L_i &= 1 - \alpha \cos(z^S_P, z'_P) - \beta \cos(z^S_N, z'_N) - \cos(z^S_R, z'_R)
            + \tfrac 1 2 \left( \ell(z^S_i, z^T) + \ell(z^T_i, z^S) \right) \\
        \ell(a_i, b) &= -\log \frac{e^{\cos(a_i, b_i) / \tau}}{\sum_j e^{\cos(a_i, b_j) / \tau}}

    :math:`z'` is ``scale_top`` of the teacher's logits; of it, P are the k largest, N the k smallest, R the rest. The
    contrast runs over all places of the batch that count, so memory grows with their square. The loss may be negative.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        k: Size of the two outer groups; by default 5, or half the classes where there are fewer than 10.
        alpha, beta: Weights of the largest and of the smallest.
        tau, scale, delta: Temperature of the contrast, and what ``scale_top`` takes.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, or shapes that differ.
        ConfigError: ``tau`` not above zero, or fewer than 2 k classes.

    Source:
        Wang and Zhou, "TopKD: Top-scaled Knowledge Distillation", 2025, arXiv 2508.04539.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, -1.0, -2.0]])
        >>> topkd_loss(logits, logits, torch.tensor([0]), k=1, scale=0.0, delta=0.0)
        tensor(-3.)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(tau, "tau")
    classes = student_logits.shape[-1]
    k = min(5, classes // 2) if k is None else k
    if not 0 < 2 * k <= classes:
        raise ConfigError("the largest and the smallest must not overlap", where="k", found=k, wanted=f"<= {classes}/2")
    _, counts = class_labels(labels, classes, "TopKD")
    counts = counts if mask is None else counts & fit_mask(mask, student_logits[..., 0])
    student, teacher = widen(student_logits), widen(teacher_logits.detach())

    scaled = scale_top(teacher, labels, k=k, scale=scale, delta=delta)
    order = scaled.argsort(dim=-1, descending=True, stable=True)
    groups = (z.gather(-1, order).split([k, classes - 2 * k, k], dim=-1) for z in (student, scaled))
    largest, rest, smallest = ((unit(a) * unit(b)).sum(dim=-1) for a, b in zip(*groups, strict=True))
    values = 1 - alpha * largest - beta * smallest - rest

    rows = student.flatten(0, -2), teacher.flatten(0, -2)
    contrast = crd_loss(*rows, temperature=tau, mask=counts.flatten(), reduction="none").reshape(counts.shape)
    return reduce(values + contrast / 2, counts, reduction)


def scale_top(teacher_logits: Tensor, labels: Tensor | None, k: int, scale: float = 1.0, delta: float = 0.1) -> Tensor:
    r"""The top-k scaling module: a teacher's k largest logits and that of the label, raised; the others as they are.

    .. math:: z'_i = z_0 + w_i (z_i - z_0) + \Delta, \qquad w_i = 1 + s (1 - r_i / k), \qquad
        \Delta = \delta \left( \overline{z}_\mathrm{top} - \overline{z}_\mathrm{rest} \right)

    with :math:`z_0` the smallest logit and :math:`r_i` the rank, from 0; the label has rank 0 whatever the teacher says
    of it. May stand before any other response loss.

    >>> scale_top(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1]), k=1, delta=0.0)
    tensor([[4., 2., 0.]])
    """
    teacher, target = widen(teacher_logits), class_labels(labels, teacher_logits.shape[-1], "TopKD")[0].unsqueeze(-1)
    values, top = teacher.topk(k, dim=-1)
    by_rank = 1 + scale * (1 - torch.arange(k, dtype=teacher.dtype, device=teacher.device) / k)
    weight = torch.zeros_like(teacher).scatter(-1, top, by_rank.expand_as(values)).scatter(-1, target, 1 + scale)
    least = teacher.amin(dim=-1, keepdim=True)
    rest = teacher.scatter(-1, top, 0.0).sum(dim=-1, keepdim=True) / max(teacher.shape[-1] - k, 1)
    raised = least + weight * (teacher - least) + delta * (values.mean(dim=-1, keepdim=True) - rest)
    return torch.where(weight > 0, raised, teacher)


@register(
    Card(
        key="topkd",
        name="TopKD",
        title="TopKD: Top-scaled Knowledge Distillation",
        year=2025,
        arxiv="2508.04539",
        knowledge="response",
        equation=r"1 - \alpha \cos(z^S_P, z'_P) - \beta \cos(z^S_N, z'_N) - \cos(z^S_R, z'_R) + L_\mathrm{contrast}",
        use="With many classes: it compares directions of logits by group, and tells samples of the batch apart.",
        defaults={
            "k": "5; the paper finds 3, 5 and 10 best, and 50 of 100 much worse",
            **dict.fromkeys(("alpha", "beta", "tau"), "a choice: what was read gives no number"),
        },
        evidence="reading",
        choices=(
            "The weights fall with the rank on a straight line; the paper only says that they depend on it.",
            "Heights are measured from the smallest logit, since a weight above 1 would lower a negative logit.",
            "A label the teacher does not put first has the weight of the first. Logits are not centred.",
            "The contrast compares directions: rows have length 1. Cross-entropy stands beside the loss.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
    ),
    topkd_loss,
)
class TopKD(Objective):
    """Top-scaled distillation; see ``limbeck.functional.topkd_loss``.

    >>> loss = TopKD(k=3)
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, decomposes=False)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, k: int | None = None, alpha: float = 2.0, beta: float = 1.0, tau: float = 0.1) -> None:
        super().__init__()
        check_positive(tau, "tau")
        self.k, self.alpha, self.beta, self.tau = k, alpha, beta, tau

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("k", "alpha", "beta", "tau")}
        return topkd_loss(student.logits, teacher.logits, batch.require("labels"), mask=batch.mask, **options)
