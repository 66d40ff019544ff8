"""What every scheme promises: it runs from a recipe, dies anywhere, ends with the same bits, ships a plain student."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck.data.language import load_tokens
from limbeck.engine.run import Run
from limbeck.models.student import load_student
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.schemes import schemes

COMMON = [
    "data.samples=60",
    "data.batch_size=20",
    "teacher.samples=60",
    "teacher.train={steps: 3}",
    "student={model: mlp_8}",
    "train={steps: 6, lr: 0.05, checkpoint_every: 2, validate_steps: 3}",
]
#: In their place for schemes that write texts.
TEXTS = [
    "data={source: 'tests.schemes.tiny:pairs', batch_size: 12}",
    "teacher={model: 'tests.schemes.tiny:llama', options: {width: 24}, train: {steps: 3}}",
    "student={model: 'tests.schemes.tiny:llama'}",
    "train={steps: 6, lr: 0.05, checkpoint_every: 2, validate_steps: 3}",
]
#: For each scheme the settings it needs; a new one has to be entered here.
EXAMPLES: dict[str, list[str]] = {
    "ban": ["loss=kd", "scheme={ban: {generations: 2}}"],
    "bilevel": ["loss=tgeo_kd", "scheme={bilevel: {samples: 8, share: 0.2}}"],
    "ddk": [
        *TEXTS,
        "data={source: 'tests.schemes.tiny:tagged', batch_size: 12}",
        "loss=kd",
        "scheme={ddk: {interval: 2}}",
    ],
    "gkd": [*TEXTS, "loss=jsd", "scheme={gkd: {lmbda: 0.7, teacher_share: 0.5, max_new_tokens: 6}}"],
    "hint_then_kd": ["loss=fitnets", "scheme={hint_then_kd: {tap: stages:-1}}", "student={model: resnet8}"],
    "minillm": [*TEXTS, "loss=cross_entropy", "scheme={minillm: {max_new_tokens: 6}}"],
    "moe_kd": [
        *TEXTS,
        "teacher={model: 'tests.schemes.tiny:mixtral', options: {width: 24}, train: {steps: 3}}",
        "loss=reverse_kl",
        "scheme={moe_kd: {way: student_aware, lmbda: 0.5, max_new_tokens: 6}}",
    ],
    "mutual": ["loss=kd", "scheme={mutual: {peers: 2}}"],
    "offline": ["loss=kd"],
    "seq_kd": [
        *TEXTS,
        "loss=cross_entropy",
        "scheme={seq_kd: {beams: 2, alpha: 0.6, max_new_tokens: 6, unfinished: keep}}",
    ],
    "takd": ["loss=kd", "scheme=takd", "players={assistant: {model: mlp_16}}"],
}


class Killed(Exception):
    pass


def settings_of(key: str) -> list[str]:
    return [*([] if EXAMPLES[key][: len(TEXTS)] == TEXTS else COMMON), *EXAMPLES[key]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_every_scheme_has_an_example():
    assert set(EXAMPLES) == set(schemes())


@pytest.mark.parametrize("key", sorted(EXAMPLES))
def test_it_dies_anywhere_and_ends_with_the_same_bits(key, tmp_path, monkeypatch):
    recipe = load("digits", settings_of(key))
    teachers = tmp_path / "teachers"
    whole = run(recipe, tmp_path / "whole", teachers=teachers, quiet=True)
    after, steps, due = Run.after_step, [], [0]
    dice = random.Random(key)

    def counted(self):
        after(self)
        steps.append(1)
        if len(steps) == due[0]:
            raise Killed

    monkeypatch.setattr(Run, "after_step", counted)
    total, deaths = whole["training"]["steps"], 0
    for moment in sorted(dice.sample(range(1, total + 1), 3)):
        due[0] = moment
        steps.clear()
        try:
            run(recipe, tmp_path / "cut", resume=deaths > 0, teachers=teachers, quiet=True)
        except Killed:
            deaths += 1
    assert deaths >= 1
    monkeypatch.setattr(Run, "after_step", after)
    again = run(recipe, tmp_path / "cut", resume=True, teachers=teachers, quiet=True)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again["accuracy"] == whole["accuracy"]
    assert again["training"]["steps"] == total


@pytest.mark.parametrize("key", sorted(EXAMPLES))
def test_its_student_is_a_plain_model(key, tmp_path):
    run(load("digits", settings_of(key)), tmp_path / "run", quiet=True)
    student = load_student(tmp_path / "run")
    if load("digits", settings_of(key)).data.source == "digits":
        assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        assert type(student).__module__.startswith("limbeck.models")
    else:
        assert student(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 258)
        assert type(student).__module__.startswith("transformers.models")
        assert load_tokens(tmp_path / "run" / "student").size == 258
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", sorted(EXAMPLES))
def test_killed_with_sigkill(key, tmp_path):
    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        options = [part for s in settings_of(key) for part in ("--set", s)]
        command = [sys.executable, "-m", "limbeck.cli.main", "run", "digits", *options, "--quiet", "--out", out, *more]
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    whole = start("runs/whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    process = start("runs/cut")
    while process.poll() is None and not list((tmp_path / "runs/cut").rglob("step-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    again = start("runs/cut", "--resume")
    assert again.wait() == 0, again.stderr.read().decode()
    first, second = weights(tmp_path / "runs/whole"), weights(tmp_path / "runs/cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
