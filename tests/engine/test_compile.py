"""Compiling: the rule is a function of the plan, and a compiled run learns the same and resumes exactly."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.engine import Stage, TrainConfig, compiling, fit
from limbeck.engine.compiling import should_compile, work
from limbeck.models import create
from limbeck.models.describe import flops
from limbeck.objectives import KD, CrossEntropy


def test_rule():
    assert [should_compile(mode, device="cpu", steps=1, step_flops=1.0) for mode in ("on", "off", "auto")] == [
        True,
        False,
        False,
    ]
    plenty = {"device": "cpu", "step_flops": 3e10, "modules": 250}
    assert [should_compile("auto", steps=n, **plenty) for n in (100, 2000)] == [False, True]
    assert [should_compile("auto", device="cuda", steps=n) for n in (100, 100_000)] == [False, True]


def test_rule_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert not should_compile("auto", device="cpu", steps=10**9, step_flops=1e12)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        compiling.compile_step(Distiller(torch.nn.Linear(2, 2), CrossEntropy()), "cpu")


def test_work_of_a_step():
    student, teacher, images = create("resnet8"), create("resnet14"), torch.randn(2, 3, 32, 32)
    batch = Batch(images, torch.arange(2))
    found = Distiller(student, CrossEntropy() + KD(), teacher).setup(batch)
    operations, modules = work(found, batch, samples=64)
    assert operations == 32 * (3 * flops(student, images) + flops(teacher, images))
    leaves = [m for model in (student, teacher) for m in model.modules() if not list(m.children())]
    assert modules == len(leaves)
    assert work(Distiller(student, CrossEntropy(), teacher).setup(batch), batch, 2)[0] == 3 * flops(student, images)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled_learns_the_same_and_resumes_exactly(loader, distiller, tmp_path, accumulate):
    def run(mode, steps_of_checkpoints=None, folder=None, resume=False):
        settings = {"checkpoint_every": steps_of_checkpoints, "keep": 9, "accumulate": accumulate}
        config = TrainConfig(steps=9, compile=mode, **settings)
        found = distiller()
        found.student[3].p = 0.0  # dropout draws otherwise in compiled code
        result = fit([Stage("kd", found, config)], loader(), out=folder, resume=resume, quiet=True)
        assert found._compiled_call_impl is None
        return torch.cat([v.double().flatten() for v in result.student.state_dict().values()])

    eager, compiled = run("off"), run("on", 3, tmp_path)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    last.rename(tmp_path / "aside")
    assert torch.equal(run("on", 3, tmp_path, resume=True), compiled)


@pytest.mark.slow
def test_what_cannot_be_compiled_goes_on_without(loader, distiller, capfd, monkeypatch):
    from torch._dynamo.exc import Unsupported

    def broken(self, **options):
        def refuse(*args, **kwargs):
            raise Unsupported("not this one")

        self._compiled_call_impl = refuse

    monkeypatch.setattr(Distiller, "compile", broken)
    monkeypatch.setattr(compiling, "CPU_FLOPS_PER_MODULE", 0.0)
    assert fit([Stage("kd", distiller(), TrainConfig(steps=3))], loader(), quiet=True).steps == 3
    assert "going on without: Unsupported: not this one" in capfd.readouterr().err
    with pytest.raises(Exception, match="cannot be compiled.*set compile to auto or off"):
        fit([Stage("kd", distiller(), TrainConfig(steps=3, compile="on"))], loader(), quiet=True)
