"""What several models say together: means against plain loops, and weights of each place."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.ensembling import confidence_weights, entropy_weights, mixed_logits, stacked
from limbeck.core.errors import TensorError


def said(models: int = 3, places: tuple[int, ...] = (6,), classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(models, *places, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_it_is_the_mean_of_what_is_softened(temperature: float) -> None:
    logits, weights = said(), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    found = (mixed_logits(logits, weights, temperature=temperature) / temperature).softmax(-1)
    wanted = sum(w * (z / temperature).softmax(-1) for w, z in zip(weights, logits, strict=True))
    torch.testing.assert_close(found, wanted)


def test_probabilities_and_logits_differ_as_the_card_says() -> None:
    two, half = torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]]]), torch.full((2,), 0.5)
    assert mixed_logits(two, half).softmax(-1)[0, 0].item() == pytest.approx(0.741, abs=1e-3)
    assert mixed_logits(two, half, of="logits").softmax(-1)[0, 0].item() == pytest.approx(0.881, abs=1e-3)


def test_equal_models_are_one_and_their_order_does_not_matter() -> None:
    one, third = said(1), torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(mixed_logits(one.expand(3, -1, -1), third).softmax(-1), one[0].softmax(-1))
    torch.testing.assert_close(mixed_logits(said(), third), mixed_logits(said().flip(0), third))


def test_a_class_that_all_rule_out_stays_out_and_weight_zero_says_nothing() -> None:
    logits = said(2)
    logits[..., 4] = -math.inf
    for of in ("probabilities", "logits"):
        found = mixed_logits(logits, torch.tensor([1.0, 0.0]), of=of).softmax(-1)
        torch.testing.assert_close(found, logits[0].softmax(-1))


def test_confidence_by_plain_loops() -> None:
    logits, labels = said(3, (4, 2)), torch.randint(5, (4, 2), generator=torch.Generator().manual_seed(2))
    found = confidence_weights(logits, labels)
    for b in range(4):
        for t in range(2):
            losses = [-z[b, t].log_softmax(0)[labels[b, t]].exp().log().item() for z in logits]
            total = sum(math.exp(x) for x in losses)
            wanted = [0.5 * (1 - math.exp(x) / total) for x in losses]
            assert found[:, b, t].tolist() == pytest.approx(wanted, rel=1e-9)
    hot = torch.nn.functional.one_hot(labels, 5).double()
    torch.testing.assert_close(confidence_weights(logits, hot), found)


def test_who_is_near_the_label_counts_most_and_without_a_label_all_alike() -> None:
    logits = torch.zeros(3, 2, 4)
    logits[0, :, 1], logits[1, :, 2] = 9.0, 9.0
    weights = confidence_weights(logits, torch.tensor([1, -100]))
    assert weights[:, 0].argmax() == 0
    assert weights[:, 0].argmin() == 1
    assert weights[:, 1].tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(weights.sum(0), torch.ones(2))


def test_entropy_and_one_model_alone() -> None:
    weights = entropy_weights(said(4))
    torch.testing.assert_close(weights.sum(0), torch.ones(6, dtype=torch.float64))
    p = said(4).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(weights, (1 - entropy / entropy.sum(0)) / 3)
    certain = torch.tensor([[[math.inf, 0.0]], [[math.inf, 0.0]]]).nan_to_num(posinf=1e4)
    assert entropy_weights(certain).flatten().tolist() == [0.5, 0.5]
    for weights in (entropy_weights(said(1)), confidence_weights(said(1), torch.zeros(6, dtype=torch.long))):
        assert torch.equal(weights, torch.ones_like(weights))


def test_who_answers_another_question_is_named() -> None:
    with pytest.raises(TensorError, match=r"teacher_logits\[1\].*found \[2, 4\].*\[2, 3\]"):
        stacked([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(TensorError, match="no logits"):
        stacked([])
    with pytest.raises(TensorError, match="labels"):
        confidence_weights(said(), torch.zeros(5, dtype=torch.long))
