"""What every loader promises the engine, checked on all kinds."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import Augment, ResidentLoader, StreamLoader, WrappedLoader, as_loader, build_loader, tensors, views

CHAIN = ["pad_crop", "flip", "mixup"]


class Pairs(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


@pytest.fixture(params=["resident", "stream", "stream with workers", "wrapped"])
def loader(request, images, labels):
    augment = Augment(CHAIN, normalise="imagenet", seed=3, samples=40, classes=5)
    if request.param == "resident":
        return ResidentLoader(images, labels, batch_size=12, augment=augment, seed=3, classes=5)
    if request.param.startswith("stream"):
        workers = 2 if request.param.endswith("workers") else 0
        pairs = Pairs(images, labels)
        return StreamLoader(pairs, labels, batch_size=12, augment=augment, seed=3, classes=5, workers=workers)
    augment = Augment(CHAIN[:2], normalise="imagenet", seed=3)
    batches = DataLoader(Pairs(images, labels), 12, shuffle=True, drop_last=True)
    return WrappedLoader(batches, labels, samples=40, augment=augment, seed=3, classes=5)


def rows(steps) -> list[list[tuple]]:
    """Everything a sample brings, step by step, for comparison."""
    return [
        [
            (int(i), x.tolist(), y.tolist())
            for batch in step
            for i, x, y in zip(batch.index, batch.inputs, batch.labels, strict=True)
        ]
        for step in steps
    ]


def test_ranks_and_parts_give_the_same_steps(loader):
    whole = rows(loader.epoch(1))
    assert len(whole) == len(loader) == loader.steps_per_epoch == 3
    assert [len(step) for step in whole] == [12, 12, 12]
    assert len({row[0] for step in whole for row in step}) == 36
    two = [rows(loader.epoch(1, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == whole
    four = list(loader.epoch(1, parts=5))
    assert [[b.size for b in step] for step in four] == [[3, 3, 2, 2, 2]] * 3
    assert rows(four) == whole
    six = [rows(loader.epoch(1, rank=r, world=3, parts=2)) for r in range(3)]
    assert [[*chain.from_iterable(parts)] for parts in zip(*six, strict=True)] == whole


def test_more_parts_than_samples_leave_none_empty(loader):
    step = next(loader.epoch(0, rank=1, world=2, parts=10))
    assert [b.size for b in step] == [1, 1]


def test_start_step_equals_skipping(loader):
    whole = rows(loader.epoch(2))
    for start in range(4):
        assert rows(loader.epoch(2, start_step=start)) == whole[start:]


def test_epochs_replay_and_differ(loader):
    torch.manual_seed(7)
    first = rows(loader.epoch(0))
    torch.manual_seed(8)
    assert rows(loader.epoch(0)) == first
    other = rows(loader.epoch(1))
    assert [[r[0] for r in s] for s in other] != [[r[0] for r in s] for s in first]
    views_of = [{row[0]: row[1] for step in epoch for row in step} for epoch in (first, other)]
    assert any(views_of[0][i] != views_of[1][i] for i in views_of[0].keys() & views_of[1].keys())


def test_nothing_random_of_the_program_is_touched(loader):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader.example()
    for _ in loader.epoch(0):
        torch.rand(1)  # the training draws between batches
    torch.set_rng_state(before[0])
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_example_is_small_fixed_and_like_a_batch(loader):
    example, batch = loader.example(3), next(loader.epoch(0))[0]
    assert example.size == 3
    assert example.index.tolist() == [0, 1, 2]
    assert example.inputs.shape[1:] == batch.inputs.shape[1:]
    assert example.inputs.dtype == batch.inputs.dtype == torch.float32
    assert example.labels.shape[1:] == batch.labels.shape[1:]
    assert example.labels.dtype == batch.labels.dtype
    assert torch.equal(loader.example(3).inputs, example.inputs)


def test_index_finds_labels_and_pixels(loader, images, labels):
    mixed = bool(loader.augment.mixes)
    for (batch,) in loader.epoch(0):
        expected = views(
            images, batch.index, 3, 0, transforms=loader.augment.transforms, normalise=loader.augment.normalise
        )
        assert torch.equal(batch.inputs, expected)
        if not mixed:
            assert torch.equal(batch.labels, labels[batch.index])
        else:
            assert torch.allclose(batch.labels.sum(1), torch.ones(batch.size), atol=1e-6)
            assert (batch.labels.gather(1, labels[batch.index].unsqueeze(1)) > 0).float().mean() > 0.4


def test_wrong_places_are_told(loader):
    for wrong in ({"rank": 2, "world": 2}, {"parts": 0}, {"start_step": 4}, {"start_step": -1}, {"rank": -1}):
        with pytest.raises(ConfigError, match="loader.epoch"):
            loader.epoch(0, **wrong)


def test_describe_tells_what_settles_an_epoch(loader):
    import json

    told = loader.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["seed"] == 3
    assert told["augment"][0] == {"pad_crop": {"padding": 4}}


def test_loaders_of_one_set_give_the_same_batches(images, labels):
    split = tensors(images, labels, validation=0, normalise="imagenet").train
    resident, stream = (
        build_loader(split, batch_size=7, train=True, augment=CHAIN, seed=9, resident=r, workers=0)
        for r in (True, False)
    )
    assert isinstance(resident, ResidentLoader)
    assert isinstance(stream, StreamLoader)
    assert rows(resident.epoch(3)) == rows(stream.epoch(3))
    assert resident.describe() == stream.describe()


def test_evaluation_is_complete_in_order_and_unchanged(images, labels):
    for resident in (True, False):
        split = tensors(images, labels, validation=0).train
        loader = build_loader(split, batch_size=16, train=False, resident=resident, workers=0)
        batches = list(loader.batches())
        assert [b.size for b in batches] == [16, 16, 8]
        assert torch.cat([b.index for b in batches]).tolist() == list(range(40))
        assert torch.allclose(torch.cat([b.inputs for b in batches]), images / 255)
        assert torch.equal(torch.cat([b.labels for b in batches]), labels)


def test_other_tensors_pass_unchanged():
    tokens = torch.randint(0, 99, (10, 7))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for resident in (True, False):
        split = tensors(inputs, tokens, validation=0).train
        loader = build_loader(split, batch_size=4, train=True, resident=resident, workers=0)
        for batch in loader.batches():
            assert torch.equal(batch.inputs["input_ids"], tokens[batch.index])
            assert torch.equal(batch.labels, tokens[batch.index])
        assert loader.classes is None
    for features in (torch.rand(10, 3), torch.rand(10, 3, 2, 2, 2), torch.rand(10, 2, 4, 4, dtype=torch.float64)):
        loader = as_loader(features, batch_size=4)
        assert loader.labels is None
        batch = next(loader.batches())
        assert torch.equal(batch.inputs, features[:4])
        assert batch.labels is None


def test_facts_for_memory_banks(images, labels):
    loader = build_loader(tensors(images, labels, classes="abcde").train, batch_size=5, train=True)
    assert loader.samples == 35
    assert loader.labels.bincount().tolist() == [7] * 5
    assert (loader.classes, loader.class_names) == (5, tuple("abcde"))
    for batch in loader.batches():
        assert torch.equal(loader.labels[batch.index], batch.labels)


def test_impossible_loaders_are_told(images, labels):
    split = tensors(images, labels, validation=0).train
    with pytest.raises(DataError, match="batch_size: .* found 64 of 40 samples; at most 40"):
        build_loader(split, batch_size=64, train=True)
    with pytest.raises(ConfigError, match="batch_size"):
        build_loader(split, batch_size=0, train=False)
    with pytest.raises(ConfigError, match="resident"):
        build_loader(split, batch_size=4, train=False, resident="always")
    with pytest.raises(DataError, match="found 1 channels; wanted 3|found 3 channels; wanted 1"):
        build_loader(tensors(images[:, :1], labels).train, batch_size=4, train=False, normalise="imagenet")
    with pytest.raises(DataError, match="only images"):
        build_loader(tensors(torch.rand(9, 2), validation=0).train, batch_size=4, train=True, augment=["flip"])
    with pytest.raises(DataError, match="cannot be loaded whole"):
        as_loader(Pairs(images, labels), batch_size=4, resident=True)


def test_auto_holds_only_what_fits(images, labels, monkeypatch):
    split = tensors(images, labels, validation=0).train
    assert isinstance(build_loader(split, batch_size=4, train=True), ResidentLoader)
    monkeypatch.setattr("limbeck.data.build.HOST_LIMIT", images.nbytes - 1)
    assert isinstance(build_loader(split, batch_size=4, train=True, workers=0), StreamLoader)


def test_as_loader_takes_what_there_is(images, labels):
    pairs = Pairs(images, labels)
    kinds = {
        ResidentLoader: [(images, labels), TensorDataset(images, labels), images, "digits"],
        StreamLoader: [pairs, [(i, int(y)) for i, y in zip(images, labels, strict=True)]],
        WrappedLoader: [DataLoader(pairs, 8), _Batches(images, labels)],
    }
    for kind, values in kinds.items():
        for value in values:
            loader = as_loader(value, batch_size=8)
            assert isinstance(loader, kind), value
            batch = next(loader.batches())
            assert batch.size == 8
            assert batch.inputs.dtype == torch.float32
            assert as_loader(loader) is loader
    assert as_loader("digits", part="test").samples == 359
    for wrong in (None, 3, (x for x in [1]), {"a": 1}, b"x"):
        with pytest.raises(DataError):
            as_loader(wrong)


class _Batches:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __iter__(self):
        return iter(zip(self.images.split(8), self.labels.split(8), strict=True))
