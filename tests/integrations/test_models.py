"""Classifiers of texts, tokens and images, encoder-decoders, caches, fused losses, two tokenizers, packs, adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from limbeck.cache import build
from limbeck.core.batch import Batch
from limbeck.data.language import language_source
from limbeck.integrations.transformers import DistillationTrainer
from limbeck.teachers.cached import CachedTeacher
from tests.data.language.texts import LINES
from tests.integrations.parts import PAIRS, Ordered, arguments, bert, bpe, llama, losses, weights

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SUM = {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}


def divergence(own: Tensor, other: Tensor, temperature: float = 2.0) -> Tensor:
    """Of each place, by definition."""
    p, q = (F.log_softmax(z.double() / temperature, -1) for z in (other, own))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def first_step(student: Any, teacher: Any, folder: Path, data: Any, collator: Any, **options: Any) -> Ordered:
    trainer = Ordered(
        model=student,
        teacher=teacher,
        loss=options.pop("loss", SUM),
        args=arguments(folder, **{"max_steps": 2, "per_device_train_batch_size": 8, **options.pop("args", {})}),
        train_dataset=data,
        data_collator=collator,
        **options,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def test_texts_are_classified(tmp_path: Path) -> None:
    tokenizer = bpe()
    data = [{**tokenizer(line), "label": i % 3} for i, line in enumerate(LINES * 4)]
    student, teacher = bert(16, 1, **STILL), bert(24, 2)
    batch = DataCollatorWithPadding(tokenizer)(copy.deepcopy(data[:8]))
    labels = batch.pop("labels")
    own, other = student(**batch).logits, teacher.eval()(**batch).logits
    wanted = 0.5 * F.cross_entropy(own.double(), labels) + 0.5 * divergence(own, other).mean()
    with torch.enable_grad():
        trainer = first_step(student, teacher, tmp_path, data, DataCollatorWithPadding(tokenizer))
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)
    assert losses(trainer)[1] != pytest.approx(losses(trainer)[0], rel=1e-6)


def tags(tokenizer: Any) -> list[dict[str, Any]]:
    found = []
    for i, line in enumerate(LINES * 4):
        ids = tokenizer(line)["input_ids"][: 8 + i % 9]
        found.append(
            {"input_ids": ids, "labels": [-100, *((j + i) % 4 if j % 3 else -100 for j in range(len(ids) - 1))]}
        )
    return found


def tagger(width: int) -> BertForTokenClassification:
    config = bert(width, **STILL).config
    config.num_labels = 4
    return BertForTokenClassification(config)


@torch.no_grad()
def test_tokens_are_classified_without_a_shift(tmp_path: Path) -> None:
    tokenizer, student, teacher = bpe(), tagger(16), tagger(24)
    collator = DataCollatorForTokenClassification(tokenizer)
    batch = collator(copy.deepcopy(tags(tokenizer)[:8]))
    labels = batch.pop("labels")
    own, other = student(**batch).logits, teacher.eval()(**batch).logits
    counts = labels != -100
    wanted = 0.5 * F.cross_entropy(own[counts].double(), labels[counts]) + 0.5 * divergence(own, other)[counts].mean()
    with torch.enable_grad():
        trainer = first_step(student, teacher, tmp_path, tags(tokenizer), collator)
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_masked_words_are_learned(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    student, teacher = (
        BertForMaskedLM(BertConfig(hidden_size=width, intermediate_size=width, **sizes)) for width in (16, 24)
    )
    data = [{"input_ids": tokenizer(line)["input_ids"]} for line in LINES * 4]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = first_step(student, teacher, tmp_path, data, collator, processing_class=tokenizer)
    assert not trainer.reader.causal
    assert trainer.task == "language"
    made = collator(copy.deepcopy(data[:4]))
    batch = trainer.reader(made)
    assert torch.equal(batch.mask, made["labels"] >= 0)  # type: ignore[arg-type]
    assert torch.equal(batch.labels[batch.mask], made["labels"][batch.mask])  # type: ignore[index]


def vit(width: int, seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    return ViTForImageClassification(config)


def digits() -> Any:
    """Scans of digits of the ``datasets`` library, their pixels made when they are asked for."""
    import datasets
    from sklearn.datasets import load_digits

    found = load_digits()
    rows = {"image": found.images[:96].reshape(96, -1).tolist(), "label": found.target[:96].tolist()}

    def pixels(batch: dict[str, Any]) -> dict[str, Any]:
        shaped = [torch.tensor(np.array(image) / 16.0, dtype=torch.float32).view(1, 8, 8) for image in batch["image"]]
        return {"pixel_values": shaped, "labels": batch["label"]}

    return datasets.Dataset.from_dict(rows).with_transform(pixels)


@torch.no_grad()
def test_images_are_classified_from_features_too(tmp_path: Path) -> None:
    data = digits()
    student, teacher = vit(16, 1), vit(24, 2)
    images = torch.stack([data[i]["pixel_values"] for i in range(8)])
    labels = torch.tensor([data[i]["labels"] for i in range(8)])
    own, other = student(images).logits, teacher.eval()(images).logits
    loss = {
        "cross_entropy": 1.0,
        "kd": {"weight": 0.5, "temperature": 2.0},
        "fitnets": {"weight": 1.0, "tap": "blocks:0"},
    }
    with torch.enable_grad():
        trainer = first_step(student, teacher, tmp_path, data, None, loss=loss, args={"remove_unused_columns": False})
    assert losses(trainer, "cross_entropy")[0] == pytest.approx(F.cross_entropy(own, labels).item(), rel=1e-5)
    assert losses(trainer, "kd")[0] == pytest.approx(divergence(own, other).mean().item(), rel=1e-4)
    assert losses(trainer, "fitnets")[0] > 0


def test_a_bank_of_samples_gets_numbers(tmp_path: Path) -> None:
    student, before = vit(16, 1), weights(vit(16, 1))
    loss = {"cross_entropy": 1.0, "crd": {"weight": 0.8, "negatives": 8}}
    options = {"remove_unused_columns": False, "eval_strategy": "steps", "eval_steps": 1}
    data = digits()
    trainer = first_step(student, vit(24, 2), tmp_path, data, None, loss=loss, args=options, eval_dataset=data)
    assert "index" in trainer.train_dataset[0]
    assert not torch.equal(before, weights(student))
    told = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert "eval_cross_entropy" in told[0]
    assert "eval_crd" not in told[0]  # its bank is of training samples
    trained = first_step(
        vit(16, 1), vit(24, 2), tmp_path, digits(), None, loss=loss, args={"remove_unused_columns": False}
    )
    assert torch.equal(weights(trained.model), weights(student))  # evaluating moved nothing


def t5(width: int, seed: int, start: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": width, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=304, decoder_start_token_id=start, **sizes))


@pytest.mark.parametrize(("start", "made_by_collator"), [(0, True), (0, False), (1, False)])
@torch.no_grad()
def test_encoder_decoders_need_no_shift(start: int, made_by_collator: bool, tmp_path: Path) -> None:
    tokenizer, student, teacher = bpe(), t5(16, 1), t5(24, 2, start)
    data = [
        {"input_ids": tokenizer(pair["prompt"])["input_ids"], "labels": tokenizer(pair["completion"])["input_ids"]}
        for pair in PAIRS
    ]
    collator = DataCollatorForSeq2Seq(tokenizer, student if made_by_collator else None)
    batch = DataCollatorForSeq2Seq(tokenizer)(copy.deepcopy(data[:8]))
    own, other = student(**batch).logits, teacher.eval()(**batch).logits
    labels = batch["labels"]
    counts = labels != -100
    wanted = 0.5 * F.cross_entropy(own[counts].double(), labels[counts]) + 0.5 * divergence(own, other)[counts].mean()
    with torch.enable_grad():
        trainer = first_step(student, teacher, tmp_path, data, collator, processing_class=tokenizer)
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest floating tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.is_floating_point() and value._base is None:
                self.size = max(self.size, value.numel())
        return out


def test_fused_losses_make_no_logits_of_all_tokens(tmp_path: Path) -> None:
    vocabulary = 2000

    def trained(loss: Any) -> tuple[int, Ordered]:
        student, teacher = llama(16, vocabulary, 1), llama(24, vocabulary, 2)
        trainer = Ordered(
            model=student,
            teacher=teacher,
            loss=loss,
            args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=24),
            train_dataset=language_source(LINES * 4, tokenizer="bytes", length=48, validation=0).train,
        )
        distiller, _ = trainer._listen()  # what sets up looks at logits once
        assert distiller is trainer.distiller
        with Largest() as largest:
            trainer.train()
        return largest.size, trainer

    fused, plain = {"fused_kl": {"chunk": 16}}, {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 1.0}}
    size, fusing = trained(fused)
    whole, dense = trained(plain)
    rows = fusing.train_dataset.split.rows.batch(torch.arange(24)).labels
    assert size < whole
    assert whole >= rows.numel() * vocabulary
    assert size < rows.numel() * vocabulary / 4
    assert losses(fusing)[0] == pytest.approx(losses(dense)[0], rel=1e-5)
    assert torch.allclose(weights(fusing.model), weights(dense.model), atol=1e-6)


def test_a_cache_teaches_what_its_teacher_does(tmp_path: Path) -> None:
    tokenizer = bpe()
    data = [{"input_ids": tokenizer(line)["input_ids"]} for line in LINES * 4]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    teacher = llama(24, 300, 2)

    def trainer(judge: Any) -> DistillationTrainer:
        args = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
        return DistillationTrainer(
            model=llama(16, 300, 1),
            teacher=judge,
            loss=SUM,
            args=args,
            train_dataset=data,
            eval_dataset=data[:5],
            data_collator=collator,
            processing_class=tokenizer,
        )

    live = trainer(teacher)
    cache = build(teacher, live.loader(), tmp_path / "cache", store={"logits": {"raw": {"dtype": "keep"}}})
    assert cache is not None
    live.train()
    cached = trainer(CachedTeacher(cache))
    cached.train()
    assert torch.allclose(weights(live.model), weights(cached.model), atol=1e-7)
    told = next(line for line in cached.state.log_history if "eval_loss" in line)
    assert "eval_cross_entropy" in told
    assert "eval_kd" not in told


def test_two_tokenizers_meet_in_a_split(tmp_path: Path) -> None:
    data = language_source(PAIRS, tokenizer="bytes", teacher_tokenizer=bpe(), length=48, validation=0.2)
    trainer = DistillationTrainer(
        model=llama(16, 258, 1),
        teacher=llama(24, 320, 2),
        loss={"cross_entropy": 1.0, "uld": 0.5},
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=data.train,
        eval_dataset=data.validation,
    )
    trainer.train()
    assert all(value > 0 for value in losses(trainer, "uld"))
    assert {"eval_loss", "eval_uld", "eval_cross_entropy"} <= trainer.evaluate().keys()


def test_columns_for_the_teacher_alone(tmp_path: Path) -> None:
    """A collator of one's own, or columns named teacher_..., for a teacher that reads other ids."""
    tokenizer, other = bpe(), bpe(280)
    data = [
        {**tokenizer(line), "labels": i % 3, **{f"teacher_{k}": v for k, v in other(line).items()}}
        for i, line in enumerate(LINES * 4)
    ]

    def collate(rows: list[dict[str, Any]]) -> Batch:
        own = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
        others = other.pad([{"input_ids": row["teacher_input_ids"]} for row in rows], return_tensors="pt")
        labels = torch.tensor([row["labels"] for row in rows])
        return Batch(dict(own), labels, teacher_inputs=dict(others))

    student, teacher = bert(16, 1, **STILL), bert(24, 2)
    options = {"processing_class": tokenizer, "teacher_processing_class": other}
    batch = collate(data[:8])
    with torch.no_grad():
        said = divergence(student(**batch.inputs).logits, teacher.eval()(**batch.teacher_inputs).logits).mean()
    trainer = first_step(student, teacher, tmp_path, data, collate, args={"remove_unused_columns": False}, **options)
    assert losses(trainer, "kd")[0] == pytest.approx(said.item(), rel=1e-4)


def test_packs_of_transformers_are_kept_apart(tmp_path: Path) -> None:
    tokenizer = bpe()
    data = [{"input_ids": tokenizer(line)["input_ids"]} for line in LINES * 4]
    student, teacher = llama(16, 300, 1).double(), llama(24, 300, 2).double()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data[:4]:
            ids = torch.tensor([row["input_ids"]])
            own, other = student(input_ids=ids).logits[0, :-1], teacher(input_ids=ids).logits[0, :-1]
            cross_entropy = F.cross_entropy(own, ids[0, 1:], reduction="sum")
            total += 0.5 * cross_entropy.item() + 0.5 * divergence(own, other).sum().item()
            count += ids.shape[1] - 1
    collator = DataCollatorWithFlattening()
    options: dict[str, Any] = {"args": {"per_device_train_batch_size": 4, "max_steps": 1}}
    trainer = first_step(student, teacher, tmp_path, data, collator, processing_class=tokenizer, **options)
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-6)


def test_adapters_learn_and_are_what_is_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = llama(16, 258, 1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    student = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    data = language_source(PAIRS, tokenizer="bytes", length=48, validation=0).train
    trainer = first_step(student, llama(24, 258, 2), tmp_path, data, None, args={"learning_rate": 1.0})
    assert trainer.reader.causal
    assert losses(trainer)[-1] != losses(trainer)[0]
    trainer.save_model(str(tmp_path / "student"))
    assert (tmp_path / "student" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "student" / "model.safetensors").exists()
    plain = student.unload().state_dict()
    assert all(torch.equal(plain[name], value) for name, value in before.items())
