"""DistillWeighted: the loss, whom it listens to, what ships, and that a related source helps more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, CrossEntropy
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build, perform


def net(seed: int, classes: int = 3, width: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


def data(samples: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 3
    labels[samples // 2 :] = -1
    return torch.randn(samples, 5, generator=draw), labels


def distiller(teachers: dict[str, nn.Module], **options):
    x, y = data()
    named = {name: FrozenTeacher(model) for name, model in teachers.items()}
    loader = ResidentLoader(x, y, batch_size=10)
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=4), loader, teachers=named)
    (training,) = build("distill_weighted", **options).trainings(cast)
    torch.manual_seed(5)
    return training.stages[0].distiller.setup(Batch(x, y)).train()


def test_the_loss_is_that_of_the_definition() -> None:
    x, y = data()
    teachers = {"a": net(1, 4), "b": net(2, 2)}
    found = distiller(teachers, similarity="equal", share=0.3, temperature=2.0)
    (_, sources) = found.loss
    assert [head.out_features for head in sources.heads] == [4, 2]
    feature = found.student[:2](x)
    wanted = 0.3 * F.cross_entropy(found.student(x)[:20], y[:20])
    for head, teacher in zip(sources.heads, teachers.values(), strict=True):
        wanted = wanted + 0.7 * 0.5 * kd_loss(head(feature), teacher(x), temperature=2.0)
    torch.testing.assert_close(found(Batch(x, y)).total, wanted)


def test_of_one_source_with_the_student_s_classes_it_is_kd() -> None:
    x, y = data()
    teacher = net(1)
    found = distiller({"a": teacher}, tied=True)
    student = found.student(x)
    wanted = 0.5 * F.cross_entropy(student[:20], y[:20]) + 0.5 * kd_loss(student, teacher(x), temperature=1.0)
    torch.testing.assert_close(found(Batch(x, y)).total, wanted)
    assert {name for name, _ in found.named_parameters()} == {
        f"student.{n}" for n, _ in found.student.named_parameters()
    }


class Feels(nn.Module):
    """A source whose features are some of the numbers, and whose answers are signs of these."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.places, self.last = places, nn.Linear(len(places), 2 * len(places), bias=False)
        with torch.no_grad():
            self.last.weight.copy_(5 * torch.cat([torch.eye(len(places)), -torch.eye(len(places))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x[:, self.places])


def problem() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=draw)
    return x, x[:, :3].argmax(1)


def test_the_source_of_the_similar_task_counts_most_and_the_nearest_is_it() -> None:
    x, y = problem()
    x, y = torch.cat([x, -x]), torch.cat([y, torch.full((200,), -1)])
    named = {"far": FrozenTeacher(Feels([3, 4, 5])), "near": FrozenTeacher(Feels([0, 1, 2]))}
    cast = Cast(nn.Linear(6, 3), Terms.of(CrossEntropy()), None, TrainConfig(), ResidentLoader(x, y, batch_size=50))
    cast.teachers = named
    for metric in ("parc", "neighbours"):
        far, near = build("distill_weighted", similarity=metric).scores(cast, named).tolist()
        assert near > far + 10
    (training,) = build("distill_weighted", keep=1).trainings(cast)
    (_, sources) = training.stages[0].distiller.loss
    assert (sources.names, sources.weights) == (["near"], [1.0])


def test_looking_leaves_sources_as_they_were_and_looks_at_no_more_than_asked() -> None:
    seen = []

    class Counts(Feels):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    teacher = Counts([0, 1, 2])
    x, y = problem()
    cast = Cast(nn.Linear(6, 3), Terms.of(CrossEntropy()), None, TrainConfig(), ResidentLoader(x, y, batch_size=50))
    build("distill_weighted", samples=30).scores(cast, {"a": FrozenTeacher(teacher)})
    assert seen[-1] == 30  # after examples
    assert max(seen[:-1]) <= 2
    assert not any(module._forward_hooks for module in teacher.modules())


def test_similar_sources_teach_more_than_labels_or_all_alike() -> None:
    x, labels = problem()
    few = labels.clone()
    few[12:] = -1
    scores = {}
    named = {"near": Feels([0, 1, 2]), "far": Feels([3, 4, 5]), "other": Feels([4, 3])}
    for name, options in (("weighted", {}), ("alike", {"similarity": "equal"}), ("labels", {"share": 1.0})):
        torch.manual_seed(0)
        own = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3))  # too narrow for all sources at once
        config = TrainConfig(steps=60, optimizer="sgd", lr=0.2, schedule="constant", compile="off")
        teachers = {key: FrozenTeacher(model) for key, model in named.items()}
        loader = ResidentLoader(x[:150], few[:150], batch_size=50, shuffle=True)
        cast = Cast(own, Terms.of(CrossEntropy()), None, config, loader, teachers=teachers)
        perform(build("distill_weighted", **options), cast, quiet=True)
        scores[name] = float((own(x[150:]).argmax(1) == labels[150:]).float().mean())
    assert scores["weighted"] > max(scores["alike"], scores["labels"])
    assert not any("heads" in name for name, _ in own.named_modules())


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="scheme.similarity"):
        build("distill_weighted", similarity="none")
    with pytest.raises(ConfigError, match="scheme.power"):
        build("distill_weighted", power=-1.0)
    x, y = data()
    cast = Cast(net(0), Terms.of(KD()), None, TrainConfig(), ResidentLoader(x, y, batch_size=10))
    cast.teachers = {"a": FrozenTeacher(net(1))}
    with pytest.raises(ConfigError, match="what labels teach"):
        next(iter(build("distill_weighted").trainings(cast)))
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(), ResidentLoader(x, y * 0 - 1, batch_size=10))
    cast.teachers = {"a": FrozenTeacher(net(1))}
    with pytest.raises(DataError, match="labelled samples"):
        next(iter(build("distill_weighted").trainings(cast)))
