"""Hidden states through a head, one chunk of places at a time, and the gradient of both on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from limbeck.core.precision import without_autocast
from limbeck.core.reduction import widen

#: The logits of a chunk take at least this much memory: smaller products of matrices run slower, and on a device the
#: head and its gradient, which every chunk reads anew, would take longer than the arithmetic.
LEAST_BYTES = {"cpu": 32 * 2**20}
LEAST_BYTES_DEVICE = 256 * 2**20
#: What is widened to float32 at a time, where the logits of a chunk are not float32 themselves.
BLOCK_BYTES = {"cpu": 4 * 2**20}
BLOCK_BYTES_DEVICE = 64 * 2**20

Index = slice | Tensor
#: Logits of the chunk, and its places. Gives the divergences and the cross-entropies, and leaves, where wanted, the
#: logits' gradient where the logits were.
RowStep = Callable[[Tensor, Index], tuple[Tensor, Tensor | None]]


class Head:
    """A head's logits, chunk after chunk in one piece of memory.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        bias: ``[V]`` or none.
        classes: The logits that count, the first ones.
        dtype: Of the product.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: int, dtype: torch.dtype) -> None:
        self.hidden = hidden
        self.weight = weight[:classes].to(dtype)
        self.bias = None if bias is None else bias[:classes].to(dtype)
        self._memory: Tensor | None = None

    def states(self, index: Index) -> Tensor:
        """Hidden states of some places."""
        return self.hidden[index].to(self.weight.dtype)

    @without_autocast
    def logits(self, states: Tensor) -> Tensor:
        """Logits ``[c, classes]``; the next call writes over them."""
        if self._memory is None:  # the first chunk is the largest
            self._memory = states.new_empty(states.shape[0], self.weight.shape[0])
        out = self._memory[: states.shape[0]]
        if self.bias is None:
            return torch.mm(states, self.weight.t(), out=out)
        return torch.addmm(self.bias, states, self.weight.t(), out=out)


class Gradients:
    """Gradients by hidden states, weight and bias, of those that are wanted; of places not in a chunk they are zero."""

    def __init__(self, head: Head, weight: Tensor, hidden: bool, heads: bool, bias: bool) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.head, self.dtype = head, weight.dtype
        self.hidden = torch.zeros_like(head.hidden) if hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if heads else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=wide) if bias else None
        self.wanted = hidden or heads or bias

    @without_autocast
    def add(self, by_logits: Tensor, states: Tensor, index: Index) -> None:
        """Count a chunk in."""
        classes = by_logits.shape[1]
        if self.hidden is not None:
            self.hidden[index] = torch.mm(by_logits, self.head.weight).to(self.hidden.dtype)
        if self.bias is not None:
            self.bias[:classes] += by_logits.sum(dim=0, dtype=self.bias.dtype)
        if self.weight is None:
            return
        if self.weight.dtype == states.dtype:
            self.weight[:classes].addmm_(by_logits.t(), states)
            return
        # A product in half precision has half precision: it is added up in float32, some classes at a time. A sum over
        # a chunk's places might be too large for float16, 32 times their mean is not.
        scale = min(32 / len(states), 1.0) if states.dtype == torch.float16 else 1.0
        for part in blocks(classes, states.shape[1], states.dtype, states.device):
            product = torch.addmm(states.new_empty(1), by_logits[:, part].t(), states, beta=0, alpha=scale)
            self.weight[part].add_(product, alpha=1 / scale)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three, empty where not wanted."""
        dtype = kept_dtype(self.dtype)
        return (
            self.head.hidden.new_empty(0) if self.hidden is None else self.hidden,
            self.head.hidden.new_empty(0, dtype=dtype) if self.weight is None else self.weight.to(dtype),
            self.head.hidden.new_empty(0, dtype=dtype) if self.bias is None else self.bias.to(dtype),
        )


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """How a head's gradient waits for backward: sums that are still to be divided may be too large for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def blocks(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Ranges of rows, each some megabytes of this width."""
    size = max(BLOCK_BYTES.get(device.type, BLOCK_BYTES_DEVICE) // max(width * dtype.itemsize, 1), 1)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def chunk_size(places: int, width: int, classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Places whose logits take about as much memory as all hidden states, or ``LEAST_BYTES``."""
    least = LEAST_BYTES.get(device.type, LEAST_BYTES_DEVICE)
    return max(max(places * width * dtype.itemsize, least) // max(classes * dtype.itemsize, 1), 1)


def add_up(gradients: Gradients, places: Tensor | int, chunk: int, step: RowStep) -> tuple[Tensor, Tensor]:
    """Sums of the divergence and of the cross-entropy over places, chunk by chunk.

    Args:
        gradients: Where the gradient of the student's head goes.
        places: Integers, or how many, when all count.
        chunk: Places at a time; 0: ``chunk_size``.
        step: What becomes of a chunk's logits.
    """
    head = gradients.head
    total = places if isinstance(places, int) else places.shape[0]
    width, classes = head.hidden.shape[1], head.weight.shape[0]
    chunk = min(chunk or chunk_size(total, width, classes, head.weight.dtype, head.hidden.device), max(total, 1))
    sums = widen(head.hidden.new_empty(0)).new_zeros(2).unbind()
    for start in range(0, total, chunk):
        index = slice(start, min(start + chunk, total)) if isinstance(places, int) else places[start : start + chunk]
        states = head.states(index)
        logits = head.logits(states)
        for value, part in zip(sums, step(logits, index), strict=True):
            if part is not None:
                value += part.sum()
        if gradients.wanted:
            gradients.add(logits, states, index)
    return sums[0].clone(), sums[1].clone()
