from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.data import WrappedLoader, as_loader

INPUTS, LABELS = torch.arange(30).float().view(30, 1), torch.arange(30) % 3
DATA = TensorDataset(INPUTS, LABELS)


class Walk(IterableDataset):
    def __iter__(self):
        for i in range(10):
            yield torch.tensor([float(i)]), i % 2


def values(loader, epoch=0, **place):
    return [[b.inputs.flatten().tolist() for b in step] for step in loader.epoch(epoch, **place)]


def test_shuffled_batches_carry_the_index_of_their_samples():
    loader = as_loader(DataLoader(DATA, 8, shuffle=True, num_workers=1))
    assert (loader.batch_size, loader.samples, loader.steps_per_epoch, loader.classes) == (8, 30, 4, 3)
    assert torch.equal(loader.labels, LABELS)
    seen = []
    for batch in loader.batches():
        assert torch.equal(batch.inputs.flatten(), batch.index.float())
        assert torch.equal(batch.labels, LABELS[batch.index])
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(30))
    assert seen != sorted(seen)


def test_a_generator_of_the_users_own_is_replayed():
    def loader(seed):
        return as_loader(DataLoader(DATA, 8, shuffle=True, generator=torch.Generator().manual_seed(seed)))

    one = loader(1)
    first, second = values(one, 0), values(one, 1)
    assert first != second
    assert values(one, 0) == first
    assert values(loader(1), 1) == second
    assert values(loader(2), 0) != first


def test_index_of_the_items_wins():
    data = [(torch.tensor([float(i)]), i % 2, 100 + i) for i in range(6)]
    batch = next(as_loader(DataLoader(data, 3)).batches())
    assert batch.index.tolist() == [100, 101, 102]


def test_iterables_are_numbered_and_cut_over_ranks():
    loader = as_loader(Walk(), batch_size=4, train=False)
    assert (loader.samples, loader.steps_per_epoch, loader.labels) == (None, None, None)
    with pytest.raises(DataError, match="length of this data"):
        len(loader)
    assert [b.index.tolist() for b in loader.batches()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    ranks = [values(loader, rank=r, world=2) for r in range(2)]
    assert ranks == [[[[0.0, 1.0]], [[4.0, 5.0]], [[8.0]]], [[[2.0, 3.0]], [[6.0, 7.0]], [[9.0]]]]
    late = next(loader.epoch(0, start_step=2))[0]
    assert late.index.tolist() == [8, 9]
    assert loader.example(3).inputs.flatten().tolist() == [0.0, 1.0, 2.0]
    assert [b.size for b in as_loader(Walk(), batch_size=4, train=True).batches()] == [4, 4]


def test_batches_without_known_samples_have_no_index():
    batches = [(INPUTS[:4], LABELS[:4]), (INPUTS[4:6], LABELS[4:6])]

    class Again:
        def __iter__(self):
            return iter(batches)

    loader = as_loader(Again())
    assert [b.index for b in loader.batches()] == [None, None]
    with pytest.raises(DataError, match="batch.index"):
        next(loader.batches()).require("index")
    assert loader.example(2).inputs.shape == (2, 1)


def test_a_dataloader_that_walks_its_own_way_is_left_alone():
    class Backwards(DataLoader):
        def __iter__(self):
            return iter([(INPUTS[i : i + 5].flip(0), LABELS[i : i + 5].flip(0)) for i in range(0, 10, 5)])

    loader = as_loader(Backwards(DATA, 5))
    assert values(loader) == [[[4.0, 3, 2, 1, 0]], [[9.0, 8, 7, 6, 5]]]
    assert next(loader.batches()).index is None


def test_batches_without_automatic_batching():
    loader = as_loader(DataLoader([(INPUTS[:4], LABELS[:4]), (INPUTS[4:], LABELS[4:])], batch_size=None))
    assert [b.size for b in loader.batches()] == [4, 26]
    assert loader.example(2).inputs.flatten().tolist() == [0.0, 1.0]


def test_epochs_of_samplers_are_set():
    sampler = DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=True)
    loader = as_loader(DataLoader(DATA, 10, sampler=sampler))
    assert values(loader, 0) != values(loader, 1)
    assert values(loader, 1) == values(loader, 1)
    with pytest.raises(DataError, match="DistributedSampler"):
        loader.epoch(0, world=2)


def test_random_transforms_replay_when_resuming():
    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.rand(2), index

    loader = as_loader(DataLoader(Noise(), 4, shuffle=True))
    whole = values(loader)
    torch.manual_seed(99)
    assert values(loader, start_step=1) == whole[1:]
    steps = loader.epoch(0)
    mixed = []
    for step in steps:
        torch.rand(5)
        mixed.append([b.inputs.flatten().tolist() for b in step])
    assert mixed == whole


def test_labels_of_subsets_and_unusual_batches():
    subset = Subset(DATA, [5, 3, 1])
    loader = as_loader(DataLoader(subset, 3))
    assert loader.labels.tolist() == [2, 0, 1]
    assert torch.equal(next(loader.batches()).labels, loader.labels)

    class Graph:
        def __init__(self, n):
            self.num_graphs, self.y = n, torch.zeros(n, dtype=torch.long)

    class Graphs:
        def __iter__(self):
            return iter([Graph(4)])

    graphs = as_loader(Graphs())
    assert next(graphs.batches()).size == 4
    with pytest.raises(DataError, match="cannot be cut"):
        next(graphs.epoch(0, parts=2))


def test_batches_are_cut_whatever_holds_them():
    mask = torch.ones(4, 2, dtype=torch.bool)
    batch = Batch(
        ({"a": INPUTS[:4]}, 7),
        LABELS[:4],
        mask=mask,
        extras={"names": ["x"], "w": torch.arange(4), "classes": torch.arange(7)},
    )

    class One:
        def __iter__(self):
            return iter([batch])

    (first, second) = next(WrappedLoader(One()).epoch(0, parts=2))
    assert second.inputs[0]["a"].flatten().tolist() == [2.0, 3.0]
    assert second.inputs[1] == 7
    assert second.mask.shape == (2, 2)
    assert second.extras["w"].tolist() == [2, 3]
    assert second.extras["classes"].tolist() == list(range(7))  # has no row for each sample
    assert first.extras["names"] == ["x"]


def test_mixing_is_refused_and_other_augmentation_done():
    images = TensorDataset(torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8), LABELS[:8])
    with pytest.raises(DataError, match="cannot be mixed"):
        as_loader(DataLoader(images, 4), augment=["mixup"])
    plain = as_loader(DataLoader(images, 4))
    assert torch.allclose(next(plain.batches()).inputs, images.tensors[0][:4] / 255)
    flipped = as_loader(DataLoader(images, 4), augment=[{"flip": {"probability": 1.0}}])
    assert torch.allclose(next(flipped.batches()).inputs, (images.tensors[0][:4] / 255).flip(-1))


def test_unreadable_items_are_told():
    for item in [(1, 2, 3, 4)], [(INPUTS[:2], ["a", "b"])]:
        with pytest.raises(DataError):
            next(as_loader(DataLoader(item, batch_size=None)).batches())
