"""Language models through the engine: trained, judged by perplexity, and shipped with their tokenizer."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.cache.build import build
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError, ModelError
from limbeck.data import build_loader, load_source
from limbeck.data.language import LibraryTokens, language_source, load_tokens
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.engine.evaluation import evaluate
from limbeck.objectives import KD, CrossEntropy
from limbeck.recipes.distill import distill
from limbeck.teachers.cached import CachedTeacher
from tests.data.language.texts import LINES

TEXT = "\n".join(LINES * 6)


class Recurrent(nn.Module):
    """A small causal model that knows nothing of transformers."""

    def __init__(self, width: int = 24, vocabulary: int = 258) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True)
        self.linear = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(self.cell(self.embedding(input_ids))[0])


def source(**options: Any) -> Any:
    return load_source([TEXT], **{"tokenizer": "bytes", "length": 32, **options})


def test_perplexity_is_that_of_every_token() -> None:
    model, split = Recurrent().requires_grad_(False), source().validation
    found = evaluate(model, build_loader(split, batch_size=3, train=False))
    losses, right = [], 0
    for row in range(len(split)):
        batch = split.rows.batch(torch.tensor([row]))
        for place in range(batch.labels.shape[1]):
            if batch.mask[0, place]:
                logits = model(batch.inputs["input_ids"])[0, place].double()
                losses.append(float(F.cross_entropy(logits, batch.labels[0, place])))
                right += int(logits.argmax() == batch.labels[0, place])
    assert found["samples"] == len(losses)
    assert math.isclose(found["nll"], sum(losses) / len(losses), rel_tol=1e-5)
    assert math.isclose(found["perplexity"], math.exp(sum(losses) / len(losses)), rel_tol=1e-5)
    assert math.isclose(found["accuracy"], right / len(losses), rel_tol=1e-6)
    config = TrainConfig(epochs=1)
    assert config.monitored("language") == "perplexity"
    assert config.lower_is_better("language")


def test_batches_that_are_looked_at_hold_their_logits_in_bounds() -> None:
    split = source().train
    assert split.measured == 512
    wide = source(tokenizer={"bpe": 300}, length=64).train
    wide.tokens = replace_size(wide.tokens, 1 << 20)
    assert wide.measured == 1
    wide.tokens = replace_size(wide.tokens, 1 << 15)
    assert wide.measured * 64 * (1 << 15) <= 1 << 26 < (wide.measured + 1) * 64 * (1 << 15)


def replace_size(tokens: Any, size: int) -> Any:
    made = copy.copy(tokens)
    made.size = size
    return made


def train(distiller: Distiller, data: Any, accumulate: int = 1, **options: Any) -> Tensor:
    loader = build_loader(data.train, batch_size=8, train=True, seed=1, **options)
    config = TrainConfig(steps=3, lr=0.1, optimizer="sgd", accumulate=accumulate, compile="off", clip=None)
    fitted = fit([Stage("s", distiller, config)], loader, quiet=True, seed=2)
    return torch.cat([p.detach().flatten() for p in fitted.student.parameters()])


def distiller(teacher: Any = None, **settings: Any) -> Distiller:
    torch.manual_seed(3)
    student, judge = Recurrent(), Recurrent(32) if teacher is None else teacher
    return Distiller(student.double(), CrossEntropy() + KD(**settings), judge.double() if teacher is None else judge)


def test_weights_are_the_same_for_any_micro_batches_and_padding() -> None:
    pairs = [{"prompt": line[: 5 + i % 9], "completion": line[9 : 12 + i % 31]} for i, line in enumerate(LINES * 6)]

    def weights(accumulate: int, **options: Any) -> Tensor:
        data = load_source(pairs, tokenizer="bytes", length=48, bucket=0, validation=0.1, **options)
        return train(distiller(), data, accumulate)

    first = weights(1)
    assert torch.allclose(weights(1, multiple=48), first, atol=1e-12)
    for accumulate in (3, 8):  # their shares of a step are numbers of single precision
        assert torch.allclose(weights(accumulate), first, atol=1e-8)
    assert torch.allclose(weights(2, multiple=48), first, atol=1e-8)


def test_a_cached_teacher_says_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    Recurrent()  # as the student of distiller() is drawn first
    teacher, data = Recurrent(32).double(), source()
    loader = build_loader(data.train, batch_size=8, train=True, seed=1)
    cache = build(teacher, loader, tmp_path, store={"logits": {"raw": {"dtype": "keep"}}}, batch=5)
    assert cache is not None
    live, cached = train(distiller(teacher), data), train(distiller(CachedTeacher(cache)), data)
    assert torch.allclose(live, cached, atol=1e-12)


def test_packs_are_refused_to_models_that_read_on() -> None:
    with pytest.raises(ModelError, match="student: packs are told apart by position_ids.*Recurrent"):
        train(distiller(), source(pack=True))


def test_other_tokenizers_are_told_before_any_step(bpe: LibraryTokens) -> None:
    data = source(tokenizer="bytes", teacher_tokenizer=bpe)
    teacher = Recurrent(16, 320)
    with pytest.raises(DataError, match=r"kd: teacher and student have different tokenizers.*found bytes with 258"):
        train(Distiller(Recurrent(), CrossEntropy() + KD(), teacher), data)
    train(Distiller(Recurrent(), CrossEntropy(), teacher), data)  # nobody compares anything


class Named(Recurrent):
    """Tells its embeddings, as models of transformers do."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def test_models_of_too_few_tokens_are_told() -> None:
    for teacher, message in (
        (Named(16, 99), "the teacher has fewer logits than its tokenizer has tokens; found 99 logits"),
        (Recurrent(16, 99), "the model does not know a token; found Recurrent: index out of range"),
    ):
        with pytest.raises(DataError, match=message):
            train(Distiller(Recurrent(), CrossEntropy() + KD(), teacher), source())


def test_distill_from_a_source_leaves_a_student_with_its_tokenizer(tmp_path: Path) -> None:
    data = source(tokenizer={"bpe": 270})
    student, teacher = Recurrent(16, 270), Recurrent(24, 270)
    done = distill(teacher, student, data, epochs=4, lr=0.3, batch_size=4, quiet=True, out=tmp_path)
    assert done.result["perplexity"] < 270
    assert math.isclose(done.result["perplexity"], math.exp(done.result["nll"]), rel_tol=1e-6)
    assert {"agreement", "kl", "js"} <= set(done.result)
    assert load_tokens(tmp_path / "student").fingerprint == data.train.tokens.fingerprint


class Reading(Recurrent):
    """Takes positions, and reads on all the same."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Tensor:
        return super().forward(input_ids)


def packed(data: Any) -> Any:
    return data.model_copy(update={"options": {**data.options, "pack": True}})


def test_a_recipe_of_language_models(tmp_path: Path) -> None:
    from limbeck.recipes.check import check
    from limbeck.recipes.run import run
    from limbeck.recipes.schema import Recipe

    (tmp_path / "text.txt").write_text(TEXT)
    model = f"{__name__}:Recurrent"
    recipe = Recipe.model_validate(
        {
            "name": "lm",
            "data": {
                "source": str(tmp_path / "text.txt"),
                "options": {"tokenizer": "bytes", "length": 32, "validation": 0.2},
                "batch_size": 8,
            },
            "teacher": {"model": model, "train": {"epochs": 1, "lr": 0.02}},
            "student": {"model": model, "options": {"width": 16}},
            "loss": "kd",
            "train": {"epochs": 1, "lr": 0.02},
        }
    )
    assert check(recipe) == []
    model = {"student": {"model": f"{__name__}:Reading"}, "loss": "cross_entropy", "teacher": None}
    (problem,) = check(Recipe.model_validate({**recipe.written(), "data": packed(recipe.data).model_dump(), **model}))
    assert "student: this model does not keep the documents" in str(problem)
    assert "pack: false" in str(problem)
    result = run(recipe, tmp_path / "run", quiet=True)
    assert result["perplexity"] > 1
    assert result["training"]["validation"] == pytest.approx(result["perplexity"], rel=1e-4)
    assert "258 ids of bytes" in result["data"]["note"]
    assert load_tokens(tmp_path / "run" / "student").size == 258
    assert json.loads((tmp_path / "run" / "student" / "student.json").read_text())["options"]["vocabulary"] == 258


def test_rows_of_conversations_train_too() -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"line {i}"}, {"role": "assistant", "content": LINES[i % 6]}]}
        for i in range(30)
    ]
    data = language_source(chats, tokenizer="bytes", length=96)
    assert torch.isfinite(train(distiller(), data)).all()
