"""The Trainer of transformers with a teacher: against limbeck's engine, and against definitions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainingArguments

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.schedules import Linear
from limbeck.data.language import LanguageLoader, language_source, next_tokens
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.integrations import reading
from limbeck.integrations import transformers as integration
from limbeck.objectives import KD, CrossEntropy
from tests.integrations.parts import PAIRS, Ordered, arguments, bpe, llama, losses, weights

SUM = {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}


def split(**options: Any) -> Any:
    return language_source(PAIRS, tokenizer="bytes", length=48, validation=0, **options).train


def trained(folder: Path, data: Any = None, *, double: bool = True, loss: Any = None, **options: Any) -> Ordered:
    student, teacher = llama(16, seed=1), llama(24, seed=2)
    if double:
        student, teacher = student.double(), teacher.double()
    trainer = Ordered(
        model=student,
        teacher=teacher,
        loss=SUM if loss is None else loss,
        args=arguments(folder, **options),
        train_dataset=split() if data is None else data,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"padding": "left"}, {"pack": True}])
def test_it_learns_what_the_engine_learns(options: dict[str, Any], tmp_path: Path) -> None:
    data = split(**options)
    trainer = trained(tmp_path, data, double=False)
    student, teacher = llama(16, seed=1), llama(24, seed=2)
    loader = LanguageLoader(data, batch_size=4, shuffle=False)
    loss = 0.5 * CrossEntropy() + 0.5 * KD(temperature=2.0)
    config = TrainConfig(
        steps=3,
        optimizer="sgd",
        optimizer_options={"momentum": 0.0},
        lr=0.1,
        schedule="constant",
        weight_decay=0.0,
        compile="off",
        log_every=1,
    )
    fitted = fit([Stage("distill", Distiller(student, loss, teacher), config)], loader, quiet=True)
    told = [line for line in fitted.history if line["split"] == "train"]
    assert losses(trainer) == pytest.approx([line["total"] for line in told], rel=1e-5)
    assert losses(trainer, "kd") == pytest.approx([line["terms"]["kd"] for line in told], rel=1e-5)
    assert torch.allclose(weights(trainer.model), weights(student), atol=1e-6)


def reference(student: Any, teacher: Any, batches: list[dict[str, Any]]) -> Tensor:
    """Cross entropy and KD at T 2 over all tokens of some batches of transformers, from their definitions."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        own, other = student(**inputs).logits, teacher(**inputs).logits
        for row, labels in enumerate(batch["labels"]):
            for place in range(len(labels) - 1):
                target = int(labels[place + 1])
                if target == -100:
                    continue
                count += 1
                cross_entropy = -F.log_softmax(own[row, place], -1)[target]
                p, q = (F.log_softmax(z[row, place] / 2, -1) for z in (other.detach(), own))
                total = total + 0.5 * cross_entropy + 0.5 * 4 * (p.exp() * (p - q)).sum()
    return total / count


def texts(tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts and completions as collators of transformers know them: prompts are not learned."""
    found = []
    for pair in PAIRS:
        prompt, completion = (tokenizer(pair[k], add_special_tokens=False)["input_ids"] for k in pair)
        found.append({"input_ids": [1, *prompt, *completion], "labels": [-100] * (1 + len(prompt)) + completion})
    return found


def seq2seq(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer)


def step(folder: Path, rows: int, accumulate: int, **options: Any) -> tuple[Ordered, list[dict[str, Any]], Any, Any]:
    """One step on batches of transformers' own."""
    tokenizer = bpe()
    student, teacher = llama(16, 300, seed=1).double(), llama(24, 300, seed=2).double()
    trainer = Ordered(
        model=copy.deepcopy(student),
        teacher=teacher,
        loss=SUM,
        args=arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            weight_decay=0.0,
            **options,
        ),
        train_dataset=texts(tokenizer),
        data_collator=seq2seq(tokenizer),
        processing_class=tokenizer,
    )
    data = texts(tokenizer)
    parts = [data[i * rows : (i + 1) * rows] for i in range(accumulate)]
    return trainer, [seq2seq(tokenizer)(copy.deepcopy(part)) for part in parts], student, teacher


def fits(folder: Path, rows: int, accumulate: int) -> bool:
    """Whether a step has the loss and the gradient of the definition."""
    trainer, batches, student, teacher = step(folder, rows, accumulate)
    wanted = reference(student, teacher, batches)
    wanted.backward()
    trainer.train()
    moved = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in student.parameters()])
    same = abs(losses(trainer)[0] - wanted.item()) < 1e-6 * wanted.item()
    return same and bool((weights(trainer.model) - moved).abs().max() < 1e-8)


@pytest.mark.parametrize(("rows", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_loss_and_gradient_are_those_of_the_whole_step(rows: int, accumulate: int, tmp_path: Path) -> None:
    assert fits(tmp_path, rows, accumulate)


def unshifted(ids: Tensor, document: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    return ids, learned


def ahead(ids: Tensor, document: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    once, _ = next_tokens(ids, document, learned)
    return next_tokens(once.clamp(min=0), document, learned)


def everything(ids: Tensor, document: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    return next_tokens(ids, document, torch.ones_like(learned))


def padding_too(ids: Tensor, document: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    labels, mask = next_tokens(ids, document, learned)
    return labels.clamp(min=0), torch.ones_like(mask)


def late(ids: Tensor, document: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    """Labels are right; what counts is a token behind."""
    return next_tokens(ids, document, learned)[0], learned & (document > 0)


@pytest.mark.parametrize("shift", [unshifted, ahead, everything, padding_too, late])
def test_wrong_shifts_and_masks_are_caught(shift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "next_tokens", shift)
    assert not fits(tmp_path, 4, 2)


def test_wrong_means_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "totals_of", lambda *_: {})  # each micro-batch as if it were the whole step
    assert not fits(tmp_path, 4, 2)
    assert fits(tmp_path / "whole", 8, 1)
    monkeypatch.setattr(Batch, "share", lambda self, unit: 0.5)  # means of means
    assert not fits(tmp_path / "means", 4, 2)


def test_equal_models_give_no_divergence(tmp_path: Path) -> None:
    teacher = llama(16, seed=1)
    trainer = Ordered(
        model=copy.deepcopy(teacher),
        teacher=teacher,
        loss=dict.fromkeys(("kd", "reverse_kl", "jsd", "skew_kl", "total_variation"), 1.0),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=split(),
    )
    trainer.train()
    assert abs(losses(trainer)[0]) < 1e-6
    assert (weights(trainer.model) - weights(teacher)).abs().max() < 1e-6


def test_progress_follows_the_steps(tmp_path: Path) -> None:
    trainer = trained(tmp_path, loss=Linear(1.0, 0.0) * KD() + 0.0 * CrossEntropy(), max_steps=4)
    whole, kd = losses(trainer), losses(trainer, "kd")
    assert whole == pytest.approx([kd[i] * (1 - i / 4) for i in range(4)], rel=1e-6)


def test_logged_terms_are_means_over_the_steps_since(tmp_path: Path) -> None:
    often = trained(tmp_path, max_steps=6, gradient_accumulation_steps=2)
    seldom = trained(tmp_path, max_steps=6, gradient_accumulation_steps=2, logging_steps=3)
    for name in ("kd", "cross_entropy"):
        each = losses(often, name)
        assert losses(seldom, name) == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-6)
    told = [line["loss"] for line in seldom.state.log_history if "loss" in line]
    each = losses(seldom)
    assert told == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], abs=1e-4)  # 4 digits before version 5


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    plain = trained(tmp_path)
    name = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    options = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    saving = trained(tmp_path, **options)
    assert torch.allclose(weights(plain.model), weights(saving.model), atol=1e-10)


def test_the_student_is_plain_before_and_after(tmp_path: Path) -> None:
    student = llama(16, seed=1, attn_implementation="eager")
    before = {name: dict(vars(module)) for name, module in student.named_modules()}
    trainer = Ordered(
        model=student,
        teacher=llama(24, seed=2, attn_implementation="eager"),
        loss={"kd": 1.0, "tinybert": 1.0},
        args=arguments(tmp_path),
        train_dataset=split(),
        eval_dataset=split(),
    )
    trainer.train()
    trainer.evaluate()
    for name, module in student.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert vars(module).keys() == before[name].keys(), name
    assert trainer.model is student


def test_a_new_student_for_every_training(tmp_path: Path) -> None:
    made: list[Any] = []

    def student() -> Any:
        made.append(llama(16, seed=len(made), attn_implementation="eager"))
        return made[-1]

    trainer = Ordered(
        model_init=student,
        teacher=llama(24, seed=2, attn_implementation="eager"),
        loss={"kd": 1.0, "tinybert": 1.0},
        args=arguments(tmp_path),
        train_dataset=split(),
    )
    trainer.train()
    assert trainer.model is made[-1]
    assert trainer.distiller is not None
    assert trainer.distiller.student is made[-1]
    assert not torch.equal(weights(made[-1]), weights(llama(16, seed=len(made) - 1)))
