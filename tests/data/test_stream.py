from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.data import StreamLoader, as_loader


class Noisy:
    """Draws from all three generators, as transforms of a user's own do."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()).item(), float(np.random.rand()), random.random()]), index


class Ragged(Noisy):
    def __getitem__(self, index):
        return torch.zeros(index + 1), index


class Failing(Noisy):
    def __getitem__(self, index):
        if index == 13:
            raise DataError("cannot be read", where="sample 13", remedy="remove it")
        return torch.zeros(2), index


def drawn(loader, epoch, **place):
    return {
        int(i): x.tolist()
        for step in loader.epoch(epoch, **place)
        for batch in step
        for i, x in zip(batch.index, batch.inputs, strict=True)
    }


def test_a_users_random_transforms_replay_from_seed_epoch_and_index():
    here = StreamLoader(Noisy(), batch_size=4, seed=1, workers=0)
    first = drawn(here, 0)
    assert len({tuple(v) for v in first.values()}) == 20
    assert drawn(StreamLoader(Noisy(), batch_size=5, seed=1, workers=2), 0) == first
    late = drawn(here, 0, start_step=3, parts=2)
    assert len(late) == 8
    assert all(first[i] == v for i, v in late.items())
    assert all(first[i] != v for i, v in drawn(here, 1).items())
    assert all(first[i] != v for i, v in drawn(StreamLoader(Noisy(), batch_size=4, seed=2, workers=0), 0).items())


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_samples_come_out_as_they_are(workers):
    loader = StreamLoader(Failing(), batch_size=4, shuffle=False, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader.batches())
    assert str(caught.value) == "sample 13: cannot be read; remove it"
    with pytest.raises(DataError, match="cannot be put together"):
        list(StreamLoader(Ragged(), batch_size=4, workers=workers).batches())


def test_collate_fn_may_give_batches():
    def collate(items):
        lengths = torch.tensor([len(x) for x, _ in items])
        padded = torch.nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        return Batch(padded, torch.tensor([y for _, y in items]), mask=mask, extras={"lengths": lengths})

    loader = StreamLoader(Ragged(), batch_size=6, workers=0, collate_fn=collate)
    for batch in loader.batches():
        assert torch.equal(batch.extras["lengths"], batch.index + 1)
        assert torch.equal(batch.mask.sum(1), batch.index + 1)


def test_items_may_be_dicts():
    items = [{"pixel_values": torch.full((3,), float(i)), "scale": torch.tensor(i), "label": i % 2} for i in range(6)]
    batch = next(as_loader(items, batch_size=3, workers=0).batches())
    assert set(batch.inputs) == {"pixel_values", "scale"}
    assert batch.labels.tolist() == [0, 1, 0]
    batch = next(as_loader([{"image": torch.ones(1, 2, 2, dtype=torch.uint8), "label": 1}] * 4, workers=0).batches())
    assert torch.equal(batch.inputs, torch.full((4, 1, 2, 2), 1 / 255))


def test_an_abandoned_epoch_leaves_nothing_behind():
    loader = StreamLoader(Noisy(), batch_size=4, workers=2)
    steps = loader.epoch(0)
    first = next(steps)[0].inputs
    del steps
    assert torch.equal(next(loader.epoch(0))[0].inputs, first)
