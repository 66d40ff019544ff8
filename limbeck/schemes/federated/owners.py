"""Owners: their samples, what is public, and a model in which each of them trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.core.objective import Terms
from limbeck.core.reduction import check_inside
from limbeck.data.loader import IndexedLoader
from limbeck.schemes.federated.split import dirichlet_rows, indexed, owned
from limbeck.schemes.scheme import Cast

_PUBLIC = 64  # keeps this draw apart from others


@dataclass
class Owners:
    """Who has which data.

    Args:
        loaders: Of each client, its own samples.
        public: Everybody's, without labels in what is learned from it; ``None``: there are none.
        facts: What a resumed run must find the same.
    """

    loaders: list[IndexedLoader]
    public: IndexedLoader | None
    facts: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        """Samples of each client."""
        return [loader.shown for loader in self.loaders]


def split_among(cast: Cast, who: str, count: int, alpha: float | None, least: int, public: float) -> Owners:
    """Split the training set among clients, and hold a part out that is everybody's.

    Args:
        cast: Whose data and seed.
        who: Asks, for errors.
        count: Clients.
        alpha: Of Dirichlet; see :func:`~limbeck.schemes.federated.split.dirichlet_rows`.
        least: Samples of everybody.
        public: Share of the samples that belongs to no client.
    """
    train = indexed(cast.train, who)
    check_inside(public, "scheme.public", 0.0, 1.0, closed=True)
    for name, value in {"alpha": alpha, "least": least}.items():
        if value is not None and value <= 0:
            raise ConfigError("out of range", where=f"scheme.{name}", found=value, wanted="more than 0")
    rows = torch.arange(train.samples) if train.only is None else train.only
    held = round(public * len(rows))
    order = draw_bits(key_tensor([key(_PUBLIC, cast.seed)]), rows).squeeze(1).argsort(stable=True)
    parts = dirichlet_rows(train.labels, rows[order[held:]].sort().values, count, alpha, cast.seed, least)
    loaders = [owned(train, part) for part in parts]
    shared = owned(train, rows[order[:held]].sort().values) if held else None
    facts: dict[str, Any] = {"data": train.describe(), "owned": [loader.describe()["rows"] for loader in loaders]}
    if shared is not None:
        facts["public"] = shared.describe()["rows"]
    return Owners(loaders, shared, facts)


def of_labels(cast: Cast) -> Terms:
    """The recipe's loss, by which clients learn from their own samples.

    Raises:
        ConfigError: A term asks a teacher, which nobody has.
    """
    for name, objective, _ in cast.loss.items():
        if objective.teacher_taps:
            raise ConfigError(
                "clients learn from their own labels by this loss, and a term of it asks a teacher",
                where=f"loss.{name}",
                remedy="leave it out, such as loss={cross_entropy: 1}",
            )
    return cast.loss
