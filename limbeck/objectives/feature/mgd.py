"""Masked generative distillation (MGD): from a masked feature of the student a small block generates the teacher's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layers import SameWidth, Tap
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import ConvProjector
from limbeck.core.reduction import Reduction, check_features, check_floating, reduce, widen
from limbeck.core.trace import Trace


def mgd_loss(
    generated: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of the generated feature from the whole feature of the teacher, for each element.

    .. math:: L = \frac 1 n \left\| \mathcal{G}(f(S) \cdot M) - T \right\|_2^2, \qquad
        \mathcal{G}(F) = W_2 * \mathrm{ReLU}(W_1 * F)

    :math:`M` is 0 at random places (or channels) and 1 elsewhere, :math:`f` aligns the width, and both convolutions are
    3x3. The paper sums over a sample's elements; here they are averaged, so that the weight need not follow their
    number: the paper's 7e-5 on 512 maps of 7x7 is a weight of 1.75.

    Args:
        generated: ``[B, C, H, W]``: what the block made of the masked feature (``generator``, ``hide``).
        teacher_feature: The same shape; detached.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes.

    Source:
        Yang et al., "Masked Generative Distillation", 2022, arXiv 2205.01529.

    Example:
        >>> import torch
        >>> mgd_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]]))
        tensor(5.)
    """
    check_features(generated, teacher_feature, least=3)
    gap = widen(generated) - widen(teacher_feature.detach())
    return reduce(gap.square().flatten(1).mean(dim=1), mask, reduction)


def generator(width: int) -> nn.Sequential:
    """The block that generates: two 3x3 convolutions of one width with a ReLU between them."""
    return nn.Sequential(
        ConvProjector(width, width, 3, padding=1), nn.ReLU(), ConvProjector(width, width, 3, padding=1)
    )


def hide(feature: Tensor, ratio: float, what: Literal["places", "channels"] = "places") -> Tensor:
    """A map with random places, or random channels, of each sample set to 0, each with this probability."""
    check_floating(feature, "feature", least=4)
    size, width, height, breadth = feature.shape
    shape = (size, 1, height, breadth) if what == "places" else (size, width, 1, 1)
    return feature * (torch.rand(shape, device=feature.device) >= ratio)


@register(
    Card(
        key="mgd",
        name="MGD",
        title="Masked Generative Distillation",
        year=2022,
        arxiv="2205.01529",
        code="yzd-v/MGD",
        knowledge="feature",
        equation=r"\frac 1 n \left\| \mathcal{G}(f(S) \cdot M) - T \right\|_2^2, \quad "
        r"\mathcal{G}(F) = W_2 * \mathrm{ReLU}(W_1 * F)",
        use="A general feature loss, best known for detection and segmentation: the student is not held to the "
        "teacher's every value, since a block of two convolutions stands between them.",
        defaults={
            "ratio": "0.5, as the authors' code documents for classification; 0.65 detection, 0.75 segmentation",
            "hide": "places, as in the paper; the released classification code hides channels with ratio 0.15",
            "tap": "the last layer of maps, the paper's for classification",
        },
        evidence="parity",
        evidence_note="value and gradients, with given random numbers, of yzd-v/MGD@2c9da0b (classification and "
        "segmentation code) and open-mmlab/mmrazor@90c7af1",
        choices=(
            "A mean over elements instead of the sum: the paper's 7e-5 at 512 maps of 7x7 is 1.75.",
            "Places are hidden by default, as the paper writes; the released classification code hides channels.",
            "Tokens of transformers are laid out as maps, and a class token is left out.",
        ),
        tasks=("classification", "segmentation", "detection"),
        with_labels={"cross_entropy": 1.0},
        weight=1.75,
    ),
    mgd_loss,
)
class MGD(SameWidth):
    """Masked generative distillation, summed over pairs of layers; see ``limbeck.functional.mgd_loss``.

    Masks are drawn anew at each step, from torch's random state.

    Args:
        tap: Where to listen: a place, or several, paired in order (a plural role: by resolution or depth).
        teacher_tap: The teacher's, where they are called otherwise.
        ratio: The part that is hidden.
        hide: ``"places"`` of the map or ``"channels"``.

    >>> loss = 1.75 * MGD("layer4", hide="channels", ratio=0.15)
    """

    contract = Contract(at_equal=None, decomposes=False, permutation=False)
    generators: nn.ModuleList | None

    def __init__(
        self,
        tap: Tap = "stages:-1",
        teacher_tap: Tap | None = None,
        ratio: float = 0.5,
        hide: Literal["places", "channels"] = "places",
    ) -> None:
        super().__init__(tap, teacher_tap)
        if not 0 <= ratio < 1:
            raise ConfigError("a part below the whole", where="ratio", found=ratio, wanted="0 up to below 1")
        self.ratio, self.hide, self.generators = ratio, hide, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        super().setup(student, teacher, batch, data)
        maps = [to_map(t, "teacher_feature") for _, t in self.features(student, teacher)]
        self.generators = nn.ModuleList(generator(t.shape[1]) for t in maps).to(maps[0].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        losses = []
        for block, (s, t) in zip(self.ready("generators"), self.features(student, teacher), strict=True):
            masked = hide(to_map(s, "student_feature"), self.ratio, self.hide)
            losses.append(mgd_loss(block(masked), to_map(t, "teacher_feature")))
        return sum(losses[1:], losses[0])
