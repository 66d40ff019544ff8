"""TGeo-KD: how much of each sample's loss is the teacher's, learned from the triangle of student, teacher and truth."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.labels import class_labels, class_means
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, check_same_shape, fit_mask, reduce
from limbeck.core.relations import project
from limbeck.core.trace import Trace


def tgeo_kd_loss(
    ratio: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distillation and cross-entropy, fused place by place.

    .. math:: L = \frac 1 N \sum_i \alpha_i \tau^2\,\mathrm{KL}(p^T_{i,\tau} \,\|\, p^S_{i,\tau})
        + (1 - \alpha_i)\,\mathrm{CE}(z^S_i, y_i)

    Args:
        ratio: :math:`\alpha`, ``[B, *]``, the teacher's share of each place.
        student_logits, teacher_logits: ``[B, *, C]``; the teacher's are detached.
        labels: ``[B, *]`` integers, negative where a place has none; it does not count then.
        temperature: :math:`\tau`; 1.5 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit, or a label names no class.
        ConfigError: A temperature that is not above zero.

    Source: Hu et al., "Less or More From Teacher: Exploiting Trilateral Geometry For KD", 2023, arXiv 2312.15112.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> tgeo_kd_loss(torch.tensor([0.5]), student, teacher, torch.tensor([0]), temperature=1.0)
        tensor(0.8251)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    labels, labelled = class_labels(labels, student_logits.shape[-1], "TGeo-KD")
    own = -soften(student_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    check_same_shape(own, ratio, "labels", "ratio")
    other = temperature**2 * kl_rows(soften(teacher_logits.detach(), temperature), soften(student_logits, temperature))
    values = ratio.to(own.dtype) * other + (1 - ratio.to(own.dtype)) * own
    return reduce(values, labelled if mask is None else labelled & fit_mask(mask, values), reduction)


def trilateral_state(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, class_means: Tensor) -> Tensor:
    """What the ratio is told of each place, ``[B, *, 9 C]``: four predictions and five squared differences of them.

    S of the student, T of the teacher, G the label, M the teacher's mean over the label's class (a row of
    ``class_means``): S, T, G, M, then (M - S)^2, (G - S)^2, (T - S)^2, (T - G)^2, (M - G)^2. Constants all.
    """
    check_logits(student_logits, teacher_logits, labels)
    labels, _ = class_labels(labels, student_logits.shape[-1], "TGeo-KD")
    s, t = (soften(z.detach()).exp() for z in (student_logits, teacher_logits))
    m = class_means.to(s.dtype)[labels]
    g = (labels.unsqueeze(-1) == torch.arange(s.shape[-1], device=s.device)).to(s.dtype)
    gaps = [(m - s).square(), (g - s).square(), (t - s).square(), (t - g).square(), (m - g).square()]
    return torch.cat([s, t, g, m, *gaps], dim=-1)


@register(
    Card(
        key="tgeo_kd",
        name="TGeo-KD",
        title="Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation",
        year=2023,
        arxiv="2312.15112",
        code="Chengming0501/TGeo-KD",
        knowledge="response",
        equation=r"\alpha_i \tau^2 \mathrm{KL}(p^T_{i,\tau} \| p^S_{i,\tau}) + (1 - \alpha_i) \mathrm{CE}(z^S_i, y_i)",
        use="Where the teacher is wrong on some samples: a small network learns how much to trust it on each. It holds "
        "the labels' loss already; the scheme bilevel trains that network, which is fixed without it.",
        defaults={"temperature": "1.5, the authors'"},
        evidence="parity",
        evidence_note="state, controller and distillation term of Chengming0501/TGeo-KD@5a69cbe; the rest by formula",
        choices=(
            "Cross-entropy of logits; the released script takes that of probabilities.",
            "The controller's gradient runs through one step of the student; in the released script it gets none.",
        ),
        needs=("labels", "answers"),
        scheme="bilevel",
        cost="With its scheme a step is two: one more goes forward and backward through the gradient of the other.",
    ),
    tgeo_kd_loss,
)
class TGeoKD(Objective):
    """TGeo-KD's weighting; see ``limbeck.functional.tgeo_kd_loss`` and the scheme ``bilevel``, which trains it.

    Without it the controller stays as it is, about one half for every sample. One of your own, which takes
    ``trilateral_state`` to ``[*, 1]``, may be put in before set-up: ``objective.controller = trained``.

    Args:
        temperature: Of both predictions.

    >>> loss = TGeoKD(temperature=4.0)
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)
    controller: nn.Module | None

    def __init__(self, temperature: float = 1.5) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature
        self.controller = None
        self.unrolled = False  # set while the controller learns: then the gradient runs through its ratios
        self.register_buffer("class_means", None)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        classes = student.logits.shape[-1]
        means, counts = class_means(self._rows(data, classes), classes)
        overall = (means * counts.unsqueeze(1)).sum(dim=0) / counts.sum().clamp(min=1)
        self.class_means = torch.where(counts.unsqueeze(1) > 0, means, overall)  # a class nobody has: the mean over all
        if self.controller is None:
            layers = [m for a, b in ((9 * classes, 32), (32, 16)) for m in (nn.Linear(a, b), nn.LeakyReLU())]
            self.controller = nn.Sequential(*layers, nn.Linear(16, 1), nn.Sigmoid()).requires_grad_(False)

    def _rows(self, data: DataInfo, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        for answer, known in data.all_answers("tgeo_kd"):
            labels, labelled = class_labels(known.labels, classes, "TGeo-KD")
            yield soften(answer.logits[labelled]).exp(), labels[labelled]

    def ratio(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The teacher's share of each place, ``[B, *]``."""
        state = trilateral_state(student_logits, teacher_logits, labels, self.ready("class_means"))
        found = project(self.ready("controller"), state, "state").squeeze(-1)
        return found if self.unrolled else found.detach()

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        said = student.logits, teacher.logits, batch.require("labels")
        return tgeo_kd_loss(self.ratio(*said), *said, temperature=self.temperature, mask=batch.mask)
