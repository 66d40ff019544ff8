"""Building: killed, resumed, shared out, merged, and always the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck.cache.build import build, merge
from limbeck.cache.folder import Cache
from limbeck.cache.shards import shard_path
from limbeck.core.batch import Batch
from limbeck.core.errors import CacheError, ConfigError, DataError
from limbeck.core.trace import Trace
from limbeck.data import ResidentLoader, as_loader
from tests.cache.conftest import FULL, content, make_loader, make_teacher

SETTINGS = {"store": {"logits": FULL, "0": FULL}, "views": 3, "batch": 16, "shard_rows": 48}
SCRIPT = Path(__file__).with_name("build_run.py")


def start(folder: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cache.build_run", str(folder)], env=environment, cwd=root, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def test_every_row_is_what_the_teacher_says(small):
    cache, teacher, loader = Cache(small), make_teacher(), make_loader()
    assert cache.header.taps == ("logits", "0", "logits@weight")
    assert torch.equal(cache.constants["logits@weight"], teacher[-1].weight)
    for view in range(3):
        (batch,) = loader.read([[(torch.arange(90), view)]])
        with torch.no_grad():
            first, logits = teacher[0](batch.inputs), teacher(batch.inputs)
        found = cache.read(torch.arange(90), view)
        torch.testing.assert_close(found["logits"], logits)
        torch.testing.assert_close(found["0"], first)
    nothing = {"mean": 0.0, "max": 0.0}
    assert cache.errors == {"logits": {"kl": nothing, "kl_t4": nothing}, "0": {"relative": nothing}}


def test_a_half_built_cache_is_refused_and_goes_on(small, tmp_path):
    class Tired(Exception):
        pass

    def tire(done: int, total: int) -> None:
        assert total == 270
        if done > 120:
            raise Tired

    store = {**SETTINGS, "store": {"logits": FULL, "0": FULL, "logits@weight": FULL}}
    with pytest.raises(Tired):
        build(make_teacher(), make_loader(), tmp_path, progress=tire, **store)
    with pytest.raises(CacheError, match="not finished; found 2 of 6 shards; go on with limbeck cache build"):
        Cache(tmp_path)
    seen: list[int] = []
    build(make_teacher(), make_loader(), tmp_path, progress=lambda done, _: seen.append(done), **store)
    assert seen[0] == 96  # what was there is not asked again
    assert seen[-1] == 270
    assert content(tmp_path) == content(small)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wanted", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path, wanted):
    finish(start(tmp_path / "whole"))
    dice, kills, folder = random.Random(3), 0, tmp_path / "killed"
    while kills < wanted:
        process = start(folder)
        there = len(list(folder.glob("shards/*")))
        while process.poll() is None and len(list(folder.glob("shards/*"))) == there and there < 20:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.04))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        process.communicate()
        assert killed, f"it was done after {kills} kills"
        assert not (folder / "index.json").is_file()
        kills += 1
    finish(start(folder))
    temporary = [name for name in content(folder) if name.rpartition("/")[2].startswith(".")]
    found = {name: bytes for name, bytes in content(folder).items() if name not in temporary}
    assert found == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_builders_at_once_share_the_work(tmp_path):
    finish(start(tmp_path / "alone"))
    both = [start(tmp_path / "shared") for _ in range(2)]
    for process in both:
        finish(process)
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def test_halves_merged_are_the_whole(small, tmp_path):
    store = {**SETTINGS, "store": {"logits": FULL, "0": FULL, "logits@weight": FULL}}
    parts = [tmp_path / "first", tmp_path / "second"]
    for i, part in enumerate(parts):
        assert build(make_teacher(), make_loader(), part, part=(i, 2), **store) is None
        with pytest.raises(CacheError, match="not finished; found 3 of 6 shards"):
            Cache(part)
    assert content(merge(tmp_path / "whole", parts).folder) == content(small)
    with pytest.raises(CacheError, match="none of the parts holds this shard; found shard 1"):
        merge(tmp_path / "half", parts[:1])
    build(make_teacher(1), make_loader(), tmp_path / "other", part=(1, 2), **store)
    with pytest.raises(CacheError, match="teacher.weights: the cache is of another kind than that in"):
        merge(tmp_path / "mixed", [parts[0], tmp_path / "other"])


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("teacher.weights", {"teacher": make_teacher(1)}),
        ("data.view_seed", {"loader": make_loader(view_seed=4)}),
        ("data.samples", {"loader": make_loader(80)}),
        ("data.augment", {"loader": make_loader(augment=("flip",))}),
        ("views", {"views": 2}),
        ("batch", {"batch": 8}),
        ("shard_rows", {"shard_rows": 16}),
        ("signals", {"store": {"logits": FULL}}),
        ("signals.0.codec", {"store": {"logits": {"raw": {"dtype": "float16"}}, "0": FULL, "logits@weight": FULL}}),
    ],
)
def test_a_folder_of_another_cache_is_not_gone_on_with(small, tmp_path, field, change):
    store = {**SETTINGS, "store": {"logits": FULL, "0": FULL, "logits@weight": FULL}}
    teacher, loader = change.pop("teacher", make_teacher()), change.pop("loader", make_loader())
    before = content(small)
    with pytest.raises(CacheError, match=f"^{field}.*another kind"):
        build(teacher, loader, small, **{**store, **change})
    assert content(small) == before


def test_a_damaged_shard_is_built_again(tmp_path):
    build(make_teacher(), make_loader(), tmp_path, **SETTINGS)
    whole = content(tmp_path)
    path = shard_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-9])
    shard_path(tmp_path, 4).unlink()
    build(make_teacher(), make_loader(), tmp_path, **SETTINGS)
    assert content(tmp_path) == whole


class Reader(nn.Module):
    """Words of texts of several lengths: a vector for each."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(30, 5), nn.Linear(5, 7)

    def forward(self, words):
        return self.out(self.words(words).cumsum(1))


class Texts(ResidentLoader):
    """Padded texts with a mask of what counts."""

    def _batch(self, pieces):
        batch = super()._batch(pieces)
        longest = int((batch.inputs >= 0).sum(1).max())
        mask = (batch.inputs >= 0)[:, :longest]
        return batch.replace(inputs=batch.inputs[:, :longest].clamp(min=0), mask=mask)


@pytest.mark.parametrize("codec", ["raw", "top_k"])
def test_positions_of_texts_of_any_length(tmp_path, codec):
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (40,))
    words = torch.randint(0, 30, (40, 8)).masked_fill(torch.arange(8) >= lengths[:, None], -1)
    loader, teacher = Texts(words, batch_size=8), Reader()
    spec = FULL if codec == "raw" else {"top_k": {"k": 7, "bits": 8}}
    cache = build(teacher, loader, tmp_path, store={"logits": spec}, batch=4, shard_rows=12)
    order = torch.randperm(40)
    for rows in order.split(7):
        (batch,) = loader.read([[(rows, 0)]])
        logits = teacher(batch.inputs).detach()
        found = cache.read(rows, 0, batch.mask)["logits"]
        if codec == "raw":
            torch.testing.assert_close(found[batch.mask], logits[batch.mask])
            assert not found[~batch.mask].any()
        else:
            dense = found.dense()[batch.mask]
            torch.testing.assert_close(dense, logits[batch.mask].log_softmax(-1), atol=0.05, rtol=0)
    with pytest.raises(CacheError, match="logits, batch.mask: the batch's positions are not those"):
        cache.read(torch.arange(3), 0, torch.ones(3, 8, dtype=torch.bool))


def test_lists_of_tensors(tmp_path):
    class Both:
        identity = "both"

        def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
            self.taps = taps

        def __call__(self, batch: Batch) -> Trace:
            x = batch.inputs.flatten(1)
            return Trace(None, {"stages": [x[:, :4].view(-1, 2, 2), x[:, :1]], "logits": x[:, :3]})

        def to(self, device):
            return self

    loader = make_loader(augment=())
    cache = build(Both(), loader, tmp_path, store={"stages": FULL, "logits": FULL}, identity={"name": "both"})
    assert cache.header.teacher == {"name": "both"}
    rows = torch.tensor([5, 1, 88])
    (batch,) = loader.read([[(rows, 0)]])
    first, second = cache.read(rows)["stages"]
    assert torch.equal(first.flatten(1), batch.inputs.flatten(1)[:, :4])
    assert torch.equal(second, batch.inputs.flatten(1)[:, :1])


def test_texts(tmp_path):
    """What a teacher wrote for each sample and view, of any length, in any script."""

    class Writer:
        def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
            assert taps == ("text", "logits")

        def __call__(self, batch: Batch) -> Trace:
            views = torch.as_tensor(batch.view).expand(batch.size).tolist()
            texts = ["schön 文字 " * (i % 4) + f"{i}/{v}" * (i % 7 > 0) for i, v in zip(batch.index.tolist(), views)]  # noqa: B905
            return Trace(None, {"text": texts, "logits": batch.inputs.flatten(1)[:, :3]})

        def to(self, device):
            return self

    loader, rows = make_loader(), torch.tensor([88, 0, 7, 5, 70])
    cache = build(Writer(), loader, tmp_path, store={"text": "raw", "logits": FULL}, views=2, batch=8, shard_rows=16)
    for view in (0, 1):
        found = cache.read(rows, view)
        wanted = ["schön 文字 " * (i % 4) + f"{i}/{view}" * (i % 7 > 0) for i in rows.tolist()]
        assert found["text"] == wanted
        (batch,) = loader.read([[(rows, view)]])
        assert torch.equal(found["logits"], batch.inputs.flatten(1)[:, :3])
    assert "text" not in cache.errors


def test_what_cannot_be_built_is_named(tmp_path):
    with pytest.raises(DataError, match="asked for by index"):
        build(make_teacher(), as_loader(DataLoader(TensorDataset(torch.zeros(2, 1, 8, 8)))), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="part: no such part"):
        build(make_teacher(), make_loader(), tmp_path, part=(2, 2))
    with pytest.raises(CacheError, match="a module cannot be stored; found logits@module"):
        build(make_teacher(), make_loader(), tmp_path, store=["logits", "logits@module"])
