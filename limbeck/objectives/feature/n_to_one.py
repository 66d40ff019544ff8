"""N-to-one representation matching (NORM): the student's feature, widened, holds the teacher's several times over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import projector
from limbeck.core.reduction import Reduction, check_floating, check_positive, reduce, widen
from limbeck.core.relations import channel_dim
from limbeck.core.trace import Trace


def n_to_one_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared distances of N segments of the student's channels from the teacher's, added up.

    .. math:: L = \sum_{n=1}^N \frac 1 C \left\| s_{(n-1) C + 1, \dots, n C} - t \right\|_2^2

    Args:
        student_feature: N times as wide as the teacher's: ``[B, N C]``, tokens ``[B, T, N C]`` or maps ``[B, N C, *]``.
        teacher_feature: Of the same places; detached.
        mask: Booleans, True where a place counts: ``[B]``, or ``[B, T]`` for tokens, ``[B, *]`` for maps.
        reduction: ``"mean"`` over places that count, ``"sum"`` over them, or ``"none"``: shaped as the places.

    Raises:
        TensorError: Features whose widths are no multiple, or of other places.

    Source: Liu et al., "NORM: Knowledge Distillation via N-to-One Representation Matching", 2023, arXiv 2305.13803.

    >>> import torch
    >>> n_to_one_loss(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.)
    """
    check_floating(student_feature, "student_feature", least=2)
    check_floating(teacher_feature, "teacher_feature", least=2)
    dim = channel_dim(teacher_feature)
    own, other = list(student_feature.shape), list(teacher_feature.shape)
    if len(own) != len(other) or own[:dim] + own[dim + 1 :] != other[:dim] + other[dim + 1 :] or own[dim] % other[dim]:
        wanted = f"{other} with a multiple of the {other[dim]} channels"
        raise TensorError("not several of the teacher's features", where="student_feature", found=own, wanted=wanted)
    segments = widen(student_feature).unflatten(dim, (-1, other[dim]))
    gaps = (segments - widen(teacher_feature.detach()).unsqueeze(dim)).square()
    return reduce(gaps.mean(dim=dim + 1).sum(dim=dim), mask, reduction)


@register(
    Card(
        key="n_to_one",
        name="NORM",
        title="NORM: Knowledge Distillation via N-to-One Representation Matching",
        year=2023,
        arxiv="2305.13803",
        code="OSVAI/NORM",
        knowledge="feature",
        equation=r"\sum_{n=1}^N \frac 1 C \left\| (P s)_{(n-1) C + 1, \dots, n C} - t \right\|_2^2",
        use="On the last maps of two networks, beside labels and KD: a wide projection that has to hold the teacher's "
        "feature N times asks more of the student than one that holds it once.",
        defaults={
            "number": "8, as in the authors' scripts",
            "tap": "the last map, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradient of OSVAI/NORM@c6dfc39 (loss_norm of its CIFAR-100 runs)",
        choices=(
            "The paper contracts the widened feature again, adds it to the student's and goes on from there; all of "
            "that is linear and merges into the classifier. Here the widening stands beside the student, which keeps "
            "its own classifier and is dropped like any other projector.",
            "The widening is a linear layer with batch normalisation, as in the authors' code, by the batch alone.",
            "The authors' schedule of the weight (0.1, 0.5, 1, 0.5, 0.1) and their layer norm of logits are left out.",
        ),
        with_labels={"cross_entropy": 0.1},
    ),
    n_to_one_loss,
)
class NToOne(LayerObjective):
    """N-to-one representation matching, on the last pair of layers; see ``limbeck.functional.n_to_one_loss``.

    Args:
        tap: The student's feature.
        teacher_tap: The teacher's, where it is called otherwise. Of maps of different sizes the larger is pooled to the
            smaller by its maxima, as in the authors' code.
        number: N, how often the teacher's feature is held.

    >>> loss = NToOne(number=4)
    """

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, least_samples=2)
    projector: nn.Module | None

    def __init__(self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None, number: int = 8) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(number, "number")
        self.number, self.projector = number, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = same_size(*self.pair(student, teacher))
        wide = torch.cat([t] * self.number, dim=channel_dim(t))
        norm = BatchNorm(wide.shape[channel_dim(t)]).to(s.device)
        self.projector = nn.Sequential(projector(s, wide, bias=False), norm)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = same_size(*self.pair(student, teacher))
        return n_to_one_loss(self.ready("projector")(s), t, mask=batch.mask)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two features of the same places; of maps the larger is pooled to the smaller by its maxima.

    >>> import torch
    >>> [f.shape[2:] for f in same_size(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 8, 8))]
    [torch.Size([4, 4]), torch.Size([4, 4])]
    """
    if student.ndim == teacher.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = (F.adaptive_max_pool2d(f, size) for f in (student, teacher))
    return aligned(student, teacher)
