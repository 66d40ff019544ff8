"""A teacher that writes once: every answer is kept, whoever is killed, and is the same as without a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.core.errors import ConfigError, DataError, ModelError
from limbeck.models.generating import Decoding, write
from limbeck.teachers.writer import ModelWriter
from tests.teachers.writer_run import PROMPTS, made

ROOT = Path(__file__).parents[2]


def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, str(Path(__file__).with_name("writer_run.py")), str(folder), *more]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_answers_are_those_of_the_model_and_asked_once(tmp_path: Path) -> None:
    writer = made(tmp_path)
    found = writer.write([*PROMPTS, *PROMPTS[:5]])
    assert found[24:] == found[:5]
    assert writer.asked == len(set(PROMPTS)) < 24 + 5
    decoding = Decoding(6, 0.0, beams=3, keep=2)
    for prompt, row in list(zip(PROMPTS, found, strict=False))[:6]:
        ids = torch.tensor([prompt])
        alone = write(writer.model, ids, torch.ones_like(ids, dtype=torch.bool), decoding, ends=[1], pad=0)
        assert [list(w.ids) for w in row] == [i[:n].tolist() for i, n in zip(alone.ids, alone.lengths, strict=True)]
        assert [w.finished for w in row] == alone.finished.tolist()
        assert [w.score for w in row] == pytest.approx(alone.scores.tolist(), rel=1e-4)
        assert row[0].score >= row[1].score
    again = made(tmp_path)
    assert again.write(PROMPTS) == found[:24]
    assert again.asked == 0
    assert made(None).write(PROMPTS) == found[:24]  # without a folder


def test_another_model_or_way_of_writing_is_asked_anew(tmp_path: Path) -> None:
    made(tmp_path).write(PROMPTS[:4])
    for options in ({"identity": "other"}, {"ends": [1, 3]}):
        other = made(tmp_path, **options)
        other.write(PROMPTS[:4])
        assert other.asked == len(set(PROMPTS[:4]))


def test_draws_follow_from_seed_and_prompt() -> None:
    model = made(None).model

    def drawn(seed: int, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        writer = ModelWriter(model, Decoding(8), ends=[1], pad=0, seed=seed, batch_size=3)
        return [row[0].ids for row in writer.write(prompts)]

    first = drawn(1, PROMPTS[:7])
    assert drawn(1, PROMPTS[:7][::-1]) == first[::-1]
    assert drawn(2, PROMPTS[:7]) != first


def test_several_draws_are_those_of_several_seeds(tmp_path: Path) -> None:
    model = made(None).model
    options: dict[str, Any] = {"ends": [1], "pad": 0, "batch_size": 4}
    single = [ModelWriter(model, Decoding(8), seed=seed, **options).write(PROMPTS[:5]) for seed in (3, 4, 5)]
    writer = ModelWriter(model, Decoding(8), seed=3, draws=3, folder=tmp_path, **options)
    together = writer.write(PROMPTS[:5])
    assert [[w.ids for w in row] for row in together] == [[w.ids for (w,) in row] for row in zip(*single, strict=True)]
    again = ModelWriter(model, Decoding(8), seed=3, draws=3, folder=tmp_path, **options)
    assert again.write(PROMPTS[:5]) == together
    assert (writer.asked, again.asked) == (len(set(PROMPTS[:5])), 0)
    with pytest.raises(ConfigError, match="draws: only what is drawn"):
        ModelWriter(model, Decoding(8, 0.0), draws=2, **options)


def test_stopped_anywhere_it_goes_on_with_what_is_there(tmp_path: Path) -> None:
    wanted, asked = made(None).write(PROMPTS), 0
    for most in (3, 1, 4, 99):
        writer = made(tmp_path)
        answer, left = writer._answer, iter(range(most))

        def some(chunk: Any, answer: Any = answer, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return answer(chunk)

        writer._answer = some  # type: ignore[method-assign]
        try:
            found = writer.write(PROMPTS)
        except KeyboardInterrupt:
            found = None
        asked += writer.asked
    assert found == wanted
    assert asked == len(set(PROMPTS))


@pytest.mark.slow
def test_killed_and_begun_again_it_is_the_same(tmp_path: Path) -> None:
    """Killed by SIGKILL with some answers there; none of these is written again, and all are as without a kill."""
    process = start(tmp_path, "slowly")
    while process.poll() is None and len(lines_so_far(tmp_path)) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    before = len(lines_so_far(tmp_path))
    again = start(tmp_path)
    said, errors = again.communicate()
    assert again.returncode == 0, errors.decode()
    answers, asked = said.decode().rsplit(" ", 1)
    wanted = made(None).write(PROMPTS)
    assert json.loads(answers) == [[[list(w.ids), w.finished, w.score] for w in row] for row in wanted]
    chunks = -(-len(set(PROMPTS)) // 2)
    assert int(asked) == 2 * (chunks - before)
    assert len({line["head"]["key"] for line in lines_so_far(tmp_path)}) == len(lines_so_far(tmp_path)) == chunks


def lines_so_far(folder: Path) -> list[dict[str, Any]]:
    """Whole lines only."""
    texts = [path.read_text().rpartition("\n")[0] for path in folder.glob("texts-*.jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    both = [start(tmp_path, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [process.communicate() for process in both]
    assert all(process.returncode == 0 for process in both), said
    answers, asked = zip(*(out.decode().rsplit(" ", 1) for out, _ in said), strict=True)
    assert answers[0] == answers[1]
    assert sum(map(int, asked)) == len(set(PROMPTS)) == 2 * int(asked[0])


def test_damage_is_told_and_a_torn_end_is_not(tmp_path: Path) -> None:
    wanted = made(tmp_path).write(PROMPTS[:4])
    (path,) = tmp_path.glob("texts-*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    cut = made(tmp_path)
    assert cut.write(PROMPTS[:4]) == wanted
    assert 0 < cut.asked < len(set(PROMPTS[:4]))
    path.write_bytes(whole.replace(b'"wrote"', b'"wrong"', 1))
    with pytest.raises(DataError, match=r"line 1: this line is not what was once written there"):
        made(tmp_path).write(PROMPTS[:4])


def test_refusals() -> None:
    with pytest.raises(ModelError, match="teacher: this model does not write texts; found Linear"):
        ModelWriter(nn.Linear(2, 2), Decoding(), ends=[1], pad=0)
    with pytest.raises(ConfigError, match="batch_size"):
        made(None, batch_size=0)
