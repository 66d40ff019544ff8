"""Which of several teachers teaches a sample: a policy over them, and the loss of a choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.divergences import cross_entropy_rows, soften


def selected_rows(student_logits: Tensor, teacher_logits: Tensor, chosen: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Cross-entropy of each sample to the teachers chosen for it, their mean; 0 where none is.

    .. math:: L_i = \frac{T^2}{K_i} \sum_{k: a_{ik} = 1} CE\left( p_k^T, p_S^T \right)

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[K, B, C]``.
        chosen: ``[K, B]``, 1 where teacher k teaches sample i.
        temperature: T.

    >>> student, teachers = torch.zeros(2, 2), torch.zeros(3, 2, 2)
    >>> selected_rows(student, teachers, torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor([0.6931, 0.6931])
    """
    goal = soften(teacher_logits.detach(), temperature).exp()
    mean = (chosen.unsqueeze(-1) * goal).sum(dim=0) / chosen.sum(dim=0).clamp(min=1).unsqueeze(-1)
    return temperature**2 * cross_entropy_rows(mean, soften(student_logits, temperature))


class Policy(nn.Module):
    r"""Whether each teacher teaches each sample: :math:`\pi(a_{ik} = 1 | s_{ik}) = \sigma(A s_{ik} + b_k)`.

    Args:
        width: Of a state.
        teachers: How many.
        start: The chance at which all are chosen in the beginning.

    >>> Policy(5, 3, start=0.9)(torch.zeros(3, 4, 5)).sigmoid()[0]
    tensor([0.9000, 0.9000, 0.9000, 0.9000], grad_fn=<SelectBackward0>)
    """

    def __init__(self, width: int, teachers: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.full((teachers, 1), math.log(start / (1 - start))))

    def forward(self, states: Tensor) -> Tensor:
        """Logits of the chances ``[K, B]`` from states ``[K, B, width]``."""
        return states @ self.weight + self.bias
