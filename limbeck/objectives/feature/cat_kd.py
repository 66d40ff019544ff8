"""Class attention transfer (CAT-KD): the student finds evidence for each class where the teacher finds it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.cam import check_class_maps, check_pooled, class_maps
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_positive, reduce, widen
from limbeck.core.relations import unit
from limbeck.core.trace import Trace


def cat_kd_loss(
    student_maps: Tensor,
    teacher_maps: Tensor,
    *,
    resolution: int = 2,
    normalize: bool = True,
    binarize: bool = False,
    top: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared distance between class activation maps, pooled to a few cells.

    .. math::
        L = \frac{1}{C r^2} \sum_c \left\| \frac{A^S_c}{\|A^S_c\|_2} - \frac{A^T_c}{\|A^T_c\|_2} \right\|_2^2, \qquad
        A_c = \mathrm{pool}_{r \times r}(M_c)

    :math:`M_c` is the classifier's answer for class c at every place, without bias: ``limbeck.core.cam.class_maps``.
    With one cell and no normalisation this is the squared distance of the logits.

    Args:
        student_maps: ``[B, C, H, W]``.
        teacher_maps: ``[B, C, *]`` of any size; detached.
        resolution: :math:`r`; 2 in the authors' CIFAR-100 runs, 4 in those on ImageNet.
        normalize: Give each pooled map length 1, so that only where the evidence is counts, not how much there is.
        binarize: Replace each of the teacher's maps by 1 where it is above its mean magnitude, and 0 elsewhere.
        top: Only the maps of so many classes which the teacher believes in most, or least where it is negative.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: No maps, or of other samples or classes.
        ConfigError: ``resolution`` not above zero, or ``top`` is 0.

    Source:
        Guo et al., "Class Attention Transfer Based Knowledge Distillation", 2023, arXiv 2304.12777.

    Example:
        >>> import torch
        >>> cat_kd_loss(torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]]), resolution=1, normalize=False)
        tensor(0.2500)
    """
    check_class_maps(student_maps, teacher_maps)
    check_positive(resolution, "resolution")
    student, teacher = widen(student_maps), widen(teacher_maps.detach())
    if top is not None:
        if top == 0:
            raise ConfigError("no class is left", where="top", found=top, wanted="1 or more, or -1 or less")
        number = min(abs(top), teacher.shape[1])
        chosen = teacher.mean(dim=(2, 3)).topk(number, dim=1, largest=top > 0).indices[:, :, None, None]
        student, teacher = (m.take_along_dim(chosen, dim=1) for m in (student, teacher))
    if binarize:
        teacher = (teacher > teacher.abs().mean(dim=(2, 3), keepdim=True)).to(teacher.dtype)
    cells = [F.adaptive_avg_pool2d(m, resolution).flatten(2) for m in (student, teacher)]
    own, wanted = (unit(m) for m in cells) if normalize else cells
    return reduce((own - wanted).square().mean(dim=(1, 2)), mask, reduction)


@register(
    Card(
        key="cat_kd",
        name="CAT-KD",
        title="Class Attention Transfer Based Knowledge Distillation",
        year=2023,
        arxiv="2304.12777",
        code="GzyAftermath/CAT-KD",
        knowledge="feature",
        equation=r"\frac{1}{C r^2} \sum_c \left\| \frac{A^S_c}{\|A^S_c\|_2} - \frac{A^T_c}{\|A^T_c\|_2} \right\|_2^2, "
        r"\quad A_c = \mathrm{pool}_{r \times r} \Big( \sum_d W_{cd} f_d \Big)",
        use="Between convolutional networks of any width that pool and classify: nothing is learned beside them, "
        "and what is transferred can be looked at. Without labels it still teaches the classes.",
        defaults={
            "resolution": "2, as in the authors' CIFAR-100 runs; 4 on ImageNet",
            "normalize": "yes, as the paper describes it; several of the authors' runs do without, at other weights",
            "top": "all classes; an analysis of the paper",
            "tap": "the last map, which is the one that is pooled",
            "teacher_tap": "the teacher's last map",
        },
        evidence="parity",
        evidence_note="value and gradient of GzyAftermath/CAT-KD@4467073",
        choices=(
            "The classifier's weight is applied to the map where it stands, which gives the numbers of the paper's "
            "converted network; the student needs no conversion.",
            "The weight is that of the authors' run from ResNet-50 to MobileNetV2; tune it, as they advise: the "
            "weighted loss should be 1 to 50 after an epoch.",
            "The bias takes no part. top counts n classes; the authors' code, with a strict comparison, n - 1.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=40.0,
    ),
    cat_kd_loss,
)
class CATKD(Objective):
    """Class attention transfer; see ``limbeck.functional.cat_kd_loss``.

    >>> loss = 15.0 * CATKD(normalize=False)  # the authors' run from ResNet-32x4 to ResNet-8x4
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(
        self,
        resolution: int = 2,
        normalize: bool = True,
        top: int | None = None,
        tap: str = "stages:-1",
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(resolution, "resolution")
        self.options: dict[str, Any] = {"resolution": resolution, "normalize": normalize, "top": top}
        self.taps = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = ((t, "logits@weight", "penultimate") for t in self.taps)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        for trace, tap in zip((student, teacher), self.taps, strict=True):
            check_pooled(trace[tap], trace["penultimate"], tap)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        own = class_maps(student[self.taps[0]], student["logits@weight"], name="student_feature")
        wanted = class_maps(teacher[self.taps[1]], teacher["logits@weight"].detach(), name="teacher_feature")
        return cat_kd_loss(own, wanted, mask=batch.mask, **self.options)
