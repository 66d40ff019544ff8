"""Multi-scale decoupled contrast (MSDCRD): windows of the last map at several sizes, told apart within a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.labels import class_labels
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import same_places, windows
from limbeck.core.matching import only
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import connector
from limbeck.core.reduction import Reduction, check_features, check_positive, check_same_shape, fit_mask, reduce, widen
from limbeck.core.relations import check_same_batch, cosines, pooled
from limbeck.core.schedules import WarmUp
from limbeck.core.trace import Trace


@without_autocast
def msdcrd_loss(
    student_windows: Tensor,
    teacher_windows: Tensor,
    *,
    temperature: float = 0.1,
    sample: float = 1.0,
    channel: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast between samples, window by window, and between channels.

    .. math::
        L &= \lambda_1 \frac 1 N \sum_n \frac{\ell(U_n, V_n) + \ell(V_n, U_n)} 2 + \lambda_2 \, \ell(U^\top, V^\top) \\
        \ell(A, B) &= - \frac 1 {|A|} \sum_i \log \frac{e^{\cos(a_i, b_i) / \tau}}{\sum_j e^{\cos(a_i, b_j) / \tau}}

    :math:`U_n` are the student's n-th windows of all samples, one row each; in the second part a row is a channel with
    its values in all windows of the batch. Both tie the samples of a batch together; no memory is needed.

    Args:
        student_windows: ``[B, N, D]``.
        teacher_windows: The same shape; detached.
        temperature: :math:`\tau`.
        sample: :math:`\lambda_1`.
        channel: :math:`\lambda_2`.
        mask: Booleans ``[B]`` or ``[B, N]``, True where a sample or window counts.
        reduction: ``"mean"`` over samples with windows that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Windows of different shapes, or a mask that does not fit.
        ConfigError: ``temperature`` not above zero.

    Source: Wang and Wang, "... via Multi-Scale Feature Decoupling", 2025, arXiv 2502.05835.

    >>> import torch
    >>> msdcrd_loss(torch.eye(2).unsqueeze(1), torch.eye(2).unsqueeze(1), temperature=1.0, channel=0.0)
    tensor(0.3133)
    """
    check_positive(temperature, "temperature")
    check_features(student_windows, teacher_windows, least=3)
    s, t = widen(student_windows), widen(teacher_windows.detach())
    counts = torch.ones_like(s[..., 0], dtype=torch.bool) if mask is None else fit_mask(mask, s[..., 0])
    scores = cosines(s.transpose(0, 1), t.transpose(0, 1)) / temperature
    there = counts.T
    each = [only(x, there.unsqueeze(1)).logsumexp(dim=2) - x.diagonal(dim1=1, dim2=2) for x in (scores, scores.mT)]
    values, who = pooled((sample * 0.5 * (each[0] + each[1])).T.unsqueeze(2), counts)
    if channel:
        rows = (x.masked_fill(~counts.unsqueeze(2), 0.0).flatten(0, 1).T for x in (s, t))
        alike = cosines(*rows) / temperature
        values = values + channel * (alike.logsumexp(dim=1) - alike.diagonal()).mean()
    return reduce(values.squeeze(1), who, reduction)


@register(
    Card(
        key="msdcrd",
        name="MSDCRD",
        title="Contrastive Representation Distillation via Multi-Scale Feature Decoupling",
        year=2025,
        arxiv="2502.05835",
        knowledge="relation",
        equation=r"\frac{\lambda_1} N \sum_n \frac{\ell(U_n, V_n) + \ell(V_n, U_n)} 2 + \lambda_2 \ell(U^\top, V^\top)",
        use="CRD's contrast without its memory bank: local windows give a batch enough samples. For pairs of any kind.",
        defaults={
            "temperature": "0.1, open in what could be read, as are sample, channel, threshold and scales",
            "tap": "the last layer of maps",
        },
        evidence="reading",
        choices=(
            "Equations after the abstract, which has sliding windows, categories of samples, and a sample-wise and a "
            "feature-wise contrast within one batch.",
            "A window counts where the teacher's classifier, read at the window, gives the label or is sure of another "
            "class; all count where that classifier does not read this layer.",
            "Weights warm up over 20 of 240 epochs.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
        weight=WarmUp(1 / 12),
    ),
    msdcrd_loss,
)
class MSDCRD(LayerObjective):
    """Multi-scale decoupled contrast; see ``limbeck.functional.msdcrd_loss``.

    Where channels differ, a 1x1 convolution and batch norm lead to the teacher's; they are dropped after training.

    Args:
        tap: A layer of maps or tokens; of two sizes the larger is pooled.
        teacher_tap: The teacher's, where it is called otherwise.
        scales: Window sizes beside the whole map; default all powers of two.
        threshold: How sure of another class the teacher must be for a window to count; 0: all windows do.
    """

    contract = Contract(normalizer="samples", at_equal=None, decomposes=False)

    def __init__(
        self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None, scales: list[int] | None = None,
        temperature: float = 0.1, sample: float = 1.0, channel: float = 1.0, threshold: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(tap, teacher_tap)
        check_positive(temperature, "temperature")
        self.teacher_taps = (*self.teacher_taps, "logits@weight", "logits@bias")
        self.scales, self.temperature, self.threshold = scales, temperature, threshold
        self.sample, self.channel = sample, channel
        self.embed: nn.Module | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = same_places(*self.pair(student, teacher))
        self.embed = nn.Identity() if s.shape[1] == t.shape[1] else connector(s, t)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        check_same_batch(s, t, "student_feature", "teacher_feature")
        s, t = same_places(s, t)
        s, t = windows(self.ready("embed")(s), self.scales), windows(t, self.scales)
        weights, mask = (self.temperature, self.sample, self.channel), self._judge(t, teacher, batch)
        return msdcrd_loss(s, t, temperature=weights[0], sample=weights[1], channel=weights[2], mask=mask)

    def _judge(self, cut: Tensor, teacher: Trace, batch: Batch) -> Tensor:
        """Which windows count: those of the label, and those sure of another class."""
        weight, bias = teacher["logits@weight"].detach(), teacher["logits@bias"].detach()
        labels, labelled = class_labels(batch.require("labels"), len(weight), "MSDCRD")
        check_same_shape(cut[:, 0, 0], labels, "the samples", "labels")
        if weight.shape[1] != cut.shape[2]:
            return torch.ones_like(cut[..., 0], dtype=torch.bool)
        sure, said = (widen(cut) @ widen(weight).T + bias).softmax(dim=2).max(dim=2)
        return ((said == labels.unsqueeze(1)) & labelled.unsqueeze(1)) | (sure >= self.threshold)
