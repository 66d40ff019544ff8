"""A task without labels: from which sample of the batch was a turned copy made?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import TensorError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import check_floating, widen
from limbeck.core.relations import cosines, pooled, project
from limbeck.core.trace import Trace
from limbeck.core.views import quarter_turns


def affinity(embedding: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Cosines of turned copies with upright samples, and from which sample each copy was made.

    Args:
        embedding: ``[4 B, D]``: the B upright samples, then three times as many copies, turn after turn.
        name: What it is called in errors.

    Returns:
        ``[3 B, B]`` and ``[3 B]``.

    Raises:
        TensorError: Not four rows for each sample.

    >>> scores, source = affinity(torch.eye(2).repeat(4, 1), "embedding")
    >>> scores[:2].tolist(), source.tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [0, 1, 0, 1, 0, 1])
    """
    check_floating(embedding, name, least=2)
    if embedding.ndim != 2 or len(embedding) % 4:
        raise TensorError("not the four views of a batch", where=name, found=list(embedding.shape), wanted="[4 B, D]")
    size = len(embedding) // 4
    source = torch.arange(size, device=embedding.device).repeat(3)
    return cosines(widen(embedding[size:]), widen(embedding[:size])), source


def task_head(feature: Tensor) -> nn.Sequential:
    """Two layers of the feature's own width, for ``embed``."""
    width = pooled(feature)[0].shape[1]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(feature.device)


def embed(head: nn.Module, feature: Tensor, name: str) -> Tensor:
    """What a head makes of the mean of a feature's places, ``[B, D]``."""
    check_floating(feature, name, least=2)
    return project(head, pooled(feature)[0], name)


class Pretext(Objective):
    """A head learns the task on the teacher's features; the teacher does not change.

    Args:
        teacher_tap: Where the head stands; the mean of the feature's places.
    """

    contract = Contract(at_equal=None, decomposes=False, permutation=False, least_samples=4)
    head: nn.Sequential | None

    def __init__(self, teacher_tap: str) -> None:
        super().__init__()
        self.tap, self.teacher_taps, self.head = teacher_tap, (teacher_tap,), None

    def prepare(self, batch: Batch) -> Batch:
        return quarter_turns(batch)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.head is None:  # else it was trained before
            self.head = task_head(teacher[self.tap])

    def embed(self, teacher: Trace) -> Tensor:
        """The head's embedding of every view."""
        return embed(self.ready("head"), teacher[self.tap].detach(), "teacher_feature")

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return F.cross_entropy(*affinity(self.embed(teacher), "teacher_feature"))
