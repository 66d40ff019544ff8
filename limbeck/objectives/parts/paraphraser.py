"""An autoencoder of a teacher's map, trained before the student or beside it."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import reduce, widen
from limbeck.core.relations import project
from limbeck.core.trace import Trace


def three_layers(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *widths: int) -> nn.Sequential:
    """Convolutions 3x3 that keep a map's size, each with a leaky ReLU behind, from width to width."""
    return nn.Sequential(*(m for a, b in pairwise(widths) for m in (kind(a, b, 3, 1, 1), nn.LeakyReLU(0.1))))


class Paraphraser(nn.Module):
    """Three convolutions from a map to its factor, and three back: the paraphraser of factor transfer.

    It is sized by the first map, and keeps what it learned where it is sized again by one of the same width.

    Args:
        rate: Channels of the factor over those of the map.
    """

    encoder: nn.Module | None
    decoder: nn.Module | None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.width = rate, 0
        self.encoder = self.decoder = None

    def size(self, feature: Tensor) -> int:
        """Make the layers for a map ``[B, C, H, W]`` where they are not there yet; gives the factor's channels."""
        width, factors = feature.shape[1], max(round(feature.shape[1] * self.rate), 1)
        if self.width != width:
            self.encoder = three_layers(nn.Conv2d, width, width, factors, factors).to(feature.device)
            self.decoder = three_layers(nn.ConvTranspose2d, factors, factors, width, width).to(feature.device)
            self.width = width
        return factors

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The factor, and the mean squared error ``[B]`` of the map as told from it."""
        if self.encoder is None or self.decoder is None:
            raise ConfigError("not set up yet", where="paraphraser", remedy="call setup, as Distiller.setup does")
        factor = project(self.encoder, feature, "teacher_feature")
        return factor, (widen(self.decoder(factor)) - widen(feature)).square().mean(dim=(1, 2, 3))


class Paraphrase(Objective):
    """A first stage in which a paraphraser learns to tell the teacher's map from its factor. The student is not asked.

    Args:
        paraphraser: Whose.
        teacher_tap: The map; of a plural role the last.
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True)

    def __init__(self, paraphraser: Paraphraser, teacher_tap: str) -> None:
        super().__init__()
        self.paraphraser, self.teacher_tap, self.teacher_taps = paraphraser, teacher_tap, (teacher_tap,)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.paraphraser.size(last_map(teacher, self.teacher_tap, "teacher_feature"))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        _, error = self.paraphraser(last_map(teacher, self.teacher_tap, "teacher_feature").detach())
        return reduce(error, batch.mask)


def last_map(trace: Trace, tap: str, name: str) -> Tensor:
    """A tap's value as a map; of a plural role the last."""
    value = trace[tap]
    return to_map(value[-1] if isinstance(value, list) else value, name)
