"""Assess: every figure from an independent count, models left as they were, any kind of data."""

import copy
import json

import pytest
import torch
from torch import nn

from limbeck.analysis import assess, kl, linear_cka
from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, TapError
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data import ResidentLoader, as_loader
from limbeck.engine import evaluate
from limbeck.models import create


class Conv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(90, 1, 8, 8)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(5, (90,)).sort().values


@pytest.fixture
def loader(inputs, labels) -> ResidentLoader:
    return ResidentLoader(inputs, labels, batch_size=32, shuffle=False, drop_last=True, class_names=tuple("abcde"))


def test_every_figure_from_the_whole_set_at_once(loader, inputs, labels):
    student, teacher = Conv(3).train(), Conv(6)
    facts = assess(student, teacher, loader)
    student.eval(), teacher.eval()
    with torch.no_grad():
        own, other = student(inputs), teacher(inputs)
    assert facts["samples"] == facts["places"] == 90  # also where the loader drops the incomplete batch
    assert facts["accuracy"] == pytest.approx(float((own.argmax(-1) == labels).float().mean()))
    assert facts["teacher"]["accuracy"] == pytest.approx(float((other.argmax(-1) == labels).float().mean()))
    assert facts["agreement"] == pytest.approx(float((own.argmax(-1) == other.argmax(-1)).float().mean()))
    assert facts["kl"] == pytest.approx(float(kl(own, other)), rel=1e-4)
    assert facts["nll"] == pytest.approx(float(nn.functional.cross_entropy(own, labels)), rel=1e-5)
    assert facts["per_class"]["support"] == labels.bincount(minlength=5).tolist()
    assert facts["per_class"]["names"] == list("abcde")
    assert facts["parameters"] == sum(p.numel() for p in student.parameters())
    assert facts["teacher"]["flops"] > facts["flops"] > 0
    assert facts["latency_ms"] > 0
    json.dumps(facts, allow_nan=False)


def test_layers_are_compared_as_one_by_one(inputs, labels):
    loader = ResidentLoader(inputs, labels, batch_size=90)
    student, teacher = Conv(3).eval(), Conv(6).eval()
    facts = assess(student, teacher, loader, taps=("one", "stages:1", "penultimate"), latency=False)
    assert facts["cka"]["student"] == ["one", "stages:1", "penultimate"]
    assert facts["cka"]["samples"] == 90
    with torch.no_grad():
        expected = linear_cka(student.one(inputs), teacher.two(teacher.one(inputs)))
    assert facts["cka"]["matrix"][0][1] == pytest.approx(float(expected), abs=1e-5)
    assert "flops" not in facts


def test_a_model_compared_with_its_copy_is_equal_on_the_diagonal(loader):
    student = Conv(4)
    facts = assess(student, copy.deepcopy(student), loader)
    assert facts["agreement"] == 1.0
    assert facts["kl"] == pytest.approx(0.0, abs=1e-6)
    assert facts["cka"]["student"] == facts["cka"]["teacher"] == ["one", "two", "penultimate"]
    for i in range(3):
        assert facts["cka"]["matrix"][i][i] == pytest.approx(1.0, abs=1e-6)


def test_models_hooks_and_randomness_are_left_alone(loader):
    student, teacher = Conv(3), Conv(6)
    student.train(), student.two.eval()
    assess(student, teacher, loader)
    assert teacher.training
    frozen = FrozenTeacher(teacher)
    frozen.attach(("one",), loader.example(2))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    state = torch.get_rng_state()
    assess(student, frozen, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert not student.two.training
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert frozen(loader.example(2))["one"].shape[1] == 6  # the teacher still answers the distiller it belongs to


def test_sorted_classes_are_mixed(inputs, labels):
    """Minibatches of one class would show CKA within classes only."""
    signal = labels.float().view(-1, 1) * torch.ones(1, 6)
    one, two = (signal + 0.5 * torch.randn(90, 6) for _ in range(2))
    loader = ResidentLoader(torch.cat([one, two], 1), labels, batch_size=18, shuffle=False)

    class Half(nn.Module):
        def __init__(self, part: slice) -> None:
            super().__init__()
            self.part, self.look, self.head = part, nn.Identity(), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.look(x[:, self.part]))

    facts = assess(Half(slice(0, 6)), Half(slice(6, 12)), loader, taps=("look",))
    assert facts["cka"]["matrix"][0][0] > 0.6


def test_cka_stops_at_its_share_of_samples(loader):
    student = Conv(3)
    assert assess(student, Conv(4), loader, cka_samples=40)["cka"]["samples"] == 64
    assert assess(student, Conv(4), loader, cka_samples=0)["cka"] is None


def test_only_places_that_count(inputs):
    """Masked positions and those without a label are in no figure."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    tokens, labels = torch.randint(11, (30, 7)), torch.randint(-1, 4, (30, 7))
    mask = torch.rand(30, 7) > 0.4

    class Masked(ResidentLoader):
        def batches(self, epoch: int = 0):
            for batch in super().batches(epoch):
                yield batch.replace(mask=mask[batch.index])

    student, teacher = Tokens(), Tokens()
    facts = assess(student, teacher, Masked(tokens, labels, batch_size=8), latency=False)
    with torch.no_grad():
        own, other = student(tokens), teacher(tokens)
    valid = mask & (labels >= 0)
    assert facts["places"] == int(mask.sum())
    assert facts["accuracy"] == pytest.approx(float((own.argmax(-1) == labels)[valid].float().mean()))
    assert facts["kl"] == pytest.approx(float(kl(own[mask], other[mask])), rel=1e-4)
    assert facts["per_class"]["support"] == labels[valid].bincount(minlength=4).tolist()


def test_without_labels_or_teacher_their_figures_are_absent(inputs):
    facts = assess(Conv(3), Conv(4), ResidentLoader(inputs, batch_size=30), latency=False)
    assert "accuracy" not in facts
    assert facts["agreement"] <= 1
    facts = assess(Conv(3), None, ResidentLoader(inputs, torch.zeros(90).long(), batch_size=30), latency=False)
    assert facts["teacher"] is None
    assert facts["cka"] is None
    assert "agreement" not in facts


def test_a_teacher_that_is_no_module_is_asked_for_logits(loader):
    class Oracle:
        def attach(self, taps, batch) -> None:
            self.taps = taps

        def __call__(self, batch: Batch) -> Trace:
            return Trace(None, {"logits": nn.functional.one_hot(batch.labels, 5).float()})

        def to(self, device):
            return self

    facts = assess(Conv(3), Oracle(), loader)
    assert facts["teacher"]["accuracy"] == 1.0
    assert facts["cka"] is None
    assert "parameters" not in facts["teacher"]


def test_numbers_that_are_none_are_none(loader):
    """A teacher that rules classes out is infinitely far from a student that does not; a dead layer is like nothing."""

    class Certain(Conv):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(torch.arange(5) > 0, -torch.inf)

    student = Conv(3)
    nn.init.zeros_(student.two.weight), nn.init.zeros_(student.two.bias)
    facts = assess(student, Certain(4), loader, latency=False)
    assert facts["cka"]["matrix"][1] == [None, None, None]
    assert facts["teacher"]["nll"] is None
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("name", ["mlp", "vit_mini", "vgg8", "shufflenetv2"])
def test_the_usual_taps_fit_any_family(name):
    loader = ResidentLoader(torch.randn(12, 3, 32, 32), torch.arange(12) % 10, batch_size=12)
    facts = assess(create(name), create("resnet8"), loader, latency=False)
    assert facts["cka"]["student"][-1] == "penultimate"
    assert len(facts["cka"]["student"]) > 2
    assert len(facts["cka"]["matrix"][0]) == len(facts["cka"]["teacher"]) == 4


def test_mistakes_are_named(loader, inputs):
    with pytest.raises(TapError, match="two"):
        assess(Conv(3), Conv(4), loader, taps=("tow",))
    with pytest.raises(DataError, match="labels do not belong"):
        assess(Conv(3), None, ResidentLoader(inputs, torch.zeros(90, 2).long(), batch_size=30))


def test_any_number_of_labels():
    torch.manual_seed(0)
    inputs, labels = torch.randn(60, 5), (torch.rand(60, 3) < 0.4).float()
    labels[:7, 1] = -1
    loader = as_loader((inputs, labels), batch_size=17, task="multilabel")
    student, teacher = nn.Linear(5, 3), nn.Linear(5, 3)
    facts = assess(student, teacher, loader, latency=False)
    judged = evaluate(student, loader)
    for name in ("map_macro", "map_micro", "f1_macro", "f1_micro", "hamming", "nll", "ece"):
        assert facts[name] == pytest.approx(judged[name], rel=1e-4), name
    assert "accuracy" not in facts
    own, other, known = student(inputs), teacher(inputs), labels >= 0
    p, q, y = own.sigmoid().double(), other.sigmoid().double(), labels.double()
    assert facts["brier"] == pytest.approx(2 * (p - y)[known].square().mean().item(), rel=1e-5)
    assert facts["agreement"] == pytest.approx(((p > 0.5) == (q > 0.5)).double().mean().item())
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert facts["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
    entropy = lambda x: -x * x.log() - (1 - x) * (1 - x).log()  # noqa: E731
    js = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    assert facts["js"] == pytest.approx(js.sum(1).mean().item(), rel=1e-3)
    by_class = facts["per_class"]
    assert by_class["support"] == [int((labels[:, c] > 0.5).sum()) for c in range(3)]
    assert sum(by_class["average_precision"]) / 3 == pytest.approx(facts["map_macro"], rel=1e-5)
    assert sum(facts["reliability"]["count"]) == int(known.sum())
    assert facts["teacher"]["map_macro"] == pytest.approx(evaluate(teacher, loader)["map_macro"])


def test_numbers():
    inputs, labels = torch.randn(30, 4), torch.randn(30, 2)
    loader = as_loader((inputs, labels), batch_size=11, task="regression")
    student = nn.Linear(4, 2)
    facts = assess(student, nn.Linear(4, 2), loader, latency=False)
    assert facts["mse"] == pytest.approx((student(inputs) - labels).square().mean().item())
    assert facts["teacher"]["mae"] > 0
    assert not {"accuracy", "kl", "agreement"} & facts.keys()
