"""A comprehensive overhaul of feature distillation (OFD): features before the ReLU, what matters of them alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import same_places, to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import connector
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import project, summed
from limbeck.core.trace import Trace


def ofd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    margin: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Partial squared distance from the teacher's feature after a ReLU with a margin.

    .. math:: L = \sum_i \left[ s_i > t'_i \;\text{or}\; t'_i > 0 \right] (s_i - t'_i)^2, \qquad
        t'_i = \max(t_i, m_{c(i)})

    Where the teacher is silent, the student need but not be above. The sum runs over a sample's channels and places.

    Args:
        student_feature: :math:`s`, brought to the teacher's shape ``[B, C, *]``.
        teacher_feature: :math:`t`, before its ReLU; detached.
        margin: :math:`m`, ``[C]``, not above zero: the mean of each channel's negative responses.
        mask: Booleans ``[B]``, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises: TensorError where features differ in shape, or there is not one margin a channel.
    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, arXiv 1904.01866.

    >>> import torch
    >>> ofd_loss(torch.tensor([[2.0, -3.0, 0.0]]), torch.tensor([[1.0, -2.0, -2.0]]), torch.full((3,), -0.5))
    tensor(1.2500)
    """
    check_features(student_feature, teacher_feature)
    student, teacher = widen(student_feature), widen(teacher_feature.detach())
    if margin.shape != (width := student.shape[1:2]):
        raise TensorError("one margin a channel", where="margin", found=list(margin.shape), wanted=list(width))
    teacher = torch.maximum(teacher, margin.to(teacher.dtype).reshape(-1, *[1] * (teacher.ndim - 2)))
    counts = (student > teacher) | (teacher > 0)
    return reduce(*summed((student - teacher).square() * counts, mask), reduction)


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The mean negative response of channels that batch normalisation gives: Gaussians of these means and deviations.

    Where hardly one in a thousand is negative, three deviations below zero, as in the authors' code.

    >>> ofd_margin(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 9.0]))
    tensor([-0.7979, -6.0000])
    """
    std, mean = weight.detach().abs(), bias.detach()
    below = torch.special.ndtr(-mean / std)  # the share of negative responses
    density = torch.exp(-((mean / std) ** 2) / 2) / (2 * torch.pi) ** 0.5
    margin = torch.where(below > 0.001, mean - std * density / below, -3 * std)
    return torch.where(std == 0, mean.clamp(max=0), margin)


@register(
    Card(
        key="ofd",
        name="OFD",
        title="A Comprehensive Overhaul of Feature Distillation",
        year=2019,
        arxiv="1904.01866",
        code="clovaai/overhaul-distillation",
        knowledge="feature",
        equation=r"\sum_i [s_i > t'_i \text{ or } t'_i > 0] (s_i - t'_i)^2, \quad t'_i = \max(t_i, m_{c(i)})",
        use="Between convolutional networks with ReLU, in one stage. The sum grows with the maps: mind the weight.",
        defaults={
            "tap": "before the last ReLU at each resolution, as in the paper",
            "norms": "none: margins are the means that the paper defines; with names, its closed form",
        },
        evidence="parity",
        evidence_note="value, gradient and margins in closed form of clovaai/overhaul-distillation@76344a8, value and "
        "gradient of megvii-research/mdistiller@a08d46f",
        choices=(
            "Margins are measured on the training set (without one, on the example batch). The closed form of the "
            "authors' code is not the mean which the paper defines where a shortcut is added after the normalisation.",
            "Layer i of n has the weight 2^(i - n), as in the code.",
            "Of maps of different sizes the larger is pooled, as in mdistiller. Where a model's ReLU is no module, its "
            "stages are taken as they are; then the margin is 0.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=0.001,
    ),
    ofd_loss,
)
class OFD(LayerObjective):
    """A comprehensive overhaul of feature distillation; see ``limbeck.functional.ofd_loss``.

    Args:
        tap: Features before the ReLU: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        norms: The teacher's batch normalisations before those ReLUs, one a layer, for margins in closed form.

    >>> loss = 0.001 * OFD(norms=["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2"])
    """

    contract = Contract(normalizer="samples", at_equal=None, decomposes=False)
    connectors: nn.ModuleList | None

    def __init__(
        self, tap: Tap = "preactivations", teacher_tap: Tap | None = None, norms: list[str] | None = None
    ) -> None:
        super().__init__(tap, teacher_tap)
        self.norms, self.connectors = norms, None
        self.teacher_taps = (*self.teacher_taps, *(f"{n}@{part}" for n in norms or () for part in ("weight", "bias")))

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pairs = [same_places(s, t) for s, t in self.pairs(student, teacher)]
        self.connectors = nn.ModuleList(connector(s, t) for s, t in pairs)
        margins = [ofd_margin(teacher[f"{n}@weight"], teacher[f"{n}@bias"]) for n in self.norms or ()]
        margins = margins if self.norms is not None else self._measured(student, teacher, batch, data)
        found, wanted = [list(m.shape) for m in margins], [[t.shape[1]] for _, t in pairs]
        if found != wanted:
            raise ConfigError("one batch normalisation a layer", where="norms", found=found, wanted=wanted)
        for i, margin in enumerate(margins):
            self.register_buffer(f"margin_{i}", margin.to(pairs[i][1].device))

    def _measured(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> list[Tensor]:
        """The mean of each channel's negative responses, layer by layer."""
        totals: list[Tensor] = []
        for answer, _ in data.answers() if data.answers is not None else [(teacher, batch)]:
            maps = [to_map(t, "teacher_feature").double() for _, t in self.pairs(student, answer)]
            parts = [torch.stack([m.clamp(max=0), (m < 0).double()]).sum(dim=(1, 3, 4)) for m in maps]
            totals = [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts
        return [(below / number.clamp(min=1)).float() for below, number in totals]

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        losses: list[Tensor] = []
        for i, (layer, s, t) in enumerate(self.each("connectors", student, teacher)):
            s, t = same_places(s, t)
            loss = ofd_loss(project(layer, s, "student_feature"), t, getattr(self, f"margin_{i}"))
            losses = [0.5 * earlier for earlier in losses] + [loss]
        return torch.stack(losses).sum()
