"""Several teachers, of which each sample hears the one that is surest of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.divergences import soften
from limbeck.core.errors import DataError
from limbeck.core.labels import soft_labels
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.teachers.several import SeveralTeachers


def surest(said: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Which of several predictions each sample is taught by, ``[B]``.

    .. math:: k_i = \arg\max_k p_k(y_i | x_i) \quad \text{or, without labels,} \quad \arg\max_k \max_c p_k(c | x_i)

    Of equals the first; so a sample whose label is not known goes to the first.

    Args:
        said: ``[K, B, C]`` logits.
        labels: ``[B]`` classes, negative where one is not known, or soft ones ``[B, C]``; ``None``: choose by
            confidence alone.

    >>> said = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [2.0, 0.0]]])
    >>> surest(said, torch.tensor([0, 0])), surest(said)
    (tensor([1, 1]), tensor([1, 0]))
    """
    p = soften(said).exp()
    sure = p.amax(dim=-1) if labels is None else (p * soft_labels(labels, said.shape[-1]).to(p)).sum(dim=-1)
    others = sure[1:].max(dim=0)
    return torch.where(others.values > sure[0], others.indices + 1, 0)


class PartitionedTeachers(SeveralTeachers):
    """Asks each of several teachers; a sample's logits are those of the teacher that is surest of it.

    ``trace.taps["chosen"]`` tells which that is.

    Args:
        members: Modules (they are frozen) or teachers, of the same classes; of equally sure ones the first counts.
        supervised: Surest of the label; else of whatever class it may be.
        logits: Where logits stand in the output of those given as modules (see ``logits_of``).

    >>> teacher, batch = PartitionedTeachers([nn.Linear(4, 3), nn.Linear(4, 3)]), Batch(torch.randn(5, 4))
    >>> teacher.supervised = False
    >>> teacher.attach(("logits",), batch)
    >>> teacher(batch).logits.shape
    torch.Size([5, 3])
    """

    def __init__(
        self, members: Iterable[nn.Module | Teacher], *, supervised: bool = True, logits: str | None = None
    ) -> None:
        super().__init__(members, logits=logits)
        self.supervised = supervised

    def __call__(self, batch: Batch) -> Trace:
        trace = super().__call__(batch)
        said = torch.stack([member.logits for member in trace.members])
        if said.ndim != 3:
            raise DataError(
                "teachers are chosen for whole samples", where="teacher", found=list(said.shape[1:]), wanted="[B, C]"
            )
        chosen = surest(said, batch.require("labels") if self.supervised else None)
        found = said[chosen, torch.arange(said.shape[1], device=said.device)]
        return Trace(None, {**trace.taps, "logits": found, "chosen": chosen}, members=trace.members)
