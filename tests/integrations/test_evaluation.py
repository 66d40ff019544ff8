"""What the Trainer says of held-out data, and that saying it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from limbeck.data.language import language_source
from limbeck.integrations.transformers import DistillationTrainer
from tests.data.language.texts import LINES
from tests.integrations.parts import PAIRS, arguments, bert, bpe, llama, weights
from tests.integrations.test_models import divergence

SUM = {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}


def texts(folder: Path, **options: Any) -> DistillationTrainer:
    data = language_source(PAIRS, tokenizer="bytes", length=48, validation=0.4)
    settings = options.pop("args", {})
    return DistillationTrainer(
        model=llama(16, 258, 1),
        teacher=llama(24, 258, 2),
        loss=SUM,
        args=arguments(folder, **settings),
        train_dataset=data.train,
        eval_dataset=data.validation,
        **options,
    )


@torch.no_grad()
def test_the_loss_is_that_of_all_tokens(tmp_path: Path) -> None:
    told = [texts(tmp_path, args={"per_device_eval_batch_size": n}).evaluate() for n in (1, 3, 8)]
    trainer = texts(tmp_path)
    rows = trainer.eval_dataset.split.rows
    batch = rows.batch(torch.arange(len(rows)))
    own, other = (m.eval()(**batch.inputs).logits for m in (llama(16, 258, 1), llama(24, 258, 2)))
    counts = batch.mask
    wanted = F.cross_entropy(own[counts].double(), batch.labels[counts]).item()
    kd = divergence(own, other)[counts].mean().item()
    for found in told:
        assert found["eval_cross_entropy"] == pytest.approx(wanted, rel=1e-5)
        assert found["eval_kd"] == pytest.approx(kd, rel=1e-4)
        assert found["eval_loss"] == pytest.approx(0.5 * wanted + 0.5 * kd, rel=1e-5)


def classifier(folder: Path, **options: Any) -> DistillationTrainer:
    tokenizer = bpe()
    data = [{**tokenizer(line), "label": i % 3} for i, line in enumerate(LINES * 4)]
    settings = options.pop("args", {})
    return DistillationTrainer(
        model=bert(16, 1),
        teacher=bert(24, 2),
        loss=options.pop("loss", "kd"),
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=options.pop("eval_dataset", data[:7]),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        **options,
    )


def test_metrics_get_logits_and_labels(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def metrics(found: Any) -> dict[str, float]:
        seen.update(predictions=found.predictions, labels=found.label_ids)
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = classifier(tmp_path, compute_metrics=metrics, args={"per_device_eval_batch_size": 3})
    told = trainer.evaluate()
    assert seen["predictions"].shape == (7, 3)
    assert seen["labels"].tolist() == [i % 3 for i in range(7)]
    assert {"eval_accuracy", "eval_loss", "eval_kd", "eval_cross_entropy"} <= told.keys()
    trainer.train()
    assert trainer.evaluate(metric_key_prefix="held")["held_kd"] != told["eval_kd"]


def test_metrics_of_language_models_get_their_own_labels(tmp_path: Path) -> None:
    tokenizer = bpe()
    data = [{"input_ids": tokenizer(line)["input_ids"]} for line in LINES]
    seen: dict[str, Any] = {}

    def metrics(found: Any) -> dict[str, float]:
        logits, labels = torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids)
        seen["nll"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).item()
        return {}

    trainer = DistillationTrainer(
        model=llama(16, 300, 1),
        teacher=llama(24, 300, 2),
        loss={"fused_kl": {"label_share": 1.0}},  # it makes no logits by itself
        args=arguments(tmp_path),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_fused_kl/cross_entropy"] == pytest.approx(seen["nll"], rel=1e-5)


def test_evaluating_moves_nothing(tmp_path: Path) -> None:
    """Not a weight, not a helper's buffer, not the random state: dropout draws on as if nothing had been asked."""
    loss = {"cross_entropy": 1.0, "taid": 1.0}
    quiet = classifier(tmp_path, loss=loss)
    quiet.train()
    asked = classifier(tmp_path, loss=loss, args={"eval_strategy": "steps", "eval_steps": 1})
    asked.train()
    assert torch.equal(weights(quiet.model), weights(asked.model))
    assert len([line for line in asked.state.log_history if "eval_loss" in line]) == 3
    own, other = quiet.distiller.loss.state_dict(), asked.distiller.loss.state_dict()  # type: ignore[union-attr]
    assert own
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_several_sets_have_their_names(tmp_path: Path) -> None:
    data = classifier(tmp_path).train_dataset
    trainer = classifier(tmp_path, eval_dataset={"near": data[:4], "far": data[4:9]}, args={"eval_strategy": "epoch"})
    told = trainer.evaluate()
    assert {"eval_near_loss", "eval_near_kd", "eval_far_cross_entropy"} <= told.keys()


def test_predictions_of_what_has_no_labels(tmp_path: Path) -> None:
    tokenizer, trainer = bpe(), classifier(tmp_path)
    found = trainer.predict([dict(tokenizer(line)) for line in LINES])
    assert found.predictions.shape == (len(LINES), 3)
    assert found.label_ids is None
    assert "test_kd" in found.metrics
    assert "test_cross_entropy" not in found.metrics
    whole = classifier(tmp_path).predict([{**tokenizer(line), "label": 0} for line in LINES])
    assert np.allclose(whole.predictions, found.predictions, atol=1e-6)
    assert "test_cross_entropy" in whole.metrics
