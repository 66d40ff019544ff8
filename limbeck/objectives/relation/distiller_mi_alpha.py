"""Distiller's MI-alpha: a bound on the mutual information of student and teacher, of little bias or little variance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.pairing import Mapping
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_inside, check_same_shape, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim, check_same_batch, gram, pooled
from limbeck.core.trace import Trace


@without_autocast
def distiller_mi_alpha_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    log_baseline: Tensor,
    *,
    alpha: float = 0.9,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The negative of an interpolated lower bound on the mutual information of two embeddings.

    .. math::
        -I_\alpha &= \frac 1 {B (B - 1)} \sum_i \sum_{j \ne i} \left[
            \frac{e^{f_{ij}}}{r_{ii}} - f_{ii} + \log r_{ij} - 1 \right], \qquad f_{ij} = g(s_i)^\top h(t_j) \\
        r_{ij} &= \alpha \frac 1 {B - 1} \sum_{k \ne j} e^{f_{ik}} + (1 - \alpha) q_i

    With :math:`\alpha = 1` it is InfoNCE: of little variance, and at most :math:`\log (B - 1)`; with 0 it is TUBA (NWJ
    where :math:`q = e`): without that limit, and of much variance. As in the authors' code each mean of exponentials
    leaves one sample out. A single sample costs 0.

    Args:
        student_embedding: :math:`g(s)`, ``[B, E]``.
        teacher_embedding: :math:`h(t)`, the same shape. *Not* detached, since the teacher's embedding learns too:
            detach the teacher's feature before embedding it.
        log_baseline: :math:`\log q`, ``[B]``.
        alpha: :math:`\alpha`, from 0 to 1; 0.9 in the authors' scripts.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Embeddings of different shapes, or another number of baselines.
        ConfigError: ``alpha`` not from 0 to 1.

    Source: He et al., "Distiller", 2021, arXiv 2109.11105, after Poole et al., 2019, arXiv 1905.06922.

    >>> import torch
    >>> distiller_mi_alpha_loss(2 * torch.eye(3), torch.eye(3), torch.zeros(3), alpha=1.0)
    tensor(-0.5662)
    """
    check_features(student_embedding, teacher_embedding)
    check_inside(alpha, "alpha", closed=True)
    f = gram(widen(student_embedding), widen(teacher_embedding))
    check_same_shape(f.diagonal(), log_baseline, "the samples", "log_baseline")
    counts = torch.ones_like(log_baseline, dtype=torch.bool) if mask is None else fit_mask(mask, log_baseline)
    pairs = counts & counts.unsqueeze(1) & ~torch.eye(len(f), dtype=torch.bool, device=f.device)
    others = pairs.sum(dim=1).clamp(min=1).to(f.dtype)
    logs = [math.log(share) if share else -math.inf for share in (alpha, 1 - alpha)]
    means = _without_each(f.masked_fill(~counts, torch.finfo(f.dtype).min / 4)) - others.log().unsqueeze(1)
    log_r = torch.logaddexp(means + logs[0], log_baseline.unsqueeze(1) + logs[1])
    marginal = (f - log_r.diagonal().unsqueeze(1)).masked_fill(~pairs, 0.0).exp()
    values = (marginal - f.diagonal().unsqueeze(1) + log_r - 1).masked_fill(~pairs, 0.0)
    return reduce(values.sum(dim=1) / others, mask, reduction)


def _without_each(scores: Tensor) -> Tensor:
    """``[i, j]``: the logarithm of row i's sum of exponentials without column j; from sums, to lose no digits."""
    nothing = torch.finfo(scores.dtype).min / 4
    before = F.pad(scores[:, :-1].logcumsumexp(dim=1), (1, 0), value=nothing)
    after = F.pad(scores.flip(1)[:, :-1].logcumsumexp(dim=1), (1, 0), value=nothing).flip(1)
    return torch.logaddexp(before, after)


def _mlp(width: int, dim: int) -> nn.Module:
    return nn.Sequential(LinearProjector(width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, dim))


@register(
    Card(
        key="distiller_mi_alpha",
        name="Distiller (MI-alpha)",
        title="Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing",
        year=2021,
        arxiv="2109.11105",
        code="Cli212/Distiller",
        knowledge="relation",
        equation=r"\frac 1 {B (B - 1)} \sum_i \sum_{j \ne i} ( e^{f_{ij}} / r_{ii} - f_{ii} + \log r_{ij} - 1 )",
        use="For hidden states of any width, beside KD: what the student can tell of the teacher's state counts, not "
        "its coordinates. Wants batches of tens of samples.",
        defaults={
            "alpha": "0.9, as in the authors' scripts",
            "tap": "what enters the classifier; the authors take all hidden states: tap='blocks'",
        },
        evidence="parity",
        evidence_note="value and gradients of the bound in Cli212/Distiller@a6a48f7, given scores and baseline",
        choices=("The authors' perceptron critic, on the mean over places; not their transformer critic, on all.",),
        tasks=("text classification", "classification"),
        with_labels={"kd": 1.0},
    ),
    distiller_mi_alpha_loss,
)
class DistillerMIAlpha(LayerObjective):
    """MI-alpha, summed over pairs of layers; see ``limbeck.functional.distiller_mi_alpha_loss``.

    For each pair two perceptrons, which embed it in 64 dimensions, and one for the baseline learn beside the student.

    Args:
        tap: Where to listen: a place, or several, or a plural role.
        teacher_tap: The teacher's, where they are called otherwise.
        mapping: Of layers: those of the same relative depth (``"skip"``), or the teacher's ``"last"``.
        alpha: Between TUBA (0) and InfoNCE (1).
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True, decomposes=False)

    def __init__(
        self, tap: Tap = "penultimate", teacher_tap: Tap | None = None, mapping: Mapping = "skip", alpha: float = 0.9
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_inside(alpha, "alpha", closed=True)
        self.mapping, self.alpha = mapping, alpha
        self.critics: nn.ModuleList | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        def critic(s: Tensor, t: Tensor) -> nn.Module:
            own, other = s.shape[channel_dim(s)], t.shape[channel_dim(t)]
            return nn.ModuleList([_mlp(own, 64), _mlp(other, 64), _mlp(other, 1)]).to(s.device)

        self.critics = nn.ModuleList(critic(s, t) for s, t in self.mapped(student, teacher, self.mapping))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        pairs, losses = self.mapped(student, teacher, self.mapping), []
        for (g, h, q), (s, t) in zip(self.ready("critics"), pairs, strict=True):
            check_same_batch(s, t, "student_feature", "teacher_feature")
            (s, counts), (t, _) = pooled(s, batch.mask), pooled(t, batch.mask)
            losses.append(distiller_mi_alpha_loss(g(s), h(t), q(t).squeeze(1), alpha=self.alpha, mask=counts))
        return sum(losses[1:], losses[0])
