from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.trace import Trace
from limbeck.objectives.parts.pace import Pace
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.taid import TAID, taid_loss
from tests.objectives.reference import kl, mean, softmax

STEPS = 6


def said(step: int, rows: slice = slice(None)) -> tuple[Trace, Trace, Tensor]:
    """What both say at a step, and which places count."""
    generator = torch.Generator().manual_seed(step)
    student, teacher = 3 * torch.randn(2, 4, 3, 5, generator=generator)
    mask = torch.rand(4, 3, generator=generator) < 0.7
    return Trace(student[rows]), Trace(teacher[rows]), mask[rows]


def path(loss: TAID, first: int = 0, last: int = STEPS) -> list[float]:
    """t at each step of a run with whole batches."""
    found = []
    for step in range(first, last):
        student, teacher, mask = said(step)
        loss(student, teacher, Batch(student.logits, mask=mask, progress=step / STEPS))
        found.append(float(loss.t))
    return found


def lively(**options: float) -> TAID:
    """One whose t moves much and not evenly."""
    return TAID(**{"start": 0.1, "rate": 0.5, "momentum": 0.3, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [0.0, 0.4, 0.75, 1.0])
def test_equals_the_paper(t: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    student.requires_grad_()
    wanted, slopes = [], []
    for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax([(1 - t) * a + t * b for a, b in zip(s, z, strict=True)]), softmax(s)
        wanted.append(kl(p, q))
        slopes.append([(b - a) / 5 for a, b in zip(p, q, strict=True)])
    value = taid_loss(student, teacher, t=t)
    assert value.item() == pytest.approx(mean(wanted), rel=1e-9, abs=1e-14)
    value.backward()
    torch.testing.assert_close(student.grad, torch.tensor(slopes).double())


def test_its_ends() -> None:
    """KD at the teacher's end, nothing at the student's, and nothing where they agree."""
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    torch.testing.assert_close(taid_loss(student, teacher, t=1.0), kd_loss(student, teacher, temperature=1.0))
    assert taid_loss(student, teacher, t=0.0).item() == pytest.approx(0, abs=1e-14)
    assert taid_loss(student, student.clone(), t=0.3).item() == pytest.approx(0, abs=1e-14)


def test_the_cross_entropy_has_the_same_gradient() -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double()
    gradients = []
    for signal in ("divergence", "cross_entropy"):
        leaf = student.clone().requires_grad_()
        taid_loss(leaf, teacher, t=0.6, signal=signal).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("t", [0.4, 1.0])
def test_a_class_that_one_rules_out(t: float) -> None:
    student = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    value = taid_loss(student, torch.tensor([[0.0, 1.0, 2.0]]), t=t)
    value.backward()
    torch.testing.assert_close(value, taid_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), t=t))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_a_constant_loss_moves_t_by_half_the_rate() -> None:
    """5e-4 / 2 of the 0.6 that are left of the way from 0.4: 1.5e-4 (the straight line is kept out of the way)."""
    pace = Pace(0.4, 1.0, 5e-4, 0.99)
    for _ in range(3):
        t = pace.begin(Batch(torch.zeros(1)))
        pace.note(torch.tensor(2.0), Batch(torch.zeros(1)))
    assert t.item() == pytest.approx(0.4 + 1.5e-4, abs=1e-7)


def test_t_never_goes_back_and_keeps_to_its_bounds() -> None:
    for loss in (lively(), lively(end=0.7), TAID()):
        found = path(loss)
        assert found == sorted(found)
        assert loss.pace.start - 1e-6 <= found[0] <= found[-1] <= loss.pace.end + 1e-6
        line = [float(loss.pace.line((step - 1) / STEPS)) for step in range(2, STEPS)]
        assert all(t >= least - 1e-6 for t, least in zip(found[2:], line, strict=True))
    ahead = lively(rate=1.0, momentum=0.9)
    assert max(t - float(ahead.pace.line(step / STEPS)) for step, t in enumerate(path(ahead))) > 0.05


def test_without_adapting_it_keeps_to_the_line() -> None:
    loss = TAID(start=0.2, end=0.8, adaptive=False)
    student, teacher, mask = said(0)
    for progress in (0.0, 0.5, 1.0):
        found = loss(student, teacher, Batch(student.logits, mask=mask, progress=progress))
        torch.testing.assert_close(found, taid_loss(student.logits, teacher.logits, t=0.2 + 0.6 * progress, mask=mask))


@pytest.mark.parametrize("signal", ["divergence", "cross_entropy"])
def test_a_step_is_one_step_however_it_is_cut(signal: str) -> None:
    whole, cut = (TAID(0.1, 1.0, 0.5, 0.3, signal=signal) for _ in range(2))  # type: ignore[arg-type]
    wanted, found, value = path(whole), [], 0.0
    for step in range(STEPS):
        mask = said(step)[2]
        totals = {"positions": mask.sum()}
        value = 0.0
        for rows in (slice(0, 1), slice(1, 4)):
            student, teacher, part = said(step, rows)
            batch = Batch(student.logits, mask=part, progress=step / STEPS, totals=totals)
            value += float(cut(student, teacher, batch) * batch.share("positions"))
            found.append(float(cut.t))
    assert found[::2] == found[1::2]  # t stays within a step
    assert found[::2] == pytest.approx(wanted, abs=1e-6)
    assert float(cut.pace.running) == pytest.approx(value, abs=1e-6)


def test_a_resumed_run_goes_on_exactly() -> None:
    wanted = path(lively())
    first = lively()
    begun = path(first, 0, 3)
    second = lively()
    second.load_state_dict(first.state_dict())
    assert begun + path(second, 3) == wanted


def test_nothing_moves_in_evaluation_or_by_steps_that_say_nothing() -> None:
    loss = lively()
    path(loss, 0, 3)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss.eval()
    path(loss, 3, 5)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    loss.train()
    student, teacher, mask = said(3)
    for _ in range(3):  # nothing counts
        loss(student, teacher, Batch(student.logits, mask=torch.zeros_like(mask), progress=0.5))
    after, previous = float(loss.t), float(loss.pace.previous)
    for _ in range(3):
        loss(student, teacher, Batch(student.logits, mask=torch.zeros_like(mask), progress=0.6))
    assert (float(loss.t), float(loss.pace.previous)) == (after, previous)


def test_what_it_refuses() -> None:
    for options in ({"start": -0.1}, {"momentum": 1.1}, {"rate": 2.0}, {"end": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            TAID(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_ranks_keep_one_pace(tmp_path: Path) -> None:
    """Two ranks with uneven halves of each batch follow the path of one process that sees all of it."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env={**os.environ, "PYTHONPATH": "."})
        for rank in range(2)
    ]
    assert [r.wait(timeout=120) for r in ranks] == [0, 0]
    wanted = path(lively())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == pytest.approx(wanted, abs=1e-6)


RANK = """
import sys, torch
from limbeck.core.batch import Batch
from tests.objectives.response.test_taid import STEPS, lively, said
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
loss, found = lively(), []
for step in range(STEPS):
    totals = {"positions": said(step)[2].sum() / 2}
    student, teacher, mask = said(step, slice(0, 1) if rank == 0 else slice(1, 4))
    loss(student, teacher, Batch(student.logits, mask=mask, progress=step / STEPS, totals=totals))
    found.append(float(loss.t))
torch.save(found, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""
