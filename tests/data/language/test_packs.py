"""Documents of a pack do not see each other: in every family, logits are those of each document alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, ModelError
from limbeck.data.language import LanguageLoader, language_source
from limbeck.data.language.apart import check_packs
from limbeck.functional import cross_entropy_loss, reverse_kl_loss
from tests.data.language.texts import LINES

SIZES = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {
    "vocab_size": 258,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
APART = {
    "Llama": GROUPED,
    "Qwen2": {**SIZES, "num_key_value_heads": 2},
    "Qwen3": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Gemma3Text": {**GROUPED, "sliding_window": 4},
    "GPTNeoX": SIZES,
    "Phi": SIZES,
    "GPT2": GPT2,
}
TOGETHER = {
    "Bloom": {"vocab_size": 258, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "Mamba": {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
TEXTS = [line[: 4 + 5 * (i % 5)] for i, line in enumerate(LINES * 4)]


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Configurations of this size make transformers talk."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def model_of(family: str, attention: str = "sdpa") -> nn.Module:
    import transformers

    sizes = {**APART, **TOGETHER}[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in made.parameters():  # far from the start, where attention hardly looks at anything
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made.double().eval()


def loader(**options: Any) -> LanguageLoader:
    source = language_source(TEXTS, **{"tokenizer": "bytes", "length": 64, "validation": 0, **options})
    return LanguageLoader(source.train, batch_size=4, shuffle=False, drop_last=False)


def alone(model: nn.Module, batch: Batch, row: int, document: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a document stands in its row, and its logits where nothing else is."""
    places = (batch.extras["document"][row] == document).nonzero().flatten()
    return places, model(input_ids=batch.inputs["input_ids"][row, places].unsqueeze(0), use_cache=False).logits[0]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "attention"), [(f, "sdpa") for f in APART] + [("Llama", "eager"), ("GPT2", "eager")]
)
def test_logits_are_those_of_each_document_alone(family: str, attention: str, padding: str) -> None:
    model, batch = model_of(family, attention), loader(pack=True, padding=padding).example(5)
    documents = batch.extras["document"]
    assert (documents == 0).any()  # there is padding
    assert (documents.amax(dim=1) > 1).sum() > 2
    with torch.no_grad():
        packed = model(**batch.inputs).logits
        for row, count in enumerate(documents.amax(dim=1).tolist()):
            for document in range(1, count + 1):
                places, logits = alone(model, batch, row, document)
                # transformers' eager softmax is of single precision
                assert torch.allclose(packed[row, places], logits, atol=1e-10 if attention == "sdpa" else 1e-5)
        check_packs(model, batch)
        contaminated = model(**{**batch.inputs, "use_cache": True}).logits
        assert (contaminated - packed)[batch.mask].abs().max() > 1e-3  # the test can fail: this is how not to ask


@pytest.mark.parametrize("family", list(TOGETHER))
def test_families_that_read_on_are_refused(family: str) -> None:
    model = model_of(family, "eager")
    model.train()
    with pytest.raises(ModelError, match=f"student: .*does not keep the documents.*{family}ForCausalLM.*pack: false"):
        check_packs(model, loader(pack=True).example(2))
    assert model.training
    with pytest.raises(DataError, match="these are no packs"):
        check_packs(model, loader().example(2))


class Places(nn.Module):
    """Looks at no other token, and counts positions through the row."""

    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.tokens, self.places, self.resets = nn.Embedding(258, 258), nn.Embedding(64, 258), resets

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        through = torch.arange(input_ids.shape[1]).unsqueeze(0)
        return self.tokens(input_ids) + self.places(position_ids if self.resets else through)


def test_positions_must_begin_anew() -> None:
    check_packs(Places(resets=True), loader(pack=True).example(2))
    with pytest.raises(ModelError, match="teacher: .*Places: logits are .* from those of a document alone"):
        check_packs(Places(resets=False), loader(pack=True).example(2), teacher=True)
    with pytest.raises(ModelError, match="position_ids and use_cache, which this model does not take; found Embedding"):
        check_packs(nn.Embedding(258, 4), loader(pack=True).example(2))


def test_half_precision_does_not_alarm() -> None:
    check_packs(model_of("Llama").bfloat16(), loader(pack=True).example(2))
    with pytest.raises(ModelError):
        check_packs(model_of("OPT", "eager").bfloat16(), loader(pack=True).example(2))


WAYS = {
    "alone": {},
    "packed": {"pack": True},
    "left": {"padding": "left"},
    "packed left": {"pack": True, "padding": "left"},
    "wide": {"multiple": 64},
}


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_loss_and_gradient_are_the_same_however_rows_are_laid_out(family: str) -> None:
    """Over the whole set, in micro-batches of any size: the mean over all tokens that count."""
    student, teacher = model_of(family), model_of(family)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = {}
    for name, options in WAYS.items():
        for size in (1, 5) if name in ("alone", "packed") else (3,):
            made = loader(**options)
            made.batch_size = size
            student.zero_grad()
            batches = list(made.batches())
            total, loss = sum(int(b.mask.sum()) for b in batches), 0.0
            for batch in batches:
                logits = student(**batch.inputs).logits
                with torch.no_grad():
                    wanted = teacher(**batch.inputs).logits
                value = cross_entropy_loss(logits, batch.labels, mask=batch.mask, reduction="sum")
                value = (value + reverse_kl_loss(logits, wanted, mask=batch.mask, reduction="sum")) / total
                value.backward()
                loss += float(value.detach())
            grads = torch.cat([p.grad.flatten() for p in student.parameters()])
            found[name, size] = total, loss, grads
    first = found["alone", 1]
    assert first[1] > 1
    for total, loss, grads in found.values():
        assert total == first[0]
        assert abs(loss - first[1]) < 1e-9
        assert torch.allclose(grads, first[2], atol=1e-9)
