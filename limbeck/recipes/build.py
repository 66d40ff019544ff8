"""From a recipe's sections to the things they name: data, models, losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.errors import ModelError
from limbeck.core.objective import Objective, Terms
from limbeck.data.build import build_loader
from limbeck.data.loader import Loader
from limbeck.data.order import hold_out
from limbeck.data.sources.load import load_source
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import Split
from limbeck.models import load_model, load_weights
from limbeck.recipes.schema import Data, Model, Term


def source_of(data: Data) -> DataSource:
    """The source of a recipe's data, with all its samples."""
    return load_source(data.source, **data.options)


def fewer(split: Split, samples: int | None, seed: int = 0) -> Split:
    """So many samples of a split, evenly from the classes and the same for everybody; ``None``: all of them."""
    count = split.samples
    if samples is None or count is None or samples >= count:
        return split
    labels = split.labels
    by_class = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    _, chosen = hold_out(labels if labels is not None and by_class else count, samples / count, seed)
    return split.subset(chosen)


def train_loader(data: Data, split: Split, seed: int, device: torch.device | str = "cpu") -> Loader:
    """Shuffled and augmented batches of a split."""
    return build_loader(
        split,
        batch_size=data.batch_size,
        train=True,
        augment=data.augment,
        normalise=data.normalize,
        seed=seed,
        device=device,
    )


def check_loader(data: Data, split: Split, device: torch.device | str = "cpu") -> Loader:
    """Plain batches of a split, in order, for measuring."""
    return build_loader(split, batch_size=_MEASURED, train=False, normalise=data.normalize, device=device)


_MEASURED = 512
_BESIDE = {"spec", "weights", "auto", "pretrained"}


@dataclass(frozen=True)
class Sizes:
    """What models are built for.

    Args:
        num_classes: How many classes the data have, ``None`` where they have none.
        in_channels: Channels of an image, ``None`` where inputs are no images.
        image_size: Height of an image.
    """

    num_classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None

    @classmethod
    def of(cls, batch: Batch, classes: int | None) -> Sizes:
        """The sizes that a batch shows."""
        images = isinstance(batch.inputs, torch.Tensor) and batch.inputs.ndim == 4
        return cls(classes, *batch.inputs.shape[1:3]) if images else cls(classes)

    def options(self) -> dict[str, int]:
        """Those that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def model_of(spec: Model, sizes: Sizes, seed: int, *, weights: bool = True) -> nn.Module:
    """A recipe's model, its random start drawn from a seed; nothing else is drawn from anywhere."""
    for name in _BESIDE & spec.options.keys():
        raise ModelError("this is said beside the options, not in them", where=f"options.{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(
            spec.model, auto=spec.auto, pretrained=spec.pretrained, **{**sizes.options(), **spec.options}
        )
    if weights and spec.weights is not None:
        load_weights(model, spec.weights)
    return model


def objective_of(name: str, term: Term) -> Objective:
    """The objective of one term of the loss."""
    return catalogue.get(term.method or name, f"loss.{name}").build(f"loss.{name}", **term.options)


def loss_of(terms: dict[str, Term]) -> Terms:
    """A recipe's loss."""
    objectives = [objective_of(name, term) for name, term in terms.items()]
    return Terms(objectives, [term.schedule() for term in terms.values()], list(terms))


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
