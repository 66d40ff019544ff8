"""Every objective on features or relations between convolutional networks and transformers, with taps left to it.

The models are those of transformers, from tiny configurations. An objective that cannot work between two of them says
so in one readable error, and stands in ``REFUSES`` with the reason: the test fails where one of these works after all,
and where one fails that is not listed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import LimbeckError
from limbeck.core.objective import DataInfo
from limbeck.models import put_head
from limbeck.models.heads.reused import Projected

transformers = pytest.importorskip("transformers")

SIZE, CLASSES = 4, 4
NAMES = ("resnet", "mobilenet_v2", "convnext", "vit", "swin")
KEYS = [key for key, method in catalogue.methods().items() if method.card.knowledge in ("feature", "relation")]

# Student and teacher. The slow test sees all twenty.
PAIRS = (("resnet", "vit"), ("vit", "resnet"), ("convnext", "swin"))

ATTENTION = ("vit", "swin")
POOLED = ("resnet", "mobilenet_v2")  # the classifier reads the mean of the last map, without a layer between
ONE_LAYER = "it takes layers of several resolutions, and a plain vision transformer has one"

# Why it refuses, and between which student and teacher.
REFUSES: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "cakd": ("it learns from queries, keys and values of the teacher", lambda s, t: t not in ATTENTION),
    "cat_kd": (
        "it compares last maps as their classifiers see them, which must read the means of these maps",
        lambda s, t: not {s, t} <= {*POOLED},
    ),
    "dskd": ("it looks tokens up, and images have none", lambda s, t: True),
    "fitnets": (ONE_LAYER, lambda s, t: "vit" in (s, t)),
    "fsp": (ONE_LAYER, lambda s, t: "vit" in (s, t)),
    "kdsvd": (ONE_LAYER, lambda s, t: "vit" in (s, t)),
    "minilm": ("it compares the attention of both between the same tokens", lambda s, t: s != t),
    "tinybert": ("it compares layers of transformers over the same tokens", lambda s, t: s != t),
    "simkd": (
        "it projects the map whose mean the classifier reads onto that of the teacher",
        lambda s, t: not {s, t} <= {*POOLED},
    ),
}


def configuration(name: str, width: int) -> Any:
    """A tiny configuration for images of 32 by 32."""
    if name == "vit":
        return transformers.ViTConfig(
            hidden_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=2 * width,
            image_size=32,
            patch_size=8,
        )
    if name == "swin":
        return transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=width, depths=[1, 1, 2], num_heads=[1, 2, 2], window_size=2
        )
    if name == "convnext":
        return transformers.ConvNextConfig(hidden_sizes=[width, 2 * width, 2 * width], depths=[1, 1, 2], num_stages=3)
    if name == "resnet":
        return transformers.ResNetConfig(
            embedding_size=width, hidden_sizes=[width, 2 * width, 4 * width], depths=[1, 1, 2], layer_type="basic"
        )
    return transformers.MobileNetV2Config(
        image_size=32, depth_multiplier=width / 40, min_depth=4, depth_divisible_by=4, output_stride=16
    )


@cache
def model(name: str, width: int) -> nn.Module:
    settings = configuration(name, width)
    settings.num_labels, settings._attn_implementation = CLASSES, "eager"
    torch.manual_seed(width)
    made = transformers.AutoModelForImageClassification.from_config(settings)
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # statistics of what it sees, as a trained model has them; else what leaves it is all but zero
        norm.momentum = 1.0
    with torch.no_grad():
        made(batch(0).inputs)
    for norm in norms:
        norm.momentum = 0.1
    return made.eval()


def batch(seed: int, several: bool = False) -> Batch:
    """Images with a class each, or with ``several``."""
    index = torch.arange(SIZE * seed, SIZE * (seed + 1)) % (2 * SIZE)
    inputs = torch.randn(SIZE, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    labels = index % CLASSES
    if several:
        labels = (torch.arange(CLASSES) <= labels.unsqueeze(1)).float()
    return Batch(inputs, labels=labels, index=index)


def train(key: str, student: str, teacher: str) -> None:
    """Set-up and two steps; the loss is finite and moves the student."""
    torch.manual_seed(0)
    method = catalogue.get(key)
    objective, several = method.build(), "multilabel" in method.card.tasks and len(method.card.tasks) == 1
    net, other = copy.deepcopy(model(student, 8)).train(), copy.deepcopy(model(teacher, 12))
    if method.card.head is not None:
        put_head(net, method.card.head, example=batch(0), teacher=other)
    labels = None if several else torch.arange(2 * SIZE) % CLASSES
    data = DataInfo(2 * SIZE, labels, CLASSES, lambda: (batch(seed, several) for seed in range(2)))
    distiller = Distiller(net, objective, other if objective.teacher_taps else None).setup(batch(0, several), data)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    for step in range(2):
        total = distiller(batch(step, several)).total
        assert bool(total.isfinite()), f"the loss of step {step + 1} is {total.item()}"
        optimizer.zero_grad()
        total.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in gradients), "a gradient of the student is not finite"
        assert any(bool(g.any()) for g in gradients), "no gradient reaches the student"
        optimizer.step()


def works_or_refuses(key: str, student: str, teacher: str) -> None:
    reason, refuses = REFUSES.get(key, ("", lambda *_: False))
    if not refuses(student, teacher):
        train(key, student, teacher)
        return
    with pytest.raises(LimbeckError) as caught:
        train(key, student, teacher)
    assert caught.value.where, f"{reason}: the error does not say where: {caught.value}"
    assert "\n" not in str(caught.value)


def test_the_list_names_methods() -> None:
    assert set(REFUSES) <= set(KEYS)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("key", KEYS)
def test_between_architectures(key: str, pair: tuple[str, str]) -> None:
    works_or_refuses(key, *pair)


@pytest.mark.parametrize("student", POOLED)
def test_a_projector_stands_behind_the_last_map_that_is_no_structure(student: str) -> None:
    """The encoder of ResNet gives the same map inside a structure."""
    (teacher,) = {*POOLED} - {student}
    train("simkd", student, teacher)
    net = copy.deepcopy(model(student, 8))
    put_head(net, "reused", example=batch(0), teacher=model(teacher, 12))
    (projected,) = (name for name, module in net.named_modules() if isinstance(module, Projected))
    assert projected == {"resnet": "resnet.encoder.stages.2", "mobilenet_v2": "mobilenet_v2.conv_1x1"}[student]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [p for p in permutations(NAMES, 2) if p not in PAIRS], ids="-".join)
@pytest.mark.parametrize("key", KEYS)
def test_between_all_architectures(key: str, pair: tuple[str, str]) -> None:
    works_or_refuses(key, *pair)
