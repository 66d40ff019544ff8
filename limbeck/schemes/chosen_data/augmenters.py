"""Networks that change inputs: by moving images about, or in what an autoencoder makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.schedules import Constant
from limbeck.core.trace import Trace
from limbeck.schemes.data_free.memory import Replay


def moved(images: Tensor, moves: Tensor, black: Tensor | float = 0.0) -> Tensor:
    r"""Images turned, sheared, scaled and shifted; what comes in from outside is black. Gradients pass to both.

    Args:
        images: ``[B, C, H, W]``.
        moves: ``[B, 5]``: shifts to the right and down in parts of a side, angle in radians, logarithm of the scale,
            shear. All 0: the images as they are.
        black: Its value, ``[C, 1, 1]`` or a number.

    >>> x = torch.arange(4.0).view(1, 1, 1, 4)
    >>> moved(x, torch.tensor([[0.25, 0.0, 0.0, 0.0, 0.0]])).flatten()
    tensor([0., 0., 1., 2.])
    """
    right, down, angle, log_scale, shear = moves.unbind(dim=1)
    cos, sin, size = angle.cos(), angle.sin(), (-log_scale).exp()
    ratio = images.shape[-2] / images.shape[-1]  # grids go from -1 to 1 on both sides, whatever their lengths
    rows = (
        torch.stack([size * cos, size * (sin + shear * cos) * ratio, torch.zeros_like(cos)], dim=1),
        torch.stack([-size * sin / ratio, size * (cos - shear * sin), torch.zeros_like(cos)], dim=1),
    )
    theta = torch.stack(rows, dim=1)
    shift = torch.stack([2 * right, 2 * down], dim=1)
    theta = torch.cat([theta[:, :, :2], -(theta[:, :, :2] @ shift.unsqueeze(2))], dim=2)
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, padding_mode="zeros", align_corners=False) + black


class Mover(nn.Module):
    r"""Moves each image as a small network of it and of noise says, :math:`m = l \tanh( f(x, n) + s n )`.

    In the beginning f is 0. It does not begin at the image itself unless ``spread`` is 0: there, where any move blurs
    an image by interpolation, less is gained at first, and the search would stay.

    Args:
        channels: Of images.
        limits: The most that each of the five moves is, see :func:`moved`.
        black: Of the images.
        spread: Of s, learned, in the beginning.
        noise: Width of the noise; its first entries are n of s n.
        width: Of the network.

    >>> x = torch.rand(3, 1, 8, 8)
    >>> torch.allclose(Mover(1, (0.5, 0.5, 0.0, 0.0, 0.0), spread=0.0)(x, torch.randn(3, 16)), x, atol=1e-6)
    True
    """

    limits: Tensor
    black: Tensor

    def __init__(
        self,
        channels: int,
        limits: tuple[float, ...],
        black: Tensor | None = None,
        *,
        spread: float = 0.5,
        noise: int = 16,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.full((len(limits),), spread))
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = _still(4 * width + noise, 2 * width, len(limits))
        self.register_buffer("limits", torch.tensor(limits), persistent=False)
        self.register_buffer("black", torch.zeros(1, 1, 1) if black is None else black, persistent=False)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        said = self.head(torch.cat([self.body(images), noise], dim=1)) + self.spread * noise[:, : len(self.limits)]
        return moved(images, said.tanh() * self.limits, self.black)


class LatentMover(nn.Module):
    """Inputs that an autoencoder makes of its code of them, moved by a network of code and noise; at first not at all.

    Args:
        autoencoder: Stays as it is.
        noise: Width of the noise.
        width: Of the network.
    """

    def __init__(self, autoencoder: Replay, *, noise: int = 16, width: int = 64) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.head = _still(autoencoder.latent + noise, width, autoencoder.latent)

    def train(self, mode: bool = True) -> LatentMover:
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, inputs: Tensor, noise: Tensor) -> Tensor:
        code = self.autoencoder.encoder(inputs).chunk(2, dim=1)[0]
        return self.autoencoder.decoder(code + self.head(torch.cat([code, noise], dim=1)))


def _still(inside: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers that give 0 in the beginning; with tanh between, since the game kills units of a ReLU for good."""
    last = nn.Linear(hidden, out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inside, hidden), nn.Tanh(), last)


class Reconstruction(Objective):
    """An autoencoder's own loss of the inputs that it is shown."""

    contract = Contract(normalizer="samples")

    def __init__(self, autoencoder: Replay) -> None:
        super().__init__()
        self._of = (autoencoder,)  # in a tuple: it is the student, and no part of its loss

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return self._of[0].loss(batch.inputs)


class Autoencoding(Distiller):
    """An autoencoder that learns the training data, as a training of its own."""

    def __init__(self, autoencoder: Replay) -> None:
        super().__init__(autoencoder, Terms([Reconstruction(autoencoder)], [Constant(1.0)], ["autoencoder"]))

    def setup(self, batch: Batch, data: Any = None) -> Autoencoding:
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        return self.compare(Trace(None), Trace(None), batch)


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Weights are drawn from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def plain_adam(lr: float) -> dict[str, Any]:
    """Settings of a plain Adam."""
    plain = {"optimizer_options": {}, "schedule": "constant", "schedule_options": {}, "warmup": 0.0}
    return {"optimizer": "adam", "lr": lr, "weight_decay": 0.0, **plain}
