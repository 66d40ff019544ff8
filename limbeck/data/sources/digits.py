"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from limbeck.data.order import hold_out
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import TensorSplit

_TEST, _VALIDATION = 0.2, 0.125


def digits(*, seed: int = 0) -> DataSource:
    """1797 grey images of 8 x 8 pixels, ten classes: the test part of the UCI set of Alpaydin and Kaynak, 1998.

    Pixels 0..16 are scaled to bytes, ``round(value * 255 / 16)``. The set comes without splits; here each class is
    cut at random, the same way for everybody: 20 % for test, then an eighth of the rest for validation, which leaves
    70 % for training (1259 / 179 / 359 images). Writers are not told apart, so test figures are easier than for
    unseen writers.

    Args:
        seed: Another seed cuts otherwise. Figures compare only under one seed.

    Example:
        >>> source = digits()
        >>> source.samples
        {'train': 1259, 'validation': 179, 'test': 359}
    """
    rows = torch.from_numpy(_rows())
    images = rows[:, :-1].reshape(-1, 1, 8, 8).mul(255 / 16).round().byte()
    labels = rows[:, -1].long()
    whole = TensorSplit(images, labels=labels, classes=tuple(str(n) for n in range(10)), normalise="digits")
    rest, test = hold_out(labels, _TEST, seed)
    train, validation = hold_out(labels[rest], _VALIDATION, seed)
    return DataSource(
        "digits",
        whole.subset(rest[train]),
        whole.subset(rest[validation]),
        whole.subset(test),
        note=f"stratified 70/10/20 split, seed {seed}",
    )


def _rows() -> np.ndarray:
    """scikit-learn's table, 64 pixels and the label a row; from its file, since importing scikit-learn is slow."""
    spec = importlib.util.find_spec("sklearn")
    places = spec.submodule_search_locations if spec is not None else None
    file = Path(places[0]) / "datasets" / "data" / "digits.csv.gz" if places else None
    if file is not None and file.is_file():
        with gzip.open(file, "rt") as table:
            return np.loadtxt(table, delimiter=",")
    from sklearn.datasets import load_digits  # it keeps its file elsewhere now

    data = load_digits()
    return np.column_stack([data.data, data.target])
