"""Settings of the Trainer and kinds of data that distillation has to go along with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, DataCollatorForLanguageModeling, DataCollatorWithPadding

from limbeck.data.language import language_source
from limbeck.integrations.transformers import DistillationTrainer
from tests.data.language.texts import LINES
from tests.integrations.parts import PAIRS, Ordered, arguments, bert, bpe, llama, losses, weights

SUM = {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}


def texts(folder: Path, **options: Any) -> Ordered:
    data = language_source(PAIRS, tokenizer="bytes", length=48, validation=0.2)
    trainer = Ordered(
        model=llama(16, 258, 1),
        teacher=llama(24, 258, 2),
        loss=SUM,
        args=arguments(folder, **options),
        train_dataset=data.train,
        eval_dataset=data.validation,
    )
    trainer.train()
    return trainer


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a training in half precision leaves behind in the process (transformers 4 does) is gone afterwards."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("precision")
def test_half_precision_leaves_the_student_as_it_is(tmp_path: Path) -> None:
    whole, half = losses(texts(tmp_path)), texts(tmp_path, bf16=True)
    assert losses(half) == pytest.approx(whole, rel=1e-2)
    assert losses(half) != whole
    assert half.evaluate()["eval_kd"] > 0
    assert vars(half.model).keys() == vars(llama()).keys()
    assert half.model.dtype == torch.float32


@pytest.mark.slow
def test_the_whole_step_is_compiled(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = texts(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    assert counters["frames"]["ok"] > 0
    assert losses(compiled) == pytest.approx(losses(texts(tmp_path, max_steps=2)), rel=1e-5)
    torch.compiler.reset()


def test_the_best_student_is_kept(tmp_path: Path) -> None:
    trainer = texts(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_kd",
        greater_is_better=True,  # so that the first is the best
        max_steps=6,
    )
    told = {line["step"]: line["eval_kd"] for line in trainer.state.log_history if "eval_kd" in line}
    best = max(told, key=lambda step: told[step])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_kd"] == pytest.approx(told[best], rel=1e-5)


def test_workers_and_smaller_batches(tmp_path: Path) -> None:
    wanted = losses(texts(tmp_path, max_steps=1))
    assert losses(texts(tmp_path, max_steps=1, dataloader_num_workers=1)) == wanted
    assert losses(texts(tmp_path, max_steps=1, auto_find_batch_size=True)) == wanted


def test_texts_that_come_one_after_the_other(tmp_path: Path) -> None:
    tokenizer = bpe()

    def walked() -> Any:
        yield from ({"input_ids": tokenizer(line)["input_ids"]} for line in LINES * 4)

    def trained(data: Any) -> DistillationTrainer:
        trainer = Ordered(
            model=llama(16, 300, 1),
            teacher=llama(24, 300, 2),
            loss=SUM,
            args=arguments(tmp_path),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )
        if isinstance(data, datasets.IterableDataset):
            trainer._get_train_sampler = lambda *_: None  # type: ignore[method-assign]
        trainer.train()
        return trainer

    assert losses(trained(datasets.IterableDataset.from_generator(walked))) == losses(trained(list(walked())))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@torch.no_grad()
def test_what_labels_mean(problem: str, tmp_path: Path) -> None:
    tokenizer, numbers = bpe(), problem == "regression"
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "problem_type": problem}

    def model(width: int) -> Any:
        config = bert(width, **still).config
        config.num_labels = 1 if numbers else 3
        torch.manual_seed(width)
        return BertForSequenceClassification(config)

    student, teacher = model(16), model(24)
    labels = [i / 9 if numbers else [float(i % 2), float(i % 3 == 0), 1.0] for i in range(24)]
    data = [{**tokenizer(LINES[i % len(LINES)]), "labels": labels[i]} for i in range(24)]
    batch = DataCollatorWithPadding(tokenizer)([dict(row) for row in data[:4]])
    wanted = batch.pop("labels")
    own, other = student(**batch).logits, teacher.eval()(**batch).logits
    with torch.enable_grad():
        trainer = Ordered(
            model=student,
            teacher=teacher,
            loss="mse" if numbers else {"binary_cross_entropy": 1.0, "mld": 0.0},
            args=arguments(tmp_path, max_steps=1),
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
    assert trainer.task == ("regression" if numbers else "multilabel")
    if numbers:
        assert losses(trainer, "mse")[0] == pytest.approx(F.mse_loss(own[:, 0], wanted).item(), rel=1e-5)
    else:
        told = losses(trainer, "binary_cross_entropy")[0]
        each = F.binary_cross_entropy_with_logits(own, wanted, reduction="none")
        assert told == pytest.approx(each.sum(-1).mean().item(), rel=1e-5)
        assert not torch.allclose(own, other)


def test_models_that_know_nothing_of_transformers(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    student, teacher = Net(4), Net(8)
    data = [{"x": torch.randn(4), "labels": i % 3} for i in range(24)]
    own = student(torch.stack([row["x"] for row in data[:4]]))
    wanted = F.cross_entropy(own, torch.tensor([row["labels"] for row in data[:4]])).item()
    trainer = Ordered(
        model=student, teacher=teacher, loss="kd", args=arguments(tmp_path), train_dataset=data, eval_dataset=data
    )
    before = weights(student)
    trainer.train()
    assert losses(trainer, "cross_entropy")[0] == pytest.approx(wanted, rel=1e-5)
    assert not torch.equal(before, weights(student))
    assert {"eval_loss", "eval_kd"} <= trainer.evaluate().keys()
