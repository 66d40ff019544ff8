"""Students of linear cost: alignment with a teacher's layers, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.teacher import FrozenTeacher
from limbeck.models.subquadratic.teacher import subquadratic_from
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, perform
from limbeck.schemes.language.mixer_alignment import hidden_loss, mixing_loss
from limbeck.schemes.language.subquadratic_kd import SubquadraticKD
from tests.schemes.tiny import cast, llama, weights


def scene(mixers: Any = "gla", copy: Any = "none", **changes: Any) -> Cast:
    judge = llama(width=16, layers=2, seed=2, sharp=8.0).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        student = subquadratic_from(judge, mixers, copy=copy)
    loss = 0.5 * CrossEntropy() + 0.5 * KD(temperature=1.0)
    given = cast(loss, teacher=FrozenTeacher(judge), **{"steps": 10, **changes})
    given.student = student
    return given


def stages(given: Cast, **options: Any) -> list[Any]:
    (training,) = SubquadraticKD(**{"mixing": 0.3, "hidden": 0.3, **options}).trainings(given)
    return training.stages


def test_losses_are_their_definitions() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.rand(2, 3, 2, 5, 5, dtype=torch.double).tril() for _ in range(2))  # 2 layers, 3 texts
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]) > 0
    per_text = torch.stack([
        torch.stack([((o - t)[i, :, :n, :n] ** 2).sum() / (2 * n**2) for i, n in enumerate((5, 3, 2))])
        for o, t in zip(ours, theirs, strict=True)
    ])  # each text's squared Frobenius norm over H L^2, one for each layer  # fmt: skip
    wanted = (per_text * torch.tensor([5.0, 3.0, 2.0]) / 10).sum(1).mean()
    assert torch.allclose(mixing_loss(list(ours), list(theirs), mask), wanted)
    ours, theirs = torch.randn(2, 2, 3, 5, 4, dtype=torch.double)
    wanted = ((ours - theirs)[:, mask] ** 2).sum(-1).div(4).mean()
    assert torch.allclose(hidden_loss(list(ours), list(theirs), mask), wanted)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_teachers_own_mixers_are_at_zero_in_every_stage(padding: str) -> None:
    given = scene("attention", "all", options={"padding": padding})
    given.student.float()  # in double precision transformers' eager attention is no number before a text
    given.teacher.model.float()  # type: ignore[union-attr]
    batch = given.train.example(5)
    for stage in stages(given, copied="all"):
        losses = stage.distiller.setup(batch)(batch)
        value = {name: term for name, term in losses.terms.items() if name != "cross_entropy"}
        assert len(value) == 1
        assert float(next(iter(value.values()))) < 1e-8, stage.name
        stage.distiller.close()


def test_each_layer_reads_what_the_teachers_layer_reads() -> None:
    """Both losses, computed anew from transformers' own hidden states and attention."""
    given = scene(["mamba2", "retention"])
    judge, batch = given.teacher.model, given.train.example(5)  # type: ignore[union-attr]
    mask = batch.inputs["attention_mask"] > 0
    judge.set_attn_implementation("eager")
    with torch.no_grad():
        said = judge(**batch.inputs, output_hidden_states=True, output_attentions=True)
    judge.set_attn_implementation("sdpa")
    states, own = list(said.hidden_states), given.student.model  # type: ignore[union-attr]
    last = []
    handle = judge.model.layers[1].register_forward_hook(lambda _, __, out: last.append(out))
    with torch.no_grad():
        judge(**batch.inputs)
    handle.remove()
    states[2] = last[0] if isinstance(last[0], torch.Tensor) else last[0][0]  # what is listed is normalised
    rotary = own.rotary(torch.arange(mask.shape[1])[None])
    matrices, hidden = [], []
    for number, layer in enumerate(own.layers):
        matrices.append(layer.self_attn.matrix(layer.input_layernorm(states[number]), rotary, mask))
        hidden.append(layer(states[number], rotary, mask)[0])
    wanted = [mixing_loss(matrices, said.attentions, mask), hidden_loss(hidden, states[1:], mask)]
    for stage, value in zip(stages(given, copied="none"), wanted, strict=False):
        total = stage.distiller.setup(batch)(batch).total
        assert torch.allclose(total, value.double(), rtol=1e-6), stage.name
        stage.distiller.close()
        assert judge.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_alignment_trains_mixers_alone_and_splits_over_micro_batches() -> None:
    found = {}
    for accumulate in (1, 3):
        given = scene("gla", config={"accumulate": accumulate})
        before = {n: t.clone() for n, t in given.student.state_dict().items()}
        perform(SubquadraticKD("rest", mixing=0.4, hidden=0.6), given, quiet=True)
        theirs = given.teacher.model.state_dict()  # type: ignore[union-attr]
        for name, tensor in given.student.state_dict().items():
            if "self_attn" not in name and "inv_freq" not in name:
                assert torch.equal(tensor, theirs[name]), name
        changed = [
            n for n, t in given.student.state_dict().items() if "self_attn" in n and not torch.equal(t, before[n])
        ]
        assert any("q_proj" in n for n in changed)
        assert any("o_proj" in n for n in changed)
        found[accumulate] = weights(given.student)
    assert torch.allclose(found[1], found[3], atol=1e-5)  # totals are counted in float32


@pytest.mark.slow
def test_aligned_students_begin_distillation_nearer_than_random_ones() -> None:
    """The same steps: hidden states first beat the recipe's loss alone, from the same random mixers."""
    found = {}
    for hidden in (0.0, 0.6):
        given = scene("gla", steps=40, config={"lr": 0.01, "optimizer": "adamw"})
        perform(SubquadraticKD("rest", mixing=0.0, hidden=hidden), given, quiet=True)
        batch = given.train.example(60)
        with torch.no_grad():
            ours = given.student(**batch.inputs).logits[batch.mask].log_softmax(-1)
            theirs = given.teacher.model(**batch.inputs).logits[batch.mask].log_softmax(-1)  # type: ignore[union-attr]
        found[hidden] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert found[0.6] < found[0.0]


def test_lengths_add_up_and_shares_can_be_nothing() -> None:
    lengths = [(s.name, s.config.steps) for s in stages(scene(steps=20), mixing=0.05, hidden=0.25)]
    assert lengths == [("mixing", 1), ("hidden", 5), ("distill", 14)]
    assert [s.name for s in stages(scene(), mixing=0.0, hidden=0.0)] == ["distill"]
    assert [s.name for s in stages(scene(), mixing=0.0, hidden=1.0)] == ["hidden"]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="mixing \\+ hidden"):
        SubquadraticKD(mixing=0.6, hidden=0.6)
    with pytest.raises(ConfigError, match="need more steps"):
        stages(scene(steps=2))
    with pytest.raises(ModelError, match="no mixers"):
        stages(cast(KD(), teacher=FrozenTeacher(llama(layers=2))))
    packed = scene(options={"pack": True})
    stage = stages(packed)[1]
    with pytest.raises(ConfigError, match="pack: false"):
        stage.distiller.setup(packed.train.example(2))
