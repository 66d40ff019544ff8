"""CAKD against the paper's equations, its two players, its views, and the authors' own variant."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import LimbeckError, TensorError
from limbeck.core.projectors import GroupedLinear
from limbeck.core.views import perturbed
from limbeck.objectives import CrossEntropy
from limbeck.objectives.feature.cakd import CAKD, cakd_loss
from limbeck.objectives.parts.cakd_released import ReleasedRamp, cakd_released_loss
from limbeck.objectives.parts.contest import contest, judge


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, row by row."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in range(len(k))]
        exps = [math.exp(s) for s in scores]
        for j in range(len(k)):
            out[i] += exps[j] / sum(exps) * v[j]
    return out


def reference(student: list[Tensor], teacher: list[Tensor], feature: Tensor, goal: Tensor, take: Tensor) -> float:
    """Equations 2 to 6 with plain loops; ``take`` says which entries are the teacher's."""
    total = 0.0
    for b in range(len(goal)):
        mixed = [s[b].clone() for s in student]
        for m in range(3):
            for i in range(mixed[m].shape[0]):
                for j in range(mixed[m].shape[1]):
                    if take[m, b, i, j]:
                        mixed[m][i, j] = teacher[m][b, i, j]
        gap = attention(*mixed) - attention(*(t[b] for t in teacher))
        width = student[2].shape[2]
        relation = (teacher[2][b] @ teacher[2][b].T - student[2][b] @ student[2][b].T) / math.sqrt(width)
        total += sum(float((g**2).mean()) for g in (gap, relation, goal[b] - feature[b]))
    return total / len(goal)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_it_is_the_papers_equations(share: float) -> None:
    student, teacher = ([drawn(2, 5, 3, seed=i + side) for i in range(3)] for side in (0, 10))
    feature, goal = drawn(2, 5, 4, seed=20), drawn(2, 5, 4, seed=21)
    torch.manual_seed(3)
    take = torch.rand(3, 2, 5, 3) < share
    torch.manual_seed(3)
    found = cakd_loss(student, teacher, feature, goal, share=share)
    assert found.item() == pytest.approx(reference(student, teacher, feature, goal, take), rel=1e-12)


def test_all_from_the_teacher_is_the_teacher() -> None:
    """Then the attention term is 0, and its gradient with it."""
    student, teacher = ([drawn(2, 5, 3, seed=i + side) for i in range(3)] for side in (0, 10))
    student[2] = teacher[2].clone()  # no relation term either
    for tensor in student:
        tensor.requires_grad_()
    loss = cakd_loss(student, teacher, teacher[0], teacher[0], share=1.0)
    loss.backward()
    assert loss.item() == 0
    assert not any(t.grad is not None and bool(t.grad.any()) for t in student)
    assert cakd_loss(student, teacher, teacher[0], teacher[0], share=0.0).item() > 0


def test_reductions_and_mask() -> None:
    qkv, feature = [drawn(3, 4, 2, seed=i) for i in range(3)], drawn(3, 4, 5)
    others, goal = [drawn(3, 4, 2, seed=i + 9) for i in range(3)], drawn(3, 4, 5, seed=7)
    each = cakd_loss(qkv, others, feature, goal, share=0.0, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(cakd_loss(qkv, others, feature, goal, share=0.0, reduction="sum"), each.sum())
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(cakd_loss(qkv, others, feature, goal, share=0.0, mask=mask), each[mask].mean())
    with pytest.raises(TensorError, match="differ in shape"):
        cakd_loss(qkv, [t[:, :3] for t in others], feature, goal)


def test_each_player_learns_from_its_own_loss() -> None:
    player, real = judge(4), torch.randn(3, 5, 4)
    fake = torch.randn(3, 5, 4, requires_grad=True)
    own, other = contest(player, real, fake)
    sure, unsure = (player(x).sigmoid().squeeze(-1) for x in (real, fake))
    torch.testing.assert_close(own, (-sure.log() - (1 - unsure).log()).mean(1))
    torch.testing.assert_close(other, (1 - unsure).log().mean(1))
    grads = torch.autograd.grad(own.sum(), [fake, *player.parameters()], retain_graph=True, allow_unused=True)
    assert grads[0] is None
    assert all(bool(g.any()) for g in grads[1:])
    grads = torch.autograd.grad(other.sum(), [fake, *player.parameters()], allow_unused=True)
    assert bool(grads[0].any())
    assert all(g is None for g in grads[1:])


class Net(nn.Module):
    """Maps of 8, 4 and 2 places a side."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def pair(loss: CAKD, size: int = 6) -> tuple[Distiller, Batch]:
    from limbeck.models.vit import ViT

    torch.manual_seed(0)
    inputs = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch(inputs, labels=torch.arange(size) % 5)
    teacher = ViT(dim=8, depth=2, heads=2, image_size=8, patch_size=2, num_classes=5)
    with torch.no_grad():
        for parameter in teacher.parameters():  # as sure of what it sees as a trained one
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Distiller(Net(), loss, teacher).setup(batch), batch


def test_it_starts_from_the_layer_nearest_to_the_patches() -> None:
    distiller, batch = pair(CAKD())
    loss = next(iter(distiller.loss))
    own, qkv, goal = loss.features(*distiller.traces(batch))
    assert own.shape == (6, 6, 4, 4)
    assert [t.shape for t in qkv] == [(6, 16, 8)] * 3  # without the class token
    assert goal.shape == (6, 8, 4, 4)
    distiller(batch).total.backward()
    student = distiller.student
    assert bool(student.layer2[0].weight.grad.any())
    assert student.layer3[0].weight.grad is None


def test_the_student_sees_other_views_than_the_teacher() -> None:
    distiller, batch = pair(CAKD(views=1.0))
    prepared = distiller.prepare(batch)
    assert torch.equal(prepared.teacher_inputs, batch.inputs)
    assert not torch.allclose(prepared.inputs, batch.inputs)
    assert distiller.eval().prepare(batch).inputs is batch.inputs
    distiller, batch = pair(CAKD(views=0.0))
    assert torch.equal(distiller.prepare(batch).inputs, batch.inputs)
    torch.manual_seed(0)
    seen = perturbed(torch.randn(200, 1, 8, 8), 0.5)
    again = perturbed(seen, 0.0)
    assert torch.equal(seen, again)
    torch.manual_seed(0)
    images = torch.randn(400, 1, 8, 8)
    changed = (perturbed(images, 0.5) != images).flatten(1).any(1).float().mean()
    assert 0.4 < float(changed) < 0.6


def test_one_optimizer_trains_student_projectors_and_judge() -> None:
    distiller, batch = pair(CAKD(views=0.0))
    before = copy.deepcopy(distiller.state_dict())
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        optimizer.zero_grad()
        losses = distiller(batch)
        losses.total.backward()
        optimizer.step()
        seen.append(float(losses.terms["cakd/projected"]))
    assert seen[-1] < 0.9 * seen[0]
    # All but what stands behind the layer that is used, which no label trains here.
    moved = [k for k, v in distiller.state_dict().items() if v.is_floating_point() and not torch.equal(v, before[k])]
    assert {k.split(".")[1] for k in moved if k.startswith("student.")} == {"layer1", "layer2"}
    assert len([k for k in moved if "judge" in k]) == 6


def test_a_grouped_projector_of_one_group_is_a_linear_layer() -> None:
    distiller, _ = pair(CAKD())
    grouped = next(iter(distiller.loss)).grouped
    assert isinstance(grouped, GroupedLinear)
    assert len(grouped.weight) == 1  # a grid of 4 by 4 is one window


class TestReleased:
    def test_its_ramp_leaves_plain_cross_entropy_for_25_epochs(self) -> None:
        distiller, batch = pair(CAKD(variant="released"))
        student = distiller.student
        weighted = Distiller(
            student, CrossEntropy() + ReleasedRamp(epochs=90) * CAKD(variant="released"), distiller.teacher
        )
        weighted.setup(batch)
        plain = nn.functional.cross_entropy(student(batch.inputs), batch.labels)
        wanted = torch.autograd.grad(plain, list(student.parameters()))
        for epoch, weight in ((10, 0.0), (25, 0.0), (30, 0.1), (60, 0.2)):
            losses = weighted(batch.replace(progress=epoch / 90))
            assert float(losses.weights["cakd"]) == pytest.approx(weight, abs=1e-6)
            grads = torch.autograd.grad(losses.total, list(student.parameters()))
            same = all(torch.allclose(a, b, atol=1e-7) for a, b in zip(grads, wanted, strict=True))
            assert same == (weight == 0)

    def test_what_it_computes(self) -> None:
        distiller, batch = pair(CAKD(variant="released", teacher_heads=2))
        loss = next(iter(distiller.loss))
        assert distiller.prepare(batch).inputs is batch.inputs
        student, teacher = distiller.traces(batch)
        own, qkv, goal = loss.released.features(student, teacher)
        crossed, tokens = loss.released.projected(own)
        wanted = cakd_released_loss(
            crossed,
            qkv,
            tokens,
            goal.flatten(2).transpose(1, 2),
            loss.released.token(student["penultimate"]),
            teacher["penultimate"],
            student.logits,
            teacher.logits,
            heads=16,
            teacher_heads=2,
        )
        torch.testing.assert_close(distiller(batch).total, wanted)


def test_a_teacher_without_attention_is_refused() -> None:
    inputs = torch.randn(2, 3, 8, 8)
    with pytest.raises(LimbeckError, match="queries|blocks"):
        Distiller(Net(), CAKD(), Net(8)).setup(Batch(inputs))
