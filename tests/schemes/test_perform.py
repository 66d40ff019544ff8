"""Schemes of several trainings: in order, never twice, ending at the same bits; and mutual learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.engine.run import Run
from limbeck.objectives import KD, CrossEntropy, FitNets
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.schemes import TAKD, BornAgain, Cast, Mutual, Offline, Scheme, Training, build, perform

SHORT = ["data.samples=100", "data.batch_size=25", "teacher.samples=100", "teacher.train.epochs=1"]


def net(seed: int, width: int = 6) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def cast(loss=None, **changes) -> Cast:
    drawn = torch.Generator().manual_seed(0)
    data = torch.randn(40, 5, generator=drawn), torch.randint(0, 3, (40,), generator=drawn)
    loss = Terms.of(CrossEntropy() + KD(2.0)) if loss is None else loss
    known = {
        "train": as_loader(data, batch_size=8, train=True),
        "players": {"assistant": net(7, 9), "second": net(8, 7)},
        "fresh": lambda number: net(100 + number),
        "seed": 3,
    }
    return Cast(net(1), loss, FrozenTeacher(net(2, 20)), TrainConfig(epochs=2, lr=0.05), **{**known, **changes})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_chain_without_assistants_is_plain_distillation():
    plain = perform(Offline(), cast(), quiet=True)
    chain = perform(TAKD([]), cast(), quiet=True)
    assert torch.equal(weights(plain.student), weights(chain.student))
    assert chain.steps == plain.steps == 10


def test_each_hop_is_taught_by_the_one_before_it(tmp_path):
    scene = cast()
    assistant, second = scene.players["assistant"], scene.players["second"]
    teacher = weights(scene.teacher.model)
    seen = []
    for training in TAKD(["assistant", "second"]).trainings(scene):
        judge = training.stages[0].distiller.teacher.model
        before = weights(judge)
        scheme = type("One", (Scheme,), {"trainings": lambda self, c, t=training: iter([Training(t.stages)])})()
        perform(scheme, Cast(training.student, scene.loss, None, scene.config, scene.train), quiet=True)
        assert torch.equal(weights(judge), before)  # it does not learn
        seen.append((training.name, judge))
    assert [name for name, _ in seen] == ["assistant", "second", ""]
    assert [judge for _, judge in seen] == [scene.teacher.model, assistant, second]
    assert torch.equal(weights(scene.teacher.model), teacher)


class Stopped(Exception):
    pass


def interrupted(scheme: Scheme, after: int) -> Scheme:
    """The same scheme, which dies when it is asked for one training more."""

    class Dies(Scheme):
        def trainings(self, cast):
            for number, training in enumerate(scheme.trainings(cast)):
                if number == after:
                    raise Stopped
                yield training

    return Dies()


@pytest.mark.parametrize("scheme", [TAKD(["assistant", "second"]), BornAgain(3)], ids=["takd", "ban"])
def test_what_was_finished_is_not_done_again(tmp_path: Path, scheme: Scheme):
    whole = perform(scheme, cast(), out=tmp_path / "whole", quiet=True)
    for after in (1, 2):
        with pytest.raises(Stopped):
            perform(interrupted(scheme, after), cast(), out=tmp_path / "cut", resume=True, quiet=True)
    done = sorted((tmp_path / "cut" / "trainings").iterdir())
    stamps = [(f / "models.safetensors").stat().st_mtime_ns for f in done]
    again = perform(scheme, cast(), out=tmp_path / "cut", resume=True, quiet=True)
    assert torch.equal(weights(again.student), weights(whole.student))
    assert (again.steps, len(done)) == (whole.steps, 2)
    assert [(f / "models.safetensors").stat().st_mtime_ns for f in done] == stamps
    assert json.loads((done[0] / "done.json").read_text())["steps"] == 10


def test_born_again_without_a_teacher_trains_the_first_on_labels():
    scene = cast()
    scene.teacher = None
    trained = perform(BornAgain(1), scene, quiet=True)
    assert trained.steps == 20
    assert len({tuple(weights(net(seed)).tolist()) for seed in (1, 100)}) == 2
    first = next(BornAgain(2).trainings(cast()))
    assert first.name == "generation-1"  # a teacher is generation 0
    with pytest.raises(ConfigError, match="generations: there must be one at least"):
        BornAgain(0)


def test_mistakes_of_a_scheme_are_named():
    class Odd(Scheme):
        def __init__(self, *names):
            self.names = names

        def trainings(self, cast):
            for name in self.names:
                stage = next(Offline().trainings(cast)).stages
                yield Training(stage, name)

    with pytest.raises(ConfigError, match="two trainings have one name; found first"):
        perform(Odd("first", "first"), cast(), quiet=True)
    with pytest.raises(ConfigError, match="the student's own training comes last"):
        perform(Odd("", "late"), cast(), quiet=True)
    with pytest.raises(ConfigError, match=r"players.third: .*did you mean|players.third: the scheme asks"):
        perform(TAKD(["third"]), cast(), quiet=True)
    with pytest.raises(ConfigError, match="fresh: this scheme makes further students"):
        perform(BornAgain(2), cast(fresh=None), quiet=True)
    missing = cast()
    missing.teacher = None
    with pytest.raises(ConfigError, match="a chain of assistants begins with a teacher"):
        perform(TAKD(), missing, quiet=True)


def test_mutual_learning_is_the_papers_sum():
    """Three models, against plain loops: value, and every gradient."""
    models = [net(seed).double() for seed in (1, 101, 102)]
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    scene = cast(Terms.of(CrossEntropy()), fresh=lambda number: models[number])
    scene.student, scene.teacher = models[0], None
    (training,) = Mutual(peers=2, weight=1.5).trainings(scene)
    batch = Batch(x, y)
    losses = training.stages[0].distiller.setup(batch)(batch)
    losses.total.backward()
    found = [[p.grad.clone() for p in model.parameters()] for model in models]
    for model in models:
        model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    logits = [model(x) for model in models]
    for k in range(3):
        total = total + F.cross_entropy(logits[k], y)
        for other in (n for n in range(3) if n != k):
            p, q = logits[other].detach().softmax(1), logits[k].log_softmax(1)
            total = total + 1.5 / 2 * (p * (p.log() - q)).sum(1).mean()
    total.backward()
    torch.testing.assert_close(losses.total, total)
    for own, model in zip(found, models, strict=True):
        torch.testing.assert_close(own, [p.grad for p in model.parameters()])
    assert losses.weights["with_1"] == 0.75


def test_a_cohort_cut_into_parts_has_the_same_gradient():
    def gradient(parts):
        scene = cast(Terms.of(CrossEntropy() + KD(2.0)))
        (training,) = Mutual().trainings(scene)
        torch.manual_seed(1)
        x, y = torch.randn(9, 5), torch.arange(9) % 3
        distiller = training.stages[0].distiller.setup(Batch(x, y))
        for rows in torch.arange(9).split(parts):
            totals = {"samples": 9.0, "positions": 9.0, "labels": 9.0}
            distiller(Batch(x[rows], y[rows], totals=totals)).total.backward()
        return torch.cat([p.grad.flatten() for p in distiller.parameters()])

    torch.testing.assert_close(gradient(9), gradient(2))


def test_a_cohort_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Peers, their losses' helpers and momenta are in the checkpoint."""

    def trained(out, resume=False):
        scene = cast(Terms.of(CrossEntropy() + FitNets("0") + KD(2.0)))
        scene.config = TrainConfig(steps=10, lr=0.05, checkpoint_every=4)
        return perform(Mutual(peers=2), scene, out=tmp_path / out, resume=resume, quiet=True)

    whole = trained("whole")
    assert any("peer_2/fitnets" in line.get("terms", {}) for line in whole.history)
    assert not [hook for module in whole.student.modules() for hook in module._forward_hooks]
    kept = Run.after_step

    def dies(self):
        kept(self)
        if self.place.step == 6:
            raise Stopped

    monkeypatch.setattr(Run, "after_step", dies)
    with pytest.raises(Stopped):
        trained("cut")
    monkeypatch.setattr(Run, "after_step", kept)
    assert torch.equal(weights(trained("cut", resume=True).student), weights(whole.student))


def test_a_cohort_asks_its_teacher_once_a_step():
    scene, calls = cast(), []
    model = scene.teacher.model
    model.register_forward_hook(lambda *_: calls.append(1))
    (training,) = Mutual(peers=3).trainings(scene)
    distiller = training.stages[0].distiller.setup(scene.train.example(4))
    calls.clear()
    distiller(scene.train.example(4))
    assert len(calls) == 1


def test_from_a_recipe_with_a_cache_and_another_method(tmp_path, monkeypatch):
    """Mutual learning between students that also learn by DKD from a teacher that is not there."""
    from limbeck.recipes.caching import build_cache

    monkeypatch.chdir(tmp_path)
    settings = [
        *SHORT,
        "train.epochs=2",
        "teacher.cache=kept",
        "student={model: mlp_8}",
        "loss={cross_entropy: 1.0, dkd: 0.5}",
    ]
    recipe = load("digits", [*settings, "scheme={mutual: {peers: 1, between: jsd, options: {}}}"])
    build_cache(recipe, quiet=True)
    result = run(recipe, "out", quiet=True)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    terms = next(line["terms"] for line in lines if line["split"] == "train")
    assert {"cross_entropy", "with_1", "peer_1/cross_entropy", "peer_1/with_0"} <= set(terms)
    assert any(name.startswith("peer_1/dkd") for name in terms)
    assert result["training"]["steps"] == 8


def test_a_chain_from_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = [*SHORT, "train.epochs=1", "players={assistant: {model: mlp_16}}", "scheme=takd", "student={model: mlp_8}"]
    result = run(load("digits", chain), "out", quiet=True)
    assert result["training"]["steps"] == 8
    assert Path("out/trainings/assistant/done.json").is_file()
    assert not Path("out/trainings/assistant/student/student.json").is_file()
    assert build("takd").path == ["assistant"]
