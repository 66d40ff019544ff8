"""Batches of one group each: who stands where, how often, and that ranks and resumed runs agree."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import as_loader
from limbeck.data.grouped import GroupedLoader
from limbeck.data.resident import ResidentLoader

GROUP = torch.tensor([0, 1, 0, 1, 1, -1, 1, 0, 2, 1])


def loader(shuffle: bool = True, batch_size: int = 3) -> GroupedLoader:
    inner = ResidentLoader(torch.arange(10.0).view(10, 1), batch_size=batch_size, shuffle=shuffle, drop_last=False)
    return GroupedLoader(inner, GROUP)


def test_a_batch_is_of_one_group_and_every_sample_comes() -> None:
    found, firsts = loader(), set()
    assert len(found) == 1 + 2 + 1
    for epoch in range(8):
        batches = [batch.index for batch in found.batches(epoch)]
        assert [len(rows) for rows in batches] == [3, 3, 3, 3]
        assert all(len(GROUP[rows].unique()) == 1 for rows in batches)
        seen = torch.cat(batches).bincount(minlength=10)
        assert torch.equal(seen > 0, GROUP >= 0)
        assert seen[GROUP == 1].max() <= 2
        firsts.add(int(GROUP[batches[0][0]]))
    assert firsts == {0, 1, 2}
    orders = {tuple(torch.cat([b.index for b in found.batches(e)]).tolist()) for e in range(4)}
    assert len(orders) == 4


def test_unshuffled_it_goes_group_by_group() -> None:
    assert [b.index.tolist() for b in loader(shuffle=False).batches()] == [[0, 2, 7], [1, 3, 4], [6, 9, 1], [8, 8, 8]]


def test_ranks_and_parts_cut_what_one_process_sees_and_an_epoch_goes_on_anywhere() -> None:
    found = loader()
    whole = [batch.index for batch in found.batches(3)]
    cut = [[*found.epoch(3, rank=rank, world=2)] for rank in range(2)]
    again = [torch.cat([b.index for b in [*one, *two]]) for one, two in zip(*cut, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    late = [parts[0].index for parts in found.epoch(3, start_step=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], late, strict=True))


def test_it_is_a_loader_like_any() -> None:
    found = loader()
    assert found.describe()["groups"] == [3, 5, 1]
    assert torch.cat([b.index for b in found.plain()]).tolist() == list(range(10))
    fewer = found.chosen(torch.tensor([0, 1, 2, 3]))
    assert sorted(torch.cat([b.index for b in fewer.batches()]).tolist()) == [0, 0, 1, 1, 2, 3]


def test_mistakes() -> None:
    inner = ResidentLoader(torch.zeros(10, 1), batch_size=2)
    with pytest.raises(DataError, match="one group a sample"):
        GroupedLoader(inner, torch.zeros(9))
    with pytest.raises(DataError, match="no sample is of a group"):
        GroupedLoader(inner, torch.full((10,), -1))
    mixed = as_loader(
        (torch.zeros(10, 3, 8, 8), torch.arange(10) % 2), batch_size=2, train=True, augment=[{"mixup": {}}]
    )
    with pytest.raises(ConfigError, match="mixes none"):
        GroupedLoader(mixed, torch.zeros(10))  # type: ignore[arg-type]
