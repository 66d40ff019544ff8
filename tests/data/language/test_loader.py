"""What every loader promises the engine, and what batches of texts hold."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data import Augment, as_loader, build_loader, load_source
from limbeck.data.language import LanguageLoader, LibraryTokens, language_source
from tests.data.language.texts import LINES

TEXTS = [{"text": line[: 5 + 7 * i % 48], "tag": "ab"[i % 2]} for i, line in enumerate(LINES * 7)]
KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "in order of length": {"bucket": 0},
    "left": {"padding": "left"},
    "packs": {"pack": True, "length": 48},
    "pairs": {"teacher_tokenizer": {"bpe": 300}},
}


@pytest.fixture(params=list(KINDS))
def loader(request: pytest.FixtureRequest) -> LanguageLoader:
    split = language_source(
        TEXTS, **{"tokenizer": "bytes", "length": 64, "validation": 0, **KINDS[request.param]}
    ).train
    return LanguageLoader(split, batch_size=6, seed=3)


def rows(steps: Any) -> list[list[tuple]]:
    """Everything a row brings but for its padding, step by step."""
    found = []
    for step in steps:
        found.append([])
        for batch in step:
            counts = batch.mask
            for b in range(batch.size):
                own = batch.inputs["input_ids"][b].tolist()
                labels = batch.labels[b][counts[b]].tolist()
                offsets = batch.extras["offsets"][b][counts[b]].tolist() if "offsets" in batch.extras else None
                found[-1].append(
                    (int(batch.index[b]), [i for i in own if i], labels, offsets, int(batch.extras["tag"][b]))
                )
    return found


def test_ranks_and_parts_give_the_same_steps(loader: LanguageLoader) -> None:
    whole = rows(loader.epoch(1))
    assert len(whole) == len(loader) == loader.samples // 6
    two = [rows(loader.epoch(1, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == whole
    assert rows(loader.epoch(1, parts=4)) == whole
    six = [rows(loader.epoch(1, rank=r, world=3, parts=2)) for r in range(3)]
    assert [[*chain.from_iterable(parts)] for parts in zip(*six, strict=True)] == whole


def test_epochs_replay_differ_and_resume(loader: LanguageLoader) -> None:
    torch.manual_seed(7)
    first = rows(loader.epoch(0))
    torch.manual_seed(8)
    assert rows(loader.epoch(0)) == first
    assert rows(loader.epoch(1)) != first
    for start in range(len(loader) + 1):
        assert rows(loader.epoch(0, start_step=start)) == first[start:]
    seen = [row[0] for step in first for row in step]
    assert len(seen) == len(set(seen)) == len(loader) * 6
    assert {row[0]: row[1:] for step in first for row in step} == {
        row[0]: row[1:] for step in rows([[b] for b in loader.plain()]) for row in step if row[0] in seen
    }  # a row is the same in every epoch


def test_nothing_random_of_the_program_is_touched(loader: LanguageLoader) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader.example()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_any_rows_can_be_read(loader: LanguageLoader) -> None:
    (batch,) = loader.read([[(torch.tensor([3, 1]), 0), (torch.tensor([2]), 5)]])
    assert (batch.index.tolist(), batch.view.tolist()) == ([3, 1, 2], [0, 0, 5])
    alone = rows([[next(loader.read([[(torch.tensor([i]), 0)]]))] for i in (3, 1, 2)])
    assert rows([[batch]])[0] == [step[0] for step in alone]
    assert loader.example(3).index.tolist() == [0, 1, 2]
    assert loader.read([[(torch.tensor([0]), 9)]]).__next__().view == 9


def test_wrong_places_are_told(loader: LanguageLoader) -> None:
    for wrong in ({"rank": 2, "world": 2}, {"parts": 0}, {"start_step": 99}):
        with pytest.raises(ConfigError, match="loader.epoch"):
            loader.epoch(0, **wrong)


def test_describe_tells_what_settles_an_epoch(loader: LanguageLoader) -> None:
    told = loader.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["language"]["tokenizer"] == loader.split.tokens.fingerprint
    base = language_source(TEXTS, tokenizer="bytes", length=64, validation=0).train
    prints = {json.dumps(LanguageLoader(base, batch_size=6, seed=3).describe(), sort_keys=True)}
    for change in (
        {"length": 32},
        {"pack": True},
        {"padding": "left"},
        {"overlap": 3},
        {"long": "drop"},
        {"bucket": 2},
        {"seed": 1},
        {"tokenizer": {"bpe": 300}},
        {"teacher_tokenizer": {"bpe": 300}},
    ):
        split = language_source(TEXTS, **{"tokenizer": "bytes", "length": 64, "validation": 0, **change}).train
        prints.add(json.dumps(LanguageLoader(split, batch_size=6, seed=3).describe(), sort_keys=True))
    assert len(prints) == 10
    assert told["language"]["template"] is None


def test_templates_are_told(bpe: LibraryTokens) -> None:
    chats = [{"messages": [{"role": "assistant", "content": line}]} for line in LINES]
    found = [
        language_source(chats, tokenizer=bpe, template=t, validation=0).train.settings["template"]
        for t in ("plain", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    ]
    assert None not in found
    assert found[0] != found[1]


def test_batches_are_of_rows_of_like_length() -> None:
    texts = ["x" * (1 + i * 37 % 96) for i in range(384)]
    split = language_source(texts, tokenizer="bytes", validation=0, multiple=1).train

    def padding(bucket: int, epoch: int = 0) -> float:
        split.rows.layout = type(split.rows.layout)(None, False, "right", 1, bucket)
        batches = list(LanguageLoader(split, batch_size=8).batches(epoch))
        places = sum(b.labels.numel() for b in batches)
        return 1 - sum(int(b.inputs["attention_mask"].sum()) for b in batches) / places

    assert padding(0) > 0.4
    assert padding(16) < 0.1
    loader = LanguageLoader(split, batch_size=8)
    lengths = [b.labels.shape[1] for b in loader.batches()]
    assert lengths != sorted(lengths)  # batches are not in order of length
    assert [b.index.tolist() for b in loader.batches(1)] != [b.index.tolist() for b in loader.batches(2)]
    drops = set(range(384)) - {i for b in LanguageLoader(split, batch_size=9).batches() for i in b.index.tolist()}
    kept = [split.rows.lengths[i].item() for i in drops]
    assert len(kept) == 6
    assert max(kept) < 98 or min(kept) < 80  # who is left out is drawn from all


def test_inputs_are_keywords_of_transformers() -> None:
    for options, keys in (
        ({}, {"input_ids", "attention_mask"}),
        ({"padding": "left"}, {"input_ids", "attention_mask", "position_ids"}),
        ({"pack": True}, {"input_ids", "position_ids", "use_cache"}),
    ):
        split = language_source(TEXTS, **{"tokenizer": "bytes", "length": 64, "validation": 0, **options}).train
        batch = LanguageLoader(split, batch_size=5).example(5)
        assert set(batch.inputs) == keys
        assert all(v.dtype == torch.long for v in batch.inputs.values() if isinstance(v, torch.Tensor))
        assert (batch.labels.dtype, batch.mask.dtype) == (torch.long, torch.bool)
        assert batch.labels.shape == batch.mask.shape == batch.inputs["input_ids"].shape
        assert (batch.labels[batch.mask] >= 0).all()
    split = language_source(TEXTS, tokenizer="bytes", padding="left", validation=0).train
    batch = LanguageLoader(split, batch_size=5).example(5)
    wanted = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(batch.inputs["position_ids"], wanted)
    assert (batch.inputs["attention_mask"][:, -1] == 1).all()


def test_widths() -> None:
    def width(size: int, **options: Any) -> int:
        split = language_source(["x" * size] * 2, **{"tokenizer": "bytes", "validation": 0, **options}).train
        return LanguageLoader(split, batch_size=2).example().labels.shape[1]

    assert width(9) == 16
    assert width(9, multiple=1) == 11
    assert width(9, length=12) == 12  # rounding up goes no further than a row may
    assert width(9, multiple=32, length=64) == 32
    assert width(99, length=20) == 20


def test_the_doors(bpe: LibraryTokens) -> None:
    source = load_source(TEXTS, tokenizer="bytes", length=64, validation=0.2)
    loader = build_loader(source.train, batch_size=4, train=True, seed=5)
    assert isinstance(loader, LanguageLoader)
    assert (loader.task, loader.vocabulary, loader.labels, loader.classes) == ("language", 258, None, None)
    assert isinstance(as_loader(source, part="validation", batch_size=4), LanguageLoader)
    few = source.train.subset(torch.tensor([5, 2]))
    batch, whole = build_loader(few, batch_size=2, train=False).example(), loader.rows.batch(torch.tensor([5, 2]))
    assert torch.equal(batch.inputs["input_ids"], whole.inputs["input_ids"])
    assert batch.index.tolist() == [0, 1]
    with pytest.raises(DataError, match="only images can be augmented"):
        build_loader(source.train, batch_size=4, train=True, augment=["flip"])
    with pytest.raises(DataError, match="the set is smaller than one batch"):
        build_loader(source.train, batch_size=400, train=True)
    assert LanguageLoader(source.train, batch_size=4, augment=Augment(seed=1)).augment.seed == 1
