"""One-for-all distillation (OFA-KD): every stage of the student answers like the teacher, between any architectures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import cross_entropy_rows, soften
from limbeck.core.labels import class_labels
from limbeck.core.layers import tap_values
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce
from limbeck.core.relations import channel_dim, project
from limbeck.core.trace import Trace
from limbeck.objectives.parts.branches import branch, branch_points


def ofa_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the teacher's prediction, in which the true class counts more the surer the teacher is of it.

    .. math:: L = -\sum_c \left( (p^T_c + m_c)^\gamma - m_c \right) \log p^S_c, \qquad p = \mathrm{softmax}(z / T)

    with :math:`m` the label as a one-hot vector. :math:`\gamma = 1` is plain distillation. Above 1 the true class's
    coefficient grows with the teacher's belief, and those of the others shrink.

    Args:
        logits: ``[B, *, C]``: the student's, or a branch's.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label (then :math:`m = 0` there); or soft labels
            ``[B, *, C]``, of which the largest counts.
        gamma: :math:`\gamma`; 1.5 in the authors' example run.
        temperature: :math:`T`; 1 in the authors' code. There is no factor :math:`T^2`.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, or shapes that do not fit.
        ConfigError: ``gamma`` or the temperature not above zero.

    Source:
        Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", 2023,
        arXiv 2310.19444.

    Example:
        >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> ofa_loss(student, teacher, torch.tensor([0]))
        tensor(0.8019)
    """
    check_logits(logits, teacher_logits, labels)
    check_positive(gamma, "gamma")
    check_positive(temperature, "temperature")
    classes = logits.shape[-1]
    target, labelled = class_labels(labels, classes, "OFA", soft=True)
    teacher = soften(teacher_logits.detach(), temperature).exp()
    truth = (F.one_hot(target, classes) * labelled.unsqueeze(-1)).to(teacher.dtype)
    coefficients = (teacher + truth).pow(gamma) - truth
    return reduce(cross_entropy_rows(coefficients, soften(logits, temperature)), mask, reduction)


@register(
    Card(
        key="ofa",
        name="OFA-KD",
        title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        year=2023,
        arxiv="2310.19444",
        code="Hao840/OFAKD",
        knowledge="response",
        equation=r"\sum_{k} \ell(b_k) + \ell(z^S), \quad "
        r"\ell(z) = -\sum_c \left( (p^T_c + m_c)^\gamma - m_c \right) \log \mathrm{softmax}_c(z)",
        use="Between a convolutional network and a transformer, where features cannot be compared: every stage learns "
        "to answer like the teacher, of whom nothing but logits is asked.",
        defaults={
            "gamma": "1.5, as in the authors' example run; 1 is their code's default",
            "temperature": "1, as in the authors' code",
            "branches": "4, as in the paper",
            "tap": "the student's blocks: the last at each resolution, or evenly spaced ones",
        },
        evidence="parity",
        evidence_note="value and gradient of ofa_loss of Hao840/OFAKD@f7bb896",
        choices=(
            "Branches are as wide as the student's last feature (in the authors' code as the wider network's), so that "
            "nothing but logits is asked of the teacher; they normalise by the batch alone and are dropped.",
            "A place without a label is taught without enhancement.",
        ),
        needs=("labels",),
        tasks=("classification", "cross-architecture"),
        with_labels={"cross_entropy": 1.0},
    ),
    ofa_loss,
)
class OFA(Objective):
    """One-for-all distillation: the loss at the student's logits and at every branch; see ``ofa_loss``.

    >>> OFA(gamma=1.2, tap=["layer1", "layer2", "layer3"]).student_taps
    ('layer1', 'layer2', 'layer3', 'logits')
    """

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, least_samples=2)
    teacher_taps = ("logits",)
    heads: nn.ModuleList | None

    def __init__(
        self, gamma: float = 1.5, temperature: float = 1.0, branches: int = 4, tap: str | list[str] = "blocks"
    ) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("temperature", temperature), ("branches", branches)):
            check_positive(value, name)
        self.gamma, self.temperature, self.branches, self.heads = gamma, temperature, branches, None
        self.taps = [tap] if isinstance(tap, str) else tap
        self.student_taps = (*self.taps, "logits")

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        features, classes = tap_values(student, self.taps), teacher.logits.shape[-1]
        self.points, self.heads = branch_points(features, self.branches), nn.ModuleList()
        width = features[-1].shape[channel_dim(features[-1])]
        for i, point in enumerate(self.points):
            self.heads.append(branch(features[point], len(self.points) - 1 - i, width, classes))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        features, heads = tap_values(student, self.taps), self.ready("heads")
        labels = batch.require("labels")

        def loss(logits: Tensor) -> Tensor:
            gamma, temperature = self.gamma, self.temperature
            return ofa_loss(logits, teacher.logits, labels, gamma=gamma, temperature=temperature, mask=batch.mask)

        said = [project(head, features[p], "student_feature") for head, p in zip(heads, self.points, strict=True)]
        return {"logits": loss(student.logits), "branches": torch.stack([loss(z) for z in said]).sum()}
