"""Views that come again, and several views of a sample from one read."""

from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import Augment, ResidentLoader, StreamLoader, build_loader, views
from limbeck.data.sources.split import StreamSplit

IMAGES = torch.randint(0, 256, (22, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(22) % 4
CHAIN = ["pad_crop", "flip"]


class Images(Dataset):
    """Counts what is read."""

    def __init__(self):
        self.reads = Counter()

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, row):
        self.reads[row] += 1
        return IMAGES[row], int(LABELS[row])


def make(kind, chain=CHAIN, **options):
    options = {"batch_size": 4, "seed": 7, **options}
    augment = Augment(chain, seed=3, samples=len(IMAGES), classes=4)
    if kind == "resident":
        return ResidentLoader(IMAGES, LABELS, augment=augment, **options)
    return StreamLoader(Images(), LABELS, augment=augment, workers=0, **options)


def seen(loader, epoch, **cut):
    """Every (sample, view) of an epoch and its pixels."""
    found = {}
    for parts in loader.epoch(epoch, **cut):
        for batch in parts:
            view = torch.as_tensor(batch.view).expand(batch.size)
            for i, v, pixels, label in zip(
                batch.index.tolist(), view.tolist(), batch.inputs, batch.labels, strict=True
            ):
                assert (i, v) not in found
                found[i, v] = pixels
                assert label.ndim or int(label) == int(LABELS[i])
    return found


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_views_come_again_after_their_number(kind):
    loader = make(kind, views=2, drop_last=False)
    epochs = [seen(loader, e) for e in range(4)]
    assert [{v for _, v in e} for e in epochs] == [{0}, {1}, {0}, {1}]
    for place, pixels in epochs[0].items():
        assert torch.equal(pixels, epochs[2][place])
    assert any(not torch.equal(epochs[0][i, 0], epochs[1][i, 1]) for i in range(22))
    orders = [[b.index.tolist() for b in loader.batches(e)] for e in (0, 2)]
    assert orders[0] != orders[1]  # the views come again, the order does not


@pytest.mark.parametrize("kind", ["resident", "stream"])
@pytest.mark.parametrize("chain", [CHAIN, [*CHAIN, "mixup"]], ids=["moved", "mixed"])
def test_several_views_of_a_read_are_those_of_as_many_epochs(kind, chain):
    together, apart = make(kind, chain, per_read=2, drop_last=False), make(kind, chain, drop_last=False)
    two = seen(together, 4) | seen(together, 5)
    assert two.keys() == {(i, v) for i in range(22) for v in (4, 5)}
    for place, pixels in (seen(apart, 4) | seen(apart, 5)).items():
        assert torch.equal(pixels, two[place])
    assert seen(together, 4).keys() != seen(together, 6).keys()


def test_a_sample_is_read_once_for_all_its_views():
    loader = make("stream", per_read=4, batch_size=8)
    batch = next(iter(loader.batches(0)))
    assert batch.size == 8
    assert len(batch.index.unique()) == 2
    assert batch.view.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    loader.dataset.reads.clear()
    next(iter(loader.batches(0)))
    assert set(loader.dataset.reads.values()) == {1}
    assert sum(loader.dataset.reads.values()) == 2


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_ranks_and_micro_batches_share_out_the_same_views(kind):
    loader = make(kind, per_read=2, batch_size=6)
    whole = seen(loader, 1)
    for world, parts in ((2, 1), (1, 2), (3, 2)):
        shares = [seen(loader, 1, rank=rank, world=world, parts=parts) for rank in range(world)]
        assert sum(map(len, shares)) == len(whole)
        union = {place: pixels for share in shares for place, pixels in share.items()}
        assert union.keys() == whole.keys()
        assert all(torch.equal(union[place], whole[place]) for place in whole)


def test_views_are_the_public_functions():
    loader = make("resident", views=5, per_read=5, batch_size=10)
    for batch in loader.batches(3):
        for view in batch.view.unique().tolist():
            rows = batch.view == view
            assert torch.equal(batch.inputs[rows], views(IMAGES, batch.index[rows], 3, view, transforms=CHAIN))


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_any_samples_can_be_read_in_any_view(kind):
    loader = make(kind)
    first, second = loader.read([[(torch.tensor([5, 2]), 9)], [(torch.tensor([1]), 0), (torch.tensor([1, 3]), 4)]])
    assert (first.index.tolist(), first.view) == ([5, 2], 9)
    assert torch.equal(first.inputs, views(IMAGES, torch.tensor([5, 2]), 3, 9, transforms=CHAIN))
    assert (second.index.tolist(), second.view.tolist()) == ([1, 1, 3], [0, 4, 4])
    assert torch.equal(second.inputs[2:], views(IMAGES, torch.tensor([3]), 3, 4, transforms=CHAIN))


def test_resuming_within_an_epoch():
    loader = make("resident", per_read=2)
    late, whole = seen(loader, 3, start_step=2), seen(loader, 3)
    assert len(late) == len(whole) - 8
    assert all(torch.equal(whole[place], pixels) for place, pixels in late.items())


def test_wrong_numbers_are_named():
    with pytest.raises(ConfigError, match="per_read: .*batch_size 4"):
        make("resident", per_read=3)
    with pytest.raises(ConfigError, match="per_read: .*views 3"):
        make("resident", per_read=2, views=3)
    with pytest.raises(ConfigError, match="views: must be a positive"):
        make("resident", views=0)
    with pytest.raises(DataError, match="views: .*walked through"):
        build_loader(StreamSplit([(IMAGES[:4], LABELS[:4])]), batch_size=4, train=True, views=2)
