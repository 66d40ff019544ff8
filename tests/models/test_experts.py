"""Networks of experts: what is shared, how the last map is fused, and what mistakes are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import ModelError
from limbeck.models import create
from limbeck.models.experts import CosineLinear, expert_resnet


def net(**options: object) -> torch.nn.Module:
    return create("resnet8_experts", num_classes=5, in_channels=1, widths=(4, 4, 8, 16), **options)


@pytest.mark.parametrize("options", [{}, {"shared": 2, "fuse": True}, {"head": "linear", "experts": 2, "fuse": True}])
def test_logits_are_the_mean_of_the_experts(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, said = net(**options).eval(), []
    for expert in model.experts:
        expert.register_forward_hook(lambda _, __, output: said.append(output))
    logits = model(torch.randn(3, 1, 8, 8))
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits, sum(said) / len(said))
    assert len(said) == len(model.experts) == options.get("experts", 3)
    assert not torch.equal(said[0], said[1])


def test_gradient_reaches_every_parameter() -> None:
    model = net(shared=2, fuse=True)
    model(torch.randn(4, 1, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_expert_multiplies_its_last_map_by_an_earlier_one() -> None:
    """SHIKE's depths: 2, 1, 2 strided convolutions, of which the second has no ReLU."""
    model = expert_resnet(8, shared=2, fuse=True).eval()
    kinds = [[type(layer).__name__ for layer in expert.shallow] for expert in model.experts]
    one, two = ["Conv2d", "BatchNorm2d", "ReLU"], ["Conv2d", "BatchNorm2d"]
    assert kinds == [one + two, one, one + two]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first = model.trunk[0](model.relu1(model.bn1(model.conv1(x))))
        second = model.trunk[1](first)
        expert = model.experts[1]
        feature = (expert.stages(second) * expert.shallow(second)).mean(dim=(2, 3))
        torch.testing.assert_close(expert([first, second]), expert.linear(feature))


def test_cosine_logits_know_no_lengths() -> None:
    layer, x = CosineLinear(4, 3, scale=7.0).double(), torch.randn(5, 4, dtype=torch.float64)
    wanted = 7 * torch.stack([F.cosine_similarity(x, w.expand_as(x)) for w in layer.weight], dim=1)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(3 * x), layer(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"experts": 1}, "two or more"), ({"shared": 3}, "1 to 2"), ({"head": "round"}, "'cosine' or 'linear'")],
)
def test_mistakes_are_told(options: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        net(**options)
    with pytest.raises(ModelError, match="6n"):
        create("resnet9_experts")
