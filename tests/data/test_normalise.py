from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.data import NORMALISATIONS, Normalisation, digits, normalisation


@pytest.mark.parametrize("name", sorted(NORMALISATIONS))
def test_bytes_and_floats_agree_with_the_formula(name):
    stats = normalisation(name)
    channels = len(stats.mean)
    image = torch.randint(0, 256, (2, channels, 5, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (stats.mean, stats.std))
    expected = (image.double() / 255 - mean) / std
    result = stats(image)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), expected, atol=1e-6)
    floats = image.float() / 255
    kept = floats.clone()
    assert torch.allclose(stats(floats).double(), expected, atol=1e-6)
    assert torch.equal(floats, kept)


def test_digits_statistics_are_those_of_its_training_pixels():
    result = normalisation("digits")(digits().train.load())
    assert abs(float(result.mean())) < 1e-3
    assert abs(float(result.std()) - 1) < 1e-3


def test_usable_under_autograd_after_inference_mode():
    stats = Normalisation((0.2,), (0.3,))
    with torch.inference_mode():
        stats(torch.zeros(1, 1, 2, 2))
    weight = torch.ones(1, 1, 2, 2, requires_grad=True)
    stats(torch.zeros(1, 1, 2, 2)).mul(weight).sum().backward()
    assert weight.grad is not None


def test_reads_what_recipes_write():
    assert normalisation({"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2]}) == Normalisation((0.1, 0.2, 0.3), (1, 1, 2))
    for wrong in ("imagnet", {"mean": [1]}, {"mean": 3, "std": 4}, 5, {"mean": [0.1], "std": [0.0]}):
        with pytest.raises(ConfigError, match="normalise"):
            normalisation(wrong)
    with pytest.raises(ConfigError, match="differ in length"):
        normalisation({"mean": [0.1], "std": [1, 2]})
