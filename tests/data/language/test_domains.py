"""Rows of several domains in the shares that are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language import LanguageLoader, language_source
from limbeck.data.language.domains import DomainLoader, quotas, repeated


def loader(sizes: tuple[int, ...] = (20, 6, 3), **options: Any) -> LanguageLoader:
    records = [{"text": f"{n} {'x' * (n % 7)}", "tag": f"tag{d}"} for d, size in enumerate(sizes) for n in range(size)]
    source = language_source(records, tokenizer="bytes", validation=0)
    return LanguageLoader(source.train, **{"batch_size": 5, "seed": 3, **options})  # type: ignore[arg-type]


def counts(of: DomainLoader, epoch: int) -> Tensor:
    return of.rows.tag[of.order(epoch)].bincount(minlength=len(of.tags))  # type: ignore[index]


def test_shares_are_kept_to_the_row() -> None:
    wanted = {0: torch.tensor([0.2, 0.5, 0.3]), 1: None, 2: torch.tensor([0.0, 0.01, 0.99])}
    drawn = DomainLoader(loader(), 8, wanted.get)
    assert drawn.steps_per_epoch == 8
    assert counts(drawn, 0).tolist() == [8, 20, 12]
    assert counts(drawn, 1).tolist() == quotas(torch.tensor([20, 6, 3]), 40).tolist() == [28, 8, 4]
    assert counts(drawn, 2).tolist() == [0, 0, 40]
    assert sum(batch.size for batch in drawn.batches(0)) == 40


def test_a_domain_comes_whole_before_any_of_it_comes_again() -> None:
    rows = torch.tensor([4, 9, 2])
    for number in (0, 2, 3, 7):
        found = repeated(rows, number, seed=5).tolist()
        assert len(found) == number
        assert max((found.count(row) for row in (4, 9, 2)), default=0) == -(-number // 3)
        assert min(found.count(row) for row in (4, 9, 2)) == number // 3
    assert repeated(rows, 7, 5).tolist() != repeated(rows, 7, 6).tolist()


def test_an_epoch_is_the_same_from_wherever_it_is_begun_and_on_all_ranks() -> None:
    asked: list[int] = []
    drawn = DomainLoader(loader(), 6, lambda epoch: asked.append(epoch) or torch.tensor([0.1, 0.6, 0.3]))  # type: ignore[func-returns-value]
    whole = [batch.require("index") for batch in drawn.batches(4)]
    late = [part.require("index") for (part,) in drawn.epoch(4, start_step=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], late, strict=True))
    ranks = [[part.require("index") for (part,) in drawn.epoch(4, rank=rank, world=2)] for rank in range(2)]
    assert all(torch.equal(torch.cat([a, b]), c) for a, b, c in zip(*ranks, whole, strict=True))
    assert asked == [4, 4, 4, 4]
    assert not torch.equal(torch.cat(whole), torch.cat([b.require("index") for b in drawn.batches(5)]))


def test_rows_of_like_length_stand_together() -> None:
    drawn = DomainLoader(loader((40, 40), batch_size=8), 10, lambda epoch: None)
    spread = [int(drawn.rows.lengths[b.require("index")].max() - drawn.rows.lengths[b.require("index")].min())
              for b in drawn.batches(0)]  # fmt: skip
    loose = loader((40, 40), batch_size=8)
    random = [
        int(loose.rows.lengths[rows].max() - loose.rows.lengths[rows].min()) for rows in torch.randperm(80).split(8)
    ]
    assert sum(spread) < 0.6 * sum(random)


def test_the_set_itself_stays_as_it_is() -> None:
    base = loader()
    drawn = DomainLoader(base, 6, lambda epoch: None)
    assert drawn.samples == 29
    assert sum(batch.size for batch in drawn.plain()) == 29
    assert drawn.describe() == {**base.describe(), "domains": ["tag0", "tag1", "tag2"], "steps": 6}


def test_what_it_refuses() -> None:
    bare = LanguageLoader(language_source(["to be"] * 9, tokenizer="bytes", validation=0).train, batch_size=3)  # type: ignore[arg-type]
    for base, message, kind in (
        (bare, "of a domain", DataError),
        (loader(shuffle=False), "at random", ConfigError),
    ):
        with pytest.raises(kind, match=message):
            next(iter(DomainLoader(base, 2, lambda epoch: None).batches()))
