"""Checkpoints: whole or not there, and every damage noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.core.errors import CheckpointError
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.engine.checkpoint import Checkpoints
from limbeck.objectives import KD, CrossEntropy


def some(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"student": {"weight": torch.full((3, 2), float(step))}, "random": {"torch": torch.arange(5)}}


def test_round_trip(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(3, some(3), {"place": {"step": 3}, "value": 0.1})
    found, damaged = store.newest()
    assert not damaged
    assert found.state == {"place": {"step": 3}, "value": 0.1}
    assert torch.equal(found.tensors("student")["weight"], some(3)["student"]["weight"])
    assert found.tensors("ema") == {}


def test_newest_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, some(step), {})
    assert store.names() == ["step-00000005", "step-00000004"]
    assert json.loads((tmp_path / "last.json").read_text()) == {"checkpoint": "step-00000005", "step": 5}


def test_best_weights_are_those_of_their_step(tmp_path):
    store = Checkpoints(tmp_path)
    for step in (3, 7):
        store.save_best(some(step)["student"], {"step": step, "metric": "nll", "value": 0.1})
    assert torch.equal(store.best(7)["weight"], some(7)["student"]["weight"])
    with pytest.raises(CheckpointError, match="of step 3, are missing or damaged"):
        store.best(3)
    damage(tmp_path / "best.safetensors", "flip", 0.99)
    with pytest.raises(CheckpointError, match="best.safetensors"):
        store.best(7)


def test_nothing_is_written_over(tmp_path):
    store = Checkpoints(tmp_path, keep=9)
    first = store.save(4, some(1), {})
    second = store.save(4, some(2), {})
    assert first != second
    assert store.names() == [second.name, first.name]


def test_shared_and_strided_tensors_are_saved(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tied = {
        "a": base,
        "b": base,
        "part": base[1:3, ::2],
        "image": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    Checkpoints(tmp_path).save(1, {"student": tied}, {})
    found = Checkpoints(tmp_path).newest()[0].tensors("student")
    assert all(torch.equal(found[k], v) for k, v in tied.items())


def test_half_written_is_no_checkpoint(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, some(1), {})
    half = tmp_path / "checkpoints" / ".writing-step-00000002-77"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", half)
    assert store.newest()[0].path.name == "step-00000001"
    store.clean()
    assert not half.exists()


def damage(path: Path, kind: str, position: float) -> None:
    """Cut a file, flip one of its bits, or remove it."""
    data = bytearray(path.read_bytes())
    at = min(int(position * len(data)), len(data) - 1)
    if kind == "cut":
        path.write_bytes(data[:at])
    elif kind == "flip":
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
    else:
        path.unlink()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["cut", "flip", "remove"]),
    file=st.sampled_from(["student.safetensors", "random.safetensors", "state.json"]),
    position=st.floats(0, 1, exclude_max=True),
)
def test_every_damage_is_noticed_and_named(tmp_path, kind, file, position):
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    store = Checkpoints(tmp_path, keep=9)
    store.save(1, some(1), {"step": 1})
    newest = store.save(2, some(2), {"step": 2})
    whole = (newest / file).read_bytes()
    damage(newest / file, kind, position)
    found, damaged = store.newest()
    if found.path == newest:  # blanks between JSON's words carry nothing
        assert json.loads((newest / file).read_bytes()) == json.loads(whole)
    else:
        assert found.state == {"step": 1}
        assert file in str(damaged[0])


def test_none_whole_is_an_error(tmp_path):
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        damage(store.save(step, some(step), {}) / "student.safetensors", "flip", 0.9)
    with pytest.raises(CheckpointError, match="no checkpoint is whole.*step-00000002/student.safetensors"):
        store.newest()


def trained(
    loader, distiller, out: Path | None, steps: int = 12, resume: bool = False, **changes: object
) -> torch.Tensor:
    settings = {"epochs": None, "steps": steps, "checkpoint_every": 4, "keep": 9, **changes}
    result = fit([Stage("kd", distiller(), TrainConfig(**settings))], loader(), out=out, resume=resume, quiet=True)
    return torch.cat([v.double().flatten() for v in result.student.state_dict().values()])


@pytest.mark.parametrize("file", ["student", "objectives", "optimizer", "random", "state"])
def test_a_damaged_checkpoint_never_goes_into_a_run(loader, distiller, tmp_path, capfd, file):
    wanted = trained(loader, distiller, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    name = "state.json" if file == "state" else f"{file}.safetensors"
    damage(tmp_path / "checkpoints" / "step-00000008" / name, "flip", 0.7)
    assert torch.equal(trained(loader, distiller, tmp_path, resume=True), wanted)
    message = capfd.readouterr().err
    assert f"step-00000008/{name}" in message
    assert "going on from the checkpoint before it" in message


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"lr": 0.01}, "stages.0.train.lr"),
        ({"optimizer": "adam"}, "stages.0.train.optimizer"),
        ({"steps": 13}, "stages.0.train.steps"),
        ({"seed": 5}, "seed"),
        ({"batch_size": 8}, "data.batch_size"),
        ({"temperature": 2.0}, "stages.0.loss.kd.temperature"),
        ({"weight": 0.7}, "stages.0.loss.kd.weight"),
        ({"width": 9}, "stages.0.student.0.bias"),
        ({"teacher": 3}, "stages.0.teacher"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(loader, distiller, tmp_path, change, where):
    def start(resume: bool, **change: object) -> None:
        loss = CrossEntropy() + change.pop("weight", 0.5) * KD(change.pop("temperature", 4.0))
        found = distiller(loss, **{k: change.pop(k) for k in ("width", "teacher") if k in change})
        data, seed = loader(batch_size=change.pop("batch_size", 16)), change.pop("seed", 0)
        config = TrainConfig(**{"steps": 3, **change})
        fit([Stage("kd", found, config)], data, out=tmp_path, resume=resume, seed=seed, quiet=True)

    start(False)
    with pytest.raises(CheckpointError) as caught:
        start(True, **change)
    assert caught.value.where == where


def test_what_changes_no_weight_may_change_on_resume(loader, distiller, tmp_path):
    wanted = trained(loader, distiller, None)
    trained(loader, distiller, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    again = trained(loader, distiller, tmp_path, resume=True, keep=1, log_every=1, checkpoint_every=3)
    assert torch.equal(again, wanted)


def test_checkpoints_by_the_clock(loader, distiller, tmp_path):
    trained(loader, distiller, tmp_path, steps=5, checkpoint_every=None, checkpoint_minutes=0)
    assert Checkpoints(tmp_path).names() == [f"step-{step:08d}" for step in (5, 4, 3, 2, 1)]
