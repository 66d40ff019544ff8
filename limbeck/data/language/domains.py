"""Batches of texts of several domains, in shares that may change while a model learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import key
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.loader import IndexedLoader
from limbeck.data.order import epoch_order

_DOMAINS = 6  # keeps these orders apart from others


class DomainLoader(LanguageLoader):
    """The rows of another loader in epochs of so many steps, with a share of each domain that is asked for anew.

    What an epoch shows is a pure function of data, seed, epoch and its shares. Rows of a domain come in a random order,
    and once more in another where it has fewer than are wanted. The random order of all is grouped by length as the
    other loader's.

    Args:
        loader: Of texts whose records all have a tag.
        steps: Of an epoch.
        shares: The share of each domain ``[N]`` in an epoch, by the numbers of ``loader.tags``; ``None``: its share of
            the rows. It is asked when an epoch begins, also one that is begun in its middle. An epoch of texts without
            domains, of a domain without texts, of several views or in order is refused then.

    >>> from limbeck.data.language import language_source
    >>> texts = [{"text": "to be", "tag": "a"}] * 6 + [{"text": "or not", "tag": "b"}] * 2
    >>> base = LanguageLoader(language_source(texts, tokenizer="bytes", validation=0).train, batch_size=4)
    >>> loader = DomainLoader(base, 3, lambda epoch: torch.tensor([0.25, 0.75]))
    >>> torch.cat([batch.extras["tag"] for batch in loader.batches()]).bincount()
    tensor([3, 9])
    """

    def __init__(self, loader: LanguageLoader, steps: int, shares: Callable[[int], Tensor | None]) -> None:
        self.__dict__.update(copy.copy(loader).__dict__)
        self.base, self.steps, self.shares = loader, steps, shares

    @property
    def shown(self) -> int:
        return self.steps * self.batch_size

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        tag, sizes = self._domains()
        wanted = self.shares(epoch)
        numbers = quotas(sizes if wanted is None else wanted, self.shown)
        own = [
            repeated((tag == domain).nonzero().flatten(), number, key(_DOMAINS, self.seed, domain, epoch))
            for domain, number in enumerate(numbers.tolist())
        ]
        drawn = torch.cat(own)
        mixed = epoch_order(len(drawn), key(_DOMAINS, self.seed), epoch)
        return self.grouped(drawn[mixed].to(device), epoch)

    def _domains(self) -> tuple[Tensor, Tensor]:
        """Each row's domain ``[R]``, and how many rows each has ``[N]``."""
        tag, names = self.rows.tag, self.tags
        if tag is None or not names or bool((tag < 0).any()):
            found = "none" if tag is None or not names else f"{int((tag < 0).sum())} rows without"
            remedy = "name the column: data.options.tag"
            raise DataError("every text has to be of a domain", where="tag", found=found, remedy=remedy)
        sizes = tag.bincount(minlength=len(names))
        empty = [name for name, size in zip(names, sizes.tolist(), strict=True) if not size]
        if empty:
            raise DataError("a domain has nothing to learn from", where="tag", found=", ".join(empty))
        if self.per_read != 1 or not self.shuffle:
            found = f"per_read {self.per_read}, shuffle {self.shuffle}"
            raise ConfigError("domains are drawn at random, one view a row", where="data", found=found)
        return tag, sizes

    def bare(self) -> IndexedLoader:
        return self.base.bare()

    def describe(self) -> dict[str, Any]:
        return {**self.base.describe(), "domains": list(self.tags), "steps": self.steps}


def quotas(shares: Tensor, count: int) -> Tensor:
    """So many whole things in shares ``[N]`` of any sum: rounded down, then the largest remainders up.

    >>> quotas(torch.tensor([0.5, 0.3, 0.2]), 9)
    tensor([4, 3, 2])
    """
    exact = shares.double().cpu() / shares.double().sum().cpu() * count
    found = exact.floor().long()
    most = (exact - found).argsort(descending=True, stable=True)[: count - int(found.sum())]
    found[most] += 1
    return found


def repeated(rows: Tensor, number: int, seed: int) -> Tensor:
    """So many of some rows in a random order, all of them before any comes again."""
    turns = -(-number // len(rows))
    order = [rows[epoch_order(len(rows), seed, turn)] for turn in range(turns)]
    return torch.cat([*order, rows[:0]])[:number]
