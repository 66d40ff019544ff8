"""Who owns what: a partition, as unlike as alpha says, the same each time."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import DataError
from limbeck.data.resident import ResidentLoader
from limbeck.schemes.federated.split import dirichlet_rows, owned


def test_a_partition_that_the_seed_settles():
    labels, rows = torch.arange(400) % 10, torch.arange(0, 400, 2)
    first, again = (dirichlet_rows(labels, rows, 5, 0.5, seed=3, least=10) for _ in range(2))
    assert torch.equal(torch.cat(first).sort().values, rows)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert min(map(len, first)) >= 10
    other = dirichlet_rows(labels, rows, 5, 0.5, seed=4, least=10)
    assert any(len(a) != len(b) or not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_alpha_says_how_unlike_the_owners_are():
    labels = torch.arange(2000) % 10

    def largest_share(alpha: float) -> float:
        parts = dirichlet_rows(labels, torch.arange(2000), 10, alpha, seed=0, least=10)
        return sum(float(labels[p].bincount(minlength=10).max() / len(p)) for p in parts) / 10

    assert largest_share(100.0) < 0.2 < 0.5 < largest_share(0.1)


def test_shares_of_a_class_follow_the_dirichlet_law():
    labels, alpha, shares = torch.zeros(200, dtype=torch.long), 0.5, []
    for seed in range(400):
        parts = dirichlet_rows(labels, torch.arange(200), 4, alpha, seed=seed, least=1)
        shares.append(len(parts[0]) / 200)
    # The variance of one share of Dir(alpha) of four is (1/4)(3/4) / (4 alpha + 1), a little less where none is empty.
    assert torch.tensor(shares).mean() == pytest.approx(0.25, abs=0.04)
    assert torch.tensor(shares).var() == pytest.approx(0.1875 / 3, rel=0.25)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="not enough samples"):
        dirichlet_rows(torch.zeros(20), torch.arange(20), 5, 1.0, seed=0, least=10)
    with pytest.raises(DataError, match="have none"):
        dirichlet_rows(None, torch.arange(20), 2, 1.0, seed=0, least=1)
    with pytest.raises(DataError, match="no draw"):
        dirichlet_rows(torch.zeros(20, dtype=torch.long), torch.arange(20), 5, 0.001, seed=0, least=4)


def test_who_has_less_than_a_batch_has_all_of_it_in_one():
    train = ResidentLoader(torch.zeros(20, 2), torch.zeros(20), batch_size=8)
    assert [b.size for b in owned(train, torch.arange(5)).batches()] == [5]
    assert [b.size for b in owned(train, torch.arange(11)).batches()] == [8]
    assert train.batch_size == 8
    assert train.drop_last
    assert train.only is None
