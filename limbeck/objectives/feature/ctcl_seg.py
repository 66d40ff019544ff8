"""CTCL: low layers alike, and of high layers and answers what the other model has the better of, place by place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.layers import SameWidth
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract
from limbeck.core.reduction import (
    Reduction,
    check_features,
    check_inside,
    check_logits,
    check_positive,
    reduce,
    widen,
)
from limbeck.core.relations import channel_dim, unit
from limbeck.core.trace import Trace


def ctcl_seg_loss(
    student_low: Tensor,
    teacher_low: Tensor,
    student_high: Tensor,
    teacher_high: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    low: float = 0.1,
    high: float = 0.1,
    pixel: float = 1.0,
    regions: int = 4,
    temperature: float = 1.0,
    only_right: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One model's part of a collaboration: what it learns from the other.

    .. math::
        L = \frac a 2\, \overline{\| \hat F^l_s - \hat F^l_t \|^2}
            + b\, \overline{[\ell^t_r < \ell^s_r]\, \big\| \hat F^h_s - \hat F^h_t \big\|^2_r}
            + c\, T^2\, \overline{[\ell^t_i < \ell^s_i]\, \mathrm{KL}(p^t_i \| p^s_i)}

    :math:`\hat F` has length 1 at each place, so the first term is one minus a cosine. :math:`\ell` is the
    cross-entropy with the label, at a pixel i or the mean of a region r; bars are means over places, over regions and
    over pixels, those without a label left out. Only where the other model is the more reliable one does this one learn
    from its high layer and its answer, so that never both learn at one place; where they are equal, neither does. Of
    low layers both learn everywhere.

    Args:
        student_low, teacher_low: Maps, tokens or vectors of equal shape; the teacher's are detached.
        student_high, teacher_high: The same of a high layer.
        student_logits, teacher_logits: Of pixels, ``[B, C, h, w]`` (brought to the labels' size) or ``[B, H, W, C]``;
            of whole images, ``[B, C]``. The teacher's are detached.
        labels: ``[B, H, W]`` or ``[B]`` integers, negative where there is none.
        low, high, pixel: :math:`a, b, c`.
        regions: The map is cut into so many by so many, or as many places as it has.
        temperature: :math:`T`.
        only_right: Answers are learned only where the other's is the label.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes that do not fit, or no labels.

    Source:
        Zhu et al., "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic
        Segmentation", 2023, arXiv 2307.12574.

    >>> import torch
    >>> layers = [torch.ones(1, 2, 4, 4)] * 4
    >>> unsure, sure = torch.zeros(1, 2, 4, 4), torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    >>> right = torch.zeros(1, 4, 4, dtype=torch.long)
    >>> ctcl_seg_loss(*layers, unsure, sure, right), ctcl_seg_loss(*layers, sure, unsure, right)
    (tensor(0.3278), tensor(0.))
    """
    check_positive(temperature, "temperature")
    own, other = of_labels(student_logits, labels), of_labels(teacher_logits.detach(), labels)
    check_logits(own, other, labels)
    target, labelled = class_labels(labels, own.shape[-1], "CTCL")
    ours, theirs = (-soften(z).gather(-1, target.unsqueeze(-1)).squeeze(-1) for z in (own.detach(), other))
    counts = labelled.flatten(1).sum(dim=1) if labelled.ndim > 1 else labelled
    learns = labelled & (theirs < ours)
    if only_right:
        learns = learns & (other.argmax(dim=-1) == target)
    divergence = kl_rows(soften(other, temperature), soften(own, temperature)).masked_fill(~learns, 0.0)
    answers = temperature**2 * divergence.flatten(1).sum(dim=1) if divergence.ndim > 1 else temperature**2 * divergence
    rows = pixel * answers / counts.clamp(min=1)
    rows = rows + low / 2 * _apart(student_low, teacher_low).view(len(rows), -1).mean(dim=1)
    rows = rows + high * _selected(student_high, teacher_high, (ours, theirs), labelled, regions)
    return reduce(rows, None, reduction)


def of_labels(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Logits with classes last, at the places that have labels: maps of scores ``[B, C, h, w]`` come to their size.

    >>> import torch
    >>> of_labels(torch.zeros(2, 5, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 8, 5])
    """
    if labels is None or labels.ndim not in (1, 3) or logits.ndim != labels.ndim + 1:
        found = f"labels {'none' if labels is None else list(labels.shape)} and logits {list(logits.shape)}"
        raise TensorError("these are neither of pixels nor of images", where="labels", found=found)
    if labels.ndim == 1 or logits.shape[:-1] == labels.shape:
        return logits
    size = (labels.shape[1], labels.shape[2])
    if logits.shape[2:] != size:
        logits = F.interpolate(widen(logits), size, mode="bilinear", align_corners=False)
    return logits.movedim(1, -1)


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of directions at each place, ``[B, *]``; 0 where both are zero."""
    check_features(student, teacher)
    dim = channel_dim(student)
    return (unit(widen(student), dim) - unit(widen(teacher.detach()), dim)).square().sum(dim=dim)


def _selected(
    student: Tensor, teacher: Tensor, losses: tuple[Tensor, Tensor], labelled: Tensor, regions: int
) -> Tensor:
    """Squared distance of directions in the regions where the other model does better, ``[B]``."""
    distance = _apart(*(f[..., None, None] if f.ndim == 2 else to_map(f, "feature") for f in (student, teacher)))
    grid = (min(regions, distance.shape[1]), min(regions, distance.shape[2]))

    def pooled(values: Tensor) -> Tensor:
        values = values.view(-1, 1, 1) if values.ndim == 1 else values
        return F.adaptive_avg_pool2d(values.to(distance.dtype).unsqueeze(1), grid).squeeze(1)

    ours, theirs = (pooled(values.masked_fill(~labelled, 0.0)) for values in losses)
    known = pooled(labelled) > 0  # means of both over the same pixels, so their sums tell as well
    values = pooled(distance).masked_fill(~(known & (theirs < ours)), 0.0)
    return values.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)


@register(
    Card(
        key="ctcl_seg",
        name="CTCL (HFD + BSD)",
        title="A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic "
        "Segmentation",
        year=2023,
        arxiv="2307.12574",
        knowledge="feature",
        equation=r"a \big(1 - \overline{\cos}(F^l_s, F^l_t)\big) + b\, \overline{[\ell^t_r < \ell^s_r]\, "
        r"\| \hat F^h_s - \hat F^h_t \|^2_r} "
        r"+ c\, T^2\, \overline{[\ell^t_i < \ell^s_i]\, \mathrm{KL}(p^t_i \| p^s_i)}",
        use="Two models of unlike kinds that learn at once, each from what the other has the better of: scheme "
        "mutual with between: ctcl_seg. With a finished teacher, to learn from it only where it is right.",
        defaults={
            "low": "0.1, as high; 1 for pixel: the text at hand gives no numbers",
            "regions": "4 by 4: no number is given",
            "temperature": "1: no number is given",
            "low_tap": "the first stage",
            "high_tap": "the last stage",
            "teacher_low_tap": "as low_tap; teacher_high_tap as high_tap",
        },
        evidence="reading",
        evidence_note="against loops over samples, regions and pixels from the definition",
        choices=(
            "The abstract and the beginning of the paper were read: what is compared (low layers, regions, pixels) and "
            "that the more reliable one gives is theirs; how reliability is told, by the cross-entropy, is not.",
            "Low layers are compared by their cosine; the exchange through the other model's next block is not there.",
            "A model of another width gets a 1x1 convolution to the other's, learned beside it.",
            "Each sample counts alike, whatever share of its pixels has labels.",
            "The two models are usually each other's; any method between two models works in scheme mutual.",
        ),
        needs=("labels",),
        tasks=("segmentation", "classification"),
        with_labels={"cross_entropy": 1.0},
    ),
    ctcl_seg_loss,
)
class CTCLSeg(SameWidth):
    """What one model learns from another that may know better or worse; see ``limbeck.functional.ctcl_seg_loss``.

    Args:
        low_tap, high_tap: The low and the high layer.
        teacher_low_tap, teacher_high_tap: The teacher's, where they are called otherwise.
        low, high, pixel, regions, temperature, only_right: As in the function.

    >>> CTCLSeg().student_taps
    ('stages:0', 'stages:-1', 'logits')
    """

    contract = Contract(normalizer="samples", stop_gradient=True)

    def __init__(
        self,
        low_tap: str = "stages:0",
        high_tap: str = "stages:-1",
        teacher_low_tap: str | None = None,
        teacher_high_tap: str | None = None,
        low: float = 0.1,
        high: float = 0.1,
        pixel: float = 1.0,
        regions: int = 4,
        temperature: float = 1.0,
        only_right: bool = False,
    ) -> None:
        super().__init__([low_tap, high_tap], [teacher_low_tap or low_tap, teacher_high_tap or high_tap])
        self.student_taps, self.teacher_taps = (*self.student_taps, "logits"), (*self.teacher_taps, "logits")
        for name, value in (("low", low), ("high", high), ("pixel", pixel)):
            check_inside(value, name, 0.0, float("inf"), closed=True)
        check_positive(temperature, "temperature")
        if regions < 1:
            raise ConfigError("at least one region is wanted", where="regions", found=regions)
        self.low, self.high, self.pixel = low, high, pixel
        self.regions, self.temperature, self.only_right = regions, temperature, only_right

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        (own_low, other_low), (own_high, other_high) = self.features(student, teacher)
        return ctcl_seg_loss(
            own_low,
            other_low,
            own_high,
            other_high,
            student.logits,
            teacher.logits,
            batch.require("labels"),
            low=self.low,
            high=self.high,
            pixel=self.pixel,
            regions=self.regions,
            temperature=self.temperature,
            only_right=self.only_right,
        )
