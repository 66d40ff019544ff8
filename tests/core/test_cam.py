from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.cam import check_pooled, class_maps
from limbeck.core.errors import ConfigError, TensorError


def test_they_are_a_one_by_one_convolution_and_average_to_the_logits() -> None:
    """Structural conversion: pooling and classifier in the other order leave the logits alone."""
    classifier, feature = nn.Linear(6, 4), torch.randn(3, 6, 5, 7)
    convolution = nn.Conv2d(6, 4, 1)
    convolution.weight.data = classifier.weight.data[:, :, None, None]
    convolution.bias.data = classifier.bias.data
    maps = class_maps(feature, classifier.weight, classifier.bias)
    torch.testing.assert_close(maps, convolution(feature), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps.mean((2, 3)), classifier(feature.mean((2, 3))), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(class_maps(feature, classifier.weight).mean((2, 3)) + classifier.bias, maps.mean((2, 3)))


def test_tokens_of_a_square_map() -> None:
    feature, weight = torch.randn(2, 6, 3, 3), torch.randn(4, 6)
    tokens = torch.cat([torch.randn(2, 1, 6), feature.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(class_maps(tokens, weight), class_maps(feature, weight))


def test_half_precision_is_widened() -> None:
    maps = class_maps(torch.ones(1, 2, 1, 1).half(), torch.full((1, 2), 6e4).half())
    assert maps.item() == pytest.approx(1.2e5, rel=1e-2)


def test_what_they_refuse() -> None:
    with pytest.raises(TensorError, match="teacher_feature.*6 channels"):
        class_maps(torch.zeros(2, 5, 3, 3), torch.zeros(4, 6), name="teacher_feature")
    with pytest.raises(TensorError, match="weight"):
        class_maps(torch.zeros(2, 5, 3, 3), torch.zeros(5))


def test_another_map_than_the_pooled_one_is_refused() -> None:
    feature = torch.randn(4, 8, 5, 5)
    check_pooled(feature, feature.mean((2, 3)), "stages:-1")
    check_pooled(feature.half(), 3 * feature.mean((2, 3)).half(), "stages:-1")
    check_pooled(1e-9 * feature, 1e-9 * feature.mean((2, 3)), "stages:-1")
    check_pooled(0 * feature, 0 * feature.mean((2, 3)), "stages:-1")
    for other in (feature.relu().mean((2, 3)), torch.randn(4, 9)):
        with pytest.raises(ConfigError, match="stages:-1"):
            check_pooled(feature, other, "stages:-1")
