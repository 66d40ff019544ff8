"""Tokens that say what others say leave a transformer on the way, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import ConfigError
from limbeck.core.roles import resolve
from limbeck.core.survey import survey


def redundancy(tokens: Tensor) -> Tensor:
    r"""How alike each token is to the others: its mean cosine with them, ``[B, N]``.

    Args:
        tokens: ``[B, N, D]``.

    >>> redundancy(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    directions = F.normalize(tokens.float(), dim=-1)
    with_all = (directions * directions.sum(dim=1, keepdim=True)).sum(dim=-1)
    return (with_all - directions.square().sum(dim=-1)) / max(1, tokens.shape[1] - 1)


def keep_least_redundant(tokens: Tensor, count: int, chance: float = 0.0, dice: Tensor | None = None) -> Tensor:
    """Which tokens stay, ``[B, count]`` ascending places: those least like the others.

    Args:
        tokens: ``[B, N, D]``.
        count: How many stay.
        chance: Up to so much is added to each redundancy at random.
        dice: ``[B, N]`` numbers from 0 to 1 that say how much; ``None``: drawn here.

    >>> keep_least_redundant(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.5]]]), 2)
    tensor([[0, 3]])
    """
    scores = redundancy(tokens.detach())
    if chance:
        scores = scores + chance * (torch.rand_like(scores) if dice is None else dice)
    return scores.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def taken(tokens: Tensor, places: Tensor | None, prefix: int = 0) -> Tensor:
    """The tokens at some places, ``[B, prefix + n, D]``, and those before all places.

    >>> taken(torch.arange(8.0).view(1, 4, 2), torch.tensor([[0, 2]]), prefix=1)
    tensor([[[0., 1.],
             [2., 3.],
             [6., 7.]]])
    """
    if places is None:
        return tokens
    after = tokens[:, prefix:]
    return torch.cat([tokens[:, :prefix], after.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))], 1)


class Dropping:
    """Before some blocks of a transformer the most redundant of its tokens leave; only while this is active.

    Args:
        model: A transformer of blocks that take ``[B, N, D]`` first; it gets hooks, which ``close`` takes off.
        inputs: An example.
        keep: The part of the patches that is left in the end; 1: none leaves.
        depths: Before which blocks they leave, in parts of all blocks; each time the same share.
        chance: See :func:`keep_least_redundant`.
        prefix: Tokens that stay in any case: the class token comes first.

    Attributes:
        dice: Rolls for the tokens before a block, from its number and theirs; ``None``: torch's random state does.

    Raises:
        ConfigError: The model has no blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        keep: float = 0.7,
        depths: Sequence[float] = (0.0, 1 / 3, 2 / 3),
        chance: float = 0.0,
        prefix: int = 1,
    ) -> None:
        spots = resolve("blocks", survey(model, inputs))
        blocks = [spot.module for spot in spots] if isinstance(spots, list) else []
        if not blocks:
            raise ConfigError("tokens leave a transformer of blocks", where="student", found=type(model).__name__)
        self.keep, self.chance, self.prefix, self.active = keep, chance, prefix, False
        self.kept: list[Tensor | None] = [None] * len(blocks)  # places of the patches that each block sees
        self.dice: Callable[[int, int], Tensor] | None = None
        self._patches = 0
        at = [min(len(blocks) - 1, round(depth * len(blocks))) for depth in depths]
        self._turn = {block: at.index(block) for block in at}  # how many times tokens have left before
        self._times = len(at)
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(self._before(number))
            for number, name in enumerate(blocks)
        ]

    def _before(self, number: int) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.active or self.keep == 1:
                self.kept[number] = None
                return None
            tokens = given[0]
            if number == 0:
                self._patches = tokens.shape[1] - self.prefix
            before = self.kept[number - 1] if number else None
            self.kept[number] = before
            if number not in self._turn:
                return None
            count = max(1, round(self._patches * self.keep ** ((self._turn[number] + 1) / self._times)))
            dice = self.dice(number, tokens.shape[1] - self.prefix) if self.chance and self.dice is not None else None
            places = keep_least_redundant(tokens[:, self.prefix :], count, self.chance, dice)
            self.kept[number] = places if before is None else before.gather(1, places)
            return (taken(tokens, places, self.prefix), *given[1:])

        return hook

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
