"""Real texts: Tiny Shakespeare, Alpaca and GSM8K, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from limbeck.data import build_loader, load_source


def file(shared_data: Path, name: str) -> str:
    path = shared_data / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return str(path)


def test_tiny_shakespeare(shared_data: Path) -> None:
    path = file(shared_data, "lm/tinyshakespeare.parquet")
    source = load_source(path, tokenizer="bytes", length=256)
    texts = {row["split"]: row["text"] for row in pq.read_table(path).to_pylist()}
    assert source.samples == {"train": 3937, "validation": 219, "test": 219}
    loader = build_loader(source.test, batch_size=64, train=False)
    found = torch.cat([batch.labels[batch.mask] for batch in loader.batches()])
    assert bytes((found[:-1] - 2).tolist()).decode() == texts["test"]
    train = build_loader(source.train, batch_size=64, train=True)
    assert (len(train), train.example().inputs["input_ids"].shape) == (61, (2, 256))


def test_alpaca_and_gsm8k(shared_data: Path) -> None:
    options = {"tokenizer": {"bpe": 512}, "length": 256, "pack": True}
    prompt = "{instruction}\n\n{input}\n\n"
    for name, columns, least in (
        ("alpaca_1k/train.parquet", {"prompt": prompt, "completion": "output"}, 0.9),
        ("gsm8k/test.parquet", {"prompt": "question", "completion": "answer"}, 0.9),
    ):
        path = file(shared_data, name)
        source = load_source(path, **columns, **options)
        rows = source.train.rows
        assert int(rows.student.pieces.lengths.sum()) > least * 256 * len(rows)
        batch = build_loader(source.validation, batch_size=8, train=False).example(1)
        tokens, document = source.train.tokens, batch.extras["document"][0]
        first = batch.inputs["input_ids"][0][document == 1].tolist()
        said = tokens.decode(batch.labels[0][(document == 1) & batch.mask[0]].tolist())
        texts = [r["output"] if "output" in r else r["answer"] for r in pq.read_table(path).to_pylist()]
        assert said.removesuffix("<|endoftext|>") in "\0".join(texts)
        assert tokens.decode(first).startswith("<|endoftext|>")
