"""TED: layers compared behind filters that have learned what the task needs of each."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import Tap
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import project
from limbeck.core.trace import Trace
from limbeck.objectives.parts.filters import Filtered, TaskFilters


def ted_loss(
    student_states: Tensor,
    teacher_states: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between filtered states, averaged over their width.

    .. math:: L = \frac 1 {N D} \sum_i \left\| f^S(h^S_i) - f^T(h^T_i) \right\|_2^2

    Args:
        student_states: :math:`f^S(h^S)`, ``[B, *, D]``.
        teacher_states: :math:`f^T(h^T)`, ``[B, *, D]``; detached.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: States of different shapes.

    Source: Liang et al., "Less is More: Task-aware Layer-wise Distillation", 2023, arXiv 2210.01351.

    >>> import torch
    >>> ted_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(5.)
    """
    check_features(student_states, teacher_states)
    gap = widen(student_states) - widen(teacher_states.detach())
    return reduce(gap.square().mean(dim=-1), mask, reduction)


@register(
    Card(
        key="ted",
        name="TED",
        title="Less is More: Task-aware Layer-wise Distillation for Language Model Compression",
        year=2023,
        arxiv="2210.01351",
        code="cliang1453/task-aware-distillation",
        knowledge="feature",
        equation=r"\frac 1 M \sum_m \mathrm{MSE}\left( f^S_m(h^S_m), f^T_m(h^T_m) \right)",
        use="To compress a transformer fine-tuned on a task into a narrower one: with the scheme hint_then_kd, where "
        "filters learn the task first. Without it, it is layer-wise distillation through learned linear maps.",
        defaults={
            "tap": "the repeated blocks, as in the paper",
            "every": "1, as in the authors' runs",
            "teacher_every": "the same relative depth",
            "nonlinear": "no, as in the authors' runs",
        },
        evidence="parity",
        evidence_note="losses and gradients of both stages with the weights of a run of "
        "cliang1453/task-aware-distillation@1cd33d0",
        choices=(
            "Padding does not count; in the authors' code it does.",
            "Common width: the teacher's. Heads of the first stage read the first token as the authors' do, or predict "
            "at each place where labels do; they are dropped with it.",
            "The authors' weights (labels 1, KD at T = 2 5 to 20, states 20 to 7500) over 20, those of most tasks.",
        ),
        tasks=("text classification", "classification", "language"),
        with_labels={"cross_entropy": 0.05, "kd": 1.0},
        weight=2.5,
        scheme="hint_then_kd",
    ),
    ted_loss,
)
class TED(Filtered):
    """Layers compared behind filters, the mean over pairs; see ``limbeck.functional.ted_loss``.

    With ``scheme: hint_then_kd`` the filters of both models learn the labels in a first stage, in which the models
    stay as they are; then the teacher's are fixed and the student's train with it, as in the paper. Without it the
    student's are new and the teacher has none.

    Args:
        tap: The layers: a plural role, or several places in order.
        teacher_tap: The teacher's, where they are called otherwise.
        every: A filter stands after every so many of the student's layers.
        teacher_every: The same of the teacher; both must come to as many.
        nonlinear: Filters of two linear maps with a GELU between them.

    >>> loss = 2.5 * TED(every=2)
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)

    def __init__(
        self,
        tap: Tap = "blocks",
        teacher_tap: Tap | None = None,
        every: int = 1,
        teacher_every: int | None = None,
        nonlinear: bool = False,
    ) -> None:
        super().__init__(tap, teacher_tap, every, teacher_every, nonlinear)
        self.two_stages = False

    def opening(self) -> Objective:
        """The filters' own loss; from now on this goes on with what they learned."""
        self.two_stages = True
        return TaskFilters(self)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.size(student, teacher, both=self.two_stages)
        self.student_filters.requires_grad_(True)
        self.teacher_filters.requires_grad_(False)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        losses = []
        for m, (s, t) in enumerate(self.matched(student, teacher)):
            own = project(self.filter("student_filters", m), s, "student_feature")
            other = project(self.filter("teacher_filters", m), t, "teacher_feature") if self.two_stages else t
            losses.append(ted_loss(own, other, mask=batch.mask))
        return sum(losses[1:], losses[0]) / len(losses)
