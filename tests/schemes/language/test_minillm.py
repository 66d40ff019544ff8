"""The policy gradient as a scheme: what is written, what is learned from data beside it, and how it adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.teacher import FrozenTeacher
from limbeck.objectives import KD, CrossEntropy
from limbeck.objectives.parts.policy import DRAWN, SAID, WRITTEN, policy_rows
from limbeck.recipes.distill import distill
from limbeck.schemes import Cast, MiniLLM, perform
from limbeck.schemes.language.minillm import PolicyDistiller
from tests.schemes.tiny import cast, llama, pairs, weights

SHORT: dict[str, Any] = {"max_new_tokens": 8}


def distiller(scene: Cast, **options: Any) -> PolicyDistiller:
    (training,) = MiniLLM(**{**SHORT, **options}).trainings(scene)
    found = training.stages[0].distiller
    assert isinstance(found, PolicyDistiller)
    return found


def step(batch: Batch, number: int = 0) -> Batch:
    return batch.replace(progress=torch.tensor(number / 100))


def test_a_step_is_the_policy_gradient_and_the_loss_on_the_data() -> None:
    """Value and gradient of both parts, from plain forwards of one unpadded text at a time."""
    scene = cast(CrossEntropy() + 0.5 * KD(temperature=1.0))
    made, batch = distiller(scene, clip=None, alpha=0.4, data_weight=0.7), step(scene.train.example(4))
    made.setup(batch)
    both = made.made(batch)
    losses = made(both)
    losses.total.backward()
    student, teacher = scene.student, scene.teacher.model
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    data, policy, counts = 0.0, 0.0, [0, 0]
    for row in range(4):
        size = int(batch.inputs["attention_mask"][row].sum())
        ids = batch.inputs["input_ids"][row, :size]
        own, other = (model(ids[None]).logits[0].log_softmax(-1) for model in (student, teacher))
        for place in batch.mask[row].nonzero().flatten().tolist():
            gap = (other[place].exp() * (other[place] - own[place])).sum()
            data, counts[0] = data - own[place, ids[place + 1]] + 0.5 * gap, counts[0] + 1
        size = int(both.inputs["attention_mask"][4 + row].sum())
        ids = both.inputs["input_ids"][4 + row, :size]
        own, other = (model(ids[None]).logits[0].log_softmax(-1) for model in (student, teacher))
        places = both.extras[WRITTEN][4 + row].nonzero().flatten().tolist()
        assert places == list(range(places[0], size - 1))
        rewards = [float((other[t, ids[t + 1]] - own[t, ids[t + 1]]).detach()) for t in places]
        for number, t in enumerate(places):
            said, rest = own[t, ids[t + 1]], rewards[number + 1 :]
            mixed = (0.6 * own[t].exp() + 0.4 * other[t].exp())[ids[t + 1]].detach()
            torch.testing.assert_close(both.extras[DRAWN][4 + row, t].exp().double(), mixed, atol=1e-6, rtol=1e-5)
            weight = float(said.detach().exp() / mixed)
            assert int(both.extras[SAID][4 + row, t]) == int(ids[t + 1])
            gap = (own[t].exp() * (own[t] - other[t].detach())).sum()
            ahead = sum(rest) / len(rest) if rest else 0.0
            policy, counts[1] = policy + weight * (gap - ahead * said), counts[1] + 1
    (0.7 * data / counts[0] + policy / counts[1]).backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)  # draws have single precision
    assert counts == [int(both.mask.sum()), int(both.extras[WRITTEN].sum())]


def test_the_data_may_be_left_out() -> None:
    scene = cast(CrossEntropy())
    made, batch = distiller(scene, alpha=0.0, data_weight=0.0), step(scene.train.example(4))
    made.setup(batch)
    written = made.made(batch)
    losses = made(written)
    assert list(losses.terms) == ["minillm"]
    labels, mask, drawn = (written.extras[name] for name in (SAID, WRITTEN, DRAWN))
    logits = [model(**written.inputs).logits for model in (scene.student, scene.teacher.model)]
    values = policy_rows(*logits, labels, mask, drawn, clip=0.2)
    torch.testing.assert_close(losses.total, values.sum() / mask.sum())
    assert written.size == 4


def test_equal_models_have_nothing_to_learn() -> None:
    scene = cast(CrossEntropy(), teacher=FrozenTeacher(llama(seed=1, sharp=6.0).double()))
    made, batch = distiller(scene, data_weight=0.0), step(scene.train.example(4))
    made.setup(batch)
    losses = made(made.made(batch))
    losses.total.backward()
    assert abs(float(losses.total.detach())) < 1e-6
    assert max(float(p.grad.abs().max()) for p in scene.student.parameters()) < 1e-6


@pytest.mark.slow
def test_it_brings_the_student_nearer_to_the_teacher_in_whole_texts() -> None:
    """The divergence of whole texts, measured on texts that the student writes, falls by a third and more."""

    def divergence(scene: Cast) -> float:
        made, batch = distiller(scene, alpha=0.0, data_weight=0.0), step(scene.train.example(54))
        torch.manual_seed(0)
        written = made.written(batch, scene.student, 7)[0]
        with torch.no_grad():
            own, other = (
                model(**written.inputs).logits.log_softmax(-1) for model in (scene.student, scene.teacher.model)
            )
        said = written.labels.clamp(min=0).unsqueeze(-1)
        gap = (own - other).gather(-1, said).squeeze(-1)
        return float(gap[written.mask].sum() / 54)

    scene = cast(CrossEntropy(), steps=25, batch_size=18, config={"optimizer": "adamw", "lr": 0.02, "clip": 1.0})
    before = divergence(scene)
    perform(MiniLLM(**SHORT, data_weight=0.0), scene, quiet=True)
    assert divergence(scene) < 0.7 * before


@pytest.mark.slow
def test_micro_batches_change_nothing() -> None:
    whole, parts = (
        perform(MiniLLM(**SHORT), cast(CrossEntropy(), config={"accumulate": n}), quiet=True) for n in (1, 3)
    )
    torch.testing.assert_close(weights(parts.student), weights(whole.student), atol=1e-6, rtol=0)


def test_in_python(tmp_path: Any) -> None:
    train: dict[str, Any] = {"steps": 2, "optimizer": "adamw", "lr": 1e-3, "batch_size": 8, "quiet": True}
    options = {"scheme": "minillm", "scheme_options": SHORT}
    done = distill(llama(width=24, seed=2), llama(seed=1), pairs(), "cross_entropy", **options, out=tmp_path, **train)
    assert done.steps == 2
    assert done.result["perplexity"] > 1


def refused(scene: Cast, **options: Any) -> None:
    next(iter(MiniLLM(**{**SHORT, **options}).trainings(scene)))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="teacher: rewards come from a teacher; found none"):
        refused(cast(CrossEntropy(), teacher=None))
    with pytest.raises(DataError, match="data.options.pack: a pack holds several texts.*another scheme than minillm"):
        refused(cast(CrossEntropy(), options={"pack": True}))
    with pytest.raises(ConfigError, match=r"train.monitor: what this scheme minimises.*found total"):
        refused(cast(CrossEntropy(), config={"monitor": "total"}))
    for wrong in ({"alpha": 1.0}, {"alpha": -0.1}, {"clip": 0.0}, {"data_weight": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match=f"scheme.{next(iter(wrong))}"):
            MiniLLM(**wrong)
