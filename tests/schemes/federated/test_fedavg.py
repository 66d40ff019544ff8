"""FedAvg: the mean of what clients learn, which one client's plain training and one common step both tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.data import as_loader
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.federated.fedavg import averaged
from tests.schemes.federated.scene import net, points, scene


def test_a_mean_by_numbers_of_samples():
    torch.manual_seed(0)
    states = {k: {"w": torch.randn(3), "n": torch.tensor(k)} for k in (2, 5, 7)}
    found = averaged(states, {2: 1, 5: 4, 7: 5})
    wanted = (states[2]["w"].double() + 4 * states[5]["w"].double() + 5 * states[7]["w"].double()) / 10
    assert torch.allclose(found["w"].double(), wanted, atol=1e-7)
    assert int(found["n"]) == 7


def test_one_client_is_plain_training():
    given = scene(epochs=1, schedule="constant")
    perform(build("fedavg", count=1, alpha=None, epochs=4), given, quiet=True)
    plain = net()
    distiller = Distiller(plain, CrossEntropy())
    fit([Stage("plain", distiller, TrainConfig(epochs=4, lr=0.1, schedule="constant"))], scene().train, quiet=True)
    for name, weight in plain.state_dict().items():
        assert torch.allclose(given.student.state_dict()[name], weight, atol=1e-6)


def test_one_step_of_whole_batches_is_one_step_on_all_data():
    x, y = points()
    train = as_loader((x.double(), y), batch_size=60, train=True)
    config = TrainConfig(epochs=1, lr=0.3, weight_decay=0.0, optimizer_options={"momentum": 0.0}, schedule="constant")
    student = net().double()
    before = [p.detach().clone() for p in student.parameters()]
    gradient = torch.autograd.grad(F.cross_entropy(student(x.double()), y), list(student.parameters()))
    cast = Cast(student, Terms.of(CrossEntropy()), None, config, train)
    perform(build("fedavg", count=4, alpha=0.5, epochs=1, least=3), cast, quiet=True)
    for old, new, slope in zip(before, student.parameters(), gradient, strict=True):
        assert torch.allclose((old - new) / 0.3, slope, atol=1e-10)


def test_some_are_asked_anew_each_round_and_the_rate_follows_the_run(monkeypatch):
    from limbeck.schemes.federated import fedavg

    seen = []

    def learn(model, loss, loader, place, **options):
        seen.append((place.number, place.config.lr, place.config.schedule, loader.shown))
        return model

    monkeypatch.setattr(fedavg, "learn", learn)
    given = scene(epochs=4, schedule="linear", lr=1.0)
    perform(build("fedavg", count=6, alpha=2.0, epochs=1, least=3, fraction=0.5), given, quiet=True)
    assert [number for number, *_ in seen] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert {(number, rate) for number, rate, *_ in seen} == {(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)}
    assert len({tuple(size for n, *_, size in seen if n == number) for number in range(4)}) > 1


def test_statistics_of_normalisation_are_averaged():
    given = scene(epochs=2)
    torch.manual_seed(0)
    given.student = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    perform(build("fedavg", count=3, alpha=None, epochs=1), given, quiet=True)
    norm = given.student[1]
    assert float(norm.running_mean.abs().sum()) > 0
    assert int(norm.num_batches_tracked) == 4
    assert norm.running_mean.isfinite().all()


@pytest.mark.slow
def test_it_learns_and_says_accuracy_and_bytes_of_each_round():
    given = scene(count=200, epochs=4)
    fitted = perform(build("fedavg", count=4, alpha=0.5, epochs=2), given, quiet=True)
    judged = [line["accuracy"] for line in fitted.history if line["split"] == "validation"]
    bytes_up = [line["terms"]["bytes_up"] for line in fitted.history if line["split"] == "train"]
    assert len(judged) == len(bytes_up) == fitted.steps == 4
    assert judged[-1] > 0.8
    assert set(bytes_up) == {bytes_up[0]}
    assert bytes_up[0] > 4 * 4 * sum(p.numel() for p in given.student.parameters())


@pytest.mark.parametrize(
    ("train", "said"),
    [({"monitor": "total"}, "train.monitor"), ({"compile": "on"}, "train.compile"), ({"ema": 0.9}, "train.ema")],
)
def test_what_a_federation_cannot_do_is_refused(train, said):
    with pytest.raises(ConfigError, match=said):
        list(build("fedavg", count=2, alpha=None).trainings(scene(**train)))


def test_a_term_that_asks_a_teacher_is_refused():
    given = scene()
    given.loss = CrossEntropy() + KD()
    with pytest.raises(ConfigError, match=r"loss\.kd"):
        list(build("fedavg", count=2, alpha=None).trainings(given))
