"""Texts: tokens, a vocabulary that only the training split tells, tables of Parquet and CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import Tokenizer, load_source
from limbeck.data.build import build_loader

TEXTS = ["A good film .", "bad , bad film", "it's good; good!", "", "Ünïcode naïve"]
LABELS = [1, 0, 1, 0, 1]


def table(texts: list[Any] = TEXTS, labels: list[int] = LABELS) -> pa.Table:
    return pa.table({"sentence": texts, "label": pa.array(labels, pa.int8())})


def folder(path: Path, kind: str = "parquet") -> Path:
    named = table().replace_schema_metadata({"label_names": json.dumps(["no", "yes"])})
    for name, rows in (("train", named), ("test", named.slice(0, 2))):
        if kind == "csv":
            pyarrow.csv.write_csv(rows, path / f"{name}.csv")
        else:
            pq.write_table(rows, path / f"{name}.parquet")
    return path


def test_words_are_cut_and_counted() -> None:
    tokenizer = Tokenizer.fit(TEXTS, least=1)
    assert tokenizer.words[:4] == ("good", "bad", "film", "!")  # by how often, then by the alphabet
    assert "it's" in tokenizer.words
    assert "ünïcode" in tokenizer.words
    assert tokenizer.length == 5
    found = tokenizer(["Good BAD new!"])
    assert found["input_ids"].tolist() == [[2, 3, 1, 5, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0]]


def test_the_vocabulary_is_bounded_and_rare_words_are_unknown() -> None:
    assert Tokenizer.fit(TEXTS, least=2).words == ("good", "bad", "film")
    small = Tokenizer.fit(TEXTS, least=1, vocabulary=4)
    assert small.words == ("good", "bad")
    assert small.size == 4
    assert small(["good film"])["input_ids"][0, :2].tolist() == [2, 1]


def test_it_does_not_depend_on_the_order_of_the_texts() -> None:
    assert Tokenizer.fit(TEXTS, least=1) == Tokenizer.fit(TEXTS[::-1], least=1)


def test_long_texts_are_cut_and_empty_ones_have_one_unknown_token() -> None:
    tokenizer = Tokenizer.fit(TEXTS, length=2)
    found = tokenizer(["good good good", ""])
    assert found["input_ids"].tolist() == [[2, 2], [1, 0]]
    assert found["attention_mask"].sum(dim=1).tolist() == [2, 1]


def test_bytes_need_no_vocabulary() -> None:
    tokenizer = Tokenizer.fit(TEXTS, tokens="bytes", length=6)
    ids = tokenizer(["ü!"])["input_ids"][0]
    assert bytes(i - 2 for i in ids[:3].tolist()).decode() == "ü!"
    assert (tokenizer.size, ids[3:].tolist()) == (258, [0, 0, 0])


def test_it_is_written_and_read() -> None:
    for tokenizer in (Tokenizer.fit(TEXTS), Tokenizer.fit(TEXTS, tokens="bytes")):
        assert Tokenizer.read(json.loads(json.dumps(tokenizer.written()))) == tokenizer
    with pytest.raises(DataError, match="no tokenizer"):
        Tokenizer.read({"tokens": "words"})
    for wrong in ({"vocabulary": 2}, {"least": 0}, {"length": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Tokenizer.fit(TEXTS, **wrong)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_folder_of_tables(kind: str, tmp_path: Path) -> None:
    source = load_source(str(folder(tmp_path, kind)), text="sentence", validation=0.4, least=1)
    assert source.samples == {"train": 3, "validation": 2, "test": 2}
    assert source.classes == (("no", "yes") if kind == "parquet" else ("0", "1"))
    assert source.train.vocabulary == source.train.tokenizer.size
    assert "told by the training split" in source.note


def test_only_what_is_trained_on_tells_the_vocabulary(tmp_path: Path) -> None:
    source = load_source(str(folder(tmp_path)), text="sentence", validation=0.4, least=1)
    whole = load_source(str(tmp_path), text="sentence", validation=0.0, least=1)
    kept = set(source.train.tokenizer.words)
    assert kept < set(whole.train.tokenizer.words)
    unknown = (source.validation.load()["input_ids"] == 1).any()
    assert unknown or kept == set(whole.train.tokenizer.words)
    again = load_source(str(tmp_path), text="sentence", validation=0.4, least=1)
    assert again.train.tokenizer == source.train.tokenizer
    assert torch.equal(again.train.load()["input_ids"], source.train.load()["input_ids"])


@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_keywords_for_a_model_and_have_no_mask(resident: bool, tmp_path: Path) -> None:
    split = load_source(str(folder(tmp_path)), text="sentence", validation=0.0).train
    loader = build_loader(split, batch_size=2, train=False, resident=resident, workers=0)
    batch = next(loader.batches())
    assert list(batch.inputs) == ["input_ids", "attention_mask"]
    assert batch.inputs["input_ids"].shape == (2, split.tokenizer.length)
    assert batch.mask is None  # it would speak of logits, which samples have and tokens have not
    assert batch.labels.tolist() == LABELS[:2]
    assert loader.vocabulary == split.vocabulary
    assert loader.classes == 2


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    path = str(folder(tmp_path))
    with pytest.raises(DataError, match=r"no such column.*did you mean 'sentence'"):
        load_source(path, text="sentenc")
    with pytest.raises(DataError, match=r"column 'label': these are no texts; found int8"):
        load_source(path, text="label")
    with pytest.raises(ConfigError, match="image: samples are images or texts"):
        load_source(path, text="sentence", image="picture")
    pq.write_table(table([None, *TEXTS[1:]]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="1 missing"):
        load_source(path, text="sentence")
    (tmp_path / "broken.csv").write_text('a,b\n"x')
    with pytest.raises(DataError, match="CSV file cannot be read|no such column"):
        load_source(str(tmp_path / "broken.csv"), text="sentence")


def test_sst2(shared_data: Path) -> None:
    source = load_source(str(shared_data / "sst2"), text="text")
    assert source.samples == {"train": 6920, "validation": 872, "test": 1821}
    assert source.classes == ("negative", "positive")
    inputs = source.test.load()
    assert inputs["input_ids"].max() < source.train.vocabulary
    known = (inputs["input_ids"] > 1).sum() / inputs["attention_mask"].sum()
    assert known > 0.9
