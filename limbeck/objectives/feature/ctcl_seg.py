"""CTCL: low layers alike, and of high layers and answers what the other model has the better of, place by place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layers import SameWidth
from limbeck.core.objective import Contract
from limbeck.core.reduction import Reduction, check_inside, check_positive, reduce
from limbeck.core.trace import Trace
from limbeck.objectives.parts.reliability import apart, better_answers, better_regions


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
    cross-entropy with the label, at a pixel i or the mean of a region r; bars are means over places, regions and
    labelled pixels. Of high layers and answers a model learns only where the other is the more reliable one, so that
    never both learn at one place; of low layers everywhere.

    Args:
        student_low, teacher_low: Maps, tokens or vectors of equal shape; the teacher's are detached.
        student_high, teacher_high: The same of a high layer.
        student_logits, teacher_logits: ``[B, C, h, w]`` (brought to the labels' size), ``[B, H, W, C]`` or ``[B, C]``.
        labels: ``[B, H, W]`` or ``[B]`` integers, negative where there is none.
        low, high, pixel: :math:`a, b, c`.
        regions: The map is cut into so many by so many, or as many places as it has.
        temperature: :math:`T`.
        only_right: Answers are learned only where the other's is the label.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes that do not fit, or no labels.

    Source: "A Good Student is Cooperative and Reliable", 2023, arXiv 2307.12574.

    >>> import torch
    >>> layers, unsure, sure = [torch.ones(1, 3)] * 4, torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> label = torch.tensor([0])
    >>> ctcl_seg_loss(*layers, unsure, sure, label), ctcl_seg_loss(*layers, sure, unsure, label)
    (tensor(0.3278), tensor(0.))
    """
    check_positive(temperature, "temperature")
    answers, losses, labelled = better_answers(student_logits, teacher_logits, labels, temperature, only_right)
    rows = pixel * answers + low / 2 * apart(student_low, teacher_low).view(len(answers), -1).mean(dim=1)
    rows = rows + high * better_regions(student_high, teacher_high, losses, labelled, regions)
    return reduce(rows, None, reduction)


@register(
    Card(
        key="ctcl_seg",
        name="CTCL (HFD + BSD)",
        title="A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic "
        "Segmentation",
        year=2023,
        arxiv="2307.12574",
        knowledge="feature",
        equation=r"a (1 - \overline{\cos}(F^l_s, F^l_t)) + b\, \overline{[\ell^t_r < \ell^s_r]\, \| \hat F^h_s - "
        r"\hat F^h_t \|^2_r} + c\, T^2\, \overline{[\ell^t_i < \ell^s_i]\, \mathrm{KL}(p^t_i \| p^s_i)}",
        use="Two models of unlike kinds that learn at once, each from what the other has the better of: scheme "
        "mutual with between: ctcl_seg. With a finished teacher, to learn from it only where it is right.",
        defaults={
            "low": "0.1, as high; 1 for pixel: the text at hand gives no numbers",
            "regions": "4 by 4; temperature 1: no numbers are given",
            "low_tap": "the first stage; high_tap the last",
            "teacher_low_tap": "as low_tap",
        },
        evidence="reading",
        evidence_note="against loops over samples, regions and pixels from the definition",
        choices=(
            "The abstract and the beginning of the paper were read: what is compared (low layers, regions, pixels) and "
            "that the more reliable one gives is theirs; how reliability is told, by the cross-entropy, is not.",
            "Low layers are compared by their cosine; the exchange through the other model's next block is not there.",
            "A model of another width gets a 1x1 convolution; each sample counts alike, however much of it has labels.",
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
        self.options: dict[str, Any] = {"low": low, "high": high, "pixel": pixel}
        self.options |= {"regions": regions, "temperature": temperature, "only_right": only_right}

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        (own_low, other_low), (own_high, other_high) = self.features(student, teacher)
        answers = (student.logits, teacher.logits, batch.require("labels"))
        return ctcl_seg_loss(own_low, other_low, own_high, other_high, *answers, **self.options)
