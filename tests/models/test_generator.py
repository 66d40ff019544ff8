from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import ModelError
from limbeck.data.normalise import Normalisation
from limbeck.models.generator import Generator


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 30, 17), (2, 28, 28), (5,)])
def test_it_fills_any_shape_with_normalised_inputs(shape):
    found = Generator(6, shape, width=4)(torch.randn(64, 6))
    assert found.shape == (64, *shape)
    channels = found.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(dim=1), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(dim=1), torch.ones(shape[0]), atol=2e-2, rtol=0)


def test_pixels_are_normalised_as_the_data_are():
    stats = Normalisation((0.2, 0.5, 0.7), (0.1, 0.2, 0.4))
    found = Generator(6, (3, 8, 8), width=4, end="pixels", normalise=stats)(torch.randn(64, 6))
    for channel in range(3):
        low, high = -stats.mean[channel] / stats.std[channel], (1 - stats.mean[channel]) / stats.std[channel]
        assert found[:, channel].min() >= low - 1e-6
        assert found[:, channel].max() <= high + 1e-6
        assert found[:, channel].std() > 0


def test_start_draws_small_weights_anew_and_gradients_reach_everything():
    generator = Generator(6, (1, 8, 8), width=16)
    before = generator.first.weight.detach().clone()
    generator.start()
    assert not torch.equal(generator.first.weight, before)
    assert abs(float(generator.first.weight.detach().std()) - 0.02) < 2e-3
    (generator(torch.randn(8, 6)) ** 3).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


def test_other_shapes_are_refused():
    with pytest.raises(ModelError, match=r"only images and vectors.*\[4, 5\]"):
        Generator(6, (4, 5))


def test_vectors_have_hidden_layers():
    assert sum(isinstance(m, nn.Linear) for m in Generator(6, (5,)).modules()) == 3
