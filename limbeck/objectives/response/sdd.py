"""Scale decoupled distillation (SDD): predictions for parts of the image, and those that disagree count more."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.cam import check_pooled, class_maps
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, check_positive, fit_mask, reduce
from limbeck.core.schedules import WarmUp
from limbeck.core.trace import Trace
from limbeck.objectives.response.dkd import dkd_loss
from limbeck.objectives.response.kd import kd_loss

Base = Literal["kd", "dkd"]


def sdd_loss(
    student_regions: Tensor,
    teacher_regions: Tensor,
    labels: Tensor | None = None,
    *,
    base: Base = "dkd",
    complementary: float = 2.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""A logit loss on every region of the image, weighted by whether the teacher is as right there as on the whole.

    .. math:: L = \frac 1 N \sum_{n=1}^N w_n D\left( z^T_n, z^S_n \right), \qquad
        w_n = \begin{cases} 1 & [\hat y_n = y] = [\hat y_1 = y] \\ \beta & \text{else} \end{cases}, \quad
        \hat y_n = \arg\max_c z^T_{nc}

    Regions that are right where the whole is wrong, or the reverse, are complementary: there are several things to see.

    Args:
        student_regions: ``[B, N, C]`` logits of each region, the whole image first: ``region_logits``.
        teacher_regions: The same; detached.
        labels: Integers ``[B]``, negative where a sample has none; such a sample does not count.
        base: :math:`D`: ``"kd"`` or ``"dkd"``, each with the defaults of its own.
        complementary: :math:`\beta`; 2 in the authors' code.
        temperature: Of the base loss; 4 in the authors' code.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count and have a label, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: No labels, soft labels, or regions that do not fit.
        ConfigError: No such base, or a temperature that is not above zero.

    Source: Wei et al., "Scale Decoupled Distillation", 2024, arXiv 2403.13512.

    >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    >>> sdd_loss(student, teacher, torch.tensor([0]), base="kd", temperature=1.0)  # the second region: twice
    tensor(0.4917)
    """
    check_features(student_regions, teacher_regions, least=3)
    target, labelled = class_labels(labels, student_regions.shape[-1], "SDD", others=True)
    if target.shape != student_regions.shape[:1]:
        raise TensorError("a label for each sample is wanted", where="labels", found=list(target.shape))
    each = target.unsqueeze(1).expand(student_regions.shape[:2])
    losses = {"kd": kd_loss, "dkd": dkd_loss}
    if base not in losses:
        raise ConfigError("no such loss", where="base", found=repr(base), wanted="'kd' or 'dkd'")
    values = losses[base](student_regions, teacher_regions, each, temperature=temperature, reduction="none")
    right = teacher_regions.argmax(dim=-1) == each
    weight = torch.where(right == right[:, :1], 1.0, complementary).to(values.dtype)
    counts = labelled if mask is None else labelled & fit_mask(mask, labelled)
    return reduce((weight * values).mean(dim=1), counts, reduction)


def region_logits(maps: Tensor, scales: list[int]) -> Tensor:
    """The classifier's answer in each cell of each grid, ``[B, N, C]``, from what it says everywhere, ``[B, C, H, W]``.

    >>> region_logits(torch.zeros(2, 5, 8, 8), [1, 2, 4]).shape
    torch.Size([2, 21, 5])
    """
    return torch.cat([F.adaptive_avg_pool2d(maps, k).flatten(2) for k in scales], dim=2).transpose(1, 2)


@register(
    Card(
        key="sdd", name="SDD", title="Scale Decoupled Distillation", year=2024, arxiv="2403.13512",
        code="shicaiwei123/SDD-CVPR2024", knowledge="response",
        equation=r"\frac 1 N \sum_n w_n D(z^T_n, z^S_n), \quad w_n = \beta \text{ where the teacher is right about "
        r"the region and wrong about the image, or the reverse, else } 1",
        use="For images with several things in them and for classes that look alike, between networks that pool a map "
        "and classify it; nothing is learned beside the student.",
        defaults={
            "base": "dkd, the paper's best",
            "complementary": "2, as in the authors' code",
            "scales": "1, 2 and 4; the paper takes 1 and 2 for networks of one family",
            "temperature": "4, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of shicaiwei123/SDD-CVPR2024@e412036 (sdd_kd_loss, multi_dkd), and its "
        "regions' logits (SPP)",
        choices=(
            "The classifier is applied to the map where it stands and then pooled, which gives the same logits.",
            "The code's NKD on regions, which leaves the target among the others, is left out.",
        ),
        needs=("labels",), with_labels={"cross_entropy": 1.0}, weight=WarmUp(0.083),
    ),
    sdd_loss,
)  # fmt: skip
class SDD(Objective):
    """Scale decoupled distillation; see ``limbeck.functional.sdd_loss``.

    Args:
        base: The loss on each region.
        complementary: Weight of regions about which the teacher is right where it is wrong about the image, or reverse.
        scales: Cells along each side, the whole image (1) first.
        temperature: Of the base loss.
        tap: The last map, which is pooled and classified. teacher_tap: The teacher's.
    """

    contract = Contract(normalizer="labels", mask=True)

    def __init__(
        self, base: Base = "dkd", complementary: float = 2.0, scales: list[int] | None = None,
        temperature: float = 4.0, tap: str = "stages:-1", teacher_tap: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(temperature, "temperature")
        self.base, self.complementary, self.temperature = base, complementary, temperature
        self.scales = [1, 2, 4] if scales is None else scales
        if self.scales[:1] != [1] or min(self.scales) < 1:
            raise ConfigError("the whole image comes first", where="scales", found=scales, wanted="1, then others")
        self.taps = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = ((t, "logits@weight", "logits@bias", "penultimate") for t in self.taps)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        for trace, tap in zip((student, teacher), self.taps, strict=True):
            check_pooled(trace[tap], trace["penultimate"], tap)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        own, told = (
            region_logits(class_maps(trace[tap], trace["logits@weight"], trace["logits@bias"], tap), self.scales)
            for trace, tap in zip((student, teacher), self.taps, strict=True)
        )
        options = {"base": self.base, "complementary": self.complementary, "temperature": self.temperature}
        return sdd_loss(own, told, batch.require("labels"), mask=batch.mask, **options)  # type: ignore[arg-type]
