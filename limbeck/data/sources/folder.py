"""Folders of images, one sub-folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from limbeck.core.errors import DataError
from limbeck.data.sources.images import image_size
from limbeck.data.sources.source import VALIDATION, DataSource, complete, split_name
from limbeck.data.sources.split import ImageSplit, Split

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FolderImages:
    """Image files."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.files, self.name = list(files), name

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> bytes:
        """The file's bytes."""
        try:
            return self.files[row].read_bytes()
        except OSError as error:
            raise DataError("this file cannot be read", where=self.where(row), found=error.strerror) from error

    def where(self, row: int) -> str:
        """The file, for messages."""
        return str(self.files[row])


def image_folder(
    path: str | Path,
    *,
    mode: str = "RGB",
    size: int | Sequence[int] | None = None,
    validation: float = VALIDATION,
    seed: int = 0,
) -> DataSource:
    """Images in one folder a class: ``PATH/cat/1.png``, or with splits ``PATH/train/cat/1.png`` and ``PATH/test/...``.

    Classes are the training folders' names in alphabetical order; files count in alphabetical order, those in folders
    below a class too. Hidden files and files that are no images are passed over.

    Args:
        path: The folder.
        mode: ``"RGB"`` or ``"L"`` (grey).
        size: Resize and crop every image to this size; needed where sizes differ.
        validation: Fraction of train held out where there is no validation folder; 0 holds out nothing.
        seed: Of what is held out.
    """
    path = Path(path)
    folders = {name: folder for folder in _folders(path) if (name := split_name(folder.name))}
    if "train" not in folders:
        folders = {"train": path}
    classes = tuple(folder.name for folder in _folders(folders["train"]))
    if not classes:
        raise DataError(
            "there are no class folders", where=str(folders["train"]), wanted="one sub-folder of images a class"
        )
    splits: dict[str, Split] = {n: _split(n, f, classes, mode, image_size(size)) for n, f in folders.items()}
    return complete(path.name, splits, validation=validation, seed=seed)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split(name: str, folder: Path, classes: tuple[str, ...], mode: str, size: tuple[int, int] | None) -> ImageSplit:
    files: list[Path] = []
    labels: list[int] = []
    for class_folder in _folders(folder):
        if class_folder.name not in classes:
            raise DataError(
                "this class is not among those of train", where=str(class_folder), wanted=f"one of {', '.join(classes)}"
            )
        found = sorted(
            p
            for p in class_folder.rglob("*")
            if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
        )
        if not found and name == "train":
            raise DataError(
                "there are no images in this folder",
                where=str(class_folder),
                wanted=f"files ending in {', '.join(sorted(SUFFIXES))}",
                remedy="fill or remove it",
            )
        files += found
        labels += [classes.index(class_folder.name)] * len(found)
    return ImageSplit(
        FolderImages(files, str(folder)),
        torch.arange(len(files)),
        mode,
        size,
        labels=torch.tensor(labels, dtype=torch.long),
        classes=classes,
        normalise="imagenet" if mode == "RGB" else "none",
    )
