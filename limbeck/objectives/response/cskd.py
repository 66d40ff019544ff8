"""Cumulative spatial distillation (CSKD): what a convolutional teacher says at every place goes to every patch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.cam import check_class_maps, check_pooled, class_maps
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.layout import same_places, to_map
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import ConvProjector, LinearProjector
from limbeck.core.reduction import Reduction, check_positive, reduce, widen
from limbeck.core.relations import project
from limbeck.core.trace import Trace

Decay = Literal["linear", "square", "cosine"]


def cskd_loss(
    student_maps: Tensor,
    teacher_maps: Tensor,
    *,
    progress: float | Tensor = 0.0,
    decay: Decay = "linear",
    hard: bool = True,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The student's answer at each place against a blend of the teacher's there and the teacher's as a whole.

    .. math::
        L = \frac{1}{H W} \sum_u \ell(z^S(u), Q(u)), \qquad Q(u) = r(x)\, z^T(u) + (1 - r(x))\, \overline{z^T}, \qquad
        \ell(z, q) = \begin{cases} -\log \mathrm{softmax}_{\arg\max q}(z) & \text{hard} \\
            T^2\, \mathrm{KL}(\mathrm{softmax}(q / T) \,\|\, \mathrm{softmax}(z / T)) & \text{soft} \end{cases}

    :math:`r` falls from 1 to 0 while training progresses: :math:`1 - x`, :math:`(1 - x)^2` or :math:`\cos(\pi x / 2)`.
    So the student learns from what is where at first, and from the whole image in the end.

    Args:
        student_maps: ``[B, C, H, W]``: logits at each place; averaged to the teacher's grid where theirs is finer.
        teacher_maps: ``[B, C, *]``: ``limbeck.core.cam.class_maps`` of the teacher; detached.
        progress: :math:`x`, 0 at the start of training, 1 at its end.
        decay: How :math:`r` falls.
        hard: Take the class that :math:`Q` is for as a label, as the paper's main runs do.
        temperature: :math:`T` of the soft form.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: No maps, or of other samples or classes.
        ConfigError: The temperature is not above zero, or no such decay.

    Source:
        Zhao et al., "Cumulative Spatial Knowledge Distillation for Vision Transformers", 2023, arXiv 2307.08500.

    Example:
        >>> teacher = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])  # two places: the first class, the second class
        >>> [round(float(cskd_loss(teacher, teacher, progress=x)), 4) for x in (0.0, 1.0)]
        [0.1809, 0.6809]
    """
    check_class_maps(student_maps, teacher_maps)
    check_positive(temperature, "temperature")
    left = 1 - torch.as_tensor(progress)
    ratios = {"linear": left, "square": left**2, "cosine": torch.sin(math.pi / 2 * left)}
    if decay not in ratios:
        raise ConfigError("no such decay", where="decay", found=repr(decay), wanted=", ".join(ratios))
    student, teacher = same_places(widen(student_maps), widen(teacher_maps.detach()))
    whole = teacher.mean(dim=(2, 3), keepdim=True)
    wanted = whole + ratios[decay].to(teacher) * (teacher - whole)
    own, wanted = student.movedim(1, -1), wanted.movedim(1, -1)
    if hard:
        values = -soften(own).gather(-1, wanted.argmax(dim=-1, keepdim=True)).squeeze(-1)
    else:
        values = temperature**2 * kl_rows(soften(wanted, temperature), soften(own, temperature))
    return reduce(values.mean(dim=(1, 2)), mask, reduction)


@register(
    Card(
        key="cskd",
        name="CSKD",
        title="Cumulative Spatial Knowledge Distillation for Vision Transformers",
        year=2023,
        arxiv="2307.08500",
        code="Zzzzz1/CSKD",
        knowledge="response",
        equation=r"\frac{1}{H W} \sum_u \ell\big(z^S(u),\; r\, z^T(u) + (1 - r)\, \overline{z^T}\big)",
        use="From a convolutional network to a vision transformer: its patches learn what is where, without features "
        "that would have to match. The teacher must pool its last map and classify the mean.",
        defaults={
            "decay": "linear, as in the authors' runs",
            "hard": "yes, as in the authors' runs",
            "temperature": "1, as in the authors' configuration",
            "tap": "the student's last map or tokens",
            "teacher_tap": "the teacher's last map, which is the one that is pooled",
        },
        evidence="parity",
        evidence_note="value and gradient of Zzzzz1/CSKD@fa0d8b8",
        choices=(
            "The patches have a head of their own, dropped after training; in the paper it is that of the distillation "
            "token, which then ships. DeiT's distillation of that token is no part of this loss.",
            "The soft form is the mean over places, as the hard one; the authors' code sums it over them.",
        ),
        tasks=("classification", "cross-architecture"),
        with_labels={"cross_entropy": 0.5},
    ),
    cskd_loss,
)
class CSKD(Objective):
    """Cumulative spatial distillation; see ``limbeck.functional.cskd_loss``."""

    contract = Contract(normalizer="samples", at_equal=None, mask=True)
    dense: nn.Module | None

    def __init__(
        self,
        decay: Decay = "linear",
        hard: bool = True,
        temperature: float = 1.0,
        tap: str = "stages:-1",
        teacher_tap: str = "stages:-1",
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.decay, self.hard, self.temperature = decay, hard, temperature
        self.tap, self.teacher_tap, self.dense, self.student_taps = tap, teacher_tap, None, (tap,)
        self.teacher_taps = (teacher_tap, "logits@weight", "logits@bias", "penultimate")

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        check_pooled(teacher[self.teacher_tap], teacher["penultimate"], self.teacher_tap)
        feature, classes = student[self.tap], len(teacher["logits@weight"])
        layers: list[nn.Module] = [ConvProjector(feature.shape[1], classes, 1)]
        if feature.ndim == 3:
            layers = [nn.LayerNorm(feature.shape[2]), LinearProjector(feature.shape[2], classes)]
        self.dense = nn.Sequential(*layers).to(feature.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        own = to_map(project(self.ready("dense"), student[self.tap], "student_feature"), "student_feature")
        classifier = teacher["logits@weight"].detach(), teacher["logits@bias"].detach()
        wanted = class_maps(teacher[self.teacher_tap], *classifier, "teacher_feature")
        options = {n: getattr(self, n) for n in ("decay", "hard", "temperature")}
        return cskd_loss(own, wanted, progress=batch.progress, mask=batch.mask, **options)
