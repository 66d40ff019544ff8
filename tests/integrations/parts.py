"""Small real models, tokenizers and trainers that tests of integrations share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from limbeck.data.language import LibraryTokens, train_bpe
from limbeck.integrations.transformers import DistillationTrainer
from tests.data.language.texts import LINES

SPREAD = {"initializer_range": 0.2}  # models that say something, so that their losses differ by more than rounding
PAIRS = [{"prompt": line[: 5 + i % 9], "completion": line[9 : 12 + i % 31]} for i, line in enumerate(LINES * 4)]


def llama(width: int = 16, vocabulary: int = 258, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Two layers with random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    known = {"vocab_size": vocabulary, "max_position_embeddings": 64, **sizes, **marks, **SPREAD}
    return LlamaForCausalLM(LlamaConfig(**(known | options)))


def bert(width: int = 16, seed: int = 0, **options: Any) -> BertForSequenceClassification:
    """Two layers that tell three classes."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=320, max_position_embeddings=64, num_labels=3, **sizes, **SPREAD, **options)
    return BertForSequenceClassification(config)


def bpe(size: int = 300) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the tests' texts."""
    made: LibraryTokens = train_bpe(LINES * 3, size)
    return PreTrainedTokenizerFast(tokenizer_object=made.tokenizer, **made.named)


class Ordered(DistillationTrainer):
    """Takes samples in their order, and keeps each step's loss with all its digits, in any version of transformers."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        value = super().training_step(*args, **kwargs)
        kept = self.__dict__.setdefault("kept", {})
        kept[self.state.global_step] = kept.get(self.state.global_step, 0.0) + value.item()
        return value

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    """Plain SGD at a constant rate, nothing clipped, nothing said."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | options))


def weights(model: nn.Module) -> Tensor:
    """All parameters, in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    """What a term was in training, as it was logged; the loss itself, of every step."""
    if name == "loss":
        return list(trainer.__dict__["kept"].values())
    return [line[name] for line in trainer.state.log_history if "loss" in line]
