"""FitNets: the student's features are regressed on the teacher's (hints)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import channel_dim, project
from limbeck.core.trace import Trace
from limbeck.objectives.parts.hints import regressor


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
    >>> from limbeck.objectives.parts.hints import TeacherDecay
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
