"""Feature vectors from Parquet, with a class or any number of labels each."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import Normalisation, as_loader, build_loader, load_source, tensors

ROWS = 40


@pytest.fixture
def values() -> tuple[torch.Tensor, torch.Tensor]:
    return 5 + 3 * torch.randn(ROWS, 3), (torch.rand(ROWS, 4) < 0.5).float()


@pytest.fixture
def file(tmp_path: Path, values: tuple[torch.Tensor, torch.Tensor]) -> Path:
    features, labels = values
    table = pa.table(
        {
            "x": pa.array(features.tolist(), pa.list_(pa.float32(), 3)),
            "y": pa.array(labels.int().tolist(), pa.list_(pa.int8())),
            "a": features[:, 0].tolist(),
            "b": features[:, 1].tolist(),
            "odd": [[1.0]] * (ROWS - 1) + [[1.0, 2.0]],
            "gap": [1.0, None] + [2.0] * (ROWS - 2),
            "yes": labels[:, 0].bool().tolist(),
            "no": (1 - labels[:, 0]).int().tolist(),
            "label": labels[:, 0].long().tolist(),
            "text": ["?"] * ROWS,
        }
    )
    path = tmp_path / "table.parquet"
    pq.write_table(table.replace_schema_metadata({b"y_names": b'["p", "q", "r", "s"]'}), path)
    return path


def test_any_number_of_labels(file: Path, values: tuple[torch.Tensor, torch.Tensor]) -> None:
    source = load_source(file, features="x", labels="y", test=0.25, validation=0.1)
    assert source.task == "multilabel"
    assert source.samples == {"train": 27, "validation": 3, "test": 10}
    assert source.classes == ("p", "q", "r", "s")
    assert "test: 25% of train held out, seed 0; validation: 10%" in source.note
    parts = [source.split(name) for name in source.samples]
    rows = torch.cat([torch.cat([p.load(), p.labels], dim=1) for p in parts])
    wanted = torch.cat(values, dim=1)
    assert sorted(rows.tolist()) == sorted(wanted.tolist())  # every row once, with its labels
    again = load_source(file, features="x", labels="y", test=0.25, validation=0.1)
    assert torch.equal(again.test.load(), source.test.load())


def test_standardised_by_the_training_split_alone(file: Path) -> None:
    source = load_source(file, features="x", labels="y", test=0.25)
    loader = build_loader(source.train, batch_size=100, train=False)
    batch = next(loader.batches())
    assert (loader.task, loader.classes, batch.labels.shape[1]) == ("multilabel", 4, 4)
    torch.testing.assert_close(batch.inputs.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.inputs.std(0, correction=0), torch.ones(3))
    train = source.train.load()
    held = next(build_loader(source.test, batch_size=100, train=False).batches()).inputs
    torch.testing.assert_close(held, (source.test.load() - train.mean(0)) / train.std(0, correction=0))
    told = loader.describe()["normalise"]
    assert told["mean"] == pytest.approx(train.mean(0).tolist(), rel=1e-5)
    bare = load_source(file, features="x", labels="y", standardise=False)
    assert torch.equal(next(as_loader(bare.train, batch_size=100).batches()).inputs, bare.train.load())


@pytest.mark.parametrize("resident", [True, False])
def test_however_it_is_read(file: Path, resident: bool) -> None:
    source = load_source(file, features="x", labels="y")
    loader = build_loader(source.train, batch_size=8, train=True, resident=resident, workers=0)
    first = next(iter(loader.epoch(0)))[0]
    wanted = source.train.normalise(source.train.load()[first.index])
    torch.testing.assert_close(first.inputs, wanted)
    assert loader.task == "multilabel"


def test_columns_of_numbers_and_one_class(file: Path, values: tuple[torch.Tensor, torch.Tensor]) -> None:
    source = load_source(file, features=["b", "a"], validation=0)
    assert source.task == "classification"
    assert torch.equal(source.train.load(), values[0][:, [1, 0]])
    assert torch.equal(source.train.labels, values[1][:, 0].long())
    several = load_source(file, features="a", labels=["yes", "no"], validation=0)
    assert several.classes == ("yes", "no")
    assert torch.equal(several.train.labels, torch.stack([values[1][:, 0], 1 - values[1][:, 0]], dim=1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": "odd"}, DataError, r"column 'odd': lists of one length were expected; found lengths 1 to 2"),
        ({"features": "gap"}, DataError, r"column 'gap', row 1: a number is missing or not finite"),
        ({"features": "text"}, DataError, r"column 'text': these are no numbers; found string"),
        ({"features": "z"}, DataError, r"no such column.*wanted 'z'"),
        (
            {"features": "x", "labels": "a"},
            DataError,
            r"column 'a': a label is neither yes nor no; wanted 1 and 0, or -1",
        ),
        ({"features": "x", "image": "a"}, ConfigError, r"image: samples are images or features"),
        ({"labels": "y"}, ConfigError, r"labels: several labels a sample are read of feature vectors"),
    ],
)
def test_what_cannot_be_read_is_told(file: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_source(file, **options)


def test_what_labels_mean_is_said_not_guessed() -> None:
    inputs, labels = torch.zeros(10, 3), (torch.rand(10, 4) < 0.5).float()
    assert tensors(inputs, labels).task == "classification"  # soft labels
    assert tensors(inputs, labels).train.class_count is None
    source = tensors(inputs, labels, task="multilabel")
    assert (source.task, source.validation.task, source.train.class_count) == ("multilabel", "multilabel", 4)
    assert as_loader((inputs, labels), batch_size=4, task="multilabel").classes == 4
    with pytest.raises(DataError, match=r"task: no such task; found 'multi-label'.*did you mean 'multilabel'"):
        tensors(inputs, labels, task="multi-label")
    for wrong in (torch.zeros(10, dtype=torch.long), 3 * torch.ones(10, 4)):
        with pytest.raises(DataError, match=r"labels: these are no labels of multilabel.*wanted \[N, C\] floating"):
            tensors(inputs, wrong, task="multilabel")


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match=r"the statistics do not fit the inputs; found 2 channels; wanted 3"):
        as_loader((torch.zeros(4, 3), torch.zeros(4).long()), batch_size=2, normalise=Normalisation((0, 0), (1, 1)))


@pytest.mark.parametrize(("name", "features", "labels"), [("emotions", 71, 6), ("yeast", 103, 14)])
def test_real_sets(shared_data: Path, name: str, features: int, labels: int) -> None:
    source = load_source(shared_data / "multilabel" / f"{name}.parquet", features="features", labels="labels", test=0.3)
    assert source.train.load().shape[1] == features
    assert len(source.classes) == source.train.labels.shape[1] == labels
    assert set(source.train.labels.unique().tolist()) == {0.0, 1.0}
