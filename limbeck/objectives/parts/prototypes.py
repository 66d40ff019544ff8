"""A dictionary of local prototypes: what is learned of one model's places, and handed to another's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.projectors import LinearProjector
from limbeck.core.relations import unit


def vlad(rows: Tensor, centres: Tensor, assignment: Tensor) -> Tensor:
    r"""How the places of a sample lie about each centre, as one vector of length 1 (NetVLAD, arXiv 1511.07247).

    .. math:: V_k = \sum_l a_{l,k} (p_l - c_k)

    each of length 1, then all of them together.

    Args:
        rows: :math:`p`, ``[B, L, D]``.
        centres: :math:`c`, ``[K, D]``.
        assignment: :math:`a`, ``[B, L, K]``; a place's sum to 1.

    Returns:
        ``[B, K D]``.

    >>> vlad(torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 2), torch.ones(1, 1, 1))
    tensor([[0.6000, 0.8000]])
    """
    about = assignment.mT @ rows - assignment.sum(dim=1).unsqueeze(2) * centres  # no [B, L, K, D] is made
    return unit(unit(about).flatten(1))


class Prototypes(nn.Module):
    """Prototypes, how they are learned from a teacher's layers, and how they augment a student's places (ProC-KD).

    Args:
        told: Width of the teacher's layers together.
        width: Of the student's feature, and of a prototype.
        number: How many.

    >>> prototypes = Prototypes(12, 8, 5)
    >>> prototypes.learn(torch.zeros(2, 9, 12)).shape, prototypes.augment(torch.zeros(2, 9, 8)).shape
    (torch.Size([2, 9, 8]), torch.Size([2, 9, 8]))
    """

    def __init__(self, told: int, width: int, number: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.rand(number, width))
        self.mix = nn.Sequential(LinearProjector(told, width), nn.ReLU())
        self.assign = nn.Linear(width, number)
        self.whole = nn.Linear(number * width, width)
        self.place = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.encode = LinearProjector(width, width)
        self.change = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def learn(self, layers: Tensor) -> Tensor:
        """The teacher's layers ``[B, L, told]`` as places in the student's width, each told of the whole by VLAD."""
        rows = self.mix(layers)
        directions = unit(rows)
        summary = self.whole(vlad(directions, self.centres, self.assign(directions).softmax(dim=-1)))
        return self.place(torch.cat([rows, summary.unsqueeze(1).expand_as(rows)], dim=-1))

    def recall(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded places, and each rebuilt from the prototypes that are like it; both ``[B, L, width]``."""
        asked, known = self.encode(places), self.encode(self.centres)
        return asked, (asked @ known.T).softmax(dim=-1) @ known

    def augment(self, places: Tensor) -> Tensor:
        """Places ``[B, L, width]``, changed by what the prototypes say of them."""
        return (self.change(torch.cat(self.recall(places), dim=-1)) + places).relu()
