"""The student and its losses as one module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, ModelError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.schedules import Linear
from limbeck.core.trace import Trace
from limbeck.functional import cross_entropy_loss, kd_loss
from limbeck.objectives import CRD, KD, CrossEntropy, FitNets


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def batch(size: int = 6) -> Batch:
    return Batch(torch.randn(size, 4), labels=torch.arange(size) % 3, index=torch.arange(size))


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    student, teacher, b = net().eval(), net(16).eval(), batch()
    distiller = Distiller(student, 0.3 * CrossEntropy() + Linear(1.0, 0.0) * KD(temperature=2.0), teacher).setup(b)
    losses = distiller(b.replace(progress=0.25))
    ce = cross_entropy_loss(student(b.inputs), b.labels)
    kd = kd_loss(student(b.inputs), teacher(b.inputs), temperature=2.0)
    assert torch.allclose(losses.total, 0.3 * ce + 0.75 * kd)
    assert torch.allclose(losses.terms["cross_entropy"], ce)
    assert torch.allclose(losses.terms["kd"], kd)
    assert {n: float(w) for n, w in losses.weights.items()} == pytest.approx({"cross_entropy": 0.3, "kd": 0.75})
    assert torch.equal(losses.logits, student(b.inputs))
    assert not any(t.requires_grad for t in [losses.logits, *losses.terms.values()])


class Parts(Objective):
    """A loss of two parts."""

    contract = Contract(at_equal=None)
    student_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        return {"small": student.logits.square().mean(), "large": 10 * student.logits.square().mean()}


def test_a_loss_of_several_parts_shows_each_and_shares_its_weight() -> None:
    b = batch()
    losses = Distiller(net(), 0.5 * Parts()).setup(b)(b)
    assert losses.terms.keys() == {"parts/small", "parts/large"}
    assert torch.allclose(losses.total, 0.5 * (losses.terms["parts/small"] + losses.terms["parts/large"]))
    assert torch.allclose(losses.terms["parts/large"], 10 * losses.terms["parts/small"])


def test_shares_apply_to_every_term_by_its_own_unit() -> None:
    b = batch()
    b = b.replace(labels=torch.tensor([0, -100, 1, -100, 2, 0]), totals={"labels": 8.0, "positions": 12.0})
    distiller = Distiller(net().eval(), CrossEntropy() + KD(), net(16)).setup(b)
    part, whole = distiller(b), distiller(b.replace(totals={}))
    assert torch.allclose(part.terms["cross_entropy"], whole.terms["cross_entropy"] * 4 / 8)
    assert torch.allclose(part.terms["kd"], whole.terms["kd"] * 6 / 12)


def test_totals_that_lack_a_unit_are_refused() -> None:
    b = batch().replace(totals={"samples": 6.0})
    distiller = Distiller(net(), KD(), net(16)).setup(batch())
    with pytest.raises(DataError, match=r"batch\.totals: .*not counted.*counts of samples; wanted positions"):
        distiller(b)


def test_the_teacher_is_no_part_of_it() -> None:
    student, teacher = net(), net(16)
    distiller = Distiller(student, KD() + FitNets("0"), teacher).setup(batch())
    own = {id(p) for p in distiller.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}
    assert own == {id(p) for p in [*student.parameters(), *distiller.loss.parameters()]}
    assert {k.split(".")[0] for k in distiller.state_dict()} == {"student", "loss"}
    distiller.train()
    distiller.requires_grad_(True)
    assert not teacher.training
    copied = copy.deepcopy(distiller.state_dict())
    Distiller(net(), KD() + FitNets("0"), net(16)).setup(batch()).load_state_dict(copied)
    assert list(distiller.parameters_of("student")) == list(distiller.parameters())


def test_setup_leaves_models_and_random_state_as_they_were() -> None:
    student, teacher, b = net(), net(16), batch()
    student[1].eval()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    state, modes = torch.get_rng_state(), [m.training for m in student.modules()]
    Distiller(student, KD(), teacher).setup(b)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in student.modules()] == modes
    for model, old in zip((student, teacher), before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_the_student_runs_in_its_own_mode_and_the_teacher_never_learns() -> None:
    student, teacher, b = net(), net(16), batch()
    distiller = Distiller(student, KD(), teacher).setup(b)
    old, moving = copy.deepcopy(teacher.state_dict()), student[1].running_mean.clone()
    distiller(b).total.backward()
    assert not torch.equal(student[1].running_mean, moving)
    student.eval()
    still = student[1].running_mean.clone()
    distiller(b)
    assert torch.equal(student[1].running_mean, still)
    assert all(torch.equal(v, old[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_that_needs_no_teacher_never_runs_one() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the teacher ran")

    b = batch()
    assert Distiller(net(), CrossEntropy(), Loud()).setup(b)(b).total.isfinite()
    assert Distiller(net(), CrossEntropy()).setup(b)(b).total.isfinite()


def test_without_logits_among_the_taps_there_are_none() -> None:
    b = batch()
    assert Distiller(net(), FitNets("0"), net(16)).setup(b)(b).logits is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: Distiller(s, CrossEntropy() + KD()), ConfigError, "teacher: kd cannot work without a teacher"),
        (lambda s: Distiller(s, KD(), s), ModelError, r"share modules.*copy\.deepcopy\(student\)"),
        (lambda s: Distiller(s, KD(), nn.Sequential(s)), ModelError, "share modules"),
        (lambda s: Distiller(s, KD(), object()), ModelError, "not a teacher; found object"),
        (lambda s: Distiller(s, nn.MSELoss(), s), ConfigError, "not a loss limbeck can train with"),
        (lambda s: Distiller(s, KD(), net())(batch()), ConfigError, "not set up yet; call distiller.setup"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(net())


def test_logits_of_both_sides_are_where_one_says() -> None:
    class Wrapped(nn.Module):
        def __init__(self, key: str) -> None:
            super().__init__()
            self.body, self.key = net(), key

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"other": x, self.key: self.body(x)}

    b, student = batch(), Wrapped("mine").eval()
    losses = Distiller(student, KD(), Wrapped("yours"), logits="mine", teacher_logits="yours").setup(b)(b)
    assert torch.equal(losses.logits, student.body(b.inputs))
    with pytest.raises(ModelError, match="no logits; found dict with keys"):
        Distiller(Wrapped("mine"), KD(), net()).setup(b)


def test_set_up_again_or_closed_it_leaves_no_hook_behind() -> None:
    student, b = net(), batch()
    distiller = Distiller(student, KD() + FitNets("0"), net(16)).setup(b)
    hooks = sum(len(m._forward_hooks) for m in student.modules())
    distiller.setup(b)
    assert sum(len(m._forward_hooks) for m in student.modules()) == hooks == 1
    distiller.close()
    assert sum(len(m._forward_hooks) for m in student.modules()) == 0
    with pytest.raises(ConfigError, match="not set up yet"):
        distiller(b)


def test_moves_take_the_teacher_along_and_casts_do_not() -> None:
    teacher = net(16)
    distiller = Distiller(net(), KD(), teacher).setup(batch())
    distiller.double()
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    distiller.to("meta")
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


def test_facts_about_the_data_reach_the_objective() -> None:
    with pytest.raises(ConfigError, match=r"data\.samples"):
        Distiller(net(), CRD("0"), net(16)).setup(batch())
    distiller = Distiller(net(), CRD("0", negatives=4), net(16)).setup(batch(), DataInfo(samples=20))
    assert distiller(batch()).total.isfinite()


class Doubles(Objective):
    """Shows every model each sample twice."""

    contract = Contract(at_equal=None)
    student_taps = ("logits",)

    def prepare(self, batch: Batch) -> Batch:
        return batch.replace(inputs=batch.inputs.repeat(2, 1), labels=None, index=None)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        assert len(student.logits) == 2 * 6
        return student.logits.square().mean()


def test_objectives_may_change_the_batch_before_both_models_see_it() -> None:
    b = batch()
    losses = Distiller(net(), Doubles() + KD(), net(16)).setup(b)(b)
    assert losses.logits.shape == (12, 3)
    part = Distiller(net(), Doubles()).setup(b)
    whole, half = part(b), part(b.replace(totals={"samples": 12.0}))
    assert torch.allclose(half.total, whole.total / 2)  # its share is counted before it was changed
    assert b.inputs.shape == (6, 4)


def test_the_whole_step_is_one_graph() -> None:
    student, teacher, b = net().eval(), net(16), batch()
    distiller = Distiller(student, CrossEntropy() + Linear(1.0, 0.0) * KD() + FitNets("0"), teacher).setup(b)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(distiller, fullgraph=True, backend=count)
    for progress in (0.0, 0.5, 0.9):
        part = batch().replace(progress=torch.tensor(progress))
        assert torch.allclose(run(part).total, distiller(part).total, atol=1e-6)
    assert len(graphs) == 1


def test_a_mask_nobody_honours_is_refused() -> None:
    class Blind(Objective):
        contract = Contract(at_equal=None)
        student_taps = ("logits",)

        def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
            return student.logits.mean()

    batch = Batch(torch.randn(4, 3), mask=torch.tensor([True, True, False, True]))
    with pytest.raises(ConfigError, match="blind: this objective knows no mask"):
        Distiller(nn.Linear(3, 2), Blind()).setup(batch)(batch)
