"""limbeck cache: build, info, verify, merge; and runs that learn from one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Command

BASE = """
name: cached
data: {source: digits, samples: 100, batch_size: 20, augment: [pad_crop], views: 2}
teacher: {model: resnet8, samples: 100, train: {epochs: 1}, cache: kept}
student: {model: mlp}
loss: kd
train: {epochs: 3, lr: 0.05, device: cpu}
"""
ALONE = "teacher={cache: kept}"


@pytest.fixture
def built(limbeck: Command) -> Path:
    """A recipe, and the cache it names."""
    Path("recipe.yaml").write_text(BASE)
    answer = limbeck("cache", "build", "recipe.yaml", "--quiet")
    assert answer.code == 0, answer.err
    assert "set teacher.cache to it" in answer.err
    return Path("kept")


def test_a_run_needs_neither_weights_nor_teacher(limbeck: Command, built: Path) -> None:
    online = limbeck(
        "run", "recipe.yaml", "--set", "teacher.cache=null", "--quiet", "--out", "runs/online", "--json"
    ).json
    shutil.rmtree("runs")
    shutil.rmtree("teachers")  # where the trained teacher was kept
    cached = limbeck("run", "recipe.yaml", "--set", ALONE, "--quiet", "--out", "runs/cached", "--json").json
    assert not Path("teachers").exists()
    assert not Path("runs/teachers").exists()
    assert abs(online["accuracy"] - cached["accuracy"]) < 0.03
    assert abs(online["agreement"] - cached["agreement"]) < 0.03  # the held-out data were stored too
    assert cached["teacher"]["accuracy"] == pytest.approx(online["teacher"]["accuracy"])
    assert cached["training"]["steps"] == 15
    named = limbeck("run", "recipe.yaml", "--quiet", "--out", "runs/named", "--json").json
    assert named["accuracy"] == cached["accuracy"]


def test_info_and_json(limbeck: Command, built: Path) -> None:
    table = limbeck("cache", "info", built)
    assert table.code == 0
    assert "2" in table.out
    assert "float16" in table.out
    train, test = limbeck("cache", "info", built, "--json").json
    assert (train["data"]["samples"], train["views"], train["rows"]) == (100, 2, 200)
    assert (test["data"]["samples"], test["views"]) == (359, 1)
    assert 0 < train["errors"]["logits"]["kl"]["mean"] < 1e-6
    assert train["bytes_a_row"] == train["bytes"] / 200


def test_verify_asks_again(limbeck: Command, built: Path) -> None:
    answer = limbeck("cache", "verify", built, "--recipe", "recipe.yaml", "--samples", "30", "--json")
    assert [fact["asked"] for fact in answer.json] == [30, 30]
    other = limbeck("cache", "verify", built, "--recipe", "recipe.yaml", "--set", "teacher.seed=4")
    assert other.code == 2
    assert "teacher.weights: the cache is of another teacher" in other.err
    shard = next((built / "train" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    damaged = limbeck("cache", "verify", built)
    assert damaged.code == 2
    assert "this shard is damaged" in damaged.err


def test_parts_are_merged(limbeck: Command, built: Path) -> None:
    for i in range(2):
        answer = limbeck("cache", "build", "recipe.yaml", "--quiet", "--part", f"{i}/2", "--out", f"part{i}")
        assert answer.code == 0
        assert "merge puts parts together" in answer.err
    shutil.copytree("part0/teachers", "teachers") if Path("part0/teachers").exists() else None
    merged = limbeck("cache", "merge", "whole", "part0", "part1", "--json")
    assert merged.code == 0, merged.err
    for name in ("train/index.json", "test/index.json", "train/shards/000000.safetensors"):
        assert (Path("whole") / name).read_bytes() == (built / name).read_bytes()


def test_other_codecs_and_views(limbeck: Command) -> None:
    Path("recipe.yaml").write_text(BASE)
    store = ["--store", "logits={top_k: {k: 5}}", "--store", "penultimate"]
    answer = limbeck("cache", "build", "recipe.yaml", "--quiet", "--views", "3", *store, "--out", "sparse", "--json")
    train = answer.json[0]
    assert train["views"] == 3
    assert [s["tap"] for s in train["signals"]] == ["logits", "penultimate"]
    assert "top_k" in train["signals"][0]["codec"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.augment=[flip]",
            "teacher.cache: data.augment.0.flip: the cache is of another data set, or of other views",
        ),
        ("data.samples=90", "found 100 in the cache; wanted 90"),
        ("data.normalize={mean: [0.5], std: [0.5]}", "data.normalise.mean.0: the cache is of another data set"),
        ("data.view_seed=5", "found 0 in the cache; wanted 5"),
        ("data.views=3", "the cache has fewer views; found 3; wanted at most 2"),
        ("teacher.model=resnet14", "the cache is of another teacher"),
        ("teacher.train.epochs=2", "the cache is of another teacher"),
        ("loss={rkd: 1.0}", "penultimate: the cache does not hold this; found a cache of logits"),
        ("loss={mixkd_std: 1.0}", "not those that the teacher saw"),
        ("teacher.cache=nowhere", "this file is missing"),
    ],
)
def test_everything_that_does_not_fit_is_told_before_training(
    limbeck: Command, built: Path, change: str, message: str
) -> None:
    answer = limbeck("check", "recipe.yaml", "--set", change)
    assert answer.code == 2
    assert message in " ".join(answer.err.split())
    assert answer.err.count("\n") <= 3


def test_a_seed_of_its_own_keeps_the_views_of_the_cache(limbeck: Command, built: Path) -> None:
    for seed in (0, 1):
        result = limbeck("run", "recipe.yaml", "--set", f"seed={seed}", "--out", f"runs/{seed}", "--quiet", "--json")
        assert result.code == 0, result.err
    first, second = (load_file(f"runs/{seed}/student/model.safetensors") for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_without_a_number_of_views_nothing_is_built(limbeck: Command) -> None:
    Path("recipe.yaml").write_text(BASE.replace(", views: 2", ""))
    answer = limbeck("cache", "build", "recipe.yaml")
    assert answer.code == 2
    assert "data.views: a new view each epoch cannot be stored" in answer.err


@pytest.mark.slow
def test_two_ranks_read_one_cache(limbeck: Command, built: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "limbeck.cli.main", "run", "recipe.yaml", "--out", "runs/two", "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(Path("runs/two/run.json").read_text())["ranks"] == 2
    one = limbeck("run", "recipe.yaml", "--out", "runs/one", "--quiet", "--json").json
    first, second = (load_file(f"runs/{name}/student/model.safetensors") for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)
    assert one["training"]["steps"] == 15
