"""Loaders of chosen samples, and of none."""

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.blank import BlankLoader
from limbeck.data.build import as_loader
from limbeck.data.sources.load import load_source


def digits(**more):
    return as_loader(load_source("digits").train, batch_size=16, train=True, seed=3, **more)


def seen(loader, epoch=0):
    return torch.cat([batch.index for batch in loader.batches(epoch)])


def test_an_epoch_shows_the_chosen_samples_and_no_others_with_their_own_ids_inputs_and_labels():
    whole, rows = digits(augment=["pad_crop"]), torch.arange(0, 320, 5)
    chosen = whole.chosen(rows)
    assert torch.equal(seen(chosen).sort().values, rows)
    assert not torch.equal(seen(chosen), seen(chosen, 1))
    assert len(chosen) == 4
    shown = {int(i): (x, y) for b in whole.batches(2) for i, x, y in zip(b.index, b.inputs, b.labels, strict=True)}
    for batch in chosen.batches(2):
        for i, x, y in zip(batch.index, batch.inputs, batch.labels, strict=True):
            assert int(i) not in shown or (torch.equal(x, shown[int(i)][0]) and y == shown[int(i)][1])
    assert whole.only is None
    assert len(seen(whole)) > len(rows)


def test_ranks_parts_and_resumed_epochs_of_chosen_samples_are_the_same_batches():
    chosen = digits().chosen(torch.arange(50, 98))
    whole = [torch.cat([part.index for part in step]) for step in chosen.epoch(1)]
    later = [torch.cat([part.index for part in step]) for step in chosen.epoch(1, start_step=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], later, strict=True))
    ranks = [list(chosen.epoch(1, rank=r, world=2, parts=2)) for r in range(2)]
    for number, step in enumerate(whole):
        parts = torch.cat([part.index for rank in ranks for part in rank[number]])
        assert torch.equal(parts.sort().values, step.sort().values)


def test_in_order_and_bare_they_stand_as_they_were_chosen():
    rows = torch.tensor([7, 3, 3, 9, *range(20, 40)])
    assert torch.equal(torch.cat([batch.index for batch in digits().chosen(rows).plain()]), rows)


def test_what_a_loader_shows_is_part_of_what_it_is():
    first, second = digits().chosen(torch.arange(30)), digits().chosen(torch.arange(1, 31))
    assert first.describe() != second.describe() != digits().describe()
    assert first.describe() == digits().chosen(torch.arange(30)).describe()


@pytest.mark.parametrize(
    "rows", [torch.tensor([0.5] * 20), torch.tensor([-1] * 20), torch.arange(10**6), torch.zeros(2, 20).long()]
)
def test_what_are_no_samples_is_refused(rows):
    with pytest.raises(DataError, match="no ids of samples"):
        digits().chosen(rows)


def test_too_few_and_mixed_samples_are_refused():
    with pytest.raises(DataError, match="fewer samples"):
        digits().chosen(torch.arange(5))
    with pytest.raises(ConfigError, match="mixed with others"):
        digits(augment=["mixup"]).chosen(torch.arange(50))


def test_blank_batches_have_shape_and_ids_and_nothing_else():
    base = digits()
    blank = BlankLoader(base)
    assert (len(blank), blank.classes, blank.task) == (len(base), 10, "classification")
    for batch in blank.batches():
        assert batch.labels is None
        assert batch.inputs.shape == (16, 1, 8, 8)
        assert not batch.inputs.any()
    assert torch.equal(seen(blank), torch.arange(16 * len(base)))
    with pytest.raises(DataError, match="from nothing"):
        BlankLoader(as_loader((torch.zeros(20, 4, dtype=torch.long), torch.zeros(20).long()), batch_size=4))
