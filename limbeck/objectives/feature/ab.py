"""Distillation of activation boundaries (AB, also DAB): the student's neurons fire where the teacher's do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import LayerObjective
from limbeck.core.layout import same_places
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import connector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import project, summed
from limbeck.core.trace import Trace


def ab_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    margin: float = 1.0,
    scale: float = 0.003,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of the student's neurons from the right side of their boundary, with a margin.

    .. math:: L = \gamma \sum_i \left[ t_i \le 0 \right] \max(s_i + \mu, 0)^2
        + \left[ t_i > 0 \right] \max(\mu - s_i, 0)^2

    :math:`s` and :math:`t` are features before the ReLU; of the teacher's, only the sign counts. The sum runs over
    channels and places of a sample.

    Args:
        student_feature: :math:`s`, brought to the teacher's shape, ``[B, *]``.
        teacher_feature: :math:`t`, the same shape; detached.
        margin: :math:`\mu`; 1 as in the paper.
        scale: :math:`\gamma`; 3/1000 as in the authors' code.
        mask: Booleans ``[B]``, or over the first dimensions of the features, True where a sample or place counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes.
        ConfigError: ``margin`` or ``scale`` not above zero.

    Source:
        Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", 2019,
        arXiv 1811.03233.

    Example:
        >>> import torch
        >>> ab_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[7.0, -7.0]]), scale=1.0)
        tensor(2.5000)
    """
    check_features(student_feature, teacher_feature)
    check_positive(margin, "margin")
    check_positive(scale, "scale")
    student = widen(student_feature)
    side = torch.where(teacher_feature.detach() > 0, 1.0, -1.0).to(student.dtype)
    values = (margin - side * student).clamp(min=0).square()
    return reduce(*summed(scale * values, mask), reduction)


@register(
    Card(
        key="ab",
        name="AB",
        title="Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
        year=2019,
        arxiv="1811.03233",
        code="bhheo/AB_distillation",
        knowledge="feature",
        equation=r"\gamma \sum_i [t_i \le 0] \max(s_i + \mu, 0)^2 + [t_i > 0] \max(\mu - s_i, 0)^2",
        use="To start a student, also where labels are few: alone in a first stage, then the labels, KD or both. In "
        "one stage it works too, beside the labels.",
        defaults={
            "margin": "1, as in the paper",
            "scale": "3/1000, as in the authors' code",
            "tap": "before the last ReLU at each resolution, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradient of bhheo/AB_distillation@a7701d3, HobbitLong/RepDistiller@b84f547 and "
        "open-mmlab/mmrazor@90c7af1; yoshitomo-matsubara/torchdistill, which calls it DAB, has the same sum",
        choices=(
            "Layer i of n has the weight 2^(i - n), as in the code: each resolution then counts alike.",
            "Where a model's ReLU is no module of its own, its stages are taken as they are. For the teacher that is "
            "the same, since ReLU keeps what is above zero.",
            "Of maps of different sizes the larger is pooled; the paper's are equal.",
            "The second stage has the other terms of the loss; the authors' code on CIFAR-10 has KD alone there "
            "(temperature 3), RepDistiller the labels alone, as here.",
        ),
        with_labels={"cross_entropy": 1.0},
        scheme="hint_then_kd",
    ),
    ab_loss,
)
class AB(LayerObjective):
    """Distillation of activation boundaries; see ``limbeck.functional.ab_loss``.

    The student's layers pass through a 1x1 convolution and batch normalisation, or nothing where widths are equal. Made
    for a first stage of its own (``scheme: hint_then_kd``), and of use in one stage, too.

    Args:
        tap: Features before the ReLU: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        margin: Where a neuron is far enough on its side.
        scale: Of the whole.

    >>> loss = AB(["layer1.0.relu2@in", "layer2.0.relu2@in"])
    """

    contract = Contract(normalizer="samples", at_equal=None, decomposes=False)
    connectors: nn.ModuleList | None

    def __init__(
        self,
        tap: str | list[str] = "preactivations",
        teacher_tap: str | list[str] | None = None,
        margin: float = 1.0,
        scale: float = 0.003,
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(margin, "margin")
        check_positive(scale, "scale")
        self.margin, self.scale = margin, scale
        self.connectors = None

    def opening(self) -> Objective:
        """All of it belongs into the first stage."""
        return self

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pairs = [same_places(s, t) for s, t in self.pairs(student, teacher)]
        same = [s.shape[1] == t.shape[1] for s, t in pairs]
        self.connectors = nn.ModuleList(
            nn.Identity() if equal else connector(s, t) for equal, (s, t) in zip(same, pairs, strict=True)
        )

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        losses: list[Tensor] = []
        for layer, s, t in self.each("connectors", student, teacher):
            s, t = same_places(s, t)
            loss = ab_loss(project(layer, s, "student_feature"), t, margin=self.margin, scale=self.scale)
            losses = [0.5 * earlier for earlier in losses] + [loss]
        return torch.stack(losses).sum()
