"""Hybrid Distill: which tokens leave, what is compared among those that stay, and what the student ships as."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.build import as_loader
from limbeck.engine import TrainConfig
from limbeck.models.vit import ViT
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.many_teachers.hybrid_distill import relation_loss
from limbeck.schemes.many_teachers.token_dropping import Dropping, keep_least_redundant, redundancy, taken


def vit(seed: int, dim: int = 8, patch_size: int = 2) -> ViT:
    torch.manual_seed(seed)
    model = ViT(dim, 3, 2, num_classes=3, in_channels=1, image_size=8, patch_size=patch_size)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3)


def cast(student: nn.Module | None = None, mim: nn.Module | None = None, **more: object) -> Cast:
    teachers = {"cl": FrozenTeacher(vit(2, 12)), "mim": FrozenTeacher(mim or vit(1))}
    train = as_loader((batch(12).inputs, batch(12).labels), batch_size=4)
    settings = {"loss": Terms.of(CrossEntropy()), "teacher": None, "config": TrainConfig(steps=4), "train": train}
    return Cast(student or vit(0), **{**settings, "teachers": teachers, **more})


def first(given: Cast, **options: object):
    (training,) = build("hybrid_distill", **options).trainings(given)
    torch.manual_seed(0)
    return training.stages[0].distiller.setup(batch()).train()


def test_redundancy_is_the_mean_cosine_with_the_others_and_duplicates_leave_first():
    tokens = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    tokens[:, 4] = 3 * tokens[:, 1]
    found = redundancy(tokens)
    for b in range(2):
        for i in range(6):
            others = [F.cosine_similarity(tokens[b, i], tokens[b, j], 0) for j in range(6) if j != i]
            torch.testing.assert_close(found[b, i], torch.stack(others).mean())
    eye = torch.eye(6).unsqueeze(0)
    eye[:, 4] = eye[:, 1]
    assert keep_least_redundant(eye, 4).tolist() == [[0, 2, 3, 5]]
    assert keep_least_redundant(eye, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    torch.manual_seed(0)
    drawn = {tuple(keep_least_redundant(eye, 3, chance=5.0)[0].tolist()) for _ in range(20)}
    assert len(drawn) > 3


def test_tokens_leave_by_steps_the_class_token_stays_and_a_share_of_one_leaves_all():
    model, inputs, seen = vit(0), batch().inputs, []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    dropping = Dropping(model, inputs, keep=0.5, depths=[0.0, 1 / 3, 2 / 3])
    seen.clear()
    before = model(inputs)
    assert seen == [17, 17, 17]
    dropping.active = True
    embedded = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, given: embedded.append(given[0]))
    seen.clear()
    model(inputs)
    handle.remove()
    assert seen == [1 + round(16 * 0.5 ** (k / 3)) for k in (1, 2, 3)]
    assert torch.equal(embedded[0][:, 0], (model.cls_token + model.pos_embed[:, :1]).expand(4, -1, -1)[:, 0])
    last = dropping.kept[2]
    assert last.shape == (4, 8)
    assert all(set(last[b].tolist()) <= set(dropping.kept[0][b].tolist()) for b in range(4))
    dropping.keep = 1
    assert torch.equal(model(inputs), before)
    dropping.close()
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_relations_are_softmax_rows_and_their_divergence_that_of_plain_loops():
    torch.manual_seed(0)
    s, t = ([torch.randn(2, 5, d, dtype=torch.float64) for _ in range(3)] for d in (8, 12))
    total = torch.zeros(2, dtype=torch.float64)
    for (a, b), place in (((0, 1), 0), ((2, 2), 1)):
        for sample in range(2):
            for head in range(4):
                rows = []
                for vectors in (t, s):
                    d = vectors[0].shape[-1] // 4
                    x, y = (vectors[k][sample, :, head * d : (head + 1) * d] for k in (a, b))
                    rows.append((x @ y.T / d**0.5).softmax(-1))
                torch.testing.assert_close(rows[1].sum(-1), torch.ones(5, dtype=torch.float64))
                total[place] += (rows[0] * (rows[0].log() - rows[1].log())).sum(-1).mean() / 8
    torch.testing.assert_close(relation_loss(s, t, 4), total.sum())
    torch.testing.assert_close(relation_loss(s, t), relation_loss(s, t, 4))  # the most that divides 8 and 12


def test_a_step_compares_at_the_tokens_that_stay():
    given = cast()
    distiller = first(given, layers=[-1], chance=0.0, keep=0.5)
    data, terms = batch(), distiller(batch()).terms
    student, mim, cl = given.student, given.teachers["mim"].model, given.teachers["cl"].model
    kept = Dropping(probe := copy.deepcopy(student), data.inputs, keep=0.5)
    kept.active = True
    said = {}
    for name, model in {"s": probe, "m": mim, "c": cl}.items():
        model.blocks[-1].register_forward_hook(lambda _, __, o, n=name: said.__setitem__(f"{n}/out", o))
        model.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, o, n=name: said.__setitem__(f"{n}/qkv", o))
        model(data.inputs)
    places = torch.cat([torch.zeros(4, 1, dtype=torch.long), kept.kept[-1] + 1], 1)
    rows = torch.arange(4).unsqueeze(1)
    s, t = (list(said[k].chunk(3, -1)) for k in ("s/qkv", "m/qkv"))
    wanted = relation_loss(s, [part[rows, places] for part in t], 8)
    torch.testing.assert_close(terms["hybrid/relations"], wanted)
    goal = F.layer_norm(said["c/out"][rows, places][:, 1:], (12,))
    head = next(iter(distiller.loss)).head
    torch.testing.assert_close(terms["hybrid/features"], F.smooth_l1_loss(head(said["s/out"][:, 1:]), goal).detach())


def test_alpha_and_beta_take_each_part_away_and_the_teachers_own_copy_has_nothing_to_learn_of_relations():
    data = batch()
    only = first(cast(), alpha=0.0)(data)
    assert float(only.terms["hybrid/relations"]) == 0
    torch.testing.assert_close(only.total, only.terms["hybrid/features"])
    assert float(first(cast(), beta=0.0)(data).terms["hybrid/features"]) == 0
    alike = first(cast(vit(1)), keep=1.0)(data).terms
    assert float(alike["hybrid/relations"]) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(taken(data.inputs, None), data.inputs)


@pytest.mark.slow
def test_relations_keep_heads_apart_where_features_alone_do_not():
    """Diversity: after some steps maps of attention are nearer to those of the teacher of relations."""
    found = {}
    for name, alpha in {"both": 4.0, "features": 0.0}.items():
        student = vit(0)
        given = cast(student, config=TrainConfig(steps=30, lr=0.1))
        perform(build("hybrid_distill", alpha=alpha, keep=1.0, then="probe", share=0.9), given, quiet=True)
        maps = []
        for model in (student.eval(), given.teachers["mim"].model):
            model.blocks[-1].attn.probs.register_forward_hook(lambda _, __, output, m=maps: m.append(output))
            model(batch(12).inputs)
        found[name] = float((maps[0] - maps[1]).abs().mean().detach())
    assert found["both"] < 0.9 * found["features"]


def test_the_student_ends_plain_and_the_probe_trains_the_last_layer_alone():
    given = cast()
    (training,) = build("hybrid_distill", then="probe").trainings(given)
    assert training.stages[1].learn == ("linear.*",)
    perform(build("hybrid_distill"), given, quiet=True)
    modules = list(given.student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert given.student(batch().inputs).shape == (4, 3)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="there is no such teacher"):
        list(build("hybrid_distill", teachers=["mim", "dino"]).trainings(cast()))
    with pytest.raises(TensorError, match="same grid of patches"):
        first(cast(mim=vit(1, patch_size=4)))
    with pytest.raises(ConfigError, match="some tokens must stay"):
        build("hybrid_distill", keep=0.0)
    with pytest.raises(ConfigError, match="2 teachers or more"):
        list(build("hybrid_distill").trainings(cast(teachers={})))
