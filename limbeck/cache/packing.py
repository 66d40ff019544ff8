r"""Integers in as few bits as they need, every row in as many bytes: numbers of a fixed width, and sets of ids.

Bits fill bytes from the lowest one, and what is left of a row's last byte is zero. All of it is integer arithmetic on
whole batches, on any device.

A set of k ids below C is an Elias-Fano code. The low l bits of every id stand as they are, in ascending order of ids.
The high parts are steps of a staircase: bit ``high + i`` of a vector is one for the i-th id, so that the vector has k
ones and, as the last high part is at most (C - 1) >> l, a fixed length. Together

.. math:: k\,l + k + \lfloor (C - 1) / 2^l \rfloor

bits, with l where this is least: about half a bit an id above the floor :math:`\log_2 \binom{C}{k}`, below which no
code of fixed length can go (three quarters of a bit where a quarter of all classes is kept). Where C bits are fewer
still, one bit a class says which are in the set (l is then written as 0); k = C needs none.

Elias, "Efficient storage and retrieval by content and address of static files", 1974; Fano, "On the number of bits
required to implement an associative memory", 1971.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import CacheError

WIDEST = 24  # bits of a number: with up to 7 before it in its first byte they stand within four bytes


def packed_bytes(count: int, width: int) -> int:
    """Bytes of a row of ``count`` numbers of ``width`` bits."""
    return -(-count * width // 8)


def pack(numbers: Tensor, width: int) -> Tensor:
    """Integers ``[P, n]`` from 0 to ``2**width - 1`` as bytes ``[P, packed_bytes(n, width)]``; width is 1 to 24.

    >>> pack(torch.tensor([[1, 2, 7]]), 3)
    tensor([[209,   1]], dtype=torch.uint8)
    """
    places = torch.arange(width, device=numbers.device)
    return pack_bits((numbers.unsqueeze(-1) >> places & 1).flatten(1))


def pack_bits(bits: Tensor) -> Tensor:
    """Zeros and ones ``[P, n]`` of any type as bytes ``[P, packed_bytes(n, 1)]``."""
    size = packed_bytes(bits.shape[1], 1)
    bits = F.pad(bits.to(torch.uint8), (0, 8 * size - bits.shape[1])).view(len(bits), size, 8)
    packed = bits[..., 0].clone()
    for place in range(1, 8):
        packed |= bits[..., place] << place
    return packed


def unpack(packed: Tensor, width: int, count: int, start: int = 0) -> Tensor:
    """The numbers again, ``[P, count]`` int32, from bit ``start`` of every row on.

    >>> unpack(torch.tensor([[209, 1]], dtype=torch.uint8), 3, 3)
    tensor([[1, 2, 7]], dtype=torch.int32)
    """
    first = torch.arange(count, device=packed.device) * width + start
    window = range(-(-(7 + width) // 8))  # bytes that a number may lie in
    columns = F.pad(packed, (0, len(window) - 1)).t().contiguous()  # so that picking bytes copies whole columns
    numbers = torch.zeros(count, len(packed), dtype=torch.int32, device=packed.device)
    for byte in window:
        numbers |= columns.index_select(0, (first >> 3) + byte).int() << 8 * byte
    return ((numbers >> (first & 7).int().unsqueeze(1)) & (1 << width) - 1).t().contiguous()


def unpack_bits(packed: Tensor, count: int, start: int = 0) -> Tensor:
    """``[P, count]`` booleans, from bit ``start`` of every row on."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, start >> 3 :].unsqueeze(-1) >> places & 1).flatten(1)
    return bits[:, start & 7 : (start & 7) + count].bool()


def set_layout(classes: int, k: int) -> tuple[int, int]:
    """Low bits of an id, and bits of the vector of high parts; no low bits: a bit for every class.

    >>> set_layout(128_256, 50), set_layout(100, 50), set_layout(10, 10)
    ((11, 112), (0, 100), (0, 0))
    """
    if k == classes:
        return 0, 0
    lengths = {low: k + (classes - 1 >> low) for low in range(1, (classes - 1).bit_length() + 1)}
    low = min(lengths, key=lambda low: k * low + lengths[low])
    return (0, classes) if classes <= k * low + lengths[low] else (low, lengths[low])


def set_bytes(classes: int, k: int) -> int:
    """Bytes of a set of k ids out of ``classes``.

    >>> set_bytes(128_256, 50), round(set_floor_bits(128_256, 50) / 8, 1)
    (83, 79.3)
    """
    low, high = set_layout(classes, k)
    return packed_bytes(k * low + high, 1)


def set_floor_bits(classes: int, k: int) -> float:
    """The least that any code of one length needs for a set: the logarithm of the number of sets."""
    logs = math.lgamma(classes + 1) - math.lgamma(k + 1) - math.lgamma(classes - k + 1)
    return logs / math.log(2)


def pack_set(ids: Tensor, classes: int) -> Tensor:
    """Ascending distinct ids ``[P, k]`` below ``classes`` as bytes ``[P, set_bytes(classes, k)]``.

    >>> pack_set(torch.tensor([[2, 3, 9]]), 10)
    tensor([[12,  2]], dtype=torch.uint8)
    """
    k = ids.shape[1]
    low, high = set_layout(classes, k)
    vector = torch.zeros(len(ids), high, dtype=torch.uint8, device=ids.device)
    if not low:
        return pack_bits(vector.scatter_(1, ids, 1) if high else vector)
    vector.scatter_(1, (ids >> low) + torch.arange(k, device=ids.device), 1)
    places = torch.arange(low, device=ids.device)
    return pack_bits(torch.cat([(ids.unsqueeze(-1) >> places & 1).flatten(1).to(torch.uint8), vector], dim=1))


def unpack_set(packed: Tensor, k: int, classes: int) -> Tensor:
    """The ids again, ``[P, k]`` int64.

    Raises:
        CacheError: The bytes are no set of k ids.

    >>> unpack_set(torch.tensor([[12, 2]], dtype=torch.uint8), 3, 10)
    tensor([[2, 3, 9]])
    """
    low, high = set_layout(classes, k)
    order = torch.arange(k, device=packed.device)
    if not high:
        return order.repeat(len(packed), 1)
    vector = unpack_bits(packed, high, start=k * low)
    if not (vector.sum(1) == k).all():
        raise CacheError("these bytes are no set of ids", where="ids", wanted=f"{k} of {classes} in every row")
    ids = vector.nonzero()[:, 1].view(len(packed), k)
    if low:
        ids = (ids - order << low) | unpack(packed, low, k)
        if not (ids < classes).all():
            raise CacheError("these bytes are no set of ids", where="ids", found=int(ids.max()), wanted=f"< {classes}")
    return ids
