"""Statistics that turn pixels or features into what a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True)
class Normalisation:
    r"""Per channel, :math:`(x - \mu) / \sigma`, where bytes are first scaled to 0..1.

    Args:
        mean: One number a channel (of a feature vector: an entry), or a single one for all.
        std: As many as ``mean``.

    Example:
        >>> Normalisation((0.5,), (0.25,))(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
        2.0
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                "mean and std differ in length", where="normalise", found=f"{len(self.mean)} and {len(self.std)}"
            )
        if not all(value > 0 for value in self.std):
            raise ConfigError("a standard deviation must be positive", where="normalise.std", found=self.std)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` bytes (0..255) or floats, or ``[B, D]`` features; the result is float32.

        One multiplication and one subtraction, each rounded once: the same bits on every device.
        """
        scale, shift = _factors(self, images.dtype == torch.uint8, images.device, images.ndim - 2)
        floats = images.float() if images.dtype != torch.float32 else images.clone()
        return floats.mul_(scale).sub_(shift)

    @classmethod
    def of(cls, features: Tensor) -> Normalisation:
        """The statistics of features ``[N, D]``; an entry that does not vary is only shifted.

        >>> Normalisation.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        Normalisation(mean=(2.0, 5.0), std=(1.0, 1.0))
        """
        mean, std = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
        return cls(tuple(mean.tolist()), tuple(std.masked_fill(std < 1e-12, 1.0).tolist()))

    def check(self, channels: int, where: str = "normalise") -> None:
        """Raise where the statistics are not for this number of channels."""
        if len(self.mean) not in (1, channels):
            raise DataError(
                "the statistics do not fit the inputs",
                where=where,
                found=f"{len(self.mean)} channels",
                wanted=f"{channels}",
                remedy="name another normalisation, or give mean and std with one number a channel",
            )


@lru_cache(maxsize=64)
def _factors(stats: Normalisation, from_bytes: bool, device: torch.device, places: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        mean, std = torch.tensor([stats.mean, stats.std], dtype=torch.float64).view(2, 1, -1, *[1] * places)
        scale, shift = 1 / (std * 255 if from_bytes else std), mean / std
        return scale.float().to(device), shift.float().to(device)


#: By name: ImageNet's usual statistics; those of all training pixels of CIFAR-10 and digits; "none" scales to 0..1.
NORMALISATIONS: dict[str, Normalisation] = {
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": Normalisation((0.3054,), (0.3758,)),
    "none": Normalisation(),
}


def normalisation(spec: str | Normalisation | Mapping[str, Sequence[float]]) -> Normalisation:
    """Read a normalisation: a name (see :data:`NORMALISATIONS`), ``{"mean": [...], "std": [...]}``, or one ready made.

    >>> normalisation("imagnet")
    Traceback (most recent call last):
    limbeck.core.errors.ConfigError: normalise: no normalisation of this name; ... did you mean 'imagenet'?
    """
    if isinstance(spec, Normalisation):
        return spec
    if isinstance(spec, str):
        if spec not in NORMALISATIONS:
            raise ConfigError(
                "no normalisation of this name",
                where="normalise",
                found=repr(spec),
                wanted=f"one of {', '.join(NORMALISATIONS)}, or mean and std",
                remedy=did_you_mean(spec, NORMALISATIONS),
            )
        return NORMALISATIONS[spec]
    if isinstance(spec, Mapping) and set(spec) == {"mean", "std"}:
        try:
            mean, std = (tuple(float(v) for v in spec[name]) for name in ("mean", "std"))
        except (TypeError, ValueError) as error:
            raise ConfigError("mean and std must be lists of numbers", where="normalise", found=dict(spec)) from error
        return Normalisation(mean, std)
    raise ConfigError(
        "cannot be read", where="normalise", found=repr(spec), wanted="a name, or {mean: [...], std: [...]}"
    )
