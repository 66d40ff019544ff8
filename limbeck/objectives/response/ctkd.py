"""Curriculum temperature (CTKD): a temperature that is learned against the student, more and more."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce
from limbeck.core.relations import project
from limbeck.core.schedules import Cosine
from limbeck.core.trace import Trace


def ctkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    raw: Tensor | float = 1.0,
    strength: Tensor | float = 1.0,
    start: float = 1.0,
    span: float = 20.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD at a learned temperature, whose gradient is reversed: the student minimises the loss, it maximises it.

    .. math::
        L = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z^T / T) \,\|\, \mathrm{softmax}(z^S / T)\big), \qquad
        T = T_0 + R\, \sigma(\theta), \quad \partial_\theta \leftarrow -\lambda\, \partial_\theta

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        raw: :math:`\theta`, a number for all places (0-d) or one for each (``[B, *]``).
        strength: :math:`\lambda`, how strongly the temperature is trained against the student.
        start: :math:`T_0`, the least temperature; 1 in the authors' code.
        span: :math:`R`, how far the temperature reaches above; 20 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``start`` or ``span`` not above zero.

    Source: Li et al., "Curriculum Temperature for Knowledge Distillation", 2022, arXiv 2211.16231.

    >>> theta = torch.zeros((), requires_grad=True)
    >>> loss = ctkd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), raw=theta)
    >>> loss.backward(); loss, theta.grad
    (tensor(1.9945, grad_fn=<MeanBackward0>), tensor(-0.0050))
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(start, "start")
    check_positive(span, "span")
    theta = torch.as_tensor(raw, dtype=soften(student_logits[:0]).dtype, device=student_logits.device)
    theta = theta.detach() - strength * (theta - theta.detach())  # the value itself, with its gradient reversed
    temperature = (start + span * theta.sigmoid()).unsqueeze(-1)
    divergence = kl_rows(soften(teacher_logits.detach(), temperature), soften(student_logits, temperature))
    return reduce(temperature.squeeze(-1) ** 2 * divergence, mask, reduction)


@register(
    Card(
        key="ctkd",
        name="CTKD",
        title="Curriculum Temperature for Knowledge Distillation",
        year=2022,
        arxiv="2211.16231",
        code="zhengli97/CTKD",
        knowledge="response",
        equation=r"\min_S \max_T T^2\,\mathrm{KL}(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(z_s/T))",
        use="In place of KD where there is no budget to tune its temperature.",
        defaults={
            "mode": "one temperature for all, which the authors have released",
            "curriculum": "10 of 240 epochs, as in the paper's CIFAR-100 runs",
        },
        evidence="parity",
        evidence_note="value and gradients of zhengli97/CTKD@7d52522 (Global_T, DistillKL), which lacks the other mode",
        choices=(
            "By instance, two layers (64 wide, which the paper leaves open) read both logits as constants: the student "
            "learns from the loss, not by steering its temperature. They start at the global one's temperature.",
        ),
        with_labels={"cross_entropy": 0.1},
        weight=0.9,
    ),
    ctkd_loss,
)
class CTKD(Objective):
    """KD at a temperature learned against the student; see ``limbeck.functional.ctkd_loss``.

    Args:
        mode: ``"global"``, one temperature, or ``"instance"``, one for each place, from both predictions.
        start: The least temperature; 1, as in the authors' code.
        span: How far it reaches above; 20, as in the authors' code.
        curriculum: The share of training over which ``strength`` grows from 0, along half a cosine wave.
        strength: How strongly the temperature is trained against the student in the end; 1, as in the paper.

    >>> loss = 0.9 * CTKD(mode="instance")
    """

    contract = Contract(normalizer="positions", mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self,
        mode: Literal["global", "instance"] = "global",
        start: float = 1.0,
        span: float = 20.0,
        curriculum: float = 10 / 240,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("span", span), ("curriculum", curriculum)):
            check_positive(value, name)
        self.mode, self.start, self.span, self.curriculum, self.strength = mode, start, span, curriculum, strength
        self.predictor: nn.Sequential | None = None
        if mode == "global":
            self.raw = nn.Parameter(torch.ones(()))
        else:  # what the temperature reads of the student is a constant for its gradient
            self.contract = replace(self.contract, spare_class=False, stop_gradient=True)  # type: ignore[misc]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.mode == "instance" and self.predictor is None:
            first, last = nn.Linear(2 * student.logits.shape[-1], 64), nn.Linear(64, 1)
            nn.init.zeros_(last.weight)
            nn.init.ones_(last.bias)
            self.predictor = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        logits = student.logits, teacher.logits
        check_logits(*logits)
        if batch.mask is not None:  # what stands there may be no number, and would be in the temperature's gradient
            logits = tuple(z.masked_fill(~fit_mask(batch.mask, z), 0.0) for z in logits)  # type: ignore[assignment]
        passed = torch.as_tensor(batch.progress, dtype=torch.float32) / self.curriculum
        strength = Cosine(0.0, self.strength)(passed.clamp(max=1.0)).to(logits[0].device)
        raw = self.raw if self.mode == "global" else self._predict(*logits)
        return ctkd_loss(*logits, raw=raw, strength=strength, start=self.start, span=self.span, mask=batch.mask)

    def _predict(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        said = torch.cat([student_logits, teacher_logits], dim=-1).detach()
        return project(self.ready("predictor"), said, "logits").squeeze(-1)
