"""Names and roles of taps on the models people bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import TapError
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import survey
from limbeck.core.taps import listen
from limbeck.models import create


def names(model: nn.Module, inputs: Any, role: str) -> list[str]:
    spots = resolve(role, survey(model, inputs))
    return [s.module for s in (spots if isinstance(spots, list) else [spots])]


IMAGES = torch.zeros(2, 3, 32, 32)


def test_roles_of_a_residual_network() -> None:
    model = create("resnet20", num_classes=10)
    assert names(model, IMAGES, "stages") == ["layer1", "layer2", "layer3"]
    assert names(model, IMAGES, "blocks") == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    assert names(model, IMAGES, "stages:-2") == ["layer2"]
    assert resolve("penultimate", survey(model, IMAGES)) == Spot("linear", "in")
    assert listen(model, IMAGES, ["penultimate"])["penultimate"].shape == (2, 64)


def test_roles_of_a_vision_transformer() -> None:
    model = create("vit_mini", num_classes=10)
    assert names(model, IMAGES, "blocks") == [f"blocks.{i}" for i in range(4)]
    assert names(model, IMAGES, "stages") == ["blocks.3"]
    maps = listen(model, IMAGES, ["attention:0"])["attention:0"]
    assert maps.shape[1:] == (4, 65, 65)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, 65))


@pytest.mark.parametrize("name", ["vgg8", "wrn_16_2", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet8x4"])
def test_stages_have_one_layer_for_each_resolution(name: str) -> None:
    trace = listen(create(name, num_classes=10), IMAGES, ["stages", "penultimate"])
    sizes = [tuple(f.shape[2:]) for f in trace["stages"]]
    assert sizes == sorted(set(sizes), reverse=True)
    assert len(sizes) >= 3
    assert trace["penultimate"].ndim == 2


class Classifier(nn.Module):
    """A head of two linear layers of which the second is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.hidden = nn.Linear(8, 3), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))


def test_the_penultimate_is_told_by_what_runs_last_not_by_what_is_written_last() -> None:
    assert resolve("penultimate", survey(Classifier(), torch.zeros(1, 4))) == Spot("out", "in")


def test_a_linear_layer_that_runs_twice_is_taken_at_its_last_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model, x = Twice(), torch.randn(2, 4)
    assert torch.equal(listen(model, x, ["penultimate"])["penultimate"], model.layer(x))


@pytest.mark.parametrize(
    ("model", "inputs", "tap", "message"),
    [
        (nn.Conv2d(3, 4, 3), IMAGES, "penultimate", "no linear layer"),
        (nn.Linear(4, 2), torch.zeros(1, 4), "stages", "no spatial maps or token rows"),
        (nn.Linear(4, 2), torch.zeros(1, 4), "blocks", "no repeated blocks"),
        (nn.Linear(4, 2), torch.zeros(1, 4), "attention", "attn_implementation='eager'"),
    ],
)
def test_a_role_the_model_cannot_play_is_an_error_that_says_so(
    model: nn.Module, inputs: Tensor, tap: str, message: str
) -> None:
    with pytest.raises(TapError, match=message):
        resolve(tap, survey(model, inputs))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("layer4", r"layer4: no such place ran.*did you mean 'layer\d'"),
        ("stages:3", r"this model has 3 stages; found layer1, layer2, layer3; wanted an index from -3 to 2"),
        ("penultimat", "did you mean 'penultimate'"),
        ("layer1[1]", "does not return that many values; found 1 values"),
        ("layer1#1", "does not run that often; found 1 calls"),
        ("layer1@up", "no such place ran"),
        ("", "no such place ran"),
    ],
)
def test_names_that_lead_nowhere(tap: str, message: str) -> None:
    with pytest.raises(TapError, match=message):
        resolve(tap, survey(create("resnet20", num_classes=10), IMAGES))


def test_a_module_named_like_a_role_is_that_module() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, self.head = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stages(x).mean((2, 3)))

    assert resolve("stages", survey(Named(), IMAGES)) == Spot("stages")


# --- transformers models, with their dict inputs and ModelOutputs

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
IDS = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
PIXELS = {"pixel_values": IMAGES}


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=50, attn_implementation="eager", num_labels=3, **SMALL)
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=50, attn_implementation="eager", **SMALL)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=32, patch_size=8, attn_implementation="eager", **SMALL)
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1])
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "inputs", "blocks", "penultimate", "logits"),
    [
        (bert, IDS, [(2, 7, 16)] * 2, (2, 16), (2, 3)),
        (llama, IDS, [(2, 7, 16)] * 2, (2, 7, 16), (2, 7, 50)),
        (vit, PIXELS, [(2, 17, 16)] * 2, (2, 16), (2, 2)),
        (resnet, PIXELS, [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)], (2, 32), (2, 2)),
    ],
    ids=["bert", "llama", "vit", "resnet"],
)
def test_roles_of_transformers_models(
    make: Any, inputs: dict[str, Tensor], blocks: list[tuple[int, ...]], penultimate: tuple[int, ...], logits: Any
) -> None:
    trace = listen(make().eval(), inputs, ["blocks", "penultimate", "stages"])
    assert [tuple(b.shape) for b in trace["blocks"]] == blocks
    assert tuple(trace["penultimate"].shape) == penultimate
    assert tuple(trace.logits.shape) == logits
    assert trace["stages"][-1].shape == trace["blocks"][-1].shape


@pytest.mark.parametrize(("make", "inputs", "length"), [(bert, IDS, 7), (llama, IDS, 7), (vit, PIXELS, 17)])
def test_attention_of_transformers_models(make: Any, inputs: dict[str, Tensor], length: int) -> None:
    maps = listen(make().eval(), inputs, ["attention"])["attention"]
    assert [tuple(m.shape) for m in maps] == [(2, 2, length, length)] * 2
    assert all(torch.allclose(m.sum(-1), torch.ones(2, 2, length), atol=1e-5) for m in maps)


def test_roles_have_sides() -> None:
    model = create("resnet20", num_classes=10)
    places = survey(model, IMAGES)
    assert resolve("blocks:-1@module", places) == Spot("layer3.2", "module")
    assert resolve("blocks:-1@in", places) == Spot("layer3.2", "in")
    assert resolve("penultimate@weight", places) == Spot("linear", "weight")
    assert [s.side for s in resolve("stages@in", places)] == ["in", "in", "in"]
    trace = listen(model, IMAGES, ["blocks:-1@in", "blocks:-1", "blocks:-1@module"])
    assert trace["blocks:-1@module"](trace["blocks:-1@in"]).shape == trace["blocks:-1"].shape
    with pytest.raises(TapError, match="no such place"):
        resolve("blocks:-1@inside", places)


def test_what_makes_queries_keys_and_values() -> None:
    vit = create("vit_mini", num_classes=10)
    assert names(vit, IMAGES, "queries") == [f"blocks.{i}.attn.qkv" for i in range(4)]  # fused: all three
    assert names(vit, IMAGES, "values:-1") == ["blocks.3.attn.qkv"]

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ self.v_proj(x)

    tokens = torch.zeros(1, 3, 4)
    for role, name in (("queries", "query"), ("keys", "key"), ("values", "v_proj")):
        assert names(Apart(), tokens, role) == [name]
    with pytest.raises(TapError, match="make queries"):
        resolve("queries", survey(create("resnet20", num_classes=10), IMAGES))


class Ended(nn.Module):
    """Two linear layers, and what comes after them."""

    def __init__(self, end: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(4, 5), nn.Linear(5, 3), end

    def forward(self, x: Tensor) -> object:
        return self.end(self.last(torch.relu(self.first(x))))


@pytest.mark.parametrize("end", [lambda z: z, lambda z: {"logits": z.double()}, lambda z: (z * 1.0,)])
def test_what_enters_the_logits(end: Callable[[Tensor], object]) -> None:
    assert resolve("logits@in", survey(Ended(end), torch.randn(2, 4))) == Spot("last", "in")


@pytest.mark.parametrize("end", [lambda z: 2 * z, lambda z: z.mul_(2), lambda z: z[:, :2], lambda z: {"loss": z.sum()}])
def test_a_layer_whose_outputs_are_not_yet_the_logits(end: Callable[[Tensor], object]) -> None:
    places = survey(Ended(end), torch.randn(2, 4))
    with pytest.raises(TapError, match=r"logits@in: this model's logits are not.*'last'"):
        resolve("logits@in", places)
    assert resolve("logits@weight", places) == Spot("last", "weight")
