"""FBKD against its equations, its masks, and its non-local blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.models import create
from limbeck.objectives.feature.fbkd import FBKD, fbkd_loss
from limbeck.objectives.parts.non_local import NonLocal, RelationHeads


def softmax(values: list[float], temperature: float) -> list[float]:
    top = [math.exp(v / temperature) for v in values]
    return [len(values) * v / sum(top) for v in top]


def reference(s: Tensor, t: Tensor, adapted: Tensor, temperature: float) -> float:
    """The masked distance of one sample, entry by entry."""
    (channels, height, width) = t.shape
    masks = {"s": ([], []), "t": ([], [])}
    for name, x in (("s", s), ("t", t)):
        places = [
            sum(abs(x[c, h, w].item()) for c in range(len(x))) / len(x) for h in range(height) for w in range(width)
        ]
        each = [x[c].abs().mean().item() for c in range(len(x))]
        masks[name] = softmax(places, temperature), softmax(each, temperature)
    total = 0.0
    for c in range(channels):
        for h in range(height):
            for w in range(width):
                place = h * width + w
                m_s = (masks["s"][0][place] + masks["t"][0][place]) / 2
                m_c = (masks["s"][1][c] + masks["t"][1][c]) / 2
                total += m_s * m_c * (t[c, h, w] - adapted[c, h, w]).item() ** 2
    return math.sqrt(total)


def inputs(batch: int = 2, channels: int = 3) -> list[Tensor]:
    shape = (batch, channels, 2, 4)
    s, t, adapted, own, other = (torch.randn(shape).double() for _ in range(5))
    return [s, t, adapted, torch.randn(batch, channels).double(), torch.randn(batch, 1, 2, 4).double(), own, other]


def test_every_part_by_itself() -> None:
    s, t, adapted, channels, places, own, other = given = inputs()
    only = {"masked_weight": 0.0, "pooled_weight": 0.0, "relation_weight": 0.0}
    found = fbkd_loss(*given, **{**only, "masked_weight": 1.0}, temperature=0.7, reduction="none")
    assert found.tolist() == pytest.approx([reference(s[b], t[b], adapted[b], 0.7) for b in range(2)], rel=1e-9)
    found = fbkd_loss(*given, **{**only, "pooled_weight": 1.0}, reduction="none")
    for b in range(2):
        first = math.sqrt(sum((t[b, c].mean() - channels[b, c]).item() ** 2 for c in range(3)))
        second = math.sqrt(
            sum((t[b, :, h, w].mean() - places[b, 0, h, w]).item() ** 2 for h in range(2) for w in range(4))
        )
        assert found[b].item() == pytest.approx(first + second, rel=1e-9)
    found = fbkd_loss(*given, **{**only, "relation_weight": 1.0}, reduction="none")
    assert found.tolist() == pytest.approx([(own[b] - other[b]).norm().item() for b in range(2)], rel=1e-9)


def test_parts_add_up_and_masks_carry_no_gradient() -> None:
    given = [x.requires_grad_() for x in inputs()]
    loss = fbkd_loss(*given)
    loss.backward()
    assert given[0].grad is None
    assert given[1].grad is None
    assert all(x.grad.abs().sum() > 0 for x in given[2:])
    weights = ("masked_weight", "pooled_weight", "relation_weight")
    parts = [fbkd_loss(*given, **{w: 0.0 for w in weights if w != own}) for own in weights]
    torch.testing.assert_close(loss, sum(parts))


def test_a_high_temperature_weighs_all_places_alike() -> None:
    given = inputs()
    found = fbkd_loss(*given, temperature=1e9, masked_weight=1.0, pooled_weight=0.0, relation_weight=0.0)
    torch.testing.assert_close(found, (given[1] - given[2]).flatten(1).norm(dim=1).mean())


def test_non_local_block_is_the_sum_over_all_places() -> None:
    block = NonLocal(4, reduction=2).double()
    nn.init.normal_(block.out[1].weight)
    x = torch.randn(2, 4, 2, 3).double()
    theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
    y = torch.zeros(2, 2, 6).double()
    for b in range(2):
        for i in range(6):
            for j in range(6):
                y[b, :, i] += theta[b, :, i].dot(phi[b, :, j]) * g[b, :, j] / 6
    torch.testing.assert_close(block(x), x + block.out(y.reshape(2, 2, 2, 3)))
    assert torch.equal(NonLocal(4)(x.float()), x.float())  # the identity at first
    pooled = NonLocal(4, pool=8)
    assert pooled(torch.randn(2, 4, 8, 4)).shape == (2, 4, 8, 4)


def test_heads_lead_to_the_teachers_width() -> None:
    adapted, channels, places, own, other = RelationHeads(3, 5)(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    assert adapted.shape == own.shape == other.shape == (2, 5, 4, 4)
    assert (channels.shape, places.shape) == ((2, 5), (2, 1, 4, 4))


def test_layers_add_up() -> None:
    batch = Batch(torch.randn(3, 1, 8, 8), labels=torch.arange(3))
    student, teacher = create("resnet8", in_channels=1).eval(), create("resnet8x4", in_channels=1)
    loss = FBKD(["layer1", "layer2"], ["layer1", "layer2"])
    distiller = Distiller(student, loss, teacher).setup(batch)
    total = distiller(batch).total
    own, other = distiller.traces(batch)
    each = [
        fbkd_loss(own[n], other[n], *h(own[n], other[n])) for n, h in zip(["layer1", "layer2"], loss.heads, strict=True)
    ]
    torch.testing.assert_close(total, sum(each))


def test_mistakes_are_named() -> None:
    given = inputs()
    with pytest.raises(ConfigError, match="temperature"):
        fbkd_loss(*given, temperature=0.0)
    with pytest.raises(LimbeckError, match="student_feature"):
        fbkd_loss(given[0].flatten(1), *given[1:])
    with pytest.raises(LimbeckError, match="teacher_feature"):
        fbkd_loss(given[0], given[1][:1], *given[2:])
    with pytest.raises(ConfigError, match="pool"):
        FBKD(pool=0)
