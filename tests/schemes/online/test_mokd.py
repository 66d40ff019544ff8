"""MOKD: no gradient goes from one model to the other, averages and centers follow, parts of a step add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.models import create
from limbeck.models.vit import ViT
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build

SMALL = {"prototypes": 10, "hidden": 12, "bottleneck": 6, "depth": 1, "heads": 2, "local_crops": 3}


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return create("resnet8", num_classes=3, in_channels=1, widths=(4, 4, 8, 16))


def vit(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return ViT(dim=8, depth=1, heads=2, image_size=8, patch_size=2, in_channels=1, num_classes=3)


def batch(size: int = 6, progress: float = 0.5) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3, progress=progress)


def training(student: nn.Module, peer: nn.Module, config: TrainConfig | None = None, **options: object):
    train = as_loader((batch(24).inputs, batch(24).labels), batch_size=12, train=True)
    cast = Cast(student, Terms.of(CrossEntropy()), None, config or TrainConfig(), train, players={"peer": peer})
    (found,) = build("mokd", **{**SMALL, **options}).trainings(cast)
    return found, train


def modes(student: nn.Module | None = None, peer: nn.Module | None = None, **options: object):
    found, _ = training(student or cnn(), peer or vit(), **options)
    torch.manual_seed(7)
    return found.stages[0].distiller.setup(batch()).train()


def test_no_gradient_leaves_a_model_and_the_averages_learn_nothing():
    found = modes()
    made = found.made(batch())
    for turn, own, other in (("student", found, found.other), ("peer", found.other, found)):
        found.zero_grad(set_to_none=True)
        losses = found(made, turn)
        losses.total.backward()
        assert {n for n, p in own.student.named_parameters() if p.grad is None} == {"linear.weight", "linear.bias"}
        heads = own.loss.parameters()
        assert all(p.grad is not None for p in heads if p.requires_grad)
        assert all(p.grad is None for p in (*other.student.parameters(), *other.loss.parameters()))
        assert all(p.grad is None and not p.requires_grad for p in found.averages.parameters())
    owned = [id(p) for turn in found.turns for p in found.parameters_of(turn)]
    assert len(owned) == len(set(owned))


def test_without_crossing_they_are_two_runs_of_their_own():
    gradients = []
    for peer in (vit(1), vit(5)):
        found = modes(peer=peer, weights=[0.0, 0.0])
        torch.manual_seed(3)
        found(found.made(batch()), "student").total.backward()
        gradients.append([p.grad for p in found.student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    found = modes(peer=vit(5), weights=[1.0, 0.0])
    torch.manual_seed(3)
    found(found.made(batch()), "student").total.backward()
    assert any(not torch.equal(a, p.grad) for a, p in zip(gradients[0], found.student.parameters(), strict=False))


def test_the_query_changes_what_is_found_through_attention_alone():
    found = modes()
    head, feature = found.averages[0]["tokens"], torch.randn(4, 16, 2, 2)
    alone, query = head(feature)
    assert alone.shape == head(torch.randn(4, 16, 5, 5))[0].shape
    searched, again = head(feature, torch.randn(4, query.shape[1]))
    assert not torch.equal(alone, searched)
    assert torch.equal(query, again)
    head.blocks = nn.ModuleList()
    torch.testing.assert_close(head(feature)[0], head(feature, torch.randn(4, query.shape[1]))[0])


def test_averages_and_centers_follow_once_a_step():
    found = modes(momentum=0.9, center=0.8)
    first = found.made(batch(progress=0.0)).extras["mokd"]
    second = found.made(batch(progress=0.0)).extras["mokd"]  # another part of the same step
    assert found.centers.abs().max() == 0
    weight = found.student.conv1.weight.detach().clone()
    with torch.no_grad():
        found.student.conv1.weight.add_(1.0)
        found.student.bn1.running_mean.add_(2.0)
    found.made(batch(progress=0.5))
    average = found.averages[0]["model"]
    torch.testing.assert_close(average.conv1.weight, weight + 0.1)  # 1 - 0.9 at the beginning
    torch.testing.assert_close(average.bn1.running_mean, torch.full_like(average.bn1.running_mean, 0.2))
    scores = torch.cat([first["mlp"][0], second["mlp"][0]])
    torch.testing.assert_close(found.centers[0], 0.2 * scores.mean(0))
    scores = torch.cat([first["tokens"][1], second["tokens"][1]])
    torch.testing.assert_close(found.centers[3], 0.2 * scores.mean(0))
    found.made(batch(progress=0.75))
    share = 0.1 * (1 + math.cos(math.pi * 0.5)) / 2
    wanted = weight + 0.1 + share * (weight + 1 - (weight + 0.1))
    torch.testing.assert_close(average.conv1.weight, wanted)


def test_temperatures_rise_and_last_layers_rest():
    found = modes(frozen=0.2, warmup=[0.5, 0.25])
    rising = found.made(batch(progress=0.125)).extras["mokd"]
    assert [round(float(t), 4) for t in rising["temperatures"]] == [0.0475, 0.055]
    assert not rising["learns"]
    found(batch(progress=0.125).replace(extras={"mokd": rising})).total.backward()
    heads = found.heads_of(found)
    assert heads.mlp.last.direction.grad.abs().max() == heads.tokens.last.direction.grad.abs().max() == 0
    assert heads.mlp.layers[0].weight.grad.abs().max() > 0
    late = found.made(batch(progress=0.9)).extras["mokd"]
    assert [round(float(t), 4) for t in late["temperatures"]] == [0.07, 0.07]
    assert late["learns"]


def test_parts_of_a_step_add_up():
    found = modes(vit(3), vit(4))  # no statistics of a batch
    whole = found.made(batch(6))
    views, parts = whole.extras["mokd"], []
    for rows in (slice(0, 2), slice(2, 6)):
        cut = {n: torch.cat([v[rows] for v in views[n].chunk(k)]) for n, k in (("global", 2), ("local", 3))}
        for name, k in (("mlp", 2), ("tokens", 2), ("searched", 1)):
            cut[name] = [torch.cat([v[rows] for v in scores.chunk(k)]) for scores in views[name]]
        inputs, labels = whole.inputs[rows], whole.labels[rows]
        totals = {"samples": torch.tensor(6.0)}
        parts.append(Batch(inputs, labels, progress=0.5, totals=totals, extras={"mokd": {**views, **cut}}))
    for turn in found.turns:
        torch.testing.assert_close(sum(found(part, turn).total for part in parts), found(whole, turn).total)


@pytest.mark.slow
def test_features_first_then_the_classifier_alone():
    student, peer = cnn(), vit()
    settings = {"optimizer": "adamw", "lr": 0.01}
    config = TrainConfig(steps=6, lr=0.1)
    found, train = training(student, peer, config, share=0.5, peer_train=settings)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    first, second = found.stages
    result = fit([first], train, train, quiet=True)
    after = {k: v.clone() for k, v in student.state_dict().items()}
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert "conv1.weight" in moved
    assert not any(k.startswith("linear") for k in moved)
    assert "accuracy" not in result.validation
    assert result.validation["total"] > 0
    assert {"student/mokd/cross_search", "peer/mokd/self_tokens"} <= set(result.history[0]["terms"])
    fit([second], train, quiet=True)
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, after[k])}
    assert moved == {"linear.weight", "linear.bias"}
    assert not any(m._forward_hooks for m in (*student.modules(), *peer.modules()))


def test_a_loss_is_judged_on_the_same_crops_every_time():
    found = modes().eval()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        values = [found(batch()).total for _ in range(2)]
    assert torch.equal(*values)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "two numbers"),
        ({"share": 1.0}, "share"),
        ({"prototypes": 0}, "prototypes"),
        ({"peer_train": {"rate": 1.0}}, "no such setting"),
        ({"then": "stop"}, "'probe' or 'finetune'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        build("mokd", **options)


def test_what_is_no_image_is_told():
    found, _ = training(cnn(), vit())
    with pytest.raises(DataError, match="crops of images"):
        found.stages[0].distiller.setup(Batch(torch.zeros(2, 5)))
