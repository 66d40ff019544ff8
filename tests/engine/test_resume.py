"""A run that was stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.data import as_loader
from limbeck.engine import Stage, Stopped, TrainConfig, fit
from limbeck.models import create
from limbeck.objectives import CRD, KD, CrossEntropy, FitNets
from limbeck.schemes import build


class Tripwire(Objective):
    """Costs nothing, and sends this process a signal at one of its calls."""

    contract = Contract(normalizer="samples")
    student_taps = ("logits",)

    def __init__(self, at: int | None, number: int = signal.SIGINT) -> None:
        super().__init__()
        self._at, self._number, self._calls = at, number, 0

    def forward(self, student, teacher, batch):
        self._calls += self.training
        if self._calls == self._at and self.training:
            os.kill(os.getpid(), self._number)
        return student.logits.sum() * 0.0


def weights(student: nn.Module) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in student.state_dict().values()])


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_s")} for line in lines]


CONFIGS = {
    "plain": {},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "warmup": 0.2, "schedule": {"step": {"value": 1, "milestones": [0.5]}}},
    "scheduler class": {"schedule": "OneCycleLR", "schedule_options": {"max_lr": 0.1}},
    "plateau": {"schedule": "ReduceLROnPlateau", "schedule_options": {"patience": 0}, "monitor": "total"},
    "averaged, in parts, clipped": {"ema": 0.9, "accumulate": 3, "clip": 0.5, "select": "best", "monitor": "nll"},
    "half precision": {"precision": "bf16", "optimizer": "rmsprop", "lr": 1e-3},
}


@pytest.mark.parametrize(("name", "at"), [("plain", 12), *((name, 7) for name in CONFIGS)])  # 12: an epoch's end
def test_stop_and_resume(loader, distiller, tmp_path, capfd, name, at):
    def run(stop_at: int | None, resume: bool = False):
        loss = CrossEntropy() + 0.5 * KD() + Tripwire(stop_at and stop_at * config.accumulate)
        stages = [Stage("kd", distiller(loss), config)]
        return fit(stages, loader(), loader(train=False), out=folder, resume=resume, quiet=True)

    config = TrainConfig(epochs=3, log_every=5, **CONFIGS[name])
    folder = tmp_path / "whole"
    wanted = run(None)
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped, match=f"stopped after step {at}; resume from"):
        run(at)
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    found = run(None, resume=True)
    assert torch.equal(weights(found.student), weights(wanted.student))
    assert without_times(found.history) == without_times(wanted.history)
    assert found.best == wanted.best
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_sigterm_is_heard_too_and_handlers_are_put_back(loader, distiller, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stages = [Stage("kd", distiller(CrossEntropy() + Tripwire(2, signal.SIGTERM)), TrainConfig(steps=9))]
    with pytest.raises(Stopped) as caught:
        fit(stages, loader(), out=tmp_path, quiet=True)
    assert caught.value.number == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_stop_without_a_folder_says_so(loader, distiller):
    stages = [Stage("kd", distiller(CrossEntropy() + Tripwire(2)), TrainConfig(steps=9))]
    with pytest.raises(Stopped, match="nothing was saved"):
        fit(stages, loader(), quiet=True)


@pytest.mark.parametrize(("at", "layout"), [(3, False), (8, True)])  # the end of the first stage; within the second
def test_two_stages_and_a_memory_bank(tmp_path, at, layout):
    torch.manual_seed(0)
    images, labels = torch.randn(48, 1, 8, 8), torch.arange(48) % 3
    teacher = create("resnet14", num_classes=3, in_channels=1)

    def run(stop_at: int | None, folder, resume: bool = False):
        torch.manual_seed(1)
        student = create("resnet8", num_classes=3, in_channels=1)
        # The wire hangs in both stages: in the hint stage as a further hint.
        loss = FitNets() + CrossEntropy() + 0.8 * CRD(negatives=8, dim=4)
        stages = build("hint_then_kd").stages(
            student, loss, teacher, TrainConfig(epochs=4, lr=0.01, channels_last=layout)
        )
        wired = []
        for k, stage in enumerate(stages):
            terms = stage.distiller.loss + Tripwire(stop_at if k == 0 else stop_at and stop_at - 3)
            wired.append(
                Stage(stage.name, Distiller(student, terms, teacher), stage.config, stage.learn, stage.learn_to)
            )
        train = as_loader((images, labels), batch_size=16, train=True)
        return fit(wired, train, out=folder, resume=resume, quiet=True)

    wanted = run(None, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(at, tmp_path / "stopped")
    found = run(None, tmp_path / "stopped", resume=True)
    assert torch.equal(weights(found.student), weights(wanted.student))
    assert found.steps == 12


def test_resuming_a_finished_run_trains_no_further(loader, distiller, tmp_path):
    stages = [Stage("kd", distiller(), TrainConfig(steps=4))]
    wanted = fit(stages, loader(), loader(train=False), out=tmp_path, quiet=True)
    again = fit(
        [Stage("kd", distiller(), TrainConfig(steps=4))], loader(), loader(train=False), out=tmp_path, resume=True
    )
    assert torch.equal(weights(again.student), weights(wanted.student))
    assert again.history == wanted.history
    assert (again.steps, again.best, again.validation) == (4, wanted.best, wanted.validation)


def test_resuming_where_nothing_is_yet_starts(loader, distiller, tmp_path, capfd):
    result = fit([Stage("kd", distiller(), TrainConfig(steps=2))], loader(), out=tmp_path, resume=True)
    assert result.steps == 2
    assert "starting from the beginning" in capfd.readouterr().err


def test_lines_lost_by_others_are_told(loader, distiller, tmp_path, capfd):
    config = TrainConfig(steps=8, checkpoint_every=4, log_every=2, keep=9)
    fit([Stage("kd", distiller(), config)], loader(), out=tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    (tmp_path / "metrics.jsonl").write_text("")
    fit([Stage("kd", distiller(), config)], loader(), out=tmp_path, resume=True, quiet=True)
    assert "lines are missing" in capfd.readouterr().err


def test_a_file_in_the_folders_place(loader, distiller, tmp_path):
    place = tmp_path / "out"
    place.write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        fit([Stage("kd", distiller(), TrainConfig(steps=1))], loader(), out=place, quiet=True)
