"""The control of all training without data: what is learned from noise, or from images of something else?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_positive
from limbeck.engine.stage import Stage
from limbeck.schemes.data_free.made import Made, teacher_at_hand, unlabelled, without_data
from limbeck.schemes.data_free.other_images import other_images
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def noise(kind: str, like: Tensor, normalise: Any = None) -> Tensor:
    r"""Inputs of pure chance, in the normalised space.

    ``"gaussian"``: each entry from :math:`\mathcal N(0, 1)`, the mean and deviation of normalised data. ``"uniform"``:
    each pixel from 0 to 1, normalised as the data; an entry of a vector from :math:`-\sqrt 3` to :math:`\sqrt 3`, which
    has the same deviation as normalised data.

    >>> noise("uniform", torch.zeros(2, 1, 8, 8)).min() >= 0
    tensor(True)
    """
    if kind == "gaussian":
        return torch.randn_like(like)
    drawn = torch.rand_like(like)
    if like.ndim != 4:
        return (2 * drawn - 1) * 3**0.5
    return drawn if normalise is None else normalise(drawn)


@register(
    Card(
        key="noise_kd",
        name="KD on noise",
        title="Data-Free Learning of Student Networks",
        year=2019,
        arxiv="1904.01186",
        knowledge="scheme",
        equation=r"\mathbb{E}_{\epsilon} \left[ L\big( z^S(\epsilon), z^T(\epsilon) \big) \right]",
        use="The control that every method without data must beat: plain distillation on noise, or on images of "
        "another source (`images: other`), which often teach more than any generator does.",
        defaults={"images": "gaussian, the row `normal distribution` of the paper's tables"},
        evidence="formula",
        evidence_note="plain distillation on the same draws gives the same weights bit for bit",
        choices=(
            "Gaussian noise has the mean and deviation of normalised data; uniform noise is that of pixels.",
            "Images of another source are resized, their channels averaged or repeated, normalised as the task's data "
            "and augmented as the recipe says.",
        ),
    )
)
class NoiseKD(Scheme):
    r"""One stage of plain distillation by the recipe's loss on what has nothing to do with the data.

    Args:
        images: ``"gaussian"``, ``"uniform"``, or ``"other"``: those of ``source``.
        source: Images of another source, as ``data.source``.
        options: Of the source.
        samples: Of the source, at most.

    Source: a row of the tables in Data-Free Learning of Student Networks, arXiv 1904.01186.

    >>> NoiseKD("uniform").images
    'uniform'
    """

    def __init__(
        self,
        images: Literal["gaussian", "uniform", "other"] = "gaussian",
        source: str | None = None,
        options: dict[str, Any] = {},  # noqa: B006  never changed
        samples: int = 10_000,
    ) -> None:
        if (images == "other") != (source is not None):
            raise ConfigError(
                "images of another source need one" if source is None else "a source is for images: other",
                where="scheme.source",
                found=source or "none",
                remedy="write {noise_kd: {images: other, source: FOLDER}}",
            )
        check_positive(samples, "scheme.samples")
        self.images, self.source, self.options, self.samples = images, source, options, samples

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, blank = teacher_at_hand(cast, "noise_kd"), without_data(cast, "noise_kd")
        distiller = Noisy(cast.student, cast.loss, teacher, logits=cast.logits)
        distiller.plan(self, blank, seed=cast.seed)
        train = blank
        if self.images == "other":
            assert cast.train is not None
            train = other_images(self.source, self.options, blank, self.samples, cast.train)  # type: ignore[assignment]
        yield Training([Stage("noise_kd", distiller, cast.config)], train=train)


class Noisy(Made):
    """Learns from noise, or from other images without their labels; see :class:`NoiseKD`."""

    who = "noise_kd"

    def made(self, batch: Batch) -> Batch:
        if self.scheme.images != "other":
            return super().made(batch)
        return unlabelled(batch, batch.inputs)

    def make(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return noise(self.scheme.images, like, self.normalise), {}
