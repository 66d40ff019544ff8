"""Distillation in Lightning: against limbeck's engine, cut or whole, and what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.data.language import language_source
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import KD, CrossEntropy

lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")

from limbeck.integrations import lightning as integration  # noqa: E402
from limbeck.integrations.lightning import DistillationModule  # noqa: E402
from limbeck.integrations.reading import written  # noqa: E402
from tests.integrations.parts import PAIRS, llama, weights  # noqa: E402

SUM = {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.*:DeprecationWarning")


def net(width: int, seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    head = nn.Linear(width, 3)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(dropout), head)


def loader(batch_size: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=batch_size)


class Noted(lightning.Callback):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.lines.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trained(module: DistillationModule, folder: Path, data: Any = None, **options: Any) -> tuple[Any, Noted]:
    noted = Noted()
    settings: dict[str, Any] = {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    held, resume = options.pop("held", None), options.pop("resume", {})
    trainer = lightning.Trainer(callbacks=[noted], **(settings | options))
    trainer.fit(module, loader() if data is None else data, held, **resume)
    return trainer, noted


def module(student: nn.Module, **options: Any) -> DistillationModule:
    settings: dict[str, Any] = {"loss": SUM, "optimizer": "sgd", "lr": 0.1, "optimizer_options": {"momentum": 0.0}}
    example = next(iter(loader()))
    return DistillationModule(student, net(32, 2), example=example, **(settings | options))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_learns_what_the_engine_learns(accumulate: int, tmp_path: Path) -> None:
    student = net(16, 1)
    _, noted = trained(module(student, accumulate=accumulate, schedule="cosine"), tmp_path)
    other = net(16, 1)
    config = TrainConfig(
        steps=6,
        optimizer="sgd",
        optimizer_options={"momentum": 0.0},
        lr=0.1,
        schedule="cosine",
        weight_decay=0.0,
        compile="off",
        log_every=1,
    )
    loss = 0.5 * CrossEntropy() + 0.5 * KD(temperature=2.0)
    fitted = fit([Stage("distill", Distiller(other, loss, net(32, 2)), config)], loader(), quiet=True)
    told = [line for line in fitted.history if line["split"] == "train"]
    assert [line["train_loss"] for line in noted.lines] == pytest.approx([line["total"] for line in told], rel=1e-5)
    assert [line["train_kd"] for line in noted.lines] == pytest.approx([line["terms"]["kd"] for line in told], rel=1e-5)
    assert torch.allclose(weights(student), weights(other), atol=1e-6)


def texts(batch_size: int) -> DataLoader[Any]:
    split = language_source(PAIRS, tokenizer="bytes", length=48, validation=0).train

    def collate(rows: list[int]) -> dict[str, Any]:
        return written(split.rows.batch(torch.tensor(rows)))

    return DataLoader(range(24), batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def language(folder: Path, accumulate: int) -> Tensor:
    student, data = llama(16, 258, 1).double(), texts(8)
    made = DistillationModule(
        student,
        llama(24, 258, 2).double(),
        SUM,
        example=next(iter(data)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        accumulate=accumulate,
    )
    trained(made, folder, data, max_steps=3)
    return weights(student)


def test_micro_batches_of_tokens_are_means_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = language(tmp_path, 1)
    assert torch.allclose(language(tmp_path, 4), whole, atol=1e-8)
    monkeypatch.setattr(integration, "totals_of", lambda *_: {})
    assert not torch.allclose(language(tmp_path, 4), whole, atol=1e-5)
    monkeypatch.setattr(Batch, "share", lambda self, unit: 0.25)  # means of means
    assert not torch.allclose(language(tmp_path, 4), whole, atol=1e-5)


def test_steps_that_lightning_accumulates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accumulate_grad_batches"):
        trained(module(net(16, 1)), tmp_path, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match="kd cannot work without a teacher"):
        DistillationModule(net(16, 1), None, "kd", example=next(iter(loader())))


def test_helpers_train_are_saved_and_resumed(tmp_path: Path) -> None:
    loss = {"cross_entropy": 1.0, "fitnets": {"weight": 1.0, "tap": "0", "teacher_tap": "0"}}

    def made() -> DistillationModule:
        return module(net(16, 1, dropout=0.2), loss=loss)

    straight = made()
    before = {name: value.clone() for name, value in straight.distiller.loss.state_dict().items()}
    trained(straight, tmp_path)
    after = straight.distiller.loss.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    short, resumed = made(), made()
    trainer, _ = trained(short, tmp_path, max_steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    found = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[1] for name in found} == {"student", "loss"}
    resume = {"ckpt_path": str(tmp_path / "half.ckpt"), "weights_only": False}
    other, _ = trained(resumed, tmp_path, resume=resume)
    assert other.global_step == 6
    halves = {name: value for name, value in found.items() if name.startswith("distiller.loss")}
    own = {f"distiller.loss.{name}": value for name, value in resumed.distiller.loss.state_dict().items()}
    assert own.keys() == halves.keys()
    assert any(not torch.equal(own[name], halves[name]) for name in own)


def test_a_resumed_training_ends_at_the_same_weights(tmp_path: Path) -> None:
    loss = {"cross_entropy": 1.0, "fitnets": {"weight": 1.0, "tap": "0", "teacher_tap": "0"}}
    straight, short, resumed = (module(net(16, 1), loss=loss) for _ in range(3))
    trained(straight, tmp_path, loader(64), max_steps=8)
    trainer, _ = trained(short, tmp_path, loader(64), max_steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resume = {"ckpt_path": str(tmp_path / "half.ckpt"), "weights_only": False}
    trained(resumed, tmp_path, loader(64), max_steps=8, resume=resume)
    assert torch.equal(weights(straight.distiller), weights(resumed.distiller))


def test_validation_is_of_all_samples_and_moves_nothing(tmp_path: Path) -> None:
    quiet, asked = (module(net(16, 1, dropout=0.3)) for _ in range(2))
    torch.manual_seed(7)
    trained(quiet, tmp_path)
    torch.manual_seed(7)
    held = DataLoader(loader().dataset, batch_size=5, generator=torch.Generator())  # walks draw from one of its own
    trainer, _ = trained(asked, tmp_path, held=held, val_check_interval=1, num_sanity_val_steps=0)
    assert torch.equal(weights(quiet.student), weights(asked.student))
    student, teacher = asked.student.eval(), net(32, 2).eval()
    inputs, labels = loader().dataset[:]
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(student(inputs), labels).item()
        p, q = ((m(inputs) / 2).log_softmax(-1) for m in (teacher, student))
        kd = 4 * (p.exp() * (p - q)).sum(-1).mean().item()
    told = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert told["val_cross_entropy"] == pytest.approx(wanted, rel=1e-4)
    assert told["val_kd"] == pytest.approx(kd, rel=1e-4)
    assert told["val_loss"] == pytest.approx(0.5 * wanted + 0.5 * kd, rel=1e-4)


def test_clipping_with_and_without_cuts(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 4):
        student = net(16, 1)
        trained(module(student, clip=0.05, accumulate=accumulate), tmp_path)
        found.append(weights(student))
    free = net(16, 1)
    trained(module(free), tmp_path)
    assert torch.allclose(*found, atol=1e-6)
    assert not torch.allclose(found[0], weights(free), atol=1e-4)


def test_the_student_is_plain_afterwards(tmp_path: Path) -> None:
    student = llama(16, 258, 1)
    data = texts(8)
    made = DistillationModule(student, llama(24, 258, 2), {"fused_kl": {}}, example=next(iter(data)), lr=1e-3)
    trained(made, tmp_path, data, max_steps=2)
    assert made.student is student
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    made.save_student(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    assert torch.equal(weights(again), weights(student))
    simple = module(net(16, 1))
    simple.save_student(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").is_file()
