"""Views: chains of augmentations that are replayed from (seed, epoch, sample) alone.

Every random choice of a view is a hash of the seed, the epoch, the sample's index and the transform's place in the
chain (:mod:`limbeck.core.hashing`). So a view does not depend on the batch it is made in, its order, the ranks, the
split into micro-batches or the device, and whoever keeps (seed, epoch, index) can make it again bit for bit.

The partner of a mixed sample is any sample of the set, in the view it has itself at that place of the chain and epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError, did_you_mean
from limbeck.core.hashing import below, draw_bits, key, key_tensor
from limbeck.core.named import read_named
from limbeck.data.mixing import Cutmix, Mixing, Mixup
from limbeck.data.normalise import Normalisation, normalisation
from limbeck.data.transforms import Cutout, Flip, Geometric, Masking, PadCrop, Transform

#: The transforms by their names in a recipe.
TRANSFORMS: dict[str, type[Transform]] = {t.name: t for t in (PadCrop, Flip, Cutout, Mixup, Cutmix)}

AugmentSpec = Sequence[str | Mapping[str, Mapping[str, Any] | None] | Transform]

#: The view of all samples of a batch, or several views, each with the number of samples that follow each other in it.
Shown = int | Sequence[tuple[int, int]]

_VIEWS = 1  # keeps the draws of views apart from those of the data order
_KEYS = 64  # views whose keys are kept


def parse_augment(spec: AugmentSpec | None) -> tuple[Transform, ...]:
    """Read a chain of augmentations as a recipe writes it: names, or ``{name: {option: value}}``, in the order applied.

    >>> parse_augment(["flip", {"pad_crop": {"padding": 2}}])
    (Flip(probability=0.5), PadCrop(padding=2))
    >>> parse_augment(["flop"])
    Traceback (most recent call last):
    limbeck.core.errors.ConfigError: augment[0]: no augmentation of this name; found 'flop'; ... did you mean 'flip'?
    """
    if spec is None:
        return ()
    if isinstance(spec, (str, Mapping)) or not isinstance(spec, Sequence):
        raise ConfigError("must be a list", where="augment", found=repr(spec), remedy=f"write [{spec!r}]")
    return tuple(_parse(item, f"augment[{place}]") for place, item in enumerate(spec))


def describe_augment(transforms: Sequence[Transform]) -> list[dict[str, dict[str, Any]]]:
    """The chain as plain values, every option written out: its identity, which :func:`parse_augment` reads back.

    >>> describe_augment([Flip()])
    [{'flip': {'probability': 0.5}}]
    """
    return [{t.name: dataclasses.asdict(t)} for t in transforms]  # type: ignore[call-overload]


def _parse(item: object, where: str) -> Transform:
    if isinstance(item, Transform):
        return item
    name, options = read_named(item, where)
    if name not in TRANSFORMS:
        raise ConfigError(
            "no augmentation of this name",
            where=where,
            found=repr(name),
            wanted=f"one of {', '.join(TRANSFORMS)}",
            remedy=did_you_mean(name, TRANSFORMS),
        )
    known = [f.name for f in dataclasses.fields(TRANSFORMS[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ConfigError(
                "no such option",
                where=f"{where}.{name}",
                found=repr(option),
                wanted=f"one of {', '.join(known)}",
                remedy=did_you_mean(str(option), known),
            )
    return TRANSFORMS[name](**options)


class Augment:
    """A chain of augmentations and a normalisation, applied to batches on their device.

    Pad-crop and flip work on the pixels as they are, so that padding is black; from the first cutout, mixup or cutmix
    on the images are normalised, so that what is cut out is the mean colour. A pad-crop behind one of these pads with
    the mean colour too.

    Args:
        transforms: As :func:`parse_augment` reads them.
        normalise: A name or statistics; ``None`` leaves floats as they are and scales bytes to 0..1.
        seed: Of every random choice.
        samples: Size of the set, from which partners for mixing are drawn.
        classes: Number of classes, for the soft labels of mixed samples.

    Example:
        >>> images = torch.arange(2 * 64).view(2, 1, 8, 8).byte()
        >>> augment = Augment(["pad_crop", "flip"], samples=2, seed=3)
        >>> index = torch.tensor([1])
        >>> view, _ = augment(images[index], augment.reads(index, epoch=0), epoch=0)
        >>> torch.equal(view, views(images, torch.tensor([0, 1]), seed=3, epoch=0, transforms=["pad_crop", "flip"])[1:])
        True
    """

    def __init__(
        self,
        transforms: AugmentSpec | None = (),
        *,
        normalise: str | Normalisation | Mapping[str, Sequence[float]] | None = None,
        seed: int = 0,
        samples: int | None = None,
        classes: int | None = None,
    ) -> None:
        self.transforms = parse_augment(transforms)
        self.normalise = None if normalise is None else normalisation(normalise)
        self.seed, self.samples, self.classes = seed, samples, classes
        self.mixes = [slot for slot, t in enumerate(self.transforms) if isinstance(t, Mixing)]
        ends = list(accumulate((t.draws for t in self.transforms), initial=0))
        self._draws = [slice(a, b) for a, b in pairwise(ends)]
        self._kept: dict[tuple[int, torch.device], Tensor] = {}
        if self.mixes and not samples:
            raise DataError(
                "mixing needs a set of known size",
                where="augment",
                remedy="leave out mixup and cutmix, or pass a map-style set",
            )

    @property
    def active(self) -> bool:
        """Whether anything is done to images that are floats already."""
        return bool(self.transforms) or self.normalise is not None

    def check(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Raise where the chain or the normalisation cannot work on such images and labels."""
        if images.ndim != 4:
            if self.transforms:
                raise DataError(
                    "only images can be augmented",
                    where="augment",
                    found=f"inputs {list(images.shape)}",
                    wanted="[B, C, H, W]",
                )
            if self.normalise is not None and images.ndim == 2:
                self.normalise.check(images.shape[1])
            return
        if self.normalise is not None:
            self.normalise.check(images.shape[1])
        if not self.mixes or labels is None or labels.is_floating_point():
            return
        if labels.ndim != 1 or self.classes is None or (labels < 0).any():
            raise DataError(
                "mixing needs a class for every sample",
                where="labels",
                found=f"shape {list(labels.shape)}, least {labels.min()}, classes {self.classes}",
                remedy="leave out mixup and cutmix, or name the classes",
            )

    def reads(self, index: Tensor, epoch: Shown) -> Tensor:
        """Samples whose pixels enter the views of ``index [B]``: ``[2**mixes, B]``, the first row ``index`` itself."""
        rows = index.view(1, -1)
        if self.mixes:
            keys = self._keys(epoch, rows.device)
        for slot in reversed(self.mixes):
            assert self.samples is not None
            first = self._draws[slot].start
            partners = below(draw_bits(keys[..., first : first + 1], rows)[..., 0], self.samples)
            rows = torch.cat([rows, partners])
        return rows

    def __call__(
        self, images: Tensor, rows: Tensor, epoch: Shown, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the views of a batch.

        Args:
            images: ``[R * B, C, H, W]`` bytes or floats: the samples ``rows.flatten()``.
            rows: ``[R, B]`` from :meth:`reads`.
            epoch: Of the run; or several, each with how many of the batch's samples it is of.
            labels: ``[R * B]`` classes or ``[R * B, K]`` soft labels, in the same order.

        Returns:
            Views ``[B, C, H, W]`` in float32, and labels: as they were, or ``[B, K]`` soft ones where samples are
            mixed.
        """
        if self.mixes and labels is not None and not labels.is_floating_point():
            assert self.classes is not None
            labels = (labels.unsqueeze(1) == torch.arange(self.classes, device=labels.device)).float()
        bits = draw_bits(self._keys(epoch, rows.device), rows).flatten(0, 1)
        normalised = False
        for moves, slots in groupby(range(len(self.transforms)), lambda s: isinstance(self.transforms[s], Geometric)):
            if moves:
                images = self._move(images, bits, list(slots))
                continue
            if not normalised:
                images, normalised = self.finish(images), True
            for slot in slots:
                transform, drawn = self.transforms[slot], bits[:, self._draws[slot]]
                if isinstance(transform, Mixing):
                    half = len(images) // 2
                    images, share = transform(images[:half], images[half:], drawn[:half])
                    bits = bits[:half]
                    if labels is not None:
                        share = share.unsqueeze(1)
                        labels = labels[:half] * share + labels[half:] * (1 - share)
                elif isinstance(transform, Masking):
                    images = transform(images, drawn)
        return (images if normalised else self.finish(images)), labels

    def finish(self, images: Tensor) -> Tensor:
        """Normalise images; bytes become floats even without statistics."""
        if self.normalise is not None:
            return self.normalise(images)
        return Normalisation()(images) if images.dtype == torch.uint8 else images

    def _keys(self, epoch: Shown, device: torch.device) -> Tensor:
        """A key for each random word of the chain ``[D]``, or where there are several views for each sample's too."""
        if not isinstance(epoch, int):
            return torch.cat([self._keys(view, device).expand(count, -1) for view, count in epoch])
        place = (epoch, device)
        if place not in self._kept:
            if len(self._kept) >= _KEYS:
                del self._kept[next(iter(self._kept))]
            slots = [(slot, draw) for slot, t in enumerate(self.transforms) for draw in range(t.draws)]
            self._kept[place] = key_tensor([key(_VIEWS, self.seed, epoch, *each) for each in slots], device)
        return self._kept[place]

    def _move(self, images: Tensor, bits: Tensor, slots: list[int]) -> Tensor:
        """Apply neighbouring geometric transforms by one gather.

        From the last to the first, each says where its output reads from; what falls outside of the image at any of
        them is sent to one more row or column, which holds zeros.
        """
        count, channels, height, width = images.shape
        row = torch.arange(height, device=images.device).expand(count, -1)
        column = torch.arange(width, device=images.device).expand(count, -1)
        row_out = column_out = torch.zeros((), dtype=torch.bool, device=images.device)
        for slot in reversed(slots):
            transform = self.transforms[slot]
            assert isinstance(transform, Geometric)
            row, column = transform.coordinates(row, column, (height, width), bits[:, self._draws[slot]])
            row_out = row_out | (row < 0) | (row >= height)
            column_out = column_out | (column < 0) | (column >= width)
        row, column = row.masked_fill(row_out, height), column.masked_fill(column_out, width)
        places = ((row * (width + 1)).unsqueeze(2) + column.unsqueeze(1)).view(count, 1, -1).expand(-1, channels, -1)
        padded = F.pad(images, (0, 1, 0, 1)).flatten(2)
        return padded.gather(2, places).view(images.shape)


def views(
    images: Tensor,
    index: Tensor,
    seed: int,
    epoch: int,
    *,
    transforms: AugmentSpec | None = (),
    normalise: str | Normalisation | Mapping[str, Sequence[float]] | None = None,
) -> Tensor:
    """The views that a loader with this seed and chain gives the model: a pure function of its arguments.

    Args:
        images: ``[N, C, H, W]`` the whole training set; partners for mixing come from it.
        index: ``[B]`` samples wanted.
        seed: Of the loader.
        epoch: Whose views.
        transforms: As :func:`parse_augment` reads them.
        normalise: As :class:`Augment` takes it.

    Returns:
        ``[B, C, H, W]`` float32.
    """
    augment = Augment(transforms, normalise=normalise, seed=seed, samples=len(images))
    augment.check(images)
    index = index.to(images.device)
    rows = augment.reads(index, epoch)
    return augment(images[rows.flatten()], rows, epoch)[0]
