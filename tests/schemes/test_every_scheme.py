"""What every scheme promises: it runs from a recipe, dies anywhere, ends with the same bits, ships a plain student."""

from __future__ import annotations

import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file

from limbeck.core.errors import ConfigError
from limbeck.core.trace import logits_of
from limbeck.data.language import load_tokens
from limbeck.engine.run import Run
from limbeck.models.student import load_student
from limbeck.recipes.check import check
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.schemes import schemes

COMMON = [
    "data.samples=60",
    "data.batch_size=20",
    "teacher={model: mlp_16, samples: 60, train: {steps: 3}}",
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
#: What each scheme is tried with lies in examples/KEY.yaml: on which base, and the settings that it needs beside that.
FOLDER = Path(__file__).with_name("examples")
EXAMPLES = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))}


class Killed(Exception):
    pass


def settings_of(key: str) -> list[str]:
    return [*(TEXTS if EXAMPLES[key]["base"] == "texts" else COMMON), *EXAMPLES[key]["set"]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_every_scheme_has_an_example():
    assert set(EXAMPLES) == set(schemes())


#: Texts are written and read slowly; their examples are tried among the slow tests.
KEYS = [pytest.param(k, marks=[pytest.mark.slow] * (EXAMPLES[k]["base"] == "texts")) for k in sorted(EXAMPLES)]


@pytest.mark.parametrize("key", KEYS)
def test_it_dies_anywhere_ends_with_the_same_bits_and_leaves_a_plain_model(key, tmp_path, monkeypatch):
    assert check("digits", settings_of(key)) == []
    recipe = load("digits", settings_of(key))
    teachers = tmp_path / "teachers"
    whole = run(recipe, tmp_path / "whole", teachers=teachers, quiet=True)
    after, steps, total = Run.after_step, [], whole["training"]["steps"]
    moment = random.Random(key).randint(1, total)

    def counted(self):
        after(self)
        steps.append(1)
        if len(steps) == moment:
            raise Killed

    monkeypatch.setattr(Run, "after_step", counted)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "cut", teachers=teachers, quiet=True)
    monkeypatch.setattr(Run, "after_step", after)
    again = run(recipe, tmp_path / "cut", resume=True, teachers=teachers, quiet=True)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again["accuracy"] == whole["accuracy"]
    assert again["training"]["steps"] == total
    check_plain(key, tmp_path / "cut")


def check_plain(key: str, folder: Path) -> None:
    """What the run left is a model of its own kind and no more."""
    student = load_student(folder)
    if "plain" in EXAMPLES[key]:  # of another kind: a function that looks at it
        pkgutil.resolve_name(EXAMPLES[key]["plain"])(student, folder)
    elif EXAMPLES[key]["base"] == "texts":
        ids = torch.zeros(2, 5, dtype=torch.long)
        more = {"decoder_input_ids": ids} if student.config.is_encoder_decoder else {}
        assert student(ids, **more).logits.shape == (2, 5, 258)
        assert type(student).__module__.startswith(EXAMPLES[key].get("module", "transformers.models"))
        assert load_tokens(folder / "student").size == 258
    else:
        assert [*student(torch.zeros(2, 1, 8, 8)).shape] == EXAMPLES[key].get("shape", [2, 10])
        assert type(student).__module__.startswith("limbeck.models")
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


IMAGES = [k for k, one in EXAMPLES.items() if one["base"] == "images" and not any(s[:4] == "data" for s in one["set"])]


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """A few JPEG images of CIFAR-10, as files are that people have."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, rows in (("train", 120), ("test", 30)):
        table = parquet.read_table(shared_data / "cifar10" / f"{name}.parquet")
        parquet.write_table(table.slice(0, rows), folder / f"{name}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("key", IMAGES)
def test_it_learns_from_jpeg_images(key, photographs, tmp_path):
    data = [f"data.source={photographs}", "data.options={validation: 0.5}", "data.samples=null"]
    recipe = load("digits", [*settings_of(key), *data])
    found = run(recipe, tmp_path / "run", quiet=True)
    student = load_student(tmp_path / "run")
    assert [*logits_of(student(torch.zeros(2, 3, 32, 32))).shape] == EXAMPLES[key].get("shape", [2, 10])
    assert found["data"] != "digits"
    assert found["samples"] == 30


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


def test_losses_that_only_training_knows_are_nothing_to_monitor(tmp_path):
    recipe = load("digits", [*settings_of("mdcs"), "train.monitor=total"])
    with pytest.raises(ConfigError, match=r"train.monitor: this training has losses of its own.*found expert_"):
        run(recipe, tmp_path, quiet=True)
