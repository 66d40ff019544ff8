"""The objectives as a training loop uses them: inside a Distiller, on real (small) networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, LimbeckError, TapError
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.trace import Trace
from limbeck.objectives.feature.at import AT, at_loss
from limbeck.objectives.feature.fitnets import FitNets, fitnets_loss
from limbeck.objectives.parts.hints import TeacherDecay
from limbeck.objectives.relation.crd import CRD
from limbeck.objectives.relation.rkd import RKD, rkd_loss
from limbeck.objectives.response.cross_entropy import CrossEntropy, cross_entropy_loss
from limbeck.objectives.response.dist import DIST, dist_loss
from limbeck.objectives.response.dkd import DKD, dkd_loss
from limbeck.objectives.response.kd import KD, kd_loss
from limbeck.objectives.response.label_smoothing import LabelSmoothing, label_smoothing_loss


class Net(nn.Module):
    """Three stages at three resolutions and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def make_batch(start: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(start)
    index = torch.arange(start, start + size)
    return Batch(torch.randn(size, 3, 8, 8, generator=generator), labels=index % 5, index=index)


def make(loss: Objective, teacher: nn.Module | None = None) -> Distiller:
    torch.manual_seed(0)
    data = DataInfo(samples=64, labels=torch.arange(64) % 5, classes=5)
    return Distiller(Net(4), loss, Net(6) if teacher is None else teacher).setup(make_batch(), data)


def steps(distiller: Distiller, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    seen = []
    for step in range(first, last):
        optimizer.zero_grad()
        total = distiller(make_batch(8 * (step % 8))).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    return seen


ALL = [CrossEntropy(), LabelSmoothing(), KD(), DKD(), DIST(), FitNets(), AT(), RKD(), CRD(negatives=32)]


@pytest.mark.parametrize("loss", ALL, ids=lambda o: o.card.key)
def test_learns(loss: Objective) -> None:
    distiller = make(loss)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = steps(distiller, optimizer, 0, 40)
    assert sum(seen[-8:]) < 0.97 * sum(seen[:8])  # eight steps are one epoch


def test_compiled_equals_eager_where_state_changes() -> None:
    """One graph without breaks, which also moves the banks (the conformance suite compiles every method)."""
    distiller = make(CRD(negatives=32))
    state = {k: v.clone() for k, v in distiller.state_dict().items()}
    batch = make_batch(8)
    eager = distiller(batch).total
    eager.backward()
    gradients = [p.grad.clone() for p in distiller.parameters() if p.grad is not None]
    after = {k: v.clone() for k, v in distiller.state_dict().items()}
    distiller.load_state_dict(state)
    distiller.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True)(batch).total
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    for parameter, gradient in zip([p for p in distiller.parameters() if p.grad is not None], gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(distiller.state_dict(), after)


def test_what_they_compute() -> None:
    student, teacher, batch = Net(4), Net(6), make_batch()
    s, t = student(batch.inputs), teacher(batch.inputs)
    labels = batch.labels
    pairs = {
        CrossEntropy(label_smoothing=0.2): cross_entropy_loss(s, labels, label_smoothing=0.2),
        LabelSmoothing(0.3): label_smoothing_loss(s, labels, smoothing=0.3),
        KD(temperature=2.0): kd_loss(s, t, temperature=2.0),
        DKD(alpha=0.5, beta=2.0, temperature=3.0): dkd_loss(s, t, labels, alpha=0.5, beta=2.0, temperature=3.0),
        DIST(beta=0.5, gamma=2.0, tau=2.0): dist_loss(s, t, beta=0.5, gamma=2.0, tau=2.0),
    }
    for loss, wanted in pairs.items():
        found = Distiller(student, loss, teacher).setup(batch)(batch).total
        torch.testing.assert_close(found, wanted)
    s1, t1 = student.layer1(batch.inputs), teacher.layer1(batch.inputs)
    s2, t2 = student.layer2(s1), teacher.layer2(t1)
    s3, t3 = student.layer3(s2).mean((2, 3)), teacher.layer3(t2).mean((2, 3))
    for loss, wanted in {
        AT(["layer1", "layer2"], p=3.0): at_loss([s1, s2], [t1, t2], p=3.0),
        AT("layer1", "layer2"): at_loss(s1, t2),
        RKD(distance_weight=1.0, angle_weight=2.0): rkd_loss(s3, t3, distance_weight=1.0, angle_weight=2.0),
    }.items():
        torch.testing.assert_close(Distiller(student, loss, teacher).setup(batch)(batch).total, wanted)
    assert AT().student_taps == ("stages",)


def test_masked_samples_count_for_nothing() -> None:
    batch = make_batch()
    masked = batch.replace(mask=torch.arange(8) < 5)
    fewer = Batch(batch.inputs[:5], labels=batch.labels[:5], index=batch.index[:5])
    for loss in (*ALL, CRD(memory="batch")):
        distiller = make(loss).eval()
        torch.testing.assert_close(distiller(masked).total, distiller(fewer).total)


class TestFitNets:
    def test_hint_stage_trains_only_up_to_the_guided_layer(self) -> None:
        distiller = make(FitNets("layer2"))
        distiller(make_batch()).total.backward()
        trained = {name for name, p in distiller.named_parameters() if p.grad is not None}
        assert {n.split(".")[1] for n in trained if n.startswith("student.")} == {"layer1", "layer2"}
        assert any("regressor" in n for n in trained)

    def test_regressor_of_the_paper(self) -> None:
        student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 6, 5))
        loss = FitNets("0")
        batch = Batch(torch.randn(2, 3, 12, 12))
        distiller = Distiller(student, loss, teacher).setup(batch)
        assert loss.regressor.kernel_size == (3, 3)
        wanted = fitnets_loss(loss.regressor(student(batch.inputs)), teacher(batch.inputs))
        torch.testing.assert_close(distiller(batch).total, wanted)

    def test_equal_shapes_need_no_regressor(self) -> None:
        teacher = Net(4)
        loss = FitNets("layer2")
        distiller = make(loss, teacher)
        assert not list(loss.parameters())
        distiller.student.load_state_dict(teacher.state_dict())
        assert distiller(make_batch()).total == 0

    def test_regressor_ends_like_the_hint(self) -> None:
        for relu, wanted in ((None, True), (False, False)):
            loss = FitNets("layer2", relu=relu)
            make(loss)
            assert any(isinstance(m, nn.ReLU) for m in loss.regressor.modules()) == wanted

    def test_smaller_student_map(self) -> None:
        loss = FitNets("layer2", "layer1")
        distiller = make(loss)
        assert distiller(make_batch()).total.isfinite()

    def test_decay_of_the_second_stage(self) -> None:
        decay = TeacherDecay()
        found = [float(decay(epoch / 500)) for epoch in (0, 4, 5, 202, 400, 450, 500)]
        assert found == pytest.approx([4, 4, 4 - 3 / 396, 2.5, 1, 1, 1], abs=1e-5)

    def test_second_stage_is_the_papers(self) -> None:
        """H(y, p) + lambda H(p_teacher, p_student) at temperature 3: the same gradient, without the T^2."""
        batch, teacher = make_batch(), Net(6)
        student = Net(4)
        distiller = Distiller(student, CrossEntropy() + TeacherDecay() * (1 / 9) * KD(temperature=3.0), teacher)
        distiller.setup(batch)(batch.replace(progress=0.5)).total.backward()
        found = student.fc.weight.grad.clone()
        student.zero_grad()
        logits = student(batch.inputs)
        soft = (teacher(batch.inputs).detach() / 3).softmax(-1)
        weight = float(TeacherDecay()(0.5))
        loss = cross_entropy_loss(logits, batch.labels) - weight * (soft * (logits / 3).log_softmax(-1)).sum(-1).mean()
        loss.backward()
        torch.testing.assert_close(found, student.fc.weight.grad)

    def test_plural_role_is_refused(self) -> None:
        with pytest.raises(LimbeckError, match="stages:0"):
            make(FitNets("stages"))


def test_unknown_layer_is_named() -> None:
    with pytest.raises(TapError, match="layer2"):
        make(AT(["layer22"]))


class TestCRD:
    def test_resume_goes_on_exactly(self) -> None:
        whole = make(CRD(negatives=32))
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
        steps(whole, optimizer, 0, 4)
        saved = {k: v.clone() for k, v in whole.state_dict().items()}
        wanted = steps(whole, optimizer, 4, 8)
        resumed = make(CRD(negatives=32))
        resumed.load_state_dict(saved)
        found = steps(resumed, torch.optim.SGD(resumed.parameters(), lr=0.05), 4, 8)
        assert found == wanted
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    def test_bank_moves_in_training_only(self) -> None:
        loss = CRD(negatives=32)
        distiller = make(loss)
        before = loss.banks.student_bank.clone()
        distiller.eval()(make_batch(8))
        assert torch.equal(loss.banks.student_bank, before)
        distiller.train()(make_batch(8))
        moved = (loss.banks.student_bank != before).any(1).nonzero().flatten()
        assert moved.tolist() == list(range(8, 16))
        assert loss.banks.step == 1

    def test_teacher_projector_learns_and_teacher_does_not(self) -> None:
        loss = CRD(negatives=32)
        teacher = Net(6)
        make(loss, teacher)(make_batch(8)).total.backward()
        assert loss.embed_teacher.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in teacher.parameters())

    def test_tokens_are_averaged_where_they_count(self) -> None:
        features = torch.randn(2, 4, 6, 7)
        counts = torch.tensor([[True] * n + [False] * (6 - n) for n in (6, 1, 3, 4)])
        batch = Batch(features[0], index=torch.arange(4), mask=counts)
        loss = CRD("x", negatives=8)
        loss.setup(Trace(None, {"x": features[0]}), Trace(None, {"x": features[1]}), batch, DataInfo(samples=16))
        loss.eval()
        mean = [torch.stack([f[i, counts[i]].mean(0) for i in range(4)]) for f in features]
        wanted = loss(Trace(None, {"x": mean[0]}), Trace(None, {"x": mean[1]}), batch.replace(mask=None))
        found = loss(Trace(None, {"x": features[0]}), Trace(None, {"x": features[1]}), batch)
        torch.testing.assert_close(found, wanted)

    def test_needs_ids_and_their_number(self) -> None:
        batch = make_batch()
        with pytest.raises(ConfigError, match=r"data\.samples.*within the batch"):
            Distiller(Net(4), CRD(), Net(6)).setup(batch)
        distiller = make(CRD(negatives=8))
        with pytest.raises(LimbeckError, match=r"batch\.index"):
            distiller(batch.replace(index=None))
        with pytest.raises(LimbeckError, match=r"batch\.index.*found 64.*0 to 63"):
            distiller(make_batch(60))

    def test_in_batch_needs_neither(self) -> None:
        loss = CRD(memory="batch")
        distiller = Distiller(Net(4), loss, Net(6)).setup(make_batch())
        assert distiller(make_batch().replace(index=None, labels=None)).total.isfinite()
        assert not dict(loss.named_buffers())

    @pytest.mark.slow
    def test_ranks_keep_the_same_banks(self, tmp_path: Path) -> None:
        """Two ranks with half a batch each end with the banks of one process that saw the whole batch."""
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(tmp_path)], env={**os.environ, "PYTHONPATH": "."}
            )
            for rank in range(2)
        ]
        assert [r.wait(timeout=120) for r in ranks] == [0, 0]
        loss = CRD(negatives=32)
        make(loss)(make_batch(8))
        for rank in range(2):
            bank = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
            torch.testing.assert_close(bank, loss.banks.student_bank)


RANK = """
import sys, torch
from limbeck.core.batch import Batch
from limbeck.objectives.relation.crd import CRD
from tests.objectives.test_classes import make, make_batch
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
loss = CRD(negatives=32)
distiller, batch = make(loss), make_batch(8)
half = slice(4 * rank, 4 * rank + 4)
distiller(Batch(batch.inputs[half], labels=batch.labels[half], index=batch.index[half]))
torch.save(loss.banks.student_bank, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""
