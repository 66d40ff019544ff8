"""AMD: nested candidates on shared weights, how they are ranked, trained together and chosen."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.teacher import as_teacher
from limbeck.data.build import as_loader
from limbeck.engine import TrainConfig
from limbeck.models import create
from limbeck.models.vit import ViT
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.in_steps.amd import npsd
from limbeck.schemes.in_steps.supernet import Supernet


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ViT(8, 2, 4, num_classes=3, in_channels=1, image_size=8, patch_size=4).eval()


def data(size: int = 24, batch_size: int = 8):
    generator = torch.Generator().manual_seed(2)
    return as_loader((torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3), batch_size=batch_size)


def cast(student: str = "mlp_2", **more: object) -> Cast:
    torch.manual_seed(1)
    small = create(student, num_classes=3, in_channels=1, image_size=8)
    settings = {"loss": CrossEntropy() + KD(1.0), "teacher": as_teacher(vit()), "config": TrainConfig(steps=2)}
    return Cast(small, **{**settings, "train": data(), "validation": data(12), **more})


def net(model: nn.Module | None = None, shares=(0.25, 0.5, 1.0)) -> Supernet:
    found = Supernet(copy.deepcopy(model or vit()))
    found.rank(data().plain(), shares)
    return found


@pytest.mark.parametrize("name", ["vit", "resnet8", "mlp_16_8"])
def test_candidates_are_nested_share_weights_and_the_whole_is_the_teacher(name):
    size = 8 if name.startswith("mlp") else None
    model = vit() if name == "vit" else create(name, num_classes=3, in_channels=1, image_size=size)
    found, inputs = net(model.eval()), torch.randn(5, 1, 8, 8)
    wanted = model(inputs)
    assert torch.equal(found.model.eval()(inputs), wanted)
    found.level = 2
    assert torch.equal(found.model(inputs), wanted)
    found.level = 0
    assert not torch.equal(found.model(inputs), wanted)
    for reader in found.readers:
        kept = reader.layer.kept_units.view(3, reader.units, -1)
        assert (kept == kept[..., :1]).all()  # a unit stays or goes whole
        assert (kept[:-1] <= kept[1:]).all()
        assert kept[..., 0].sum(1).tolist() == [max(1, round(s * reader.units)) for s in (0.25, 0.5, 1.0)]
    scales = [found.scale(level, inputs) for level in range(3)]
    assert scales[0] < scales[1] < scales[2] == 1.0
    assert len(list(found.model.parameters())) == len(list(model.parameters()))


def test_the_units_that_stay_matter_most_to_first_order():
    """Against a gate before every unit, whose gradient is the change of the loss."""
    model = vit()
    found = net(model, (0.5,))
    reader = next(r for r in found.readers if r.name == "blocks.1.attn.proj")
    total = torch.zeros(4)
    for batch in data().plain():
        gate = torch.ones(4, requires_grad=True)
        layer = model.get_submodule(reader.name)
        handle = layer.register_forward_pre_hook(lambda _, given, g=gate: (given[0] * g.repeat_interleave(2),))
        total += torch.autograd.grad(F.cross_entropy(model(batch.inputs), batch.labels), gate)[0].abs()
        handle.remove()
    kept = reader.layer.kept_units[0].view(4, 2)[:, 0]
    assert set(kept.nonzero().flatten().tolist()) == set(total.topk(2).indices.tolist())


def test_the_scale_is_the_part_of_the_weights_that_is_used():
    """By hand: of a block's two matrices around n of 16 units, and of the first one's biases."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("mlp", nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 3)))
    found = Supernet(model)
    found.rank([Batch(torch.randn(8, 4), torch.arange(8) % 3)], (0.25,))
    assert found.scale(0, torch.randn(8, 4)) == (4 * 4 + 4 + 4 * 3 + 3) / (16 * 4 + 16 + 16 * 3 + 3)


def test_a_step_trains_the_smallest_the_largest_and_a_drawn_candidate():
    given = cast()
    training = next(build("amd", candidates=4).trainings(given))
    joint, batch = training.stages[0].distiller, next(data().plain())
    joint.setup(batch).eval()
    drawn = [joint.levels(batch.replace(progress=torch.tensor(p / 40))) for p in range(40)]
    assert all({0, 3} <= set(levels) for levels in drawn)
    assert {1, 2} <= {level for levels in drawn for level in levels}
    assert drawn[7] == joint.levels(batch.replace(progress=torch.tensor(7 / 40)))
    wanted, teacher = torch.zeros(()), given.teacher.model.eval()(batch.inputs).log_softmax(1)
    for level in joint.levels(batch):
        joint.net.level = level
        said = joint.student(batch.inputs)
        wanted = wanted + F.cross_entropy(said, batch.labels)
        wanted = wanted + F.kl_div(said.log_softmax(1), teacher, reduction="batchmean", log_target=True)
    joint.net.level = None
    torch.testing.assert_close(joint(batch).total, wanted)


def test_the_choice():
    scores = npsd([0.89, 0.80], [0.6, 0.5], teacher=0.90)
    assert scores[0] == pytest.approx(-0.025)
    assert scores[1] == pytest.approx(-0.2)
    assert build("amd", candidates=8).shares(0.1)[:2] == [0.2, 0.3]


def test_the_whole_of_it(tmp_path):
    given = cast()
    fitted = perform(build("amd", candidates=2, finetune=0.5), given, out=tmp_path, quiet=True)
    assert fitted.steps == 2 + 1 + 2
    facts = json.loads((tmp_path / "assistant.json").read_text())
    assert 0 < facts["scales"][0] < facts["scales"][1] < 1
    wanted = npsd(facts["accuracy"], facts["scales"], facts["teacher"])
    assert facts["scores"] == wanted
    assert facts["chosen"] == max(range(2), key=lambda k: wanted[k])
    assert all(torch.equal(a, b) for a, b in zip(given.teacher.model.parameters(), vit().parameters(), strict=True))


def test_without_candidates_it_is_plain_distillation():
    first, second = cast(), cast()
    perform(build("amd", candidates=0), first, quiet=True)
    perform(build("offline"), second, quiet=True)
    for own, other in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("more", "options", "error", "message"),
    [
        ({"validation": None}, {}, ConfigError, "chosen on validation data"),
        ({"student": "mlp_256_256"}, {}, ConfigError, "no larger than the student"),
        ({}, {"units": ["nothing"]}, ModelError, "can be left out"),
        ({"teacher": None}, {}, ConfigError, "cut out of it"),
        ({}, {"rule": "first"}, ConfigError, "rule"),
    ],
)
def test_mistakes_are_told(more, options, error, message):
    with pytest.raises(error, match=message):
        next(build("amd", **options).trainings(cast(**more)))
