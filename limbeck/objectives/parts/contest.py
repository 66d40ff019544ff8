"""Two players in one loss: a judge tells the teacher's features from the student's, which learn to pass for them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.objectives.parts.frozen import run_frozen


def judge(width: int, hidden: int = 256) -> nn.Sequential:
    """A judge of single features: three linear layers, to one logit."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1)
    )


def contest(player: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    r"""The judge's loss and the student's, in one forward: each has gradient for its own player alone.

    .. math:: L_D = -\log D(r) - \log (1 - D(\mathrm{sg}[f])), \qquad L_G = \log (1 - \mathrm{sg}[D](f))

    Args:
        player: The judge, which gives logits.
        real: The teacher's features ``[B, *, D]``.
        fake: The student's, the same shape.

    Returns:
        :math:`L_D` and :math:`L_G`, ``[B]`` each: means over a sample's features.

    >>> import torch
    >>> losses = contest(nn.Linear(2, 1), torch.ones(3, 4, 2), torch.zeros(3, 4, 2))
    >>> [tuple(loss.shape) for loss in losses]
    [(3,), (3,)]
    """
    own = F.softplus(-player(real.detach())) + F.softplus(player(fake.detach()))
    other = -F.softplus(run_frozen(player, fake))
    return own.flatten(1).mean(dim=1), other.flatten(1).mean(dim=1)
