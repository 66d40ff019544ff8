"""Sources of stored images: Parquet files, folders, the hub's library."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from limbeck.core.errors import ConfigError, DataError, MissingExtra
from limbeck.data import ResidentLoader, StreamLoader, build_loader, load_source
from limbeck.data.sources.images import decode


def by_content(split, images):
    """The index in ``images`` of each image of a split."""
    keys = {tuple(i.flatten().tolist()): n for n, i in enumerate(images)}
    return [keys[tuple(i.flatten().tolist())] for i in split.load()]


def test_parquet_round_trip(tmp_path, images, labels, write_parquet):
    write_parquet(tmp_path / "train.parquet", images, labels)
    write_parquet(tmp_path / "test.parquet", images[:9], labels[:9])
    source = load_source(tmp_path)
    assert source.samples == {"train": 35, "validation": 5, "test": 9}
    assert source.classes == tuple("abcde")
    assert torch.equal(source.test.load(), images[:9])
    assert torch.equal(source.test.labels, labels[:9])
    train, held = by_content(source.train, images), by_content(source.validation, images)
    assert sorted(train + held) == list(range(40))
    assert source.train.labels.tolist() == labels[train].tolist()
    assert source.validation.labels.bincount().tolist() == [1] * 5
    assert torch.equal(torch.stack([source.train.read(i) for i in range(35)]), source.train.load())


def test_parquet_shards_folders_and_names_of_the_hub(tmp_path, images, labels, write_parquet):
    for part in range(2):
        file = tmp_path / "data" / f"train-0000{part}-of-00002-abc.parquet"
        write_parquet(file, images[part * 20 : part * 20 + 20], labels[part * 20 : part * 20 + 20])
        features = {"label": {"names": ["v", "w", "x", "y", "z"], "_type": "ClassLabel"}}
        table = pq.read_table(file)
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), file)
    write_parquet(tmp_path / "data" / "val.parquet", images[:5], labels[:5], names=None)
    write_parquet(tmp_path / "data" / "train_small.parquet", images[:5], labels[:5])  # no split's name
    source = load_source(str(tmp_path))
    assert source.samples == {"train": 40, "validation": 5}
    assert source.classes == tuple("vwxyz")
    assert torch.equal(source.train.load(), images)
    one = load_source(tmp_path / "data" / "val.parquet", validation=0)
    assert one.samples == {"train": 5}
    assert one.classes == tuple("01234")


def test_grey_and_resized(tmp_path, images, labels, write_parquet):
    write_parquet(tmp_path / "train.parquet", images, labels)
    grey = load_source(tmp_path, mode="L", size=4, validation=0)
    assert grey.train.load().shape == (40, 1, 4, 4)
    assert grey.train.normalise == "none"
    assert load_source(tmp_path, size=[8, 5]).train.load().shape == (35, 3, 8, 5)
    flat = torch.full((2, 3, 6, 9), 77, dtype=torch.uint8)
    write_parquet(tmp_path / "train.parquet", flat, labels[:2])
    assert (load_source(tmp_path, size=[12, 5], validation=0).train.load() == 77).all()
    with pytest.raises(ConfigError, match="size"):
        load_source(tmp_path, size=[1, 2, 3])


def test_a_whole_loader_of_parquet(tmp_path, images, labels, write_parquet):
    write_parquet(tmp_path / "train.parquet", images, labels)
    split = load_source(tmp_path, validation=0).train
    chain = ["pad_crop", "mixup"]
    one = build_loader(split, batch_size=8, train=True, augment=chain, seed=4)
    two = build_loader(split, batch_size=8, train=True, augment=chain, seed=4, resident=False, workers=2)
    assert isinstance(one, ResidentLoader)
    assert isinstance(two, StreamLoader)
    for a, b in zip(one.batches(1), two.batches(1), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.index, b.index)


@pytest.fixture
def broken(tmp_path, images, labels, encode, write_parquet):
    """Parquet files wrong in one way each."""

    def make(kind: str):
        file = tmp_path / "train.parquet"
        cells = [{"bytes": encode(i), "path": None} for i in images]
        if kind == "image":
            cells[23]["bytes"] = cells[23]["bytes"][:40]
        elif kind == "empty cell":
            cells[23]["bytes"] = None
        elif kind == "size":
            cells[23]["bytes"] = encode(images[0, :, :5])
        elif kind == "label":
            labels[23] = 5
        write_parquet(file, images, labels, rows=cells)
        if kind == "cut short":
            file.write_bytes(file.read_bytes()[:-100])
        elif kind == "no column":
            pq.write_table(pq.read_table(file).rename_columns(["image", "labels"]), file)
        elif kind == "no image column":
            pq.write_table(pq.read_table(file).select(["label"]), file)
        elif kind == "float labels":
            table = pq.read_table(file)
            pq.write_table(table.set_column(1, "label", pa.array(np.linspace(0, 1, 40))), file)
        return file

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("image", "train.parquet, row 23: this image cannot be read"),
        ("empty cell", "train.parquet, row 23: there is no image"),
        ("size", "train.parquet, row 23: images of several sizes; found 5 x 9 pixels; wanted 6 x 9 .* give size"),
        ("label", "train.parquet, column 'label': a label is out of range; found 5 in row 23; wanted 0 to 4"),
        ("cut short", "train.parquet: this Parquet file cannot be read"),
        ("no column", "train.parquet: there is no such column; found image, labels; .* did you mean 'labels'"),
        ("no image column", "train.parquet: one column of images was expected; found 0"),
        ("float labels", "train.parquet, column 'label': labels must be integers; found double"),
    ],
)
def test_damaged_parquet_is_told(broken, kind, message):
    with pytest.raises(DataError, match=message):
        load_source(broken(kind).parent, validation=0).train.load()


def test_damage_is_told_when_streaming(broken):
    for kind, message in {"image": "row 23: this image cannot", "size": "row 23: images of several sizes"}.items():
        split = load_source(broken(kind).parent, validation=0).train
        loader = build_loader(split, batch_size=8, train=True, resident=False, workers=1)
        with pytest.raises(DataError, match=message) as caught:
            list(loader.batches())
        assert "Traceback" not in str(caught.value)


def test_the_row_told_is_that_of_the_file(broken):
    split = load_source(broken("image").parent, validation=0.3).train
    with pytest.raises(DataError, match="train.parquet, row 23:"):
        split.load()
    split = load_source(broken("size").parent, validation=0.3).train
    loader = build_loader(split, batch_size=4, train=False, resident=False, workers=0)
    with pytest.raises(DataError, match="train.parquet, row 23:"):
        list(loader.batches())


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_flipped_bits_never_escape(data, encode, images):
    encoded = bytearray(encode(images[0]))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        image = decode(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]), "here")
    except DataError:
        return
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3


@pytest.fixture
def folder(tmp_path, images):
    """Class folders of images, with things in them that do not count."""
    for number, image in enumerate(images[:20]):
        place = tmp_path / "pets" / "train" / ("cat" if number % 2 else "dog") / ("deep" if number > 15 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:02d}.png")
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / "train" / ".hidden").mkdir()
    return tmp_path / "pets"


def test_image_folders(folder, images):
    source = load_source(folder, validation=0)
    assert source.classes == ("cat", "dog")
    numbers = by_content(source.train, images)
    assert sorted(numbers) == list(range(20))
    assert source.train.labels.tolist() == [1 - n % 2 for n in numbers]
    assert load_source(folder / "train").samples == {"train": 18, "validation": 2}
    test = folder / "test" / "dog"
    test.mkdir(parents=True)
    Image.fromarray(images[0, 0].numpy()).save(test / "a.BMP")
    source = load_source(folder)
    assert source.test.labels.tolist() == [1]  # the class number of train, though cat is missing
    assert torch.equal(source.test.load()[0], images[0, :1].expand(3, -1, -1))


def test_wrong_folders_are_told(folder, tmp_path):
    (folder / "test" / "cow").mkdir(parents=True)
    with pytest.raises(DataError, match="cow: this class is not among those of train; wanted one of cat, dog"):
        load_source(folder)
    (folder / "test" / "cow").rmdir()
    with pytest.raises(DataError, match="test: there are no images"):
        load_source(folder)
    (folder / "test").rmdir()
    (folder / "train" / "eel").mkdir()
    with pytest.raises(DataError, match="eel: there are no images in this folder; .* fill or remove it"):
        load_source(folder)
    (folder / "train" / "eel" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="eel/1.png: this image cannot be read"):
        load_source(folder, validation=0).train.load()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty: nothing to read in this folder"):
        load_source(empty)
    (empty / "other.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"no train.parquet; found other.parquet"):
        load_source(empty)


def test_hub_reads_local_sets(tmp_path, images, labels, write_parquet, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})
    rows = {"img": [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], "label": labels.tolist()}
    whole = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(30, 40))}).save_to_disk(tmp_path / "disk")
    source = load_source(f"hf:{tmp_path / 'disk'}", validation=0)
    assert source.samples == {"train": 40, "test": 10}
    assert source.classes == tuple("abcde")
    assert torch.equal(source.train.load(), images)
    assert torch.equal(source.test.load(), images[30:])
    assert torch.equal(source.test.labels, labels[30:])
    (tmp_path / "files").mkdir()
    whole.to_parquet(tmp_path / "files" / "train.parquet")
    assert torch.equal(load_source(f"hf:{tmp_path / 'files'}", validation=0).train.load(), images)
    assert load_source(tmp_path / "files").classes == tuple("abcde")
    loader = build_loader(source.train, batch_size=8, train=False, resident=False, workers=1)
    batch = next(loader.batches())
    assert torch.equal(batch.labels, labels[:8])
    for options, message in {
        ("image", "label"): "this is no column of images",
        ("label", "img"): "labels must be integers; found Image",
        ("label", "lable"): "no such column; .* did you mean 'label'",
    }.items():
        with pytest.raises(DataError, match=message):
            load_source(f"hf:{tmp_path / 'disk'}", **{options[0]: options[1]})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_source("hf:nobody/nothing-of-this-name")


def test_hub_without_its_library(monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r"limbeck\[language\]"):
        load_source("hf:cifar10")


def test_real_cifar10(shared_data):
    source = load_source(shared_data / "cifar10", validation=0)
    assert source.samples == {"train": 50000, "test": 10000}
    assert source.classes[:3] == ("airplane", "automobile", "bird")
    assert len(source.classes) == 10
    assert source.train.labels.bincount().tolist() == [5000] * 10
    assert source.test.labels.bincount().tolist() == [1000] * 10
    assert source.train.read(49999).shape == (3, 32, 32)
    held = load_source(shared_data / "cifar10")
    assert held.samples == {"train": 45000, "validation": 5000, "test": 10000}
    assert held.validation.labels.bincount().tolist() == [500] * 10
    loader = build_loader(source.test.subset(torch.arange(500)), batch_size=250, train=False)
    assert [tuple(b.inputs.shape) for b in loader.batches()] == [(250, 3, 32, 32)] * 2
