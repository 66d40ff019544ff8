"""Image sets of the Hugging Face hub, read by its own library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.core.errors import DataError, MissingExtra, did_you_mean
from limbeck.data.sources.images import image_size
from limbeck.data.sources.source import VALIDATION, DataSource, complete, split_name
from limbeck.data.sources.split import ImageSplit, Split


class HubImages:
    """The image column of one split; files stay where the library keeps them, mapped into memory."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        self.dataset, self.column, self.name = dataset.select_columns([column]), column, name

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> bytes:
        """The image file in a row."""
        value = self.dataset[row][self.column]
        if value and value.get("bytes") is not None:
            return value["bytes"]
        if value and value.get("path") and Path(value["path"]).is_file():
            return Path(value["path"]).read_bytes()
        raise DataError("there is no image", where=self.where(row))

    def where(self, row: int) -> str:
        """Split and row, for messages."""
        return f"{self.name}, row {row}"


def hub(
    name: str,
    *,
    config: str | None = None,
    image: str | None = None,
    label: str = "label",
    mode: str = "RGB",
    size: int | Sequence[int] | None = None,
    validation: float = VALIDATION,
    seed: int = 0,
) -> DataSource:
    """An image set by its name on the hub, or a local folder that the ``datasets`` library reads.

    Args:
        name: Such as ``"uoft-cs/cifar10"``, a folder of data files, or one written by ``save_to_disk``.
        config: The set's configuration, where it has several.
        image: Column of images; by default the only one.
        label: Column of integer classes.
        mode: ``"RGB"`` or ``"L"`` (grey).
        size: Resize and crop every image to this size; needed where sizes differ.
        validation: Fraction of train held out where there is no validation split; 0 holds out nothing.
        seed: Of what is held out.
    """
    parts = load_hub(name, config)
    splits: dict[str, Split] = {}
    for key, part in parts.items():
        split = split_name(key)
        if split is not None:
            splits[split] = _split(part, f"hf:{name} {key}", image, label, mode, image_size(size))
    return complete(name, splits, validation=validation, seed=seed)


def load_hub(name: str, config: str | None = None) -> dict[str, Any]:
    """The data sets of a set of the hub, or of a local folder, by the names of their splits.

    Raises:
        DataError: It cannot be loaded.
        MissingExtra: The ``datasets`` library is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", extra="language") from error
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "this set cannot be loaded",
            where=f"hf:{name}",
            found=str(error).splitlines()[0],
            remedy="check the name and the network, or give a local folder",
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _split(part: Any, name: str, image: str | None, label: str, mode: str, size: tuple[int, int] | None) -> ImageSplit:
    import datasets

    images = [c for c, feature in part.features.items() if isinstance(feature, datasets.Image)]
    column = image or (images[0] if len(images) == 1 else "")
    if column not in images:
        raise DataError(
            "no column of images was found" if image is None else "this is no column of images",
            where=name,
            found=", ".join(part.column_names),
            remedy=f"name it with image: one of {', '.join(images)}" if images else "choose a set of images",
        )
    if label not in part.column_names:
        raise DataError(
            "there is no such column",
            where=name,
            found=", ".join(part.column_names),
            wanted=repr(label),
            remedy=did_you_mean(label, part.column_names) or "name the column of classes with label",
        )
    feature = part.features[label]
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise DataError("labels must be integers", where=f"{name}, column {label!r}", found=feature)
    values = np.asarray(part.select_columns([label]).with_format("numpy")[:][label])
    names = getattr(feature, "names", None)
    return ImageSplit(
        HubImages(part.cast_column(column, datasets.Image(decode=False)), column, name),
        torch.arange(len(part)),
        mode,
        size,
        labels=torch.from_numpy(values.astype(np.int64)),
        classes=tuple(names) if names else None,
        normalise="imagenet" if mode == "RGB" else "none",
    )
