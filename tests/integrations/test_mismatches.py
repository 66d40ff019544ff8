"""What does not fit is said before anything trains, in one readable sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, DataCollatorWithPadding

from limbeck.core.errors import ConfigError, DataError, LimbeckError, ModelError
from limbeck.data.language import language_source
from limbeck.integrations.transformers import DistillationTrainer
from limbeck.teachers.cached import CachedTeacher
from tests.data.language.texts import LINES
from tests.integrations.parts import PAIRS, arguments, bert, bpe, llama, weights


def texts(folder: Path, student: Any = None, teacher: Any = None, **options: Any) -> DistillationTrainer:
    tokenizer = options.pop("tokenizer", None) or bpe()
    given = {
        "train_dataset": [{"input_ids": tokenizer(line)["input_ids"]} for line in LINES],
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "processing_class": tokenizer,
        "loss": "kd",
        "teacher": llama(24, 300, 2) if teacher is None else teacher,
        "args": arguments(folder),
    }
    return DistillationTrainer(model=llama(16, 300, 1) if student is None else student, **(given | options))


def refused(kind: type[LimbeckError], pattern: str, trainer: DistillationTrainer) -> None:
    before = weights(trainer.model).clone()
    with pytest.raises(kind, match=pattern):
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.equal(before, weights(trainer.model))
    assert not any(m._forward_hooks for m in trainer.model.modules())


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kd cannot work without a teacher"):
        DistillationTrainer(model=llama(), args=arguments(tmp_path), train_dataset=[])
    with pytest.raises(ConfigError, match="no such method.*'kdd'.*did you mean 'kd'"):
        texts(tmp_path, loss={"kdd": 1.0})
    with pytest.raises(ConfigError, match="no such option"):
        texts(tmp_path, loss={"kd": {"temp": 1.0}})
    with pytest.raises(ConfigError, match="label_smoothing_factor.*label_smoothing"):
        texts(tmp_path, args=arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ConfigError, match="compute_loss_func"):
        texts(tmp_path, compute_loss_func=lambda *_: None)
    with pytest.raises(ConfigError, match="another last layer"):
        texts(tmp_path, loss="dho")
    model = llama(16, 300)
    with pytest.raises(ModelError, match="share modules"):
        texts(tmp_path, model, model)


def test_other_vocabularies(tmp_path: Path) -> None:
    refused(DataError, "cannot have one vocabulary.*teacher_processing_class", texts(tmp_path, None, llama(24, 4000)))
    other = texts(tmp_path, None, llama(24, 300), teacher_processing_class=bpe(290))
    refused(DataError, "different tokenizers.*290.*use .*uld", other)
    refused(DataError, "fewer logits than its tokenizer", texts(tmp_path, llama(16, 280)))
    refused(DataError, "fewer logits than its tokenizer", texts(tmp_path, None, llama(16, 280)))
    split = language_source(PAIRS, tokenizer="bytes", teacher_tokenizer=bpe(), length=48, validation=0).train
    refused(DataError, "different tokenizers", texts(tmp_path, llama(16, 258), train_dataset=split))


def test_vocabularies_padded_to_other_sizes_train(tmp_path: Path) -> None:
    """As those of Qwen2.5 are: the same tokens, 151,936 or 152,064 rows."""
    for student, teacher in ((300, 320), (320, 300)):
        trainer = texts(tmp_path, llama(16, student, 1), llama(24, teacher, 2), teacher_processing_class=bpe())
        trainer.train()
        assert trainer.state.global_step == 3
    unnamed = texts(tmp_path, llama(16, 320, 1), llama(24, 300, 2), processing_class=None)
    unnamed.train()
    assert unnamed.state.global_step == 3


def test_methods_that_know_no_tokens(tmp_path: Path) -> None:
    refused(ConfigError, "loss.ickd: this objective knows no mask", texts(tmp_path, loss={"ickd": 1.0}))


def test_packs_without_positions(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(3, 19)), "labels": list(range(3, 19)), "seq_lengths": [8, 8]}] * 8
    collator = DataCollatorWithPadding(bpe())
    options: dict[str, Any] = {"train_dataset": rows, "data_collator": collator}
    refused(DataError, "packs of several documents.*seq_lengths|seq_lengths.*packs", texts(tmp_path, **options))
    running = [{**row, "position_ids": list(range(16))} for row in rows]
    refused(DataError, "position_ids that run on", texts(tmp_path, **(options | {"train_dataset": running})))
    begun = [{**row, "position_ids": [*range(8), *range(8)]} for row in rows]
    texts(tmp_path, **(options | {"train_dataset": begun})).train()


def test_models_that_read_on_in_a_pack(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    class Deaf(BloomForCausalLM):
        """Takes positions, and passes them over."""

        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **others: Any) -> Any:
            return super().forward(input_ids, **others)

    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    student = Deaf(config)
    trainer = texts(tmp_path, student, data_collator=DataCollatorWithFlattening(), causal=True)
    refused(ModelError, "does not keep the documents of a pack apart", trainer)


def test_classes_in_another_order(tmp_path: Path) -> None:
    tokenizer = bpe()
    names = {"neutral": 0, "good": 1, "bad": 2}
    student = bert(16, 1, label2id=names, id2label={i: n for n, i in names.items()})
    names = {"bad": 0, "neutral": 1, "good": 2}
    teacher = bert(24, 2, label2id=names, id2label={i: n for n, i in names.items()})
    data = [{**tokenizer(line), "label": i % 3} for i, line in enumerate(LINES)]
    collator = DataCollatorWithPadding(tokenizer)
    options: dict[str, Any] = {"train_dataset": data, "data_collator": collator}
    refused(DataError, "number their classes differently.*'neutral' is 0", texts(tmp_path, student, teacher, **options))
    other = texts(tmp_path, bert(16, 1), bert(24, 2), teacher_processing_class=bpe(290), **options)
    refused(DataError, "different tokenizers", other)


def test_no_data_and_caches_of_other_data(tmp_path: Path) -> None:
    from limbeck.cache import build

    with pytest.raises(LimbeckError, match="no sample"):
        texts(tmp_path, train_dataset=[]).train()
    live = texts(tmp_path)
    cache = build(llama(24, 300, 2), live.loader(), tmp_path / "cache")
    assert cache is not None
    tokenizer = bpe()
    others = [{"input_ids": tokenizer(line[5:])["input_ids"]} for line in LINES]
    trainer = texts(tmp_path, teacher=CachedTeacher(cache), train_dataset=others)
    refused(LimbeckError, "not those that the teacher saw", trainer)
