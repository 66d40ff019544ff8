"""MST-Distill: masks inside teachers, what a router picks, who learns in which stage, and what it is good for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig, fit
from limbeck.objectives import KD, CrossEntropy
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build
from limbeck.schemes.many_teachers.masking import MaskNet, inserted, maskable, masked
from limbeck.schemes.many_teachers.specialists import imbalance, routed_rows


class Both(nn.Module):
    """A teacher of two modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.last((self.first(one) + self.second(two)).relu())


def net(width: int, hidden: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def batch(count: int = 10) -> Batch:
    draw = torch.Generator().manual_seed(1)
    one, two = torch.randn(count, 4, generator=draw), torch.randn(count, 6, generator=draw)
    return Batch(one, torch.arange(count) % 3, teacher_inputs=(one, two))


def stages(steps: int = 6, **options):
    torch.manual_seed(0)
    named = {"both": FrozenTeacher(Both()), "other": FrozenTeacher(net(6))}
    cast = Cast(net(4, 8), Terms.of(CrossEntropy()), None, TrainConfig(steps=steps), teachers=named)
    given = {"layers": 1, "sees": {"other": 1}, "shares": (0.34, 0.34), **options}
    (training,) = build("mst_distill", **given).trainings(cast)
    return training.stages


@pytest.mark.parametrize("shape", [(5, 12), (5, 7, 12), (5, 12, 4, 6)])
def test_masks_lie_between_0_and_1_and_go_with_channels(shape: tuple[int, ...]) -> None:
    feature = torch.randn(shape)
    mask = MaskNet(12, maps=len(shape) == 4)(feature)
    assert mask.shape == (5, 12)
    assert 0 < float(mask.detach().min()) <= float(mask.detach().max()) < 1
    spec = {2: "bc,bc->bc", 3: "bnc,bc->bnc", 4: "bchw,bc->bchw"}[len(shape)]
    torch.testing.assert_close(masked(feature, mask), torch.einsum(spec, feature, mask))


def test_a_mask_of_ones_changes_nothing_and_no_hook_stays() -> None:
    class Ones(nn.Module):
        def forward(self, feature: Tensor) -> Tensor:
            return torch.ones(len(feature), feature.shape[1])

    model, x = net(4), torch.randn(5, 4)
    plain = model(x)
    with inserted(model, "0", Ones()):
        assert torch.equal(model(x), plain)
    with inserted(model, "0", MaskNet(12)):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)


def test_masks_go_behind_the_last_layers_before_the_logits() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(24, 7), nn.Linear(7, 6), nn.Linear(6, 3))
    x = torch.randn(2, 1, 4, 4)
    assert [place.name for place in maskable(model, x, 2, "t")] == ["2", "3"]
    assert [place.name for place in maskable(model, x, ["0"], "t")] == ["0"]
    with pytest.raises(ConfigError, match="too few layers"):
        maskable(model, x, 4, "t")
    with pytest.raises(ConfigError, match="no such layer"):
        maskable(model, x, ["none"], "t")
    with pytest.raises(ConfigError, match="so few channels"):
        MaskNet(5)


def test_of_equal_experts_all_teach_as_one() -> None:
    student, expert = torch.randn(6, 4), torch.randn(6, 4)
    gates = torch.randn(6, 3).softmax(-1)
    wanted = kd_loss(student, expert, temperature=4.0)
    for k, way in ((3, "top"), (3, "gated"), (1, "mixed"), (1, "top")):
        found = routed_rows(student, expert.expand(3, -1, -1), gates, k, 4.0, way)  # type: ignore[arg-type]
        torch.testing.assert_close(found.mean(), wanted)
    torch.testing.assert_close(routed_rows(student, student.expand(3, -1, -1), gates, 2, 4.0, "top"), torch.zeros(6))


def test_each_sample_asks_its_best_experts() -> None:
    student, experts, gates = torch.randn(6, 4), torch.randn(3, 6, 4), torch.randn(6, 3).softmax(-1)
    for k in (1, 2):
        rows = []
        for i in range(6):
            best = gates[i].argsort(descending=True)[:k]
            rows.append([kd_loss(student[i : i + 1], experts[w, i : i + 1], temperature=2.0) for w in best])
        plain = torch.stack([torch.stack(r).mean() for r in rows])
        torch.testing.assert_close(routed_rows(student, experts, gates, k, 2.0, "top"), plain)
        weights = gates.sort(dim=1, descending=True).values[:, :k]
        gated = torch.stack([(w * torch.stack(r)).sum() for w, r in zip(weights, rows, strict=True)])
        torch.testing.assert_close(routed_rows(student, experts, gates, k, 2.0, "gated"), gated)


def test_balance_is_nothing_where_the_mean_gate_is_uniform() -> None:
    even = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.double)
    for way in ("kl", "cv"):
        assert float(imbalance(even, way)) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
        assert imbalance(even[:1], way) > 0.1  # type: ignore[arg-type]
    wanted = 0.5 * (0.5 * torch.tensor(0.5 / 0.9).log() + 0.5 * torch.tensor(0.5 / 0.1).log())
    torch.testing.assert_close(imbalance(torch.tensor([[0.9, 0.1]])), wanted)


def test_without_weights_the_mixture_is_the_task() -> None:
    first, _, mixture = stages(weight=0.0, balance_weight=0.0)
    first.distiller.setup(batch())
    found = mixture.distiller.setup(batch()).train()
    wanted = F.cross_entropy(found.student(batch().inputs), batch().labels)
    torch.testing.assert_close(found(batch()).total, wanted)


def test_the_total_is_what_its_terms_say() -> None:
    for stage in stages(k=2, weight=0.7, balance_weight=0.3):
        losses = stage.distiller.setup(batch()).train()(batch())
        torch.testing.assert_close(losses.total, sum(losses.weights[n] * v for n, v in losses.terms.items()))
        assert len(losses.terms) == {"together": 6, "masks": 2, "mixture": 3}[stage.name]


def test_it_is_judged_by_the_task() -> None:
    for stage in stages():
        found = stage.distiller.setup(batch()).eval()
        wanted = F.cross_entropy(found.student(batch().inputs), batch().labels)
        torch.testing.assert_close(found(batch()).total, wanted)


def test_targets_of_the_first_stage_may_be_held_fixed() -> None:
    found = stages(detach=True)[0].distiller.setup(batch()).train()
    given, crew = batch(), found.crew
    own, others = found.student(given.inputs), [crew.ask(given, n) for n in range(2)]
    wanted = F.cross_entropy(own, given.labels) + sum(kd_loss(own, o.detach(), temperature=4.0) for o in others)
    wanted = torch.autograd.grad(wanted, list(found.student.parameters()))
    found(given).total.backward()
    for parameter, gradient in zip(found.student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_each_stage_trains_its_own_and_the_recipes_teachers_stay() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(30, 4), torch.randn(30, 6)
    loader = ResidentLoader((one, two), torch.arange(30) % 3, batch_size=10)

    class First(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.inner(first)

    named = {"both": FrozenTeacher(Both()), "other": FrozenTeacher(net(6))}
    kept = {name: copy.deepcopy(t.model.state_dict()) for name, t in named.items()}
    cast = Cast(First(net(4, 8)), Terms.of(CrossEntropy()), None, TrainConfig(steps=6), teachers=named)
    scheme = build("mst_distill", layers=1, sees={"other": 1}, shares=(0.34, 0.34), way="gated")
    (training,) = scheme.trainings(cast)
    crew = training.stages[0].distiller.crew
    for stage, moving in zip(training.stages, ("student models", "masks", "student router"), strict=True):
        stage.distiller.setup(loader.example(4))
        stage.distiller.close()
        parts = {"student": cast.student, "models": crew.models, "masks": crew.masks, "router": crew.router}
        before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        fit([stage], loader, quiet=True)
        for name, part in parts.items():
            moved = any(not torch.equal(v, before[name][n]) for n, v in part.state_dict().items())
            assert moved == (name in moving.split()), (stage.name, name)
    for name, teacher in named.items():
        assert all(torch.equal(v, kept[name][n]) for n, v in teacher.model.state_dict().items())


def test_specialists_come_nearer_to_the_student() -> None:
    torch.manual_seed(0)
    _, masks, _ = stages()
    found = masks.distiller.setup(batch()).train()
    optimizer = torch.optim.Adam(found.crew.masks.parameters(), lr=0.01)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        losses = found(batch())
        losses.total.backward()
        optimizer.step()
        values.append(losses.total.item())
    assert values[-1] < 0.9 * values[0]
    assert all(p.grad is None for p in found.student.parameters())


def test_a_router_learns_of_whom_to_ask_only_where_gates_weigh() -> None:
    for way, learns in (("top", False), ("gated", True)):
        found = stages(way=way, balance_weight=0.0)[2].distiller.setup(batch()).train()
        found(batch()).total.backward()
        gradients = [p.grad for p in found.crew.router.parameters()]
        assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients) == learns


def learn(model: nn.Module, loss, steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.slow
def test_a_student_of_the_weak_modality_becomes_better_than_by_labels_alone() -> None:
    """Two fifths of its labels may be wrong; teachers of the strong modality know better."""

    def score(seed: int, taught: bool) -> float:
        draw, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(8)
        weak, strong = torch.randn(3, 4, generator=fixed), 2 * torch.randn(3, 6, generator=fixed)
        y = torch.arange(900) % 3
        one = weak[y] + torch.randn(900, 4, generator=draw)
        two = strong[y] + torch.randn(900, 6, generator=draw)
        poor = torch.where(torch.rand(300, generator=draw) < 0.4, torch.randint(3, (300,), generator=draw), y[:300])
        torch.manual_seed(seed)
        both, other, student = Both(), net(6), net(4, 16)
        learn(both, lambda: F.cross_entropy(both(one[:300], two[:300]), y[:300]), 60)
        learn(other, lambda: F.cross_entropy(other(two[:300]), y[:300]), 60)
        named = {"both": FrozenTeacher(both), "other": FrozenTeacher(other)}
        cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(steps=60), teachers=named)
        scheme = build("mst_distill", layers=1, sees={"other": 1}, shares=(0.34, 0.05))
        given = Batch(one[:300], poor, teacher_inputs=(one[:300], two[:300]))
        if not taught:
            learn(student, lambda: F.cross_entropy(student(one[:300]), poor), 60)
        for stage in next(iter(scheme.trainings(cast))).stages if taught else []:
            found = stage.distiller.setup(given).train()
            student.requires_grad_(stage.name != "masks")
            learn(found, lambda found=found: found(given).total, stage.config.steps)
            found.close()
        return float((student(one[300:]).argmax(1) == y[300:]).float().mean())

    alone, whole = (sum(score(seed, taught) for seed in range(4)) / 4 for taught in (False, True))
    assert whole > alone, (whole, alone)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="scheme.way"):
        build("mst_distill", way="none")
    with pytest.raises(ConfigError, match="specialists are made by masks"):
        build("mst_distill", layers=0)
    with pytest.raises(ConfigError, match="fewer specialists"):
        stages(k=3)[0].distiller.setup(batch())
    with pytest.raises(ConfigError, match="no such part"):
        stages(sees={"other": 5})[0].distiller.setup(batch())
    with pytest.raises(ConfigError, match="no such teacher"):
        stages(sees={"third": 0})
    with pytest.raises(ConfigError, match="three stages need more steps"):
        stages(steps=2)
    cast = Cast(net(4), Terms.of(KD()), None, TrainConfig(steps=6), teachers={"a": FrozenTeacher(net(4))})
    with pytest.raises(ConfigError, match="labels"):
        next(build("mst_distill").trainings(cast))
    with pytest.raises(ConfigError, match="teachers"):
        next(build("mst_distill").trainings(Cast(net(4), Terms.of(CrossEntropy()), None, TrainConfig())))
    cut = Cast(net(4), Terms.of(CrossEntropy()), None, TrainConfig(steps=6, accumulate=2), teachers=cast.teachers)
    with pytest.raises(ConfigError, match="cannot be cut into parts"):
        next(build("mst_distill").trainings(cut))
    next(build("mst_distill", balance_weight=0.0).trainings(cut))
    dense = Cast(nn.Linear(4, 3), Terms.of(CrossEntropy()), None, TrainConfig(steps=6))
    dense.teachers = {"a": FrozenTeacher(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))}
    (training,) = build("mst_distill", layers=1).trainings(dense)
    with pytest.raises(TensorError, match="one label"):
        training.stages[0].distiller.setup(Batch(torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)))
