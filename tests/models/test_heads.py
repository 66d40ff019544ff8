"""Heads: on any model, read back, shipped, and refused readably."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, LimbeckError, ModelError
from limbeck.core.survey import survey
from limbeck.core.taps import listen
from limbeck.models import create, head_of, load_model, put_head, save_weights
from limbeck.models.export import export
from limbeck.models.heads import available_heads, check_head, fit_head, wanted_head
from limbeck.models.student import describe_inputs, load_student, save_student
from limbeck.objectives import DHO, KD, LELP, SimKD

IMAGES = torch.randn(2, 3, 16, 16)
TEACHER = create("resnet8", num_classes=7, widths=(4, 4, 8, 12))
NETS = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]  # with every kind of pooling
POOLED = {"reused": {"feature": "pooled"}}


def net(name: str = "resnet8", **options: Any) -> nn.Module:
    return create(name, **{"num_classes": 7, "image_size": 16, **options})


def said(model: nn.Module, inputs: Any = IMAGES) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


class Functional(nn.Module):
    """Pools by a function; its last linear layer was registered first, and a leaf stands behind the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 7)
        self.unused = nn.Linear(6, 7)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.body(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("head", ["subclass", "dual", "reused", POOLED], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_a_student_ships_with_its_head(name: str, head: Any, tmp_path: Path) -> None:
    model, images = net(name, image_size=32), torch.randn(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    written = put_head(model, head, example=images, teacher=TEACHER)
    kept = {k: v for k, v in model.state_dict().items() if k in before}
    assert all(torch.equal(v, before[k]) for k, v in kept.items() if not k.startswith("linear"))
    assert said(model, images).shape == (2, 7)
    assert json.loads(json.dumps(written)) == written == head_of(model)
    save_student(model, tmp_path, model=name, options={"num_classes": 7, "image_size": 32})
    again = load_student(tmp_path)
    assert head_of(again) == written
    assert torch.equal(said(again, images), said(model, images))
    assert {k: p.requires_grad for k, p in again.named_parameters()} == {
        k: p.requires_grad for k, p in model.named_parameters()
    }


@pytest.mark.parametrize("head", ["subclass", "dual", "reused", POOLED], ids=str)
def test_it_is_exported(head: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = net()
    put_head(model, head, example=IMAGES, teacher=TEACHER)
    save_student(
        model,
        tmp_path / "student",
        model="resnet8",
        options={"num_classes": 7},
        inputs=describe_inputs(IMAGES),
    )
    assert export(tmp_path, "onnx", tmp_path / "onnx")["max_difference"] < 1e-4
    assert export(tmp_path, "safetensors", tmp_path / "safetensors")["max_difference"] == 0
    assert head_of(load_student(tmp_path / "safetensors")) == head_of(model)


def test_no_transformers_folder_is_written_of_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    bert = transformers.BertForSequenceClassification(config)
    tokens = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    assert put_head(bert, "subclass", example=tokens)["subclass"]["layer"] == "classifier"
    with pytest.raises(ModelError, match=r"from_pretrained.*found subclass"):
        export(bert, "transformers", tmp_path, tokens)


def test_the_layer_is_the_last_that_runs() -> None:
    assert put_head(Functional(), "dual", example=IMAGES)["dual"]["layer"] == "fc"
    assert put_head(Functional(), "dual")["dual"]["layer"] == "unused"  # no example: the last registered
    assert put_head(Functional(), {"dual": {"layer": "fc"}})["dual"]["layer"] == "fc"
    inside = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3)))
    assert put_head(inside, "subclass", example=torch.zeros(1, 4))["subclass"]["layer"] == "2.0"


def test_subclasses_fold_to_their_class() -> None:
    model = net()
    put_head(model, {"subclass": {"subclasses": 4, "temperature": 3.0}}, example=IMAGES)
    trace = listen(model.eval(), IMAGES, ["head.sub", "penultimate"])
    assert trace["head.sub"].shape == (2, 28)
    folded = (trace["head.sub"] / 3).softmax(dim=1).unflatten(1, (7, 4)).sum(dim=2)
    torch.testing.assert_close((trace.logits / 3).softmax(dim=1), folded)
    assert trace["penultimate"].shape == (2, 64)


def test_a_projector_stands_before_the_pooling() -> None:
    model = Functional()
    written = put_head(model, "reused", example=IMAGES, teacher=TEACHER)
    assert written["reused"]["after"] == "body"
    assert written["reused"]["size"] == [4, 4]  # the student's map is 8x8, the teacher's 4x4
    trace = listen(model.eval(), IMAGES, ["head.projector", "penultimate"])
    assert trace["head.projector"].shape == (2, 12, 4, 4)
    torch.testing.assert_close(trace["penultimate"], trace["head.projector"].mean(dim=(2, 3)))
    torch.testing.assert_close(trace.logits, TEACHER.linear(trace["penultimate"]))
    assert not any(p.requires_grad for p in model.fc.parameters())


def test_the_projector_is_the_papers() -> None:
    model = net()
    put_head(model, {"reused": {"depthwise": True, "factor": 4}}, example=IMAGES, teacher=TEACHER)
    layers = model.get_submodule("layer3.projector")
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    sizes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.groups) for c in convolutions]
    assert sizes == [(64, 3, 1, 1), (3, 3, 3, 3), (3, 12, 1, 1)]
    assert [type(m).__name__ for m in layers] == ["Conv2d", "BatchNorm2d", "ReLU"] * 3


def test_a_token_at_a_time() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3))
    teacher = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3))
    ids = torch.arange(10).view(2, 5) % 9
    for head in ("subclass", "dual", POOLED):
        tagger = copy.deepcopy(model)
        put_head(tagger, head, example=ids, teacher=teacher)
        assert tagger(ids).shape == (2, 5, 3)


def test_its_device_dtype_and_mode_are_the_layers() -> None:
    for head in ("subclass", "dual", POOLED, "reused"):
        model = net().double().eval()
        put_head(model, head, example=Batch(IMAGES.double(), teacher_inputs=IMAGES), teacher=TEACHER)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert not any(m.training for m in model.modules())


def test_random_states_and_the_teacher_stay() -> None:
    model, teacher = net(), copy.deepcopy(TEACHER).train()
    before = copy.deepcopy(teacher.state_dict())
    put_head(model, "reused", example=IMAGES, teacher=teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*teacher.modules(), *model.modules()])


def test_it_is_put_on_once() -> None:
    model = net()
    first = put_head(model, {"subclass": {"subclasses": 4}}, example=IMAGES)
    layer = model.linear
    assert put_head(model, "subclass", example=IMAGES) == first
    assert model.linear is layer
    for other in ("dual", {"subclass": {"subclasses": 6}}):
        with pytest.raises(ModelError, match="another head already"):
            put_head(model, other, example=IMAGES)


def test_the_plain_head_is_none() -> None:
    model = net()
    assert put_head(model, "linear", example=IMAGES) == {}
    assert head_of(model) is None
    assert set(available_heads()) == {"subclass", "dual", "reused"}


def test_load_model_takes_a_head_and_either_kind_of_weights(tmp_path: Path) -> None:
    plain = net("mlp_8", in_channels=1)
    save_weights(plain, tmp_path / "plain.safetensors")
    sizes = {"num_classes": 7, "in_channels": 1, "image_size": 16}
    model = load_model("mlp_8", head="dual", weights=tmp_path / "plain.safetensors", **sizes)
    assert torch.equal(model.blocks[0].linear.weight, plain.blocks[0].linear.weight)
    save_weights(model, tmp_path / "whole.safetensors")
    again = load_model("mlp_8", head="dual", weights=tmp_path / "whole.safetensors", **sizes)
    assert torch.equal(again.linear.ce.weight, model.linear.ce.weight)
    with pytest.raises(ModelError, match="do not fit"):
        load_model("mlp_9", head="dual", weights=tmp_path / "plain.safetensors", **sizes)


def test_what_objectives_want() -> None:
    assert wanted_head([KD()]) is None
    assert wanted_head([KD(), DHO()]) == {"dual": {}}
    assert wanted_head([LELP(subclasses=4)]) == {"subclass": {"subclasses": 4, "temperature": 2.0}}
    assert wanted_head([SimKD(feature="pooled")]) == {"reused": {"feature": "pooled"}}
    with pytest.raises(ConfigError, match=r"different heads.*found lelp: .*dho"):
        wanted_head([LELP(), DHO()])
    with pytest.raises(ConfigError, match="different heads"):
        wanted_head([LELP(subclasses=2), LELP(subclasses=4)])


def test_what_a_method_and_its_head_have_in_common_has_one_default() -> None:
    for objective in (LELP(), SimKD(), DHO()):
        model = net()
        ((name, options),) = put_head(model, wanted_head([objective]), example=IMAGES, teacher=TEACHER).items()
        other = put_head(net(), name, example=IMAGES, teacher=TEACHER)
        assert other == {name: options}


def test_a_model_that_has_the_places_is_left_alone() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.ModuleDict({"ce": nn.Linear(4, 3), "kd": nn.Linear(4, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.head["ce"](x) + 0 * self.head["kd"](x)

    own = Own()
    names = set(survey(own, torch.zeros(1, 4)))
    fit_head(own, [DHO()], example=Batch(torch.zeros(1, 4)))
    assert set(survey(own, torch.zeros(1, 4))) == names
    assert head_of(own) is None


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: put_head(nn.Linear(3, 2), "dual", example=torch.zeros(1, 3)), "nothing but its last layer"),
    (lambda: put_head(nn.Conv2d(3, 2, 1), "dual", example=IMAGES), "no last linear layer.*Conv2d"),
    (lambda: put_head(nn.Conv2d(3, 2, 1), "dual"), "no last linear layer"),
    (lambda: put_head(net(), {"dual": {"layer": "lin"}}, example=IMAGES), "no such module.*did you mean 'linear'"),
    (lambda: put_head(net(), {"dual": {"layer": "conv1"}}, example=IMAGES), "linear layer.*Conv2d"),
    (lambda: put_head(net(), "dul"), "no such head.*did you mean 'dual'"),
    (lambda: put_head(net(), {"dual": 3}), "cannot be read"),
    (lambda: check_head({"linear": {"a": 1}}), "no such head"),
    (lambda: put_head(net(), {"dual": {"alpha": 1.5}}, example=IMAGES), "head.alpha: .*between 0 and 1"),
    (lambda: put_head(net(), {"dual": {"beta": 0.0}}, example=IMAGES), "head.beta: .*above zero"),
    (lambda: put_head(net(), {"subclass": {"subclasses": 0}}, example=IMAGES), "one logit or more"),
    (lambda: put_head(net(), {"subclass": {"temperature": 0.0}}, example=IMAGES), "head.temperature: .*above zero"),
    (lambda: put_head(net(), {"subclass": {"subclasse": 2}}, example=IMAGES), "did you mean 'subclasses'"),
    (lambda: put_head(net(), "reused", example=IMAGES), "there is no teacher.*width"),
    (lambda: put_head(net(), {"reused": {"width": 8}}), "told by an example"),
    (lambda: put_head(net(), {"reused": {"factor": 20}}, example=IMAGES, teacher=TEACHER), "factor.*1 to 12"),
    (
        lambda: put_head(net(), {"reused": {"width": 8}}, example=IMAGES, teacher=TEACHER),
        "another width; found 8; wanted 12",
    ),
    (lambda: put_head(create("resnet8"), "reused", example=IMAGES, teacher=TEACHER), "different numbers of classes"),
    (lambda: put_head(net("vit_mini"), "reused", example=IMAGES, teacher=TEACHER), "student.*feature: pooled"),
    (lambda: put_head(net(), "reused", example=IMAGES, teacher=net("vit_mini")), "teacher.*feature: pooled"),
]


@pytest.mark.parametrize(("wrong", "told"), BAD, ids=[told for _, told in BAD])
def test_what_cannot_be_is_told(wrong: Callable[[], Any], told: str) -> None:
    with pytest.raises(LimbeckError, match=told):
        wrong()


def test_a_model_that_does_not_average_is_left_as_it_was() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).amax(dim=(2, 3)))

    model = Largest()
    body, fc = model.body, model.fc
    with pytest.raises(ModelError, match="not the mean of its last map"):
        put_head(model, "reused", example=IMAGES, teacher=TEACHER)
    assert model.body is body
    assert model.fc is fc
    put_head(model, POOLED, example=IMAGES, teacher=TEACHER)
    assert said(model).shape == (2, 7)


def test_a_student_made_by_hand_says_how_it_is_built_again(tmp_path: Path) -> None:
    model = Functional()
    put_head(model, "dual", example=IMAGES)
    save_student(model, tmp_path)
    with pytest.raises(ModelError, match=r"put_head\(model, \{'dual'"):
        load_student(tmp_path)
