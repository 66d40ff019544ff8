"""Layered self-supervised distillation (LSSKD): classifiers on all stages tell class and turn, the deepest teaches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.layers import tap_values
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce, widen
from limbeck.core.trace import Trace
from limbeck.core.views import quarter_turns, split_views
from limbeck.objectives.parts.stage_classifiers import StageClassifiers, check_views, stage_rows


def lsskd_loss(
    branch_logits: Sequence[Tensor],
    branch_features: Sequence[Tensor],
    joint_logits: Tensor,
    feature: Tensor,
    student_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.01,
    temperature: float = 3.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Every stage learns class and turn together, shallow ones from the deepest, the student's head from all turns.

    .. math::
        L = \frac 1 K \sum_k \Big[ \sum_{l \le L} \mathrm{CE}(q_l(t_k x), (y, k))
            + \sum_{l < L} \tau^2\, \mathrm{KL}(q^\tau_L(t_k x) \,\|\, q^\tau_l(t_k x)) + \beta \|F_l - F_L\|_2^2 \Big]
            + \tau^2\, \mathrm{KL}(\bar q^\tau(x) \,\|\, p^\tau(x))

    where :math:`q_l` is the joint prediction of C classes and K turns by stage l, and :math:`\bar q` the softmax of the
    deepest stage's logits for the turn that was made, averaged over turns. The deepest is a constant where it teaches.

    Args:
        branch_logits: One ``[K B, C K]`` a shallow stage, turn after turn; entry ``c K + k`` is class c in turn k.
        branch_features: One ``[K B, D]`` a shallow stage: what its classifier reads.
        joint_logits, feature: ``[K B, C K]`` of the deepest stage, and ``[K B, D]`` that it reads (detached).
        student_logits: ``[B, C]``, the student's own, of the upright samples.
        labels: ``[B]`` integers, negative where a sample has no label: it then learns from the deepest alone.
        beta: Weight of the features; 0.01 is our choice.
        temperature: :math:`\tau`; 3 as in the works it descends from.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes do not belong together, no labels, or soft ones.
        ConfigError: The temperature is not above zero.

    Source: LSSKD, 2025, arXiv 2506.07055; the terms are those of HSAKD (arXiv 2107.13715), with which it compares.

    >>> import torch
    >>> joint, feature = torch.zeros(4, 8), torch.zeros(4, 3)
    >>> lsskd_loss([joint], [feature], joint, feature, torch.zeros(1, 2), torch.tensor([1]))
    tensor(4.1589)
    """
    check_positive(temperature, "temperature")
    size, classes = student_logits.shape
    taught = stage_rows(
        branch_logits, branch_features, joint_logits, feature, labels, size, classes, beta=beta, temperature=temperature
    )
    own_turn = widen(joint_logits.detach()).view(len(taught), size, classes, -1).diagonal(dim1=0, dim2=3)
    answer = temperature**2 * kl_rows(soften(own_turn.mean(dim=-1), temperature), soften(student_logits, temperature))
    return reduce(taught.mean(dim=0) + answer, mask, reduction)


@register(
    Card(
        key="lsskd",
        name="LSSKD",
        title="A Layered Self-Supervised Knowledge Distillation Framework for Efficient Multimodal Learning on the "
        "Edge",
        year=2025,
        arxiv="2506.07055",
        knowledge="response",
        equation=r"\sum_l \mathrm{CE}(q_l, (y, k)) + \sum_{l < L} \tau^2\, \mathrm{KL}(q^\tau_L \,\|\, q^\tau_l) "
        r"+ \beta \|F_l - F_L\|_2^2 + \tau^2\, \mathrm{KL}(\bar q^\tau \,\|\, p^\tau)",
        use="Without a teacher, for images whose turned copies look different: classifiers on inner layers help.",
        cost="Every image is seen four times, upright and turned, and a classifier stands on every stage.",
        defaults={
            "beta": "0.01, our choice: the abstract tells no weights, all others are 1",
            "temperature": "3, as in HSAKD; turns 4",
            "tap": "the student's blocks: last at each resolution or evenly spaced; 3 at most beside the deepest",
        },
        evidence="reading",
        evidence_note="only the abstract and a summary could be read; terms and gradients against plain loops",
        choices=(
            "The abstract names classifiers on all stages, self-supervised augmented distributions, one-to-one "
            "transfer with divergence and squared distance: the terms are HSAKD's, the deepest stage the teacher.",
            "Branches are BYOT's bottlenecks; the deepest joint head is linear, beside the student's own, which learns "
            "from labels by the cross-entropy beside this loss. Both sides of the last divergence are softened.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
    ),
    lsskd_loss,
)
class LSSKD(Objective):
    """Layered self-supervised distillation; see ``limbeck.functional.lsskd_loss``.

    Args:
        beta: Weight of the features.
        temperature: Of all divergences.
        turns: 4 quarter turns, or 1: no turns, so that classifiers on stages tell classes alone (deep supervision).
        tap: Which layers may have a classifier.
    """

    contract = Contract(
        "positions", at_equal=None, decomposes=False, permutation=False, least_samples=4, stop_gradient=True
    )

    def __init__(
        self, beta: float = 0.01, temperature: float = 3.0, turns: int = 4, tap: str | list[str] = "blocks"
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        if turns not in (1, 4):
            raise ConfigError("images are turned four times or not at all", where="turns", found=turns, wanted="4 or 1")
        self.beta, self.temperature, self.turns = beta, temperature, turns
        self.branches: StageClassifiers | None = None
        self.taps = [tap] if isinstance(tap, str) else tap
        self.student_taps = (*self.taps, "penultimate", "logits")

    def prepare(self, batch: Batch) -> Batch:
        return quarter_turns(batch) if self.turns == 4 else batch

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        entries = student.logits.shape[-1] * self.turns
        self.branches = StageClassifiers(tap_values(student, self.taps), student["penultimate"], entries)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        check_views(batch, self.turns, "lsskd")
        check_logits(student.logits, labels=batch.require("labels"))
        read = student["penultimate"]
        answers, reads, joint = self.ready("branches")(tap_values(student, self.taps), read)
        logits, labels = (split_views(values, batch)[0] for values in (student.logits, batch.require("labels")))
        mask = None if batch.mask is None else split_views(batch.mask, batch)[0]
        inputs = (answers, reads, joint, read, logits, labels)
        return lsskd_loss(*inputs, beta=self.beta, temperature=self.temperature, mask=mask)
