"""Records from files, sets of the hub, and lists; and what is held out of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import load_source
from limbeck.data.language import language_source
from limbeck.data.language.read import read_records
from limbeck.data.language.records import Fields
from tests.data.language.texts import CHAT, LINES, write_lines

ROWS = [{"text": f"{i}: {LINES[i % 6]}", "tag": "ab"[i % 2]} for i in range(30)]


def texts(found, split: str = "train") -> list[str]:
    return [record.texts[0] for record in found[split].records]


def test_json_lines(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "set.jsonl", ROWS)
    file.write_text(file.read_text() + "\n\n")  # blank lines are no records
    found = read_records(file, Fields())
    assert texts(found) == [row["text"] for row in ROWS]
    assert found["train"].records[4].place == (str(file), "line", 5)
    assert found["train"].records[4].tag == "a"
    write_lines(tmp_path / "odd.jsonl", [{"text": "a\u2028b\x85c"}])  # these end no line of JSON
    assert texts(read_records(tmp_path / "odd.jsonl", Fields())) == ["a\u2028b\x85c"]


def test_broken_lines_are_told(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"set.jsonl, line 2: this line is no JSON"):
        read_records(file, Fields())
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_records(file, Fields())
    file.write_text('["a"]\n')
    with pytest.raises(DataError, match="line 1: this is no record; found list"):
        read_records(file, Fields())
    file.write_text("\n")
    with pytest.raises(DataError, match="there are no records"):
        read_records(file, Fields())
    (tmp_path / "set.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="this Parquet file cannot be read"):
        read_records(tmp_path / "set.parquet", Fields())
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path / "latin.txt", Fields())


def test_folders_by_the_names_of_their_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[:5])
    write_lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[5:9])
    write_lines(tmp_path / "dev.jsonl", ROWS[9:12])
    found = read_records(tmp_path, Fields())
    assert {name: len(part) for name, part in found.items()} == {"train": 9, "validation": 3}
    assert texts(found) == [row["text"] for row in ROWS[:9]]
    write_lines(tmp_path / "other/b.jsonl", ROWS[:2])
    write_lines(tmp_path / "other/a.jsonl", ROWS[2:4])
    assert texts(read_records(tmp_path / "other", Fields())) == [r["text"] for r in ROWS[2:4] + ROWS[:2]]
    both = read_records([str(tmp_path / "other/b.jsonl"), tmp_path / "dev.jsonl"], Fields())
    assert texts(both) == [r["text"] for r in ROWS[:2] + ROWS[9:12]]
    parts = read_records({"train": tmp_path / "other/b.jsonl", "test": [ROWS[0]]}, Fields())
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "test": 1}


def test_parquet_with_a_column_of_splits(tmp_path: Path) -> None:
    pq.write_table(pa.table({"split": ["train", "val", "train"], "text": ["a", "b", "c"]}), tmp_path / "x.parquet")
    found = read_records(tmp_path / "x.parquet", Fields())
    assert (texts(found), texts(found, "validation")) == (["a", "c"], ["b"])
    pq.write_table(pa.table({"part": ["train", "rest"], "text": ["a", "b"]}), tmp_path / "y.parquet")
    assert texts(read_records(tmp_path / "y.parquet", Fields())) == ["a", "b"]
    with pytest.raises(DataError, match="row 1, field 'part': no split is called so; found 'rest'"):
        read_records(tmp_path / "y.parquet", Fields(split="part"))


def test_sets_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list([{"messages": list(CHAT)}] * 3)
    assert read_records(whole, Fields())["train"].records[0].messages == CHAT
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:4])}
    )
    parts.save_to_disk(tmp_path / "saved")
    for spec in (parts, f"hf:{tmp_path / 'saved'}"):
        found = read_records(spec, Fields())
        assert {name: len(part) for name, part in found.items()} == {"train": 30, "test": 4}
        assert texts(found) == [row["text"] for row in ROWS]


def test_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\na\n")
    for spec, message in (
        (tmp_path / "x.csv", "no such kind of file; found .csv"),
        (tmp_path / "none.jsonl", "no such file or folder"),
        (3, "no records of text here; found int"),
        ({"text": "a"}, "found dict"),
        ([], "there are no records"),
    ):
        with pytest.raises(DataError, match=message):
            read_records(spec, Fields())
    with pytest.raises(DataError, match="nothing to train on in this folder"):
        read_records(tmp_path, Fields())


def test_records_are_held_out_before_anything_is_packed() -> None:
    source = language_source(ROWS, tokenizer="bytes", length=128, pack=True, validation=0.2, test=0.1)
    assert "test: 10% of train held out" in source.note
    told = [source.split(name).rows for name in ("train", "validation", "test")]
    assert [len(rows.student.corpus) for rows in told] == [22, 5, 3]
    seen = [tuple(rows.student.corpus.ids.tolist()) for rows in told]
    assert len(set(seen)) == 3
    again = language_source(ROWS, tokenizer="bytes", length=128, pack=True, validation=0.2, test=0.1)
    assert again.train.rows.student.corpus.ids.equal(told[0].student.corpus.ids)


def test_of_a_few_long_texts_the_ends_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(LINES * 20))
    source = load_source(str(tmp_path / "book.txt"), tokenizer="bytes", length=64)
    corpora = [source.split(name).rows.student.corpus for name in ("train", "validation")]
    joined = b"".join(bytes(i - 2 for i in c.ids.tolist() if i > 1) for c in corpora)
    assert joined.decode() == "\n".join(LINES * 20)
    assert bytes(i - 2 for i in corpora[1].ids.tolist() if i > 1).decode().split("\n")[0] in LINES
    assert 0.07 < len(corpora[1].ids) / len(joined) < 0.11
    assert "the last 10% of each text" in source.note


def test_load_source_knows_text_by_its_tokenizer(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "set.jsonl", ROWS)
    with pytest.raises(ConfigError, match="text needs a tokenizer; give the option tokenizer"):
        load_source(str(file))
    with pytest.raises(ConfigError, match=r"no such option; found 'lenght'.*did you mean 'length'"):
        load_source(str(file), tokenizer="bytes", lenght=3)
    source = load_source(str(file), tokenizer="bytes", length=64)
    assert (source.task, source.name, source.classes) == ("language", "set", None)
    assert load_source(ROWS, tokenizer="bytes").train.vocabulary == 258
    pq.write_table(pa.table({"text": LINES, "label": [0, 1] * 3}), tmp_path / "x.parquet")
    assert load_source(str(tmp_path / "x.parquet"), text="text", validation=0).task == "classification"
    assert load_source(str(tmp_path / "x.parquet"), tokenizer="bytes").task == "language"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": True}, "length: a pack has a length"),
        ({"padding": "both"}, "padding: no such side"),
        ({"multiple": 0}, "multiple: must be a whole number"),
        ({"bucket": -1}, "bucket"),
        ({"length": 1}, "a row reads more than it repeats"),
        ({"length": 8, "overlap": 8}, "overlap"),
        ({"length": 8, "long": "split"}, "long: no such choice"),
        ({"tokenizer": "words"}, "tokenizer: no such tokenizer"),
        ({"tokenizer": {"bpe": 99}}, "too small a vocabulary; found 99; wanted 258 or more"),
        ({"tokenizer": {"unigram": 99}}, "no such tokenizer"),
        ({"template": "chatml"}, "template: no such template"),
        ({"template": "{{ messages }}"}, "bytes know only the plain template"),
        ({"prompt": "text", "completion": "none"}, "no such column"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        language_source(ROWS, **{"tokenizer": "bytes", **options})


def test_nothing_to_learn_is_told() -> None:
    rows = [{"prompt": "a long prompt, longer than the row", "completion": "b"}] * 30
    with pytest.raises(DataError, match="the train split: there is nothing to learn.*27 documents, rows of 8"):
        language_source(rows, tokenizer="bytes", length=8)
