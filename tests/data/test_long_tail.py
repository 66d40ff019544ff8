"""Long tails: how many samples of each class stay, which, and what is refused."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.build import as_loader, build_loader
from limbeck.data.long_tail import class_counts, long_tailed, tail_counts
from limbeck.data.sources.load import load_source


def test_counts_are_those_of_cifar_lt() -> None:
    """The numbers of the benchmark: 10,847 images of CIFAR-100 at a factor of 100, 12,406 of CIFAR-10."""
    assert int(tail_counts(500, 100, 100.0).sum()) == 10847
    assert int(tail_counts(5000, 10, 100.0).sum()) == 12406
    assert tail_counts(5000, 10, 100.0)[[0, -1]].tolist() == [5000, 50]


def test_a_tail_of_real_images_is_the_same_each_time_and_keeps_ids() -> None:
    loader = build_loader(load_source("digits").train, batch_size=16, train=True, seed=3)
    tail = long_tailed(loader, 20.0)
    counts = class_counts(tail, "a test")
    wanted = tail_counts(loader.samples // 10, 10, 20.0)
    assert (counts == wanted.minimum(class_counts(loader, "a test"))).all()
    assert counts[0] > 15 * counts[-1]
    seen = torch.cat([batch.index for batch in tail.bare().batches()])
    assert torch.equal(seen, long_tailed(loader, 20.0).only)
    labels = torch.cat([batch.labels for batch in tail.bare().batches()])
    assert torch.equal(labels, loader.labels[seen])
    whole = loader.samples // 10  # of each class, or all that it has
    assert torch.equal(
        class_counts(long_tailed(loader, 1.0), "a test"), class_counts(loader, "a test").clamp(max=whole)
    )


def test_a_class_that_has_too_few_stays_whole() -> None:
    labels = torch.tensor([0] * 2 + [1] * 10)
    tail = long_tailed(as_loader((torch.zeros(12, 3), labels), batch_size=2), 2.0)
    assert class_counts(tail, "a test").tolist() == [2, 3]


def test_what_has_no_classes_is_refused() -> None:
    loader = as_loader((torch.zeros(12, 3), torch.zeros(12)), batch_size=2)
    with pytest.raises(DataError, match="counts the samples"):
        long_tailed(loader, 2.0)
    with pytest.raises(ConfigError, match="1 or more"):
        long_tailed(as_loader((torch.zeros(4, 3), torch.arange(4) % 2), batch_size=2), 0.5)
