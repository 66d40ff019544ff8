"""Numbers of any width and sets of ids, as bytes and back."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.cache.packing import (
    WIDEST,
    pack,
    pack_bits,
    pack_set,
    packed_bytes,
    set_bytes,
    set_floor_bits,
    set_layout,
    unpack,
    unpack_bits,
    unpack_set,
)
from limbeck.core.errors import CacheError


def bits_of(rows: torch.Tensor) -> list[str]:
    """Every row as a word of zeros and ones, its first bit first."""
    return ["".join(f"{byte:08b}"[::-1] for byte in row) for row in rows.tolist()]


@given(st.integers(1, WIDEST), st.integers(0, 40), st.integers(0, 4), st.randoms(use_true_random=False))
def test_numbers_of_any_width(width, count, rows, chance):
    numbers = [[chance.getrandbits(width) for _ in range(count)] for _ in range(rows)]
    packed = pack(torch.tensor(numbers, dtype=torch.int64).view(rows, count), width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(count, width)) == (rows, math.ceil(count * width / 8))
    for row, word in zip(numbers, bits_of(packed), strict=True):
        wanted = "".join(f"{number:0{width}b}"[::-1] for number in row)
        assert word == wanted.ljust(len(word), "0")
    assert unpack(packed, width, count).tolist() == numbers


@pytest.mark.parametrize("width", [1, 7, 8, 9, 17, WIDEST])
def test_numbers_that_begin_anywhere(width):
    numbers = torch.randint(0, 1 << width, (3, 9))
    before = torch.randint(0, 2, (3, 13))
    bits = torch.cat([before, unpack_bits(pack(numbers, width), 9 * width)], dim=1)
    assert torch.equal(unpack(pack_bits(bits), width, 9, start=13).long(), numbers)
    assert torch.equal(unpack_bits(pack_bits(bits), 13).long(), before)


@given(st.integers(1, 300), st.integers(0, 4), st.randoms(use_true_random=False), st.data())
def test_sets_of_any_size(classes, rows, chance, data):
    k = data.draw(st.integers(1, classes))
    sets = [sorted(chance.sample(range(classes), k)) for _ in range(rows)]
    packed = pack_set(torch.tensor(sets, dtype=torch.int64).view(rows, k), classes)
    assert packed.shape == (rows, set_bytes(classes, k))
    assert unpack_set(packed, k, classes).tolist() == sets


@pytest.mark.parametrize(("classes", "k"), [(1 << 18, 1), (1 << 18, 50), (151_936, 128), (32_000, 1000), (2, 1)])
def test_large_and_tiny_vocabularies(classes, k):
    chance = random.Random(classes)
    sets = [sorted(chance.sample(range(classes), k)) for _ in range(20)]
    sets += [list(range(k)), list(range(classes - k, classes))]  # the ends of the staircase
    packed = pack_set(torch.tensor(sets), classes)
    assert unpack_set(packed, k, classes).tolist() == sets


@given(st.integers(2, 1 << 18), st.data())
def test_a_set_is_near_the_floor(classes, data):
    k = data.draw(st.integers(1, min(classes - 1, 2000)))
    low, high = set_layout(classes, k)
    floor = set_floor_bits(classes, k)
    assert floor == pytest.approx(math.log2(math.comb(classes, k)), abs=1e-4)
    assert floor <= k * low + high + 1e-4
    assert k * low + high <= classes  # a bit for every class at worst
    if 2 * k <= classes:
        assert k * low + high <= floor + 0.76 * k + 0.5 * math.log2(2 * math.pi * k) + 2


def test_language_model_sizes():
    floors = {v: set_floor_bits(v, 50) / 8 for v in (32_000, 128_256, 151_936)}
    for classes, floor in floors.items():
        assert set_bytes(classes, 50) - floor < 5
        assert set_bytes(classes, 50) < 50 * math.ceil(math.log2(classes)) / 8  # than ids side by side


@pytest.mark.parametrize(("classes", "k"), [(100, 50), (5000, 20)])
def test_other_bytes_are_no_set(classes, k):
    packed = pack_set(torch.arange(k).repeat(2, 1), classes)
    low = set_layout(classes, k)[0]
    packed[1, -1 if low else 0] ^= 1  # a one more, or fewer
    with pytest.raises(CacheError, match="no set of ids"):
        unpack_set(packed, k, classes)


def test_ids_past_the_last_class_are_no_set():
    low, high = set_layout(5000, 20)
    packed = pack_set(torch.arange(4980, 5000).unsqueeze(0), 5000)
    packed[:, : 20 * low // 8] = 255  # low parts as large as can be, in the right order of high parts
    assert high
    with pytest.raises(CacheError, match="< 5000"):
        unpack_set(packed, 20, 5000)
