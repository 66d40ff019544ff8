"""Class-wise self-distillation (CS-KD): a sample's prediction should look like that of another of its class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import cross_entropy_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce
from limbeck.core.trace import Trace

Partner = Literal["random", "all"]


@without_autocast
def cs_kd_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    partner: Partner = "random",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of a prediction from that of another sample of the same class, which is taken as a constant.

    .. math::
        L = \frac 1 N \sum_i T^2 \, \mathrm{KL}(p_{j(i)} \,\|\, p_i), \qquad p = \mathrm{softmax}(z / T), \quad
        y_{j(i)} = y_i, \quad j(i) \ne i

    The partner :math:`j(i)` is drawn from the batch. A sample that is alone in its class contributes 0. The ``N`` rows
    are all places that count and have a label.

    Args:
        student_logits: ``[B, *, C]``.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        temperature: :math:`T`; 4 in the authors' code.
        partner: ``"random"``: one other of the class, as in the paper; ``"all"``: the mean over all others of the
            class, which is what the draw gives on average.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, or soft labels.
        ConfigError: A temperature not above zero, or no such partner.

    Source:
        Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", 2020, arXiv 2003.13964,
        equation 1.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [5.0, 1.0]])
        >>> cs_kd_loss(logits, torch.tensor([0, 0, 1]), temperature=1.0)
        tensor(1.0155)
    """
    check_logits(student_logits, labels=labels)
    check_positive(temperature, "temperature")
    if partner not in ("random", "all"):
        raise ConfigError("no such partner", where="partner", found=repr(partner), wanted="'random' or 'all'")
    classes = student_logits.shape[-1]
    target, counts = class_labels(labels, classes, "CS-KD")
    counts = counts if mask is None else counts & fit_mask(mask, student_logits[..., 0])
    places = counts.shape
    target, counted = target.reshape(-1), counts.reshape(-1)
    # What does not count may be anything, also in half precision: it must not come near the products below.
    log_p = soften(student_logits.masked_fill(~counts.unsqueeze(-1), 0.0), temperature).reshape(-1, classes)

    same = (target.unsqueeze(1) == target) & counted & counted.unsqueeze(1)
    others = same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)
    if partner == "random":
        # Members of a class are numbered, and each takes the one a random number of steps further on: what does not
        # count changes no draw.
        members, number = same.sum(dim=1).clamp(min=1), same.tril(-1).sum(dim=1)
        steps = 1 + (torch.rand((), device=target.device) * (members - 1)).long()
        others = others & (number == ((number + steps) % members).unsqueeze(1))
    share = others.to(log_p.dtype)
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1)

    # sum_j share_ij KL(p_j || p_i), without [N, N, C]: cross-entropy with the partners' mean, minus their mean entropy.
    q, log_q = log_p.detach().exp(), log_p.detach()
    entropy = cross_entropy_rows(q, log_q)
    values = cross_entropy_rows(share @ q, log_p) - share @ entropy
    return temperature**2 * reduce(values.reshape(places), counts, reduction)


@register(
    Card(
        key="cs_kd",
        name="CS-KD",
        title="Regularizing Class-wise Predictions via Self-knowledge Distillation",
        year=2020,
        arxiv="2003.13964",
        code="alinlab/cs-kd",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(\mathrm{softmax}(z_{j(i)}/T)\,\|\,\mathrm{softmax}(z_i/T)), \quad y_{j(i)} = y_i",
        use="Without a teacher, against sure mistakes: fine-grained classes gain most. Batches need several samples of "
        "a class: few classes, large batches or a sampler that pairs them.",
        defaults={
            "temperature": "4, as in the authors' code",
            "partner": "one at random, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradient of alinlab/cs-kd@b447f25, over a batch of pairs, each the other's partner",
        choices=(
            "The partner is drawn from the batch; the authors' loader adds one for every sample, so that their model "
            "runs twice. A sample without a partner counts as 0 in the mean.",
            "In a pair both learn from each other; in the authors' code the added one only teaches.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
    ),
    cs_kd_loss,
)
class ClassWiseKD(Objective):
    """Class-wise self-distillation; see ``limbeck.functional.cs_kd_loss``.

    Args:
        temperature: T.
        partner: One other of the class at random, or all of them.

    >>> from limbeck.objectives import CrossEntropy
    >>> loss = CrossEntropy() + ClassWiseKD(partner="all")
    """

    contract = Contract("labels", None, True, False, "squared", spare_class=True, permutation=False, stop_gradient=True)
    student_taps = ("logits",)

    def __init__(self, temperature: float = 4.0, partner: Partner = "random") -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature, self.partner = temperature, partner

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return cs_kd_loss(
            student.logits, batch.require("labels"), temperature=self.temperature, partner=self.partner, mask=batch.mask
        )
