"""The policy gradient of a divergence between whole texts."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import check_floating, fit_mask, reduce
from limbeck.core.trace import Trace

WRITTEN = "written"  # which places were written to be judged, in the extras of a batch, and the unit of the mean
SAID, DRAWN = "written_labels", "written_log_probs"  # which tokens they predict, and by what chance these were drawn


def policy_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    drawn: Tensor | None = None,
    *,
    single_step: bool = True,
    length_norm: bool = True,
    clip: float | None = None,
    whole: bool = False,
) -> Tensor:
    r"""What to minimise at each place of drawn texts so that :math:`\mathrm{KL}(q \| p)` of whole texts falls.

    With :math:`r_t = \log p(y_t) - \log q(y_t)` and texts drawn from :math:`\tilde p`, the gradient is that of MiniLLM:

    .. math:: \nabla L = \sum_t w_t \left( \nabla\, \mathrm{KL}\big(q(\cdot \mid y_{<t}) \| p(\cdot \mid y_{<t})\big)
        - R_{t+1} \nabla \log q(y_t \mid y_{<t}) \right), \qquad R_{t+1} = \sum_{s > t} r_s,
        \quad w_t = \frac{q(y_t)}{\tilde p(y_t)}

    The mean over texts is exact where they are the student's own, or with ``whole``, and without ``length_norm``.

    Args:
        student_logits: ``[B, L, V]`` of q.
        teacher_logits: ``[B, L, V']`` of p; detached. Of padded vocabularies the first logits of both count.
        labels: ``[B, L]``, the token that each place predicts.
        mask: ``[B, L]``, True where that token was drawn.
        drawn: ``[B, L]``, the log-probability with which it was; ``None``: it was the student's own, w is 1.
        single_step: Take the part of the next token as a whole, as above; otherwise as :math:`r_t` in the sum.
        length_norm: Divide R by how many terms it has.
        clip: Proximal clipping: no gradient of R's part where w has left :math:`1 \pm` this to R's advantage.
        whole: The exact weights, products of the ratios of whole texts, in the place of the ratio at t alone.

    Returns:
        ``[B, L]``, 0 where nothing was drawn. Their gradient is what counts, their value is not the divergence.

    Source: MiniLLM: Knowledge Distillation of Large Language Models, arXiv 2306.08543, equations 2 to 7.

    >>> logits = torch.zeros(1, 2, 3)
    >>> policy_rows(logits, logits, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)).abs()
    tensor([[0., 0.]])
    """
    check_floating(student_logits, "student_logits", least=3)
    check_floating(teacher_logits, "teacher_logits", least=3)
    width = min(student_logits.shape[-1], teacher_logits.shape[-1])
    own, other = soften(student_logits[..., :width]), soften(teacher_logits[..., :width].detach())
    mask = fit_mask(mask, labels)
    said = labels.clamp(min=0).unsqueeze(-1)
    log_q, log_p = own.gather(-1, said).squeeze(-1), other.gather(-1, said).squeeze(-1)
    with torch.no_grad():
        rewards = (log_p - log_q).masked_fill(~mask, 0.0)
        ahead, count = _from_here(rewards), _from_here(mask.to(rewards))
        if single_step:
            ahead, count = ahead - rewards, count - mask.to(rewards)
        if length_norm:
            ahead = ahead / count.clamp(min=1)
        gap = torch.zeros_like(log_q) if drawn is None else (log_q - drawn).masked_fill(~mask, 0.0)
        weight = (gap.sum(dim=1, keepdim=True).expand_as(gap) if whole else gap).exp()
    ratio = weight * (log_q - log_q.detach()).exp()  # its value is the weight, its gradient that of log q as well
    values = -ratio * ahead
    if clip is not None:
        values = torch.maximum(values, -ratio.clamp(1 - clip, 1 + clip) * ahead)
    if single_step:
        values = values + weight * kl_rows(own, other)
    return reduce(values, mask, "none")


def _from_here(values: Tensor) -> Tensor:
    """The sum from each place to the end of its row."""
    return values.flip(1).cumsum(dim=1).flip(1)


class Policy(Objective):
    """:func:`policy_rows` over the places that a scheme has written; of a batch as it was read, over its own texts.

    Args:
        single_step, length_norm, clip: See there.
    """

    contract = Contract(normalizer=WRITTEN, mask=True, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, single_step: bool = True, length_norm: bool = True, clip: float | None = 0.2) -> None:
        super().__init__()
        self.single_step, self.length_norm, self.clip = single_step, length_norm, clip

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        if WRITTEN in batch.extras:
            labels, mask, drawn = (batch.extras[name] for name in (SAID, WRITTEN, DRAWN))
        else:
            labels, drawn = batch.require("labels"), None
            mask = labels >= 0 if batch.mask is None else batch.mask
        values = policy_rows(
            student.logits,
            teacher.logits,
            labels,
            mask,
            drawn,
            single_step=self.single_step,
            length_norm=self.length_norm,
            clip=self.clip,
        )
        return reduce(values, mask)
