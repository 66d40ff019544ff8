"""ONE: models are cut where that is possible, branches share what comes before, and the student stays plain."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.engine import TrainConfig
from limbeck.models import create
from limbeck.objectives import KD, CrossEntropy, FitNets
from limbeck.schemes import Cast, build
from limbeck.schemes.online.branching import Tail, cuttable
from limbeck.schemes.online.one import blend

MODELS = ["resnet8", "resnet14_a", "wrn_10_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "vit_mini"]


def batch(size: int = 12, progress: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(5)
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3, progress=progress)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create("resnet8", num_classes=3, in_channels=1, widths=(4, 4, 8, 16))


def tree(loss=None, teacher=None, **options: object):
    cast = Cast(net(), Terms.of(loss or CrossEntropy()), teacher, TrainConfig(), fresh=lambda n: net(n))
    (training,) = build("one", **options).trainings(cast)
    return training.stages[0].distiller.setup(batch()).train()


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_network_goes_on_from_the_cut(name):
    """In training mode too: what the tail gives is what the whole model gives, and its own weights alone are there."""
    size = 8 if name in ("resnet8", "resnet14_a", "wrn_10_1") else 32
    options = {"image_size": 32} if name.startswith("vit") else {}
    tap = "blocks:1" if name.startswith("vit") else "stages:-2"
    model = create(name, num_classes=3, in_channels=1, **options).eval()
    inputs = torch.randn(4, 1, size, size)
    cut, places = cuttable(model, tap, inputs[:2])
    kept = []
    handle = model.get_submodule(cut).register_forward_hook(lambda _, __, output: kept.append(output))
    wanted = model(inputs)
    handle.remove()
    before = sum(p.numel() for p in model.parameters())
    tail = Tail(model, cut, places, 2)
    assert torch.equal(tail(inputs, kept[0]), wanted)
    assert 0 < sum(p.numel() for p in tail.parameters()) < before


def test_a_model_past_whose_cut_something_older_is_used_is_refused():
    class Bridge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            early = self.first(x)
            return self.last(self.second(early).relu() + early)

    model, inputs = Bridge(), torch.randn(3, 4)
    with pytest.raises(ConfigError, match="does not go on from this place alone"):
        cuttable(model, "second", inputs)
    assert cuttable(model, "first", inputs)[0] == "first"
    with pytest.raises(ConfigError, match="one module that runs once"):
        cuttable(model, "last@in", inputs)


def test_the_loss_is_the_sum_of_all_branches_and_their_ensemble():
    found, data = tree(ramp=0.5, temperature=2.0, weight=0.7), batch(progress=0.25)
    losses = found(data)
    student, kept = found.student, []
    student.layer2.register_forward_hook(lambda _, __, output: kept.append(output))
    said = [student(data.inputs)]
    said += [tail(data.inputs, kept[0]) for tail in found.tails]
    gates = found.gate(kept[0])
    torch.testing.assert_close(gates.sum(1), torch.ones(12))
    together = sum(g.unsqueeze(1) * z for g, z in zip(gates.unbind(1), said, strict=True))
    torch.testing.assert_close(blend(said, gates), together)
    weight = 0.7 * torch.exp(torch.tensor(-5 * 0.5**2))
    wanted = sum(F.cross_entropy(z, data.labels) for z in [*said, together])
    target = (together.detach() / 2).softmax(1)
    kl = sum((target * (target.log() - (z / 2).log_softmax(1))).sum(1).mean() for z in said)
    torch.testing.assert_close(losses.total, wanted + weight * 4 * kl)
    assert len(losses.terms) == 2 * 3 + 1


def test_the_trunk_runs_once_and_the_others_have_none():
    found, runs = tree(), []
    found.student.layer1.register_forward_hook(lambda *_: runs.append(1))
    found(batch())
    assert len(runs) == 1
    own = {n.split(".")[2] for n, _ in found.tails.named_parameters()}
    assert own == {"layer3", "linear"}
    assert found.tails[0].model.linear.weight.ne(found.tails[1].model.linear.weight).any()
    assert found.tails[0].model.linear.weight.ne(found.student.linear.weight).any()


def test_what_teaches_is_a_constant_and_the_gate_learns_from_the_labels():
    found = tree(ramp=0.0)
    weight = found.gate.linear.weight
    found(batch()).total.backward()
    with_kl = weight.grad.clone()
    found.zero_grad()
    found.scheme.weight = 0.0
    found(batch()).total.backward()
    torch.testing.assert_close(with_kl, weight.grad)  # no divergence reaches the gate
    assert weight.grad.abs().max() > 0


def test_other_terms_of_the_loss_are_the_students_alone():
    torch.manual_seed(9)
    teacher = create("resnet8", num_classes=3, in_channels=1)
    terms = tree(CrossEntropy() + KD() + FitNets("layer3"), teacher)(batch()).terms
    assert {"fitnets", "kd", "branch_2/kd", "ensemble/kd"} <= set(terms)
    assert not any(name.endswith("/fitnets") for name in terms)
    with pytest.raises(ConfigError, match="one of logits alone"):
        tree(FitNets("layer3"), teacher)


def test_parts_of_a_step_add_up_where_the_statistics_do_not_change():
    found, data = tree(), batch()
    found.eval()
    found.gate.norm = nn.Identity()
    totals = {"labels": torch.tensor(12.0), "positions": torch.tensor(12.0)}
    parts = [Batch(data.inputs[r], data.labels[r], progress=1.0, totals=totals) for r in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(sum(found(part).total for part in parts), found(data).total)


def test_the_student_stays_plain():
    found = tree()
    found(batch()).total.backward()
    found.close()
    assert type(found.student).__module__.startswith("limbeck.models")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.student.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"branches": 0}, "two branches"), ({"ramp": 1.5}, "ramp"), ({"temperature": 0.0}, "above zero")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        build("one", **options)
