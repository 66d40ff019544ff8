"""Channel-wise distillation (CWD): each channel of the student lights up at the places where the teacher's does."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.layers import SameWidth, Tap
from limbeck.core.objective import Contract
from limbeck.core.reduction import Reduction, check_features, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim
from limbeck.core.trace import Trace


def cwd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of the teacher's channels from the student's, each channel as a distribution over places.

    .. math::
        L = \frac{T^2}{C} \sum_c \sum_i \phi(y^T_c)_i \log \frac{\phi(y^T_c)_i}{\phi(y^S_c)_i}, \qquad
        \phi(y_c)_i = \frac{\exp(y_{c,i} / T)}{\sum_j \exp(y_{c,j} / T)}

    Args:
        student_feature: Maps ``[B, C, *]`` or tokens ``[B, N, C]``, already of the teacher's width.
        teacher_feature: The same shape; detached.
        temperature: :math:`T`: the larger, the wider the region that counts. 4 in the paper.
        mask: Booleans, True where a sample ``[B]`` or a place (``[B, *]``, ``[B, N]``) counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes or without places, or a mask that does not fit.
        ConfigError: A temperature that is not above zero.

    Source:
        Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021, arXiv 2011.13256.

    Example:
        >>> import torch
        >>> cwd_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]]).log(), temperature=1.0)
        tensor(0.6931)
    """
    check_features(student_feature, teacher_feature, least=3)
    check_positive(temperature, "temperature")
    dim = channel_dim(student_feature)
    student, teacher = (
        widen(f).movedim(dim, 1).flatten(2) for f in (student_feature, teacher_feature.detach())
    )  # [B, C, places]
    if mask is not None:
        counts = fit_mask(mask, student_feature.select(dim, 0)).flatten(1)
        mask = counts.any(dim=1)
        hidden = ~(counts | ~mask.unsqueeze(1)).unsqueeze(1)  # a sample without a place keeps all: no NaN in gradients
        student, teacher = (f.masked_fill(hidden, -math.inf) for f in (student, teacher))
    values = temperature**2 * kl_rows(soften(teacher, temperature), soften(student, temperature)).mean(dim=1)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="cwd",
        name="CWD",
        title="Channel-wise Knowledge Distillation for Dense Prediction",
        year=2021,
        arxiv="2011.13256",
        code="irfanICMLL/TorchDistiller",
        knowledge="feature",
        equation=r"\frac{T^2}{C} \sum_c \mathrm{KL}\left( \phi(y^T_c) \,\|\, \phi(y^S_c) \right), \quad "
        r"\phi(y_c) = \mathrm{softmax}_{places}(y_c / T)",
        use="Made for segmentation and detection: on the logit maps of a dense predictor (tap='logits') or on "
        "features. Looks at where a channel is strong and not at how strong, so scales need not agree.",
        defaults={
            "temperature": "4, the paper's value",
            "tap": "the last layer of maps; the paper takes the logit map or the last feature map",
        },
        evidence="parity",
        evidence_note="value and gradient of irfanICMLL/TorchDistiller@78bac7c and open-mmlab/mmrazor@90c7af1",
        choices=(
            "The paper weighs logit maps with 3; the same is its usual weight here, on features too.",
            "A student of another width gets a 1x1 convolution without bias, as the paper's for features.",
        ),
        tasks=("classification", "segmentation", "detection"),
        with_labels={"cross_entropy": 1.0},
        weight=3.0,
    ),
    cwd_loss,
)
class CWD(SameWidth):
    """Channel-wise distillation, summed over pairs of layers; see ``limbeck.functional.cwd_loss``.

    Args:
        tap: Where to listen: a place, or several, paired in order (a plural role: by resolution or depth).
        teacher_tap: The teacher's, where they are called otherwise.
        temperature: T.

    >>> loss = 3.0 * CWD("layer3", temperature=4.0)
    """

    contract = Contract(normalizer="samples", mask=True, temperature="squared")

    def __init__(self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None, temperature: float = 4.0) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        pairs = self.features(student, teacher)
        losses = [cwd_loss(s, t, temperature=self.temperature, mask=batch.mask) for s, t in pairs]
        return sum(losses[1:], losses[0])
