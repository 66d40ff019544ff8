"""FitNets: the student's features are regressed on the teacher's (hints)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import projector
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import channel_dim, project
from limbeck.core.schedules import Schedule
from limbeck.core.trace import Trace


def fitnets_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Half the squared distance of the regressed student feature from the teacher's hint, for each element.

    .. math:: L = \frac 1 2 \cdot \frac 1 n \sum_{i=1}^n \left( r(v_g)_i - u_{h,i} \right)^2

    The student's feature comes already regressed to the teacher's shape. The paper gives the squared norm; its code
    sums over channels and averages over samples and places. Here channels are averaged too, so that the weight need not
    change with the teacher's width; later toolkits do so as well, without the half.

    Args:
        student_feature: ``[B, D]``, tokens ``[B, T, D]`` or maps ``[B, C, *]``: what the regressor gave.
        teacher_feature: The same shape; detached.
        mask: Booleans, True where a place counts: ``[B]``, or ``[B, T]`` for tokens, ``[B, *]`` for maps.
        reduction: ``"mean"`` over places that count, ``"sum"`` over them (of the mean over channels), or ``"none"``:
            ``[B]``, ``[B, T]`` or ``[B, *]``.

    Raises:
        TensorError: Features of different shapes.

    Source:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, arXiv 1412.6550, equation 3.

    Example:
        >>> import torch
        >>> fitnets_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(1.)
    """
    check_features(student_feature, teacher_feature)
    gap = widen(student_feature) - widen(teacher_feature.detach())
    values = 0.5 * gap.square().mean(dim=channel_dim(gap))
    return reduce(values, mask, reduction)


def regressor(student_feature: Tensor, teacher_feature: Tensor, relu: bool = False) -> nn.Module:
    """The map from the student's guided layer to the shape of the hint.

    For maps, a convolution without padding whose kernel takes up the difference in size, so that each hint is told from
    where the student looks, with few weights; where the student's map is the smaller, the hint is pooled instead. For
    tokens and vectors, a linear map. Nothing is learned between equal shapes.

    Args:
        student_feature, teacher_feature: One example of each, ``[B, D]``, ``[B, T, D]`` or ``[B, C, H, W]``.
        relu: End with the nonlinearity of a hint that is not negative.

    >>> import torch
    >>> regressor(torch.zeros(1, 8, 10, 10), torch.zeros(1, 32, 8, 8))
    Conv2d(8, 32, kernel_size=(3, 3), stride=(1, 1))
    >>> regressor(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4))
    Identity()
    """
    if student_feature.shape == teacher_feature.shape:
        return nn.Identity()
    if student_feature.ndim == teacher_feature.ndim == 4:
        sizes = zip(student_feature.shape[2:], teacher_feature.shape[2:], strict=True)
        kernel = tuple(max(s - t, 0) + 1 for s, t in sizes)
        widths = student_feature.shape[1], teacher_feature.shape[1]
        layer: nn.Module = nn.Conv2d(*widths, kernel).to(student_feature.device)  # type: ignore[arg-type]
    else:
        layer = projector(student_feature, teacher_feature)
    return nn.Sequential(layer, nn.ReLU()) if relu else layer


@register(
    Card(
        key="fitnets",
        name="FitNets",
        title="FitNets: Hints for Thin Deep Nets",
        year=2015,
        arxiv="1412.6550",
        code="adri-romsor/FitNets",
        knowledge="feature",
        equation=r"\frac 1 2 \cdot \frac 1 n \left\| r(v_g) - u_h \right\|_2^2",
        use="To start a deep thin student well: alone in a first stage, which trains the student up to the guided "
        "layer, then KD in a second. Or beside the labels in one stage, as later comparisons do.",
        defaults={
            "tap": "the last layer but one in resolution, which in three-stage networks is the paper's middle layer",
            "relu": "by the hint: a regressor ends with the teacher's nonlinearity, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradient of HobbitLong/RepDistiller@b84f547, which leaves out the half",
        choices=(
            "The mean over channels; the authors' code sums over them, so its weight depends on the teacher's width.",
            "Where the student's map is smaller than the hint, which the paper does not consider, the hint is pooled.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=200.0,
    ),
    fitnets_loss,
)
class FitNets(Objective):
    """Hints: the student's guided layer, through a learned regressor, should equal the teacher's layer.

    See ``limbeck.functional.fitnets_loss``. As in the paper, train in two stages: this alone (the student then runs no
    further than its guided layer, and labels are not needed), and then KD with a falling share of the teacher. In one
    stage, weigh it beside the labels: 200 is the 100 of the CRD benchmark, whose loss lacks the half.

    Args:
        tap: The student's guided layer.
        teacher_tap: The teacher's hint layer, where it is called otherwise.
        relu: Whether the regressor ends with a ReLU; ``None``: where the hint is not negative in the dry run.

    >>> from limbeck.objectives import KD, CrossEntropy
    >>> first = FitNets("layer2")
    >>> second = CrossEntropy() + TeacherDecay() * (1 / 9) * KD(temperature=3.0)  # the paper has no T^2
    >>> joint = CrossEntropy() + 200.0 * FitNets("layer2")
    """

    contract = Contract(normalizer="positions", mask=True)
    regressor: nn.Module | None

    def __init__(self, tap: str = "stages:-2", teacher_tap: str | None = None, relu: bool | None = None) -> None:
        super().__init__()
        self.tap, self.teacher_tap, self.relu = tap, teacher_tap or tap, relu
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.regressor = None

    def opening(self) -> Objective:
        """All of it belongs into the first stage."""
        return self

    def _layers(self, student: Trace, teacher: Trace) -> tuple[Tensor, Tensor]:
        """The guided layer and the hint; both as maps where one is a map and the other tokens."""
        guided, hint = student[self.tap], teacher[self.teacher_tap]
        for feature, tap in ((guided, self.tap), (hint, self.teacher_tap)):
            if not isinstance(feature, Tensor):
                raise ConfigError("one layer is wanted", where="fitnets", found=tap, remedy=f"choose one: {tap}:0")
        return (to_map(guided), to_map(hint)) if {guided.ndim, hint.ndim} == {3, 4} else (guided, hint)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        guided, hint = self._layers(student, teacher)
        self.regressor = regressor(guided, hint, bool((hint >= 0).all()) if self.relu is None else self.relu)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        guided, hint = self._layers(student, teacher)
        guided, hint = project(self.ready("regressor"), guided, "student_feature"), hint.detach()
        if guided.ndim == 4 and guided.shape[2:] != hint.shape[2:]:
            hint = F.adaptive_avg_pool2d(hint, (guided.shape[2], guided.shape[3]))
        return fitnets_loss(guided, hint, mask=batch.mask)


@dataclass(frozen=True)
class TeacherDecay(Schedule):
    r"""The weight of the teacher in FitNets' second stage: ``start``, falling on a straight line to ``end``.

    .. math:: \lambda(e) = \mathrm{start} - (\mathrm{start} - \mathrm{end})
        \frac{e - \mathrm{begin} + 1}{\mathrm{saturate} - \mathrm{begin} + 1}
        \quad \text{for } \mathrm{begin} \le e < \mathrm{saturate}, \qquad e = \mathrm{epochs} \cdot \mathrm{progress}

    Defaults are those of the authors' CIFAR-10 run.

    >>> schedule = TeacherDecay(epochs=500)
    >>> [round(float(schedule(epoch / 500)), 4) for epoch in (0, 4, 5, 202, 400, 500)]
    [4.0, 4.0, 3.9924, 2.5, 1.0, 1.0]
    """

    start: float = 4.0
    end: float = 1.0
    begin: float = 5.0
    saturate: float = 400.0
    epochs: float = 500.0

    def at(self, progress: Tensor) -> Tensor:
        passed = (progress * self.epochs - self.begin + 1) / (self.saturate - self.begin + 1)
        return self.start - (self.start - self.end) * passed.clamp(0.0, 1.0)
