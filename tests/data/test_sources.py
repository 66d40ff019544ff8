from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import DatasetSplit, StreamSplit, TensorSplit, as_split, digits, load_source, tensors

X, Y = torch.arange(60).float().view(60, 1), torch.arange(60) % 3


def test_digits_are_split_once_and_for_all():
    from sklearn.datasets import load_digits

    source, data = digits(), load_digits()
    assert source.samples == {"train": 1259, "validation": 179, "test": 359}
    assert source.classes == tuple("0123456789")
    parts = [source.split(name) for name in ("train", "validation", "test")]
    whole = torch.cat([p.load() for p in parts])
    assert whole.dtype == torch.uint8
    assert whole.shape == (1797, 1, 8, 8)
    assert whole.max() == 255

    def rows(images):
        return sorted(tuple(i) for i in images.flatten(1).tolist())

    expected = (torch.from_numpy(data.images) * 255 / 16).round().to(torch.uint8)
    assert rows(whole) == rows(expected)  # every image once: the splits are disjoint
    share = torch.tensor(data.target).bincount() / 1797
    for part in parts:
        assert (part.labels.bincount() / len(part) - share).abs().max() < 0.005
    again = digits().train
    assert torch.equal(again.load(), source.train.load())
    assert torch.equal(again.labels, source.train.labels)
    assert not torch.equal(digits(seed=1).train.load()[:100], source.train.load()[:100])
    # pixels belong to their labels: a nearest-mean rule learned on train is right on most of test
    means = torch.stack([source.train.load()[source.train.labels == c].float().mean(0) for c in range(10)])
    nearest = torch.cdist(source.test.load().float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == source.test.labels).float().mean() > 0.85


def test_validation_is_held_out_of_train_by_class():
    source = load_source((X, Y), validation=0.2)
    assert source.samples == {"train": 48, "validation": 12}
    assert source.validation.labels.bincount().tolist() == [4, 4, 4]
    both = torch.cat([source.train.load(), source.validation.load()]).flatten().sort().values
    assert torch.equal(both, X.flatten())
    assert torch.equal(source.train.load().flatten().long() % 3, source.train.labels)
    assert source.note == "validation: 20% of train held out, seed 0"
    assert load_source((X, Y)).samples["validation"] == 6
    assert load_source((X, Y), validation=0).validation is None
    other = load_source((X, Y), validation=0.2, seed=1)
    assert not torch.equal(other.validation.load(), source.validation.load())


def test_a_users_splits_are_taken_as_they_are():
    data, loader = TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), 4)
    source = load_source({"train": data, "val": (X[:6], Y[:6]), "test": loader})
    assert source.samples == {"train": 60, "validation": 6, "test": 60}
    assert isinstance(source.test, StreamSplit)
    assert source.note == ""
    source = load_source({"train": data, "test": (X[:6], Y[:6])}, validation=0.5)
    assert source.samples == {"train": 30, "validation": 30, "test": 6}
    with pytest.raises(DataError, match="no training split"):
        load_source({"test": data})


def test_data_sets_of_a_users_own():
    class Images(Dataset):
        classes = ("cat", "dog", "eel")
        targets = Y.tolist()

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return X[index], self.targets[index]

    source = load_source(Images(), validation=0.1)
    assert source.name == "Images"
    assert source.classes == ("cat", "dog", "eel")
    assert source.train.labels.bincount().tolist() == [18, 18, 18]
    x, y = source.train.dataset()[5]
    assert (int(x) % 3, y) == (y, int(source.train.labels[5]))
    loader = load_source(DataLoader(Images(), 5))
    assert loader.validation is None
    assert loader.classes == ("cat", "dog", "eel")
    assert isinstance(as_split([(X[0], 1)]), DatasetSplit)
    assert isinstance(as_split(X), TensorSplit)


def test_functions_of_a_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make(count=10):\n    return torch.zeros(count, 2), torch.arange(count) % 2\n"
        "def broken():\n    return 1 / 0\n"
        "def word():\n    return 'digits'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    before = list(sys.path)
    assert load_source("mine:make", count=20).samples == {"train": 18, "validation": 2}
    for spec, message in {
        "mine:broken": "mine:broken: it raised ZeroDivisionError",
        "mine:nothing": "mine:nothing: it raised AttributeError",
        "no.such.module:f": "no module 'no'",
        "mine:word": "returned a string",
    }.items():
        with pytest.raises(DataError, match=message):
            load_source(spec)
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("digit", {}, DataError, "no such data; found 'digit'; .* did you mean 'digits'"),
        ("/no/such/folder", {}, DataError, "no such data"),
        ("digits", {"sed": 1}, ConfigError, r"data \(digits\): .* found 'sed'; .* did you mean 'seed'"),
        ((X, Y), {"size": 3}, ConfigError, "found 'size'; wanted one of test, validation, seed"),
        ((X, Y[:5]), {}, DataError, "differ in length"),
        ((X, Y), {"validation": 1.5}, ConfigError, "fraction 1.5"),
        ((X[:0], Y[:0]), {}, DataError, "no samples"),
        ([], {}, DataError, "no samples"),
        (None, {}, DataError, "no data set"),
        (7, {}, DataError, "no data set"),
    ],
)
def test_what_cannot_be_read_is_told(spec, options, error, message):
    with pytest.raises(error, match=message):
        load_source(spec, **options)


def test_labels_out_of_range_and_missing_splits_are_told():
    with pytest.raises(DataError, match="label is out of range; found 2 in row 2; wanted 0 to 1"):
        tensors(X, Y, classes=["a", "b"])
    with pytest.raises(DataError, match="found -2 in row 0"):
        tensors(X, Y - 2, classes=["a", "b", "c"])
    assert tensors(X, Y - 1, classes=["a", "b"]).classes == ("a", "b")  # -1: no label
    with pytest.raises(DataError, match="no such split; found 'test'; wanted one of train, validation"):
        tensors(X, Y).split("test")
    with pytest.raises(DataError, match="no such split"):
        tensors(X, Y).split("name")


def test_tensors_with_targets_that_are_no_classes():
    source = tensors(X, torch.rand(60, 4), test=(X[:3], torch.rand(3, 4)))
    assert source.samples == {"train": 54, "validation": 6, "test": 3}
    assert source.classes is None
    assert tensors(X).train.labels is None
    assert tensors({"a": X, "b": X}, Y).train.nbytes == 54 * 8
