"""TAID: a target that moves from the student to the teacher, as fast as the student follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import cross_entropy_rows, kl_rows
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside, check_logits, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.pace import Pace


def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    t: float | Tensor = 0.4,
    signal: Literal["divergence", "cross_entropy"] = "divergence",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence from a prediction between the student's, as a constant, and the teacher's.

    .. math:: L = \mathrm{KL}(p_t \,\|\, q), \qquad q = \mathrm{softmax}(z^S), \quad
        p_t = \mathrm{softmax}\big((1 - t)\, \mathrm{const}(z^S) + t\, z^T\big)

    Its gradient by :math:`z^S` is :math:`q - p_t`. At t = 1 it is KD at temperature 1, at t = 0 nothing.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        t: How far on the way to the teacher, from 0 to 1.
        signal: ``"cross_entropy"`` leaves the target's entropy in the value, as the authors' code does; the gradient
            stays.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", 2025, arXiv 2501.16937.

    >>> taid_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), t=0.5)
    tensor(0.4338)
    """
    check_logits(student_logits, teacher_logits, labels)
    own, teacher = widen(student_logits.detach()), widen(teacher_logits.detach())
    out = (own == -torch.inf) | (teacher == -torch.inf)  # a class that one of them rules out
    mixed = (1 - t) * own.masked_fill(out, 0.0) + t * teacher.masked_fill(out, 0.0)
    log_p, log_q = mixed.masked_fill(out, -torch.inf).log_softmax(-1), widen(student_logits).log_softmax(-1)
    values = kl_rows(log_p, log_q) if signal == "divergence" else cross_entropy_rows(log_p.exp(), log_q)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="taid",
        name="TAID",
        title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        year=2025,
        arxiv="2501.16937",
        code="SakanaAI/TAID",
        knowledge="response",
        equation=r"\mathrm{KL}\big(\mathrm{softmax}((1 - t)\, \mathrm{const}(z^S) + t\, z^T) \,\|\, q\big)",
        use="In place of KD for a student much smaller than its teacher: it never asks for more than the student can "
        "nearly do. It needs no labels beside it.",
        defaults={
            "start": "0.4, the authors' script",
            "end": "1, the authors' script",
            "rate": "5e-4, the authors' script",
            "momentum": "0.99, the authors' script",
            "adaptive": "yes, as in the paper",
            "signal": "the divergence, the paper's objective; the authors' code looks at the cross-entropy",
        },
        evidence="parity",
        evidence_note="values, gradients and the path of t over steps of SakanaAI/TAID@a062892, which computes in "
        "float32, with signal 'cross_entropy'",
        choices=(
            "The divergence where the authors' code has the cross-entropy: the same gradient, and 0 at equality.",
            "t moves once an optimizer step, by the loss of all its micro-batches and ranks.",
            "A step whose loss is 0 (nothing counted) or not finite does not move it.",
        ),
        tasks=("classification", "language"),
    ),
    taid_loss,
)
class TAID(Objective):
    """Temporally adaptive interpolation; see ``limbeck.functional.taid_loss``, and ``parts.pace.Pace`` for how t moves.

    Args:
        start, end: Of t.
        rate: How fast t may run ahead of the straight line between them.
        momentum: Of the losses' trend, which says how fast it does.
        adaptive: Else t keeps to the straight line.
        signal: What the trend is of: ``"divergence"`` or ``"cross_entropy"``, which the value then is, too.

    In evaluation mode t stays.

    >>> loss = TAID(start=0.2)
    """

    contract = Contract(normalizer="positions", mask=True, spare_class=True, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self,
        start: float = 0.4,
        end: float = 1.0,
        rate: float = 5e-4,
        momentum: float = 0.99,
        adaptive: bool = True,
        signal: Literal["divergence", "cross_entropy"] = "divergence",
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end), ("rate", rate), ("momentum", momentum)):
            check_inside(value, name, closed=True)
        if start > end:
            raise ConfigError("t never goes back", where="end", found=end, wanted=f"start ({start}) or more")
        self.pace = Pace(start, end, rate, momentum)
        self.adaptive, self.signal = adaptive, signal
        if signal == "cross_entropy":
            self.contract = replace(self.contract, at_equal=None)  # type: ignore[misc]

    @property
    def t(self) -> Tensor:
        """How far the target is on the way to the teacher."""
        return self.pace.t

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        logits = student.logits, teacher.logits
        moves = self.adaptive and self.training
        t = self.pace.begin(batch) if moves else self.t if self.adaptive else self.pace.line(batch.progress)
        value = taid_loss(*logits, t=t.to(logits[0].device), signal=self.signal, mask=batch.mask)
        if moves:
            self.pace.note(value, batch)
        return value
