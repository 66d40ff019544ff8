from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import ConfigError
from limbeck.data import epoch_order, hold_out
from limbeck.data.order import cut, step_slices, steps_in


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 5))
def test_cuts_cover_a_batch_evenly(size, world, parts):
    pieces = [cut(size, rank, world, parts) for rank in range(world)]
    flat = [s for rank in pieces for s in rank]
    assert [i for s in flat for i in range(s.start, s.stop)] == list(range(size))
    lengths = [s.stop - s.start for s in flat]
    assert all(lengths)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert all(len(rank) <= parts for rank in pieces)


@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(1, 3), st.integers(1, 3), st.data())
def test_steps_are_the_same_however_they_are_cut(samples, batch, drop, world, parts, data):
    steps = steps_in(samples, batch, drop)
    start = data.draw(st.integers(0, steps))

    def places(world: int, parts: int, start: int) -> list[list[int]]:
        ranks = [
            list(step_slices(samples, batch, drop, start_step=start, rank=r, world=world, parts=parts))
            for r in range(world)
        ]
        return [[i for rank in step for s in rank for i in range(s.start, s.stop)] for step in zip(*ranks, strict=True)]

    whole = places(1, 1, 0)
    assert len(whole) == steps
    assert [*chain.from_iterable(whole)] == list(range(samples - samples % batch if drop else samples))
    assert places(world, parts, start) == whole[start:]


def test_order_is_a_permutation_new_for_each_seed_and_epoch():
    orders = [epoch_order(500, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(500))
    assert len({tuple(o.tolist()) for o in orders}) == len(orders)
    assert torch.equal(epoch_order(500, 1, 1), orders[3])
    # no place prefers a sample: the mean place of each, over many epochs, is near the middle
    places = torch.stack([epoch_order(50, 0, e).argsort() for e in range(400)]).double()
    assert (places.mean(0) - 24.5).abs().max() < 5 * 14.4 / 400**0.5


def test_order_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    epoch_order(100, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


@given(
    st.lists(st.integers(-1, 4), min_size=2, max_size=80),
    st.floats(0.01, 0.95),
    st.integers(0, 3),
)
def test_hold_out_keeps_classes_in_balance(labels, fraction, seed):
    labels = torch.tensor(labels)
    stay, held = hold_out(labels, fraction, seed)
    assert torch.equal(torch.cat([stay, held]).sort().values, torch.arange(len(labels)))
    assert torch.equal(stay, stay.sort().values)
    assert torch.equal(held, held.sort().values)
    assert len(held) >= 1
    counts = {int(c): (int((labels == c).sum()), int((labels[held] == c).sum())) for c in labels.unique()}
    if any(n > 1 and n * fraction > 0.51 for n, _ in counts.values()):
        for n, taken in counts.values():
            assert abs(taken - n * fraction) <= 0.5 + 1e-4 or taken == n - 1
    assert torch.equal(hold_out(labels, fraction, seed)[1], held)


def test_hold_out_is_random_by_seed():
    labels = torch.arange(100) % 4
    first, second = hold_out(labels, 0.2, 0)[1], hold_out(labels, 0.2, 1)[1]
    assert not torch.equal(first, second)
    assert torch.equal(labels[first].bincount(), torch.full((4,), 5))


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.5), (10, 0.0), (10, 1.0), (0, 0.1)])
def test_hold_out_refuses(count, fraction):
    with pytest.raises(ConfigError, match="validation"):
        hold_out(count, fraction)
