"""Averages of a trajectory of weights: a running mean, and that of a valley of the validation loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def valley(
    losses: Sequence[float], converge: int = 3, tolerance: int = 6, ratio: float = 1.3
) -> tuple[int | None, int | None]:
    r"""Where a valley of the loss begins, and where it has ended (the first number past it).

    It begins with the first value that is the least of the :math:`N_s` values from it on. Let l be their mean times r:
    it ends before the first :math:`N_e` values in a row that are all above l. ``None``: not yet.

    Args:
        losses: Of one block of training after another.
        converge: :math:`N_s`.
        tolerance: :math:`N_e`.
        ratio: r.

    Source: SWAD, arXiv 2102.08604, algorithm 1.

    >>> valley([5, 4, 2, 3, 2.5, 2, 9, 9, 9], converge=3, tolerance=2)
    (2, 6)
    >>> valley([5, 4, 3])
    (None, None)
    """
    windows = (losses[end - converge : end] for end in range(converge, len(losses) + 1))
    start = next((number for number, window in enumerate(windows) if window[0] == min(window)), None)
    if start is None:
        return None, None
    most = ratio * sum(losses[start : start + converge]) / converge
    ends = range(start + converge + 1, len(losses) + 1)
    stop = (end - tolerance for end in ends if end - tolerance > start and min(losses[end - tolerance : end]) > most)
    return start, next(stop, None)


class Mean(nn.Module):
    r"""The mean of all weights from one step on, :math:`\bar\theta \leftarrow \bar\theta + (\theta - \bar\theta) / n`.

    Before that, the weights themselves.

    Args:
        first: The step from which on they count.

    >>> mean, average = Mean(first=2), [torch.zeros(1)]
    >>> for step in (1, 2, 3, 4): mean.follow(average, [torch.full((1,), float(step))], step)
    >>> average
    [tensor([3.])]
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    @torch.no_grad()
    def follow(self, average: list[Tensor], live: list[Tensor], step: int) -> None:
        """Take in the weights after a step; steps are counted from 1."""
        share = 1 / max(1, step - self.first + 1)
        if share == 1:
            torch._foreach_copy_(average, live)
        else:
            torch._foreach_lerp_(average, live, share)


class ValleyMean(nn.Module):
    """The mean of all weights within a valley of the validation loss, block by block.

    Until a valley is found the average is the last block's.

    Args:
        weights: An example of them.
        blocks: How many there will be at most.
        every: Steps of a block.
        converge, tolerance, ratio: See :func:`valley`.
    """

    block: Tensor
    recent: Tensor
    settled: Tensor
    losses: Tensor
    done: Tensor

    def __init__(
        self, weights: list[Tensor], blocks: int, every: int, converge: int, tolerance: int, ratio: float
    ) -> None:
        super().__init__()
        self.every, self.converge, self.tolerance, self.ratio = every, converge, tolerance, ratio
        size, held = sum(w.numel() for w in weights), max(converge, tolerance)
        self.register_buffer("block", torch.zeros(size))  # the mean within this block
        self.register_buffer("recent", torch.zeros(held, size))  # means of the last blocks
        self.register_buffer("settled", torch.zeros(size))  # the sum of those before that are in the valley
        self.register_buffer("losses", torch.zeros(max(blocks, 1), dtype=torch.float64))
        self.register_buffer("done", torch.zeros((), dtype=torch.long))  # blocks

    @torch.no_grad()
    def gather(self, live: list[Tensor], step: int) -> bool:
        """Take in the weights after a step; whether that ends a block."""
        share = 1 / ((step - 1) % self.every + 1)
        self.block.lerp_(torch.cat([w.detach().flatten().float() for w in live]), share)
        return step % self.every == 0

    @torch.no_grad()
    def judge(self, average: list[Tensor], loss: float) -> None:
        """End a block after which the validation loss is this, and set the average."""
        number, held = int(self.done), len(self.recent)
        self.losses[number] = loss
        self.done += 1
        start, stop = valley(self.losses[: number + 1].tolist(), self.converge, self.tolerance, self.ratio)
        gone = number - held  # the block whose place is wanted
        if start is not None and start <= gone and (stop is None or gone < stop):
            self.settled += self.recent[number % held]
        self.recent[number % held] = self.block
        if start is None:
            found = self.block
        else:
            end = number + 1 if stop is None else stop
            inside = [n % held for n in range(max(start, gone + 1), end)]
            found = (self.settled + self.recent[inside].sum(dim=0)) / (end - start)
        if stop is None or stop > gone:  # later, what is wanted of it has long been written
            for tensor, part in zip(average, found.split([a.numel() for a in average]), strict=True):
                tensor.copy_(part.view_as(tensor))
