"""Training end to end on a small problem."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from limbeck.core.errors import ConfigError
from limbeck.engine import Stage, TrainConfig, evaluate, fit
from limbeck.objectives import CrossEntropy


def weights(student: nn.Module) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in student.state_dict().values()])


def test_student_learns(loader, distiller):
    train, validation = loader(samples=512), loader(samples=512, train=False)
    found = distiller()
    before = evaluate(found.student, validation)["accuracy"]
    result = fit([Stage("kd", found, TrainConfig(epochs=8))], train, validation, quiet=True)
    assert result.validation["accuracy"] > max(before + 0.2, 0.8)
    assert result.steps == 8 * 32
    assert result.best["value"] == max(line["accuracy"] for line in result.history if line["split"] == "validation")


def test_same_seed_same_bits_and_another_seed_others(loader, distiller):
    def run(seed: int) -> torch.Tensor:
        return weights(fit([Stage("kd", distiller(), TrainConfig(epochs=2))], loader(), seed=seed, quiet=True).student)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))  # dropout draws otherwise


def test_run_folder(loader, distiller, tmp_path):
    train, validation = loader(), loader(train=False)
    result = fit(
        [Stage("kd", distiller(), TrainConfig(epochs=2, log_every=4))], train, validation, out=tmp_path, quiet=True
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    logged = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in logged] == [4, 6, 8, 12]
    assert set(logged[0]) >= {
        "stage",
        "epoch",
        "progress",
        "total",
        "terms",
        "weights",
        "lr",
        "accuracy",
        "samples_per_s",
    }
    assert logged[0]["terms"].keys() == {"cross_entropy", "kd"}
    total = sum(logged[0]["weights"][k] * v for k, v in logged[0]["terms"].items())
    assert logged[0]["total"] == pytest.approx(total, rel=1e-5)
    status = json.loads((tmp_path / "run.json").read_text())
    assert (status["status"], status["steps"]) == ("finished", 12)
    assert status["parameters"] == sum(p.numel() for p in result.student.parameters())
    assert json.loads((tmp_path / "last.json").read_text())["checkpoint"] == "step-00000012"
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_student_is_plain_afterwards(loader, distiller):
    found = distiller()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in found.student.modules()]
    fit([Stage("kd", found, TrainConfig(steps=3))], loader(), quiet=True)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in found.student.modules()] == hooks
    assert all(p.grad is None and p.requires_grad for p in found.student.parameters())
    assert not found.student.training


def test_accumulation_changes_nothing_but_the_last_digits(loader, distiller):
    def run(parts: int) -> torch.Tensor:
        found = distiller()
        found.student[1] = nn.Identity()  # statistics of a batch depend on how it is cut
        found.student[3] = nn.Identity()
        config = TrainConfig(epochs=2, accumulate=parts)
        return weights(fit([Stage("kd", found, config)], loader(batch_size=22), quiet=True).student)

    torch.testing.assert_close(run(4), run(1), rtol=1e-5, atol=1e-7)


def test_learn_freezes_the_rest(loader, distiller):
    found = distiller()
    before = {k: v.clone() for k, v in found.student.state_dict().items()}
    fit([Stage("head", found, TrainConfig(steps=5), learn=("4.*",))], loader(), quiet=True)
    changed = {k for k, v in found.student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"4.weight", "4.bias"}  # the statistics of the frozen norm stay too


def test_stages_follow_each_other(loader, distiller):
    found = distiller()
    other = type(found)(found.student, found.loss, found.teacher.model)
    stages = [
        Stage("first", found, TrainConfig(steps=3), learn=("0.*",)),
        Stage("second", other, TrainConfig(epochs=1)),
    ]
    result = fit(stages, loader(), loader(train=False), quiet=True)
    assert result.steps == 9
    assert [line["stage"] for line in result.history if line["split"] == "validation"] == ["first", "second"]


def test_early_stopping_and_the_best_weights(loader, distiller, tmp_path):
    config = TrainConfig(epochs=30, lr=3.0, schedule="constant", clip=100.0, patience=2, select="best", monitor="nll")
    for out in (None, tmp_path):
        validation = loader(train=False)
        result = fit([Stage("kd", distiller(), config)], loader(), validation, out=out, quiet=True)
        scores = [line["nll"] for line in result.history if line["split"] == "validation"]
        assert len(scores) < 30
        assert len(scores) - 1 - scores.index(min(scores)) == 2
        assert evaluate(result.student, validation)["nll"] == pytest.approx(min(scores), rel=1e-6)
    assert json.loads((tmp_path / "best.json").read_text())["value"] == min(scores)
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in result.student.state_dict().items())


def test_averaged_weights_are_what_is_kept(loader, distiller):
    plain, averaged = distiller(), distiller()
    fit([Stage("kd", plain, TrainConfig(steps=10))], loader(), quiet=True)
    result = fit([Stage("kd", averaged, TrainConfig(steps=10, ema=0.5))], loader(), loader(train=False), quiet=True)
    assert not torch.equal(weights(plain.student), weights(averaged.student))
    assert evaluate(averaged.student, loader(train=False))["nll"] == pytest.approx(result.validation["nll"], rel=1e-6)
    near = fit([Stage("kd", distiller(), TrainConfig(steps=10, ema=1e-9))], loader(), quiet=True)
    torch.testing.assert_close(weights(near.student), weights(plain.student), rtol=1e-5, atol=1e-6)


def test_monitoring_the_loss_itself(loader, distiller):
    config = TrainConfig(epochs=2, monitor="total")
    result = fit([Stage("kd", distiller(), config)], loader(), loader(samples=50, train=False), quiet=True)
    scores = result.validation
    assert scores["total"] == pytest.approx(scores["terms"]["cross_entropy"] + 0.5 * scores["terms"]["kd"], rel=1e-5)
    assert scores["terms"]["cross_entropy"] == pytest.approx(scores["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("problem", "where"),
    [
        ({"stages": []}, "stages"),
        ({"resume": True}, "out"),
        ({"config": TrainConfig(patience=1)}, "validation"),
        ({"config": TrainConfig(precision="fp16", device="cpu")}, "precision"),
        ({"learn": ("layer9.*",)}, "learn"),
        ({"config": TrainConfig(trackers=["no_such_tracker"])}, "trackers"),
    ],
)
def test_what_cannot_be_is_refused(loader, distiller, problem, where):
    stage = Stage("kd", distiller(), problem.get("config", TrainConfig(steps=1)), problem.get("learn", ("*",)))
    with pytest.raises(ConfigError) as caught:
        fit(problem.get("stages", [stage]), loader(), resume=problem.get("resume", False), quiet=True)
    assert caught.value.where == where


def test_stages_must_agree_on_what_belongs_to_the_run(loader, distiller):
    found = distiller()
    stages = [Stage("a", found, TrainConfig()), Stage("b", found, TrainConfig(precision="bf16"))]
    with pytest.raises(ConfigError, match="stage 'b': precision"):
        fit(stages, loader(), quiet=True)


def test_a_folder_with_a_run_is_not_written_over(loader, distiller, tmp_path):
    stages = [Stage("kd", distiller(), TrainConfig(steps=1))]
    fit(stages, loader(), out=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        fit(stages, loader(), out=tmp_path, quiet=True)


def test_bf16_trains_and_keeps_float_weights(loader, distiller):
    full, half = (
        fit([Stage("kd", distiller(), TrainConfig(steps=10, precision=p))], loader(), quiet=True)
        for p in ("fp32", "bf16")
    )
    assert all(p.dtype == torch.float32 for p in half.student.parameters())
    assert not torch.equal(weights(full.student), weights(half.student))
    torch.testing.assert_close(weights(half.student), weights(full.student), rtol=0.2, atol=0.05)


def test_deterministic_mode_lasts_as_long_as_the_training(loader, distiller):
    seen = []

    class Looks(CrossEntropy):
        def forward(self, student, teacher, batch):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(student, teacher, batch)

    fit([Stage("kd", distiller(Looks()), TrainConfig(steps=2, deterministic=True))], loader(), quiet=True)
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_terminal_sees_how_far_it_is(loader, distiller, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    fit([Stage("kd-stage", distiller(), TrainConfig(epochs=3, log_every=1))], loader())
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "kd-stage" in shown.err
    assert "samples/s" in shown.err


def test_nothing_is_printed_without_a_terminal(loader, distiller, capfd):
    fit([Stage("kd", distiller(), TrainConfig(epochs=1))], loader(), loader(train=False))
    assert capfd.readouterr() == ("", "")
