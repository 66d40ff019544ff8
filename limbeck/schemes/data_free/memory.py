"""What a generator made earlier: a sample of it all that is kept, or a model that makes it again."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.heads import two_layers
from limbeck.core.reduction import widen
from limbeck.models.generator import Generator
from limbeck.schemes.data_free.pool import Pool


class Reservoir(Pool):
    """A pool of which every input that was ever added is a part with the same chance.

    Source: Vitter, "Random Sampling with a Reservoir", 1985, algorithm R.

    >>> reservoir = Reservoir(3, (1,), None)
    >>> reservoir.add(torch.arange(2.0).view(2, 1)); reservoir.size
    2
    >>> reservoir.add(torch.arange(50.0).view(50, 1)); reservoir.size
    3
    """

    def add(self, inputs: Tensor) -> None:
        """Show it some more: the n-th of all takes a random place among n, if there is such a place."""
        capacity, device = len(self.kept), self.kept.device
        number = self.added + torch.arange(len(inputs), device=device)
        drawn = (torch.rand(len(inputs), device=device, dtype=torch.float64) * (number + 1)).long()
        places = torch.where(number < capacity, number, drawn)
        inside = (places < capacity).nonzero().flatten()
        last = torch.full((capacity,), -1, device=device).scatter_reduce(0, places[inside], inside, "amax")
        taken = last >= 0
        self.kept[taken] = self.packed(inputs.detach()[last[taken]])
        self.added += len(inputs)


class Replay(nn.Module):
    r"""A variational autoencoder of inputs, :math:`\| x - \hat x \|^2 + \mathrm{KL}(q(z|x) \| \mathcal N(0, 1))`.

    Args:
        latent: Width of z.
        shape: Of an input, ``[C, H, W]`` or ``[D]``.
        width: Of encoder and decoder.

    >>> replay = Replay(4, (1, 8, 8), 4)
    >>> replay.loss(torch.randn(6, 1, 8, 8)).ndim, replay.draw(3).shape
    (0, torch.Size([3, 1, 8, 8]))
    """

    def __init__(self, latent: int, shape: torch.Size | tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        self.latent = latent
        if len(shape) == 3:
            small = [math.ceil(math.ceil(side / 2) / 2) for side in shape[1:]]
            self.encoder: nn.Module = nn.Sequential(
                nn.Conv2d(shape[0], width, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Flatten(),
                nn.Linear(2 * width * small[0] * small[1], 2 * latent),
            )
        else:
            self.encoder = two_layers(shape[0], 2 * width, 2 * latent)
        self.decoder = Generator(latent, shape, width=width)

    def loss(self, inputs: Tensor) -> Tensor:
        """Its loss, a mean over inputs."""
        mean, log_variance = self.encoder(inputs).float().chunk(2, dim=1)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        error = F.mse_loss(widen(self.decoder(latent)), widen(inputs), reduction="sum") / len(inputs)
        return error + (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2

    @torch.no_grad()
    def draw(self, number: int) -> Tensor:
        """Inputs like those it learned from."""
        return self.decoder(torch.randn(number, self.latent, device=next(self.parameters()).device))
