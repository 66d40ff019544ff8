"""The record on disk: damage, cuts, claims, and what others write."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import ConfigError, DataError
from limbeck.teachers.answers import Answer, Token, Usage, from_json, to_json
from limbeck.teachers.claims import Holder
from limbeck.teachers.journal import Reader, head_of, pack
from limbeck.teachers.record import Claim, Record

ANSWERS = {
    f"key{i}": Answer(
        f"text {i} é \ud800",
        (Token("te", -0.5, (Token("te", -0.5, data=b"te"), Token("\ufffd", -1.25, data=b"\xc3"))), Token("xt", None)),
        "stop",
        Usage(3, 2),
        model="m",
    )
    for i in range(6)
}


def fill(folder: Path, keys: list[str], cost: float = 0.0) -> Record:
    record = Record(folder)
    for key in keys:
        assert record.claim(key) is Claim.MINE
        record.write(key, {"key": key}, ANSWERS[key], cost)
    return record


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("answers-*.jsonl")
    return path


def test_it_gives_back_what_it_got(tmp_path: Path) -> None:
    with_answers = fill(tmp_path, list(ANSWERS), cost=0.5)
    for record in (with_answers, Record(tmp_path)):
        assert {key: record.read(key) for key in ANSWERS} == ANSWERS
        assert record.read("other") is None
        assert list(record.rows()) == [({"key": k}, a) for k, a in ANSWERS.items()]
        assert record.spent == record.paid == 3.0


tokens = st.builds(
    Token,
    st.text(st.characters(codec=None), max_size=4),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.builds(Token, st.text(max_size=3), st.floats(-9, 0), data=st.none() | st.binary()), max_size=2).map(
        tuple
    ),
    st.none() | st.binary(max_size=4),
)


@settings(max_examples=20)
@given(
    st.builds(
        Answer, st.text(), st.none() | st.lists(tokens, max_size=3).map(tuple), usage=st.none() | st.just(Usage(1, 2))
    )
)
def test_every_answer_survives_a_line(answer: Answer) -> None:
    line = pack({"kind": "answer"}, to_json(answer))
    assert line.count(b"\n") == 1
    assert from_json(to_json(answer)) == answer
    assert head_of(line) == {"kind": "answer"}


def test_a_last_line_that_was_cut_is_dropped_and_asked_again(tmp_path: Path) -> None:
    fill(tmp_path, list(ANSWERS)).close()
    path = file_of(tmp_path)
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        record = Record(tmp_path)
        if end == len(whole) - 1:  # only the line's end is missing
            assert len(record) == 6
            assert record.read("key5") == ANSWERS["key5"]
        else:
            assert len(record) == 5
            assert record.torn == [f"{path}, line 6"]
    path.write_bytes(whole[: last + 20])
    record = Record(tmp_path)
    assert record.claim("key5") is Claim.MINE
    record.write("key5", {"key": "key5"}, ANSWERS["key5"], 0.0)
    record.close()
    assert path.read_bytes() == whole[: last + 20]  # what is there is never touched
    assert Record(tmp_path).read("key5") == ANSWERS["key5"]


def test_any_changed_byte_names_file_and_line(tmp_path: Path) -> None:
    fill(tmp_path, list(ANSWERS)).close()
    path = file_of(tmp_path)
    whole, dice = path.read_bytes(), random.Random(3)
    last = whole[:-1].rindex(b"\n") + 1
    for place in [*range(0, last, 29), *(dice.randrange(last) for _ in range(20))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        line = whole[:place].count(b"\n") + 1
        with pytest.raises(DataError, match="not what was once written there") as caught:
            Record(tmp_path)
        assert f"{path}, line {line};" in str(caught.value).replace(": this line", "; this line")


def test_damage_after_opening_is_seen_when_the_answer_is_read(tmp_path: Path) -> None:
    fill(tmp_path, list(ANSWERS)).close()
    record, path = Record(tmp_path), file_of(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="not what was once written there"):
        record.read("key0")
    assert record.read("key1") == ANSWERS["key1"]


def test_claims_hold_between_records(tmp_path: Path) -> None:
    one, other = Record(tmp_path), Record(tmp_path)
    assert one.claim("a") is Claim.MINE
    assert one.claim("a") is Claim.BUSY
    assert other.claim("a") is Claim.BUSY
    assert other.claim("b") is Claim.MINE
    one.free("a")
    assert other.claim("a") is Claim.MINE
    other.write("a", {}, Answer("yes"), 0.0)
    assert "a" not in one
    assert one.claim("a") is Claim.KNOWN
    assert one.read("a") == Answer("yes")
    other.close()  # which gives up b
    assert one.claim("b") is Claim.MINE


def test_an_answer_that_comes_during_a_claim_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Record(tmp_path), Record(tmp_path)
    assert one.claim("a") is Claim.MINE
    look = Holder.look

    def late(holder: Holder) -> None:
        if "a" not in one:
            one.write("a", {}, Answer("yes"), 0.0)
        look(holder)

    monkeypatch.setattr(Holder, "look", late)
    assert other.claim("a") is Claim.KNOWN


def test_what_all_hold_counts_against_the_cap(tmp_path: Path) -> None:
    one, other = Record(tmp_path), Record(tmp_path)
    assert one.claim("a", 6.0, cap=10.0) is Claim.MINE
    assert other.claim("b", 5.0, cap=10.0) is Claim.DEAR
    assert other.claim("b", 4.0, cap=10.0) is Claim.MINE
    one.write("a", {}, Answer("yes"), 2.0)
    assert other.claim("c", 4.0, cap=10.0) is Claim.MINE
    other.lose("b", 4.0)
    other.write("c", {}, Answer("no"), 3.0)
    assert one.claim("d", 1.5, cap=10.0) is Claim.OVER
    assert one.claim("d", 1.0, cap=10.0) is Claim.MINE
    assert (one.paid, one.lost) == (5.0, 4.0)
    assert Record(tmp_path).spent == 9.0


def test_a_record_that_was_not_closed_leaves_no_claim(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.claim("a")
    del record
    assert Record(tmp_path).claim("a") is Claim.MINE
    assert not list(tmp_path.glob("*.claims"))


def test_the_claims_of_a_dead_process_are_taken_over(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        record = Record(tmp_path)
        record.claim("answered", 1.0)
        record.write("answered", {}, Answer("yes"), 0.5)
        record.claim("under way", 2.0)
        os._exit(0)  # as a kill does: nothing is closed
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("*.claims"))) == 1
    record = Record(tmp_path)
    assert record.spent == 0.5
    assert record.claim("answered") is Claim.KNOWN
    assert record.claim("under way") is Claim.MINE
    assert (record.paid, record.lost) == (0.5, 2.0)
    assert len(list(tmp_path.glob("*.claims"))) == 1  # our own
    record.close()
    assert Record(tmp_path).spent == 2.5


def test_a_fork_may_read_but_not_ask(tmp_path: Path) -> None:
    record = fill(tmp_path, ["key0"])
    child = os.fork()
    if child == 0:
        try:
            good = record.read("key0") == ANSWERS["key0"]
            record.claim("new")
        except ConfigError as error:
            os._exit(0 if good and "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert record.claim("new") is Claim.MINE
    assert Record(tmp_path).claim("new") is Claim.BUSY


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    record = fill(tmp_path, ["key0", "key1"])
    assert record.claim("key2") is Claim.MINE
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_of(tmp_path).stat().st_size + 40, before[1]))
    try:
        with pytest.raises(DataError, match="the record cannot be written"):
            record.write("key2", {"key": "key2"}, ANSWERS["key2"], 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "key2" not in record
    record.write("key2", {"key": "key2"}, ANSWERS["key2"], 0.0)
    record.close()
    again = Record(tmp_path)
    kept = ("key0", "key1", "key2")
    assert {key: again.read(key) for key in kept} == {key: ANSWERS[key] for key in kept}
    assert again.torn == []


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    reader, line = Reader(path), pack({"n": 1}, None)
    assert list(reader.news()) == []
    path.write_bytes(line + line[:30])
    assert [found.head for found in reader.news()] == [{"n": 1}]
    assert reader.torn()
    path.write_bytes(line + line)
    assert [found.offset for found in reader.news()] == [len(line)]
    assert not reader.torn()


def test_a_file_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="record: not a folder"):
        Record(tmp_path / "file")
