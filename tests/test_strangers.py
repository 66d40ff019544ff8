"""limbeck's losses in other people's loops: a plain one, a Lightning module, and transformers' Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck.functional as LF
from limbeck import Batch, Distiller
from limbeck.core.objective import DataInfo
from limbeck.objectives import CRD, KD, CrossEntropy, FitNets


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def net(width: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(16 * width, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def teacher(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = net(16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        rows = torch.randint(0, 1200, (128,))
        nn.functional.cross_entropy(model(digits[0][rows]), digits[1][rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(model, digits) > 0.85
    return model.eval()


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(digits[0][1200:]).argmax(1) == digits[1][1200:]).float().mean())


def test_a_plain_loop(digits: tuple[Tensor, Tensor], teacher: nn.Module) -> None:
    torch.manual_seed(1)
    student = net(4)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for step in range(60):
        rows = torch.randint(0, 1200, (128,))
        x, y = digits[0][rows], digits[1][rows]
        with torch.no_grad():
            t = teacher(x)
        s = student(x)
        loss = LF.cross_entropy_loss(s, labels=y) + min(step / 30, 1.0) * LF.dkd_loss(s, t, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(student, digits) > 0.7


def test_a_lightning_module(digits: tuple[Tensor, Tensor], teacher: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_lightning as lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.student = net(4)
                loss = CrossEntropy() + KD() + FitNets("0") + 0.1 * CRD(memory="batch")
                self.distiller = Distiller(self.student, loss, teacher)
                self.distiller.setup(Batch(digits[0][:4], digits[1][:4]), DataInfo(samples=1200))

            def training_step(self, batch: list[Tensor], _: int) -> Tensor:
                progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
                return self.distiller(Batch(*batch, progress=progress)).total

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.Adam(self.distiller.parameters(), lr=0.01)

        torch.manual_seed(2)
        module = Module()
        helpers = {name: p.detach().clone() for name, p in module.distiller.loss.named_parameters()}
        trainer = lightning.Trainer(
            max_epochs=6,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(TensorDataset(digits[0][:1200], digits[1][:1200]), 128, shuffle=True))
    assert helpers
    assert any(not torch.equal(p, helpers[name]) for name, p in module.distiller.loss.named_parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}
    assert accuracy(module.student, digits) > 0.7


def test_the_trainer_of_transformers(digits: tuple[Tensor, Tensor], teacher: nn.Module, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(4)

        def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.net(images)}

    class DistillationTrainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
        ) -> Any:
            outputs = model(**inputs)
            with torch.no_grad():
                answers = teacher(inputs["images"])
            task = LF.cross_entropy_loss(outputs["logits"], labels=inputs["labels"])
            loss = task + LF.dkd_loss(outputs["logits"], answers, inputs["labels"], beta=1.0)
            return (loss, outputs) if return_outputs else loss

    rows = [{"images": image, "labels": label} for image, label in zip(digits[0][:1200], digits[1][:1200], strict=True)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=6,
        per_device_train_batch_size=128,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        seed=3,
    )
    torch.manual_seed(3)
    student = Student()
    DistillationTrainer(student, settings, train_dataset=rows).train()
    assert accuracy(student.net, digits) > 0.7
