"""CTCL: against loops over samples, regions and pixels; who is better gives, and is not moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import Terms
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.functional import ctcl_seg_loss
from limbeck.objectives import CrossEntropy, CTCLSeg
from limbeck.schemes import Cast, build

LOW, HIGH, PIXEL, T = 0.3, 0.7, 1.1, 2.0


def inputs(batch: int = 3, classes: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, classes, (batch, 8, 8), generator=generator)
    labels[torch.rand(batch, 8, 8, generator=generator) < 0.2] = -1
    labels[0, :4, :4] = -1  # a region without any
    shapes = [(5, 6, 6), (5, 6, 6), (7, 4, 4), (7, 4, 4), (classes, 8, 8), (classes, 8, 8)]
    return [*(drawn(*shape) for shape in shapes), labels]


def by_hand(*given: Tensor) -> Tensor:
    low_s, low_t, high_s, high_t, logits_s, logits_t, labels = given
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(labels)):
        cosines = [F.cosine_similarity(low_s[b, :, i, j], low_t[b, :, i, j], dim=0) for i in range(6) for j in range(6)]
        total = total + LOW * (1 - torch.stack(cosines).mean())
        known = [(i, j) for i in range(8) for j in range(8) if labels[b, i, j] >= 0]
        loss = {
            k: {p: -z[b, :, p[0], p[1]].log_softmax(0)[labels[b][p]] for p in known}
            for k, z in (("s", logits_s), ("t", logits_t))
        }
        regions, distances = 0, torch.zeros((), dtype=torch.float64)
        for r, c in ((r, c) for r in range(2) for c in range(2)):
            inside = [p for p in known if p[0] // 4 == r and p[1] // 4 == c]
            if not inside:
                continue
            regions += 1
            means = {k: torch.stack([loss[k][p] for p in inside]).mean() for k in loss}
            if means["t"] < means["s"]:
                places = [(i, j) for i in range(4) for j in range(4) if i // 2 == r and j // 2 == c]
                found = [
                    F.normalize(high_s[b, :, i, j], dim=0) - F.normalize(high_t[b, :, i, j], dim=0) for i, j in places
                ]
                distances = distances + torch.stack([d.square().sum() for d in found]).mean()
        total = total + HIGH * distances / regions
        pixels = torch.zeros((), dtype=torch.float64)
        for p in known:
            if loss["t"][p] < loss["s"][p]:
                q, log_p = (logits_t[b, :, p[0], p[1]] / T).softmax(0), (logits_s[b, :, p[0], p[1]] / T).log_softmax(0)
                pixels = pixels + (q * (q.log() - log_p)).sum()
        total = total + PIXEL * T**2 * pixels / len(known)
    return total / len(labels)


def test_value_and_gradients_are_those_of_the_definition():
    results = []
    for own in (True, False):
        given = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs()]
        options = {"low": LOW, "high": HIGH, "pixel": PIXEL, "regions": 2, "temperature": T}
        value = ctcl_seg_loss(*given, **options) if own else by_hand(*given)
        value.backward()
        results.append([value.detach(), *(given[i].grad for i in (0, 2, 4))])
        if own:
            assert all(given[i].grad is None for i in (1, 3, 5))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_at_every_pixel_and_region_one_of_the_two_learns_at_most():
    given = inputs()
    gradients = []
    for order in ((0, 1, 2, 3, 4, 5, 6), (1, 0, 3, 2, 5, 4, 6)):
        values = [given[i].clone().requires_grad_(given[i].is_floating_point()) for i in order]
        ctcl_seg_loss(*values, low=0.0, regions=4).backward()
        gradients.append([values[2].grad.abs().sum(1) > 0, values[4].grad.abs().sum(1) > 0])
    for first, second in zip(*gradients, strict=True):
        assert not (first & second).any()
        assert first.any()
        assert second.any()
    pixels = gradients[0][1] | gradients[1][1]
    assert torch.equal(pixels, given[-1] >= 0)  # and where there is a label, one does: no two losses are equal


def test_alike_models_have_nothing_to_learn():
    given = inputs()
    same = [given[i].clone().requires_grad_() for i in (0, 0, 2, 2, 4, 4)]
    value = ctcl_seg_loss(*same, given[-1])
    value.backward()
    assert value.item() == 0
    assert all(same[i].grad.abs().max() == 0 for i in (0, 2, 4))


def test_of_one_who_is_right_everywhere_it_is_plain_distillation():
    given = inputs()
    given[-1] = given[-1].clamp(min=0)
    given[5] = 20.0 * F.one_hot(given[-1], 4).movedim(-1, 1).double()
    value = ctcl_seg_loss(*given, low=0.0, high=0.0, temperature=3.0)
    p, log_q = (given[5] / 3).softmax(1), (given[4] / 3).log_softmax(1)
    torch.testing.assert_close(value, 9 * (p * (p.log() - log_q)).sum(1).mean())
    back = [given[i] for i in (1, 0, 3, 2, 5, 4, 6)]
    assert ctcl_seg_loss(*back, low=0.0).item() == 0


def test_scores_come_to_the_labels_size_in_either_layout():
    given = inputs()
    last = [*given[:4], given[4].movedim(1, -1), given[5].movedim(1, -1), given[6]]
    torch.testing.assert_close(ctcl_seg_loss(*given), ctcl_seg_loss(*last))
    small = [F.avg_pool2d(given[i], 2) for i in (4, 5)]
    large = [F.interpolate(z, (8, 8), mode="bilinear") for z in small]
    torch.testing.assert_close(ctcl_seg_loss(*given[:4], *small, given[6]), ctcl_seg_loss(*given[:4], *large, given[6]))


def test_only_right_answers_are_given_where_that_is_asked():
    logits = [torch.tensor([[[[-2.0]], [[2.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[1.0]], [[-1.0]]]])]
    layer, label = torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)  # the other is less wrong, yet wrong
    values = [ctcl_seg_loss(*[layer] * 4, *logits, label, only_right=right).item() for right in (False, True)]
    assert values[0] > 0
    assert values[1] == 0


class Segmenter(nn.Module):
    """A dense predictor with logits ``[B, H, W, C]``."""

    def __init__(self, seed: int, width: int, dilation: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.low = nn.Sequential(nn.Conv2d(1, width, 3, padding=dilation, dilation=dilation), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(2 * width, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.low(images))).movedim(1, -1)


def test_two_segmenters_learn_from_one_another():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 12, 12, generator=generator)
    labels = (F.avg_pool2d(images, 3, 1, 1).squeeze(1) > 0).long()
    student, peer = Segmenter(0, 4, 1), Segmenter(1, 6, 2)
    options = {"low_tap": "low", "high_tap": "high"}
    config = TrainConfig(steps=24, lr=0.2)
    cast = Cast(student, Terms.of(CrossEntropy()), None, config, players={"peer": peer})
    (training,) = build("mutual", peers=["peer"], between="ctcl_seg", options=options).trainings(cast)
    history = fit(training.stages, as_loader((images, labels), batch_size=16, train=True), quiet=True).history
    terms = [line["terms"] for line in history if "terms" in line]
    assert terms[-1]["cross_entropy"] < 0.6 * math.log(2)
    assert terms[-1]["with_1"] < terms[0]["with_1"]  # the two come nearer to one another
    assert "peer_1/with_0" in terms[0]


def test_what_cannot_be_is_told():
    given = inputs()
    with pytest.raises(TensorError, match="neither of pixels nor of images"):
        ctcl_seg_loss(*given[:6], given[6].flatten(1))
    with pytest.raises(TensorError, match="labels"):
        ctcl_seg_loss(*given[:6])
    with pytest.raises(TensorError, match="differ in shape"):
        ctcl_seg_loss(given[0][:, :3], *given[1:])
    with pytest.raises(ConfigError, match="one region"):
        CTCLSeg(regions=0)
    with pytest.raises(ConfigError, match="pixel"):
        CTCLSeg(pixel=-1.0)
    batch = Batch(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="not set up yet"):
        CTCLSeg("low", "high")(*[_trace() for _ in range(2)], batch)


def _trace():
    from limbeck.core.trace import Trace

    return Trace(None, {"low": torch.ones(1, 2, 4, 4), "high": torch.ones(1, 2, 4, 4), "logits": torch.ones(1, 2)})
