"""Reading: exact in any order, and never from anything that is damaged."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from limbeck.cache.build import build
from limbeck.cache.folder import Cache
from limbeck.cache.header import sealed
from limbeck.core.errors import CacheError
from tests.cache.conftest import FULL, content, make_loader, make_teacher


def everything(cache: Cache) -> None:
    """Read all there is."""
    for view in range(cache.header.views):
        cache.read(torch.arange(cache.header.samples), view)
        cache.prints(torch.arange(cache.header.samples), view)


def test_any_rows_in_any_order(small):
    cache = Cache(small)
    whole = torch.stack([Cache(small).read(torch.arange(90), view)["logits"] for view in range(3)])
    dice = torch.Generator().manual_seed(0)
    for size in (1, 7, 90, 300):
        index = torch.randint(0, 90, (size,), generator=dice)
        view = torch.randint(0, 3, (size,), generator=dice)
        assert torch.equal(cache.read(index, view)["logits"], whole[view, index])
    assert cache.read(torch.empty(0, dtype=torch.long))["logits"].shape == (0, 10)
    maps = Cache(small).read(torch.tensor([80, 3]), torch.tensor([0, 2]))["0"]
    assert torch.equal(maps[0], Cache(small).read(torch.tensor([80]), 0)["0"][0])


@pytest.mark.parametrize(("name", "index", "view"), [("index", [90], 0), ("index", [-1], 0), ("view", [3], 3)])
def test_rows_that_are_not_there(small, name, index, view):
    with pytest.raises(CacheError, match=f"batch.{name}: the cache holds no such row"):
        Cache(small).read(torch.tensor(index), view)


def test_two_hundred_corruptions_are_all_noticed(small, tmp_path):
    """Flipped bits, cut and lengthened files, missing and exchanged files: 200 of 200."""
    files, dice, folder = sorted(content(small)), random.Random(5), tmp_path / "copy"
    noticed = 0
    for trial in range(200):
        shutil.copytree(small, folder)
        path = folder / files[trial % len(files)]
        held, kind = path.read_bytes(), trial % 5
        if kind <= 1:
            place = dice.randrange(len(held))
            path.write_bytes(held[:place] + bytes([held[place] ^ 1 << dice.randrange(8)]) + held[place + 1 :])
        elif kind == 2:
            path.write_bytes(held[: dice.randrange(len(held))])
        elif kind == 3:
            path.unlink() if dice.random() < 0.5 else path.write_bytes(held + bytes(dice.randrange(1, 9)))
        else:
            other = folder / dice.choice([f for f in files if f != files[trial % len(files)]])
            path.write_bytes(other.read_bytes())
        try:
            everything(Cache(folder))
        except CacheError:
            noticed += 1
        shutil.rmtree(folder)
    assert noticed == 200


def test_shards_in_each_others_place_are_noticed(small, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    first, second = (folder / "shards" / f"{n:06d}.safetensors" for n in (0, 1))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    with pytest.raises(CacheError, match="not of this cache; found shard 1 of .*; wanted shard 0"):
        everything(Cache(folder))


def test_a_shard_of_another_teacher_is_noticed(small, tmp_path):
    store = {"logits": FULL, "0": FULL, "logits@weight": FULL}
    other = tmp_path / "other"
    build(make_teacher(1), make_loader(), other, store=store, views=3, batch=16, shard_rows=48)
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    shutil.copy(other / "shards" / "000003.safetensors", folder / "shards")
    with pytest.raises(CacheError, match="this shard is not of this cache"):
        everything(Cache(folder))
    shutil.copy(other / "header.json", folder)
    with pytest.raises(CacheError, match="header and index are of different caches"):
        Cache(folder)


def test_a_header_that_says_something_else_is_refused(small, tmp_path):
    """Even where somebody sealed it again: shards and index carry the digest of the true one."""
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    plain = json.loads((folder / "header.json").read_bytes())
    plain.pop("digest")
    for field in plain:
        changed = dict(plain)
        changed[field] = (
            {"x": 1} if field in ("data", "teacher", "origin", "made_with") else "x" if field == "kind" else 2
        )
        if field in ("signals", "constants"):
            changed[field] = []
        (folder / "header.json").write_bytes(sealed(changed))
        with pytest.raises(CacheError):
            Cache(folder)


@pytest.mark.parametrize(
    ("field", "loader"),
    [
        ("data.samples", lambda: make_loader(89)),
        ("data.augment", lambda: make_loader(augment=("pad_crop",))),
        ("data.augment.0.pad_crop.padding", lambda: make_loader(augment=({"pad_crop": {"padding": 2}}, "flip"))),
        ("data.view_seed", lambda: make_loader(view_seed=1)),
    ],
)
def test_other_views_are_refused_by_name(small, field, loader):
    with pytest.raises(CacheError, match=f"^{field}: the cache is of another data set, or of other views"):
        Cache(small).refuse_other_views(loader())


def test_other_content_and_normalisation_are_refused(small):
    other = make_loader()
    other.augment.normalise = None
    with pytest.raises(CacheError, match="^data.normalise"):
        Cache(small).refuse_other_views(other)
    other = make_loader()
    other.inputs = other.inputs.flip(0)
    with pytest.raises(CacheError, match="^data.content"):
        Cache(small).refuse_other_views(other)
    Cache(small).refuse_other_views(make_loader(batch_size=7, seed=99, shuffle=False))  # these are nothing to it


def test_no_cache(tmp_path):
    with pytest.raises(CacheError, match="header.json: this file is missing"):
        Cache(tmp_path)
