"""Direct preference optimisation against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.trace import Trace
from limbeck.objectives.parts.preference import DPO, LABELS, PLACES, dpo_loss, text_log_probs


def test_the_definition_and_its_gradient() -> None:
    torch.manual_seed(0)
    sides = [torch.randn(6, dtype=torch.double, requires_grad=True) for _ in range(4)]
    loss = dpo_loss(*sides, beta=0.3)
    wanted = 0.0
    for w, l, rw, rl in zip(*(side.tolist() for side in sides), strict=True):  # noqa: E741
        wanted -= math.log(1 / (1 + math.exp(-0.3 * ((w - rw) - (l - rl))))) / 6
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-12)
    loss.backward()
    w, l, rw, rl = (side.detach() for side in sides)  # noqa: E741
    slope = -0.3 * torch.sigmoid(-0.3 * ((w - rw) - (l - rl))) / 6
    torch.testing.assert_close(sides[0].grad, slope)
    torch.testing.assert_close(sides[1].grad, -slope)
    assert sides[2].grad is None
    assert sides[3].grad is None


def test_at_the_reference_it_is_log_two_and_grows_with_the_loser() -> None:
    own = torch.randn(5, dtype=torch.double)
    even = dpo_loss(own, own - 1, own, own - 1)
    assert float(even) == pytest.approx(math.log(2), rel=1e-12)
    values = [float(dpo_loss(own, own - 1 + gain, own, own - 1)) for gain in (0.0, 0.5, 2.0)]
    assert values == sorted(values)
    assert values[0] < values[1] < values[2]


def test_texts_are_sums_of_their_own_tokens() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 4, 5, dtype=torch.double)
    labels = torch.tensor([[1, 2, 3, -1], [4, 0, 2, 1]])
    places = torch.tensor([[False, True, True, False], [False, False, True, True]])
    found = text_log_probs(logits, labels, places)
    for row in range(2):
        wanted = 0.0
        for place in range(4):
            if places[row, place]:
                wanted += float(logits[row, place].log_softmax(-1)[labels[row, place]])
        assert float(found[row]) == pytest.approx(wanted, rel=1e-12)


def test_the_objective_pairs_the_halves_of_a_batch() -> None:
    torch.manual_seed(2)
    own, reference = torch.randn(4, 3, 5, dtype=torch.double), torch.randn(4, 3, 5, dtype=torch.double)
    labels, places = torch.randint(5, (4, 3)), torch.ones(4, 3, dtype=torch.bool)
    batch = Batch({}, labels, extras={LABELS: labels, PLACES: places})
    said = [text_log_probs(logits, labels, places) for logits in (own, reference)]
    wanted = dpo_loss(said[0][:2], said[0][2:], said[1][:2], said[1][2:], beta=0.5)
    traces = [Trace(None, {"logits": logits}) for logits in (own, reference)]
    torch.testing.assert_close(DPO(0.5)(*traces, batch), wanted)
    assert float(DPO()(traces[0], traces[0], batch)) == pytest.approx(DPO.contract.at_equal, rel=1e-12)


def test_refusals() -> None:
    two = torch.zeros(2)
    with pytest.raises(TensorError, match=r"rejected: pairs differ in number; found \[3\]"):
        dpo_loss(two, torch.zeros(3), two, two)
    with pytest.raises(ConfigError, match="beta: must be above zero"):
        dpo_loss(two, two, two, two, beta=0.0)
    with pytest.raises(DataError, match="this loss is of pairs of texts"):
        DPO()(Trace(None), Trace(None), Batch({}))
