"""What the processes of a run have to agree on: whose rows are whose, what is drawn, what is told of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.hashing import key
from limbeck.core.reduction import widen

_apart = False  # within :func:`alone`


def world_size() -> int:
    """How many processes train together.

    >>> world_size()
    1
    """
    dist = torch.distributed
    return dist.get_world_size() if not _apart and dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """As if this process were the only one: for work that the others have no part in, or do by themselves.

    >>> with alone(): world_size()
    1
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def rank_here() -> int:
    """Which of them this one is; the first, 0, writes what all of them know.

    >>> rank_here()
    0
    """
    return torch.distributed.get_rank() if world_size() > 1 else 0


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a detached number over all processes, the same on each; the number itself where there is one process.

    All processes have to call it equally often, as they do in a forward.

    >>> mean_over_ranks(torch.tensor(2.0))
    tensor(2.)
    """
    if world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / world_size()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all processes, with such a gradient that of a loss that all compute from sums alike the mean over
    processes is that of the whole batch.

    >>> sum_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    return value if world_size() == 1 else _Sum.apply(value)


def mean_of_rows(values: Tensor) -> Tensor:
    """The mean over all processes' rows, the same on each; gradients as of :func:`sum_over_ranks`.

    >>> mean_of_rows(torch.tensor([1.0, 3.0]))
    tensor(2.)
    """
    if world_size() == 1:
        return values.mean(dim=0)
    flat = widen(values).reshape(len(values), -1)
    sums = sum_over_ranks(torch.cat([flat.sum(dim=0), flat.new_tensor([len(flat)])]))
    return (sums[:-1] / sums[-1]).view(values.shape[1:]).to(values.dtype)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return mean_over_ranks(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return mean_over_ranks(grad)


def mean_gradients(parts: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over all processes, which can be differentiated: each process's part gets the mean gradient.

    For what is computed from a gradient before a step ends, whose whole is the mean over processes.

    >>> mean_gradients([torch.ones(2)])
    [tensor([1., 1.])]
    """
    if world_size() == 1 or not parts:
        return list(parts)
    flat = _Mean.apply(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


@torch.no_grad()
def as_on_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place.

    >>> as_on_first([torch.ones(2)])
    """
    if world_size() == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    for own in groups.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in own])
        torch.distributed.broadcast(flat, 0)
        for tensor, piece in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(piece.view_as(tensor))


@contextlib.contextmanager
def drawn_alike(device: torch.device, *counters: int) -> Iterator[None]:
    """What is drawn within is the same on every process, and a pure function of these numbers.

    >>> with drawn_alike(torch.device("cpu"), 1, 2): first = torch.rand(3)
    >>> with drawn_alike(torch.device("cpu"), 1, 2): bool((torch.rand(3) == first).all())
    True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cpu":  # the state of an accelerator is not kept then, so it is not to be touched
            torch.default_generator.manual_seed(key(*counters))
        else:
            torch.manual_seed(key(*counters))
        yield


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch that all processes share are this one's; see :func:`rows_of_ranks`.

    Args:
        sizes: How many each process has, in order.
        rank: Which of them this one is.

    >>> rows = Rows((3, 2), 1)
    >>> rows.whole, rows.own, rows.share
    (5, slice(3, 5, None), 0.8)
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @property
    def whole(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """Where this process's lie."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    @property
    def share(self) -> float:
        """Makes a mean over own rows its part of the mean over all: gradients are averaged over processes."""
        return self.sizes[self.rank] * len(self.sizes) / self.whole

    def gather(self, tensor: Tensor) -> Tensor:
        """All rows in order; gradients reach this process's own alone, see :meth:`of_whole`.

        >>> Rows((2,)).gather(torch.tensor([1, 2]))
        tensor([1, 2])
        """
        if len(self.sizes) == 1:
            return tensor
        padded = tensor.detach().new_zeros(max(self.sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        found = [torch.empty_like(padded) for _ in self.sizes]
        torch.distributed.all_gather(found, padded)
        parts = [part[:size] for part, size in zip(found, self.sizes, strict=True)]
        return torch.cat([*parts[: self.rank], tensor, *parts[self.rank + 1 :]])

    def of_whole(self, value: Tensor) -> Tensor:
        """A loss that every process computed from the same gathered rows: of the same size, and with such a gradient to
        own rows that the mean over processes is that of the whole. Nothing that learns may stand behind the gathering.

        >>> Rows((2,)).of_whole(torch.tensor(2.0))
        tensor(2.)
        """
        world = len(self.sizes)
        return value if world == 1 else value * world - value.detach() * (world - 1)

    def rand(self, *shape: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers from 0 to 1 for own rows, out of those that :func:`drawn_alike` gives to all; ``shape`` may begin
        with a multiple of the rows, group after group.

        >>> Rows((2,)).rand(6, 1, device=torch.device("cpu")).shape
        torch.Size([6, 1])
        """
        groups = shape[0] // self.sizes[self.rank]
        drawn = torch.rand(groups, self.whole, *shape[1:], device=device, dtype=dtype)
        return drawn[:, self.own].flatten(0, 1)


def rows_of_ranks(count: int, device: torch.device) -> Rows:
    """How many rows every process has; all have to call it equally often.

    >>> rows_of_ranks(4, torch.device("cpu"))
    Rows(sizes=(4,), rank=0)
    """
    if world_size() == 1:
        return Rows((count,))
    sizes = [torch.zeros((), dtype=torch.long, device=device) for _ in range(world_size())]
    torch.distributed.all_gather(sizes, torch.tensor(count, device=device))
    return Rows(tuple(int(size) for size in sizes), torch.distributed.get_rank())


def gather_bytes(payload: bytes, device: torch.device) -> list[bytes]:
    """Every process's bytes in order, which may be of any length.

    >>> gather_bytes(b"ab", torch.device("cpu"))
    [b'ab']
    """
    if world_size() == 1:
        return [payload]
    own = torch.frombuffer(bytearray(payload + b"\0"), dtype=torch.uint8).to(device)  # one more: none has no tensor
    rows = rows_of_ranks(len(own), device)
    return [part[:-1].cpu().numpy().tobytes() for part in rows.gather(own).split(rows.sizes)]
