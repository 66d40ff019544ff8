"""Instance relationship graph (IRG): how samples lie to one another, and how far each moves between two layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layers import tap_values
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, check_same_shape, reduce, widen
from limbeck.core.relations import check_same_batch, distances, paired_rows, pooled, rows
from limbeck.core.trace import Trace


@without_autocast
def irg_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    student_flow: Sequence[Tensor] = (),
    teacher_flow: Sequence[Tensor] = (),
    *,
    edges: float = 1.0,
    transformation: float = 64.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Half the squared distance between two graphs of a batch, and between the ways of its samples through layers.

    .. math::
        L = \frac{1}{2 N} \left( \lambda_E \| A^S - A^T \|_F^2 + \lambda_T \sum_l \| b^S_l - b^T_l \|_2^2 \right), \quad
        A_{ij} = \frac{\| x_i - x_j \|_2^2}{\max_{kl} \| x_k - x_l \|_2^2}, \quad
        b_{l,i} = \frac{\| y_{l,i} - z_{l,i} \|_2^2}{\max_k \| y_{l,k} - z_{l,k} \|_2^2}

    :math:`y_l` and :math:`z_l` are what two layers of one width make of the samples. Each side has its own greatest
    distance, through which the gradient flows too, so widths and scales of student and teacher do not matter. Where all
    distances are 0 they stay 0.

    Args:
        student_feature: x, ``[B, *]``; flattened to one row a sample.
        teacher_feature: ``[B, *]``, of any width; detached.
        student_flow: y, z, y, z, ...: pairs of layers, ``[B, *]`` each; none: only the graph.
        teacher_flow: As many of the teacher; detached.
        edges: :math:`\lambda_E`.
        transformation: :math:`\lambda_T`; 64, the authors' batch, since their code sums over it.
        mask: ``[B]`` booleans, True where a sample counts; or over the first dimensions of both features.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different batch sizes, layers that are no pairs, or a mask that does not fit.

    Source: Liu et al., "Knowledge Distillation via Instance Relationship Graph", 2019, CVPR.

    >>> import torch
    >>> irg_loss(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [4.0]]))
    tensor(0.0443)
    """
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    every = student.new_ones(len(student), dtype=torch.bool) if counts is None else counts
    pairs = every.unsqueeze(0) & every.unsqueeze(1)
    own, told = (_over_greatest(distances(x).square(), pairs) for x in (student, teacher))
    values = 0.5 * edges * (own - told).square().sum(dim=1)
    if len(student_flow) != len(teacher_flow) or len(student_flow) % 2:
        found = f"{len(student_flow)} and {len(teacher_flow)} layers"
        raise TensorError("no pairs of layers", where="student_flow", found=found, wanted="as many, two and two")
    for i in range(0, len(student_flow), 2):
        ways = [_over_greatest(_way(f[i], f[i + 1], every), every) for f in (student_flow, teacher_flow)]
        values = values + 0.5 * transformation * (ways[0] - ways[1].detach()).square()
    return reduce(values, counts, reduction)


def _way(first: Tensor, last: Tensor, counts: Tensor) -> Tensor:
    """Squared distance ``[B]`` between what two layers make of each sample."""
    check_floating(first, "student_flow", least=2)
    check_same_shape(first, last, "a pair's first layer", "its last")
    check_same_batch(counts, first, "student_feature", "student_flow")
    return (rows(widen(last), counts)[0] - rows(widen(first), counts)[0]).square().sum(dim=1)


def _over_greatest(values: Tensor, counts: Tensor) -> Tensor:
    values = values.masked_fill(~counts, 0.0)
    greatest = values.amax()
    return values / greatest.masked_fill(greatest == 0, 1.0)


@register(
    Card(
        key="irg",
        name="IRG",
        title="Knowledge Distillation via Instance Relationship Graph",
        year=2019,
        code="yufanLIU/IRG",
        knowledge="relation",
        equation=r"\frac{1}{2 N} \left( \lambda_E \| A^S - A^T \|_F^2 "
        r"+ \lambda_T \sum_l \| b^S_l - b^T_l \|_2^2 \right)",
        use="Beside labels, with nothing learned beside the student and any widths. With flow it also tells how far "
        "each sample moves within the stages, which is gentler than matching the features there.",
        defaults={
            "edges": "1, times the weight 0.005, as in the authors' runs",
            "transformation": "64, times the weight, as in the authors' runs: their batch, over which they sum",
            "tap": "what enters the classifier, as in the authors' runs",
            "flow": "none; the authors take the first and the last block of each stage",
        },
        evidence="parity",
        evidence_note="value of yufanLIU/IRG@0a6837c (both of its layers, under Caffe's Euclidean loss), and its "
        "gradient by differences of that value",
        choices=(
            "The true gradient; the code's own takes the greatest distance as a constant, and of each two samples "
            "moves one.",
            "Vertices (the features themselves) are left out, as in the released runs; FitNets is that.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=0.005,
    ),
    irg_loss,
)
class IRG(Objective):
    """Instance relationship graph; see ``limbeck.functional.irg_loss`` for the weights.

    Args:
        tap: The feature whose graph is compared. teacher_tap: The teacher's, where it is called otherwise.
        flow: Layers, two and two, each two of one width; the mean of their places. teacher_flow: The teacher's.

    >>> loss = 0.005 * IRG(flow=["layer1.0", "layer1.2", "layer2.0", "layer2.2"])
    """

    contract = Contract(mask=True, decomposes=False)

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, edges: float = 1.0,
        transformation: float = 64.0, flow: list[str] | None = None, teacher_flow: list[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.taps, self.weights = (tap, teacher_tap or tap), (edges, transformation)
        self.flows = flow or [], (teacher_flow or flow) or []
        self.student_taps, self.teacher_taps = ((t, *f) for t, f in zip(self.taps, self.flows, strict=True))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        sides = list(zip((student, teacher), self.taps, self.flows, strict=True))
        flows = [[pooled(f, batch.mask)[0] for f in tap_values(trace, flow)] for trace, _, flow in sides]
        own, told = (trace[tap] for trace, tap, _ in sides)
        edges, way = self.weights
        return irg_loss(own, told, *flows, edges=edges, transformation=way, mask=batch.mask)
