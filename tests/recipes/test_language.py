"""Language models in recipes: compared by perplexity, with other widths, other tokens, and from a cache."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from limbeck.data.language import load_tokens
from limbeck.models.student import load_student
from limbeck.recipes.caching import build_cache
from limbeck.recipes.compare import compare
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe
from limbeck.report.run_page import _said

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LINE = "To be, or not to be, that is the question: {} times is it nobler in the mind to suffer. "


@pytest.fixture
def texts(tmp_path):
    """Training, validation and test lines in one file."""
    file = tmp_path / "lines.jsonl"
    split = ("train", "train", "train", "validation", "test")
    lines = [{"text": LINE.format(i) * (1 + i % 3), "split": split[i % 5]} for i in range(100)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def recipe(texts, *, wider: int = 0, **changes) -> Recipe:
    teacher = {"model": "transformers:llama", "options": dict(LLAMA), "train": {"steps": 20, "lr": 0.01}}
    if wider:
        teacher["options"]["vocab_size"] = wider
    plain = {
        "name": "lines",
        "data": {"source": str(texts), "options": {"tokenizer": "bytes", "length": 48}, "batch_size": 10},
        "teacher": teacher,
        "student": {"model": "transformers:llama", "options": {**LLAMA, "hidden_size": 8}},
        "loss": "kd",
        "train": {"steps": 6, "lr": 0.01, "optimizer": "adamw", "device": "cpu"},
    }
    for name, value in changes.items():
        plain[name] = {**plain[name], **value} if isinstance(value, dict) and isinstance(plain[name], dict) else value
    return Recipe.model_validate(plain)


@pytest.mark.slow
def test_compared_by_perplexity(texts, tmp_path):
    facts = compare(recipe(texts), ["kd", "mutual/jsd"], 2, ["no_teacher"], out=tmp_path / "out", quiet=True)
    assert facts["metric"] == "perplexity"
    rows = {row["entry"]: row for row in facts["methods"]}
    assert rows["mutual/jsd"]["scheme"] == "mutual"
    assert [*rows["mutual/jsd"]["loss"]] == ["cross_entropy", "jsd"]
    for row in rows.values():
        assert 1 < row["perplexity"]["mean"] < 300
        assert 0 < row["acceptance"]["mean"] < 1 or row["entry"] == "no_teacher"
    reached = {entry: [r["perplexity"] for r in row["runs"]] for entry, row in rows.items()}
    mean = sum(a - b for a, b in zip(reached["kd"], reached["no_teacher"], strict=True)) / 2
    assert rows["kd"]["gain"]["mean"] == pytest.approx(mean)


def test_perplexity_of_the_student_that_was_written(texts, tmp_path):
    """By hand, from its folder and the file's bytes."""
    result = run(recipe(texts), tmp_path / "run", quiet=True)
    student = load_student(tmp_path / "run" / "student").eval()
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    from limbeck.data.language import ByteTokens

    tokens, total, count = ByteTokens(), 0.0, 0
    for line in (line["text"] for line in lines if line["split"] == "test"):
        ids = [*tokens.front, *tokens.encode([line])[0][0].tolist(), *tokens.back]
        for start in range(0, len(ids) - 1, 47):  # blocks of 48 that share a token, so that each is predicted once
            block = torch.tensor([ids[start : start + 48]])
            with torch.no_grad():
                logits = student(input_ids=block).logits
            total += float(F.cross_entropy(logits[0, :-1].double(), block[0, 1:], reduction="sum"))
            count += block.shape[1] - 1
    assert result["places"] == count
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_teacher_with_more_rows_than_tokens(texts, tmp_path):
    """Its own cross-entropy is over all its logits; what both have is compared."""
    result = run(recipe(texts, wider=320), tmp_path / "run", quiet=True)
    assert 0 < result["agreement"] <= 1
    assert result["kl"] > 0
    assert load_student(tmp_path / "run" / "student").config.vocab_size < 320


def test_a_teacher_of_other_tokens(texts, tmp_path):
    options = {"tokenizer": "bytes", "length": 48, "teacher_tokenizer": {"bpe": 300}}
    given = recipe(texts, data={"options": options}, loss="uld")
    result = run(given, tmp_path / "run", quiet=True)
    assert "agreement" not in result
    assert result["perplexity"] > 1
    assert result["teacher"]["perplexity"] > 1
    teacher = next((tmp_path / "teachers").glob("*/student"))
    assert load_student(teacher).config.vocab_size == 300
    bits = result["bits_per_byte"]  # every predicted byte is a token, and each text's end one more
    assert 0.9 * bits < math.log2(result["perplexity"]) < bits
    assert result["teacher"]["bits_per_byte"] < math.log2(result["teacher"]["perplexity"])  # longer tokens cost more
    (said,) = _said(result, result["teacher"])
    assert said.startswith(f"On held-out samples the student's cost of a byte in bits is {bits:.3f}")


def test_bytes_of_texts_in_any_tokens():
    texts = ["to be, or not", "naïve — 漢字"]
    for spec in ("bytes", {"bpe": 300}):
        tokens = load_tokens(spec, texts=lambda: texts * 20)
        for text, (ids, _) in zip(texts, tokens.encode(texts), strict=True):
            assert tokens.bytes_in([*ids.tolist(), *tokens.back]) == len(text.encode())


def test_other_tokens_from_a_cache_are_the_same(texts, tmp_path):
    options = {"tokenizer": "bytes", "length": 48, "teacher_tokenizer": {"bpe": 300}}
    online = recipe(texts, data={"options": options}, loss="uld")
    build_cache(online, tmp_path / "cache", store={"logits": {"raw": {"dtype": "float32"}}})
    cached = recipe(texts, data={"options": options}, loss="uld", teacher={"cache": str(tmp_path / "cache")})
    for name, given in (("online", online), ("cached", cached)):
        run(given, tmp_path / name, quiet=True)
    first, second = (load_student(tmp_path / name / "student").state_dict() for name in ("online", "cached"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_pack_trained_student_ships_whole(texts, tmp_path):
    """Its folder loads in transformers, knows its end of text, and brings its tokenizer and a card."""
    import transformers

    from limbeck.models.export import export

    options = {"tokenizer": {"bpe": 300}, "length": 48, "pack": True}
    run(recipe(texts, data={"options": options}), tmp_path / "run", quiet=True)
    facts = export(tmp_path / "run", "transformers", tmp_path / "shipped")
    assert facts["max_difference"] <= facts["tolerance"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shipped")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "shipped")
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    inputs = tokenizer("To be, or", return_tensors="pt")
    assert (
        model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    )
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "transformers:llama" in card
    assert "perplexity" in card


def test_the_check_reads_other_tokens(texts):
    from limbeck.recipes.check import check

    options = {"tokenizer": "bytes", "length": 48, "teacher_tokenizer": {"bpe": 300}}
    assert check(recipe(texts, data={"options": options}, loss="uld")) == []
    (problem,) = check(recipe(texts, data={"options": options}, loss="kd"))
    assert "tokenizers" in str(problem)
