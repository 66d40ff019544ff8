"""Documents cut into rows: every token is predicted once, packs are full, and what is lost is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data.language import LanguageLoader, language_source
from limbeck.data.language.pieces import best_fit, cut, predicted
from tests.data.language.texts import LINES

TEXT = "\n".join(LINES * 4)


def counted(options: dict, records: list) -> torch.Tensor:
    """Every token that is predicted, in order of rows."""
    source = language_source(records, **{"tokenizer": "bytes", "validation": 0, **options})
    batches = list(LanguageLoader(source.train, batch_size=7, shuffle=False, drop_last=False).batches())
    return torch.cat([batch.labels[batch.mask] for batch in batches])


@pytest.mark.parametrize("overlap", [1, 2, 7, 31])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_every_token_of_a_long_text_is_predicted_once(overlap: int, padding: str) -> None:
    found = counted({"length": 32, "overlap": overlap, "padding": padding}, [TEXT])
    assert found.tolist() == [*(b + 2 for b in TEXT.encode()), 1]


def test_blocks_read_on_where_they_overlap() -> None:
    source = language_source([TEXT], tokenizer="bytes", length=32, overlap=8, validation=0)
    rows = LanguageLoader(source.train, batch_size=1, shuffle=False).example(3)
    ids = rows.inputs["input_ids"]
    assert torch.equal(ids[0, 24:], ids[1, :8])
    assert rows.mask[0].sum() == 31
    assert rows.mask[1].sum() == 24
    assert not rows.mask[1, :7].any()


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    length=st.integers(2, 15),
    overlap=st.integers(1, 14),
    long=st.sampled_from(["cut", "truncate", "drop"]),
)
def test_pieces_by_the_definition(sizes: list[int], length: int, overlap: int, long: str) -> None:
    overlap = min(overlap, length - 1)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    pieces = cut(starts, length, long, overlap)
    assert (pieces.lengths <= length).all()
    seen: dict[int, int] = {}
    for a, b, fresh, document in zip(
        *(t.tolist() for t in (pieces.start, pieces.stop, pieces.fresh, pieces.document)), strict=True
    ):
        assert starts[document] <= a <= b <= starts[document + 1]
        for token in range(a + max(fresh, 1), b):
            seen[token] = seen.get(token, 0) + 1
    wanted = set()
    for first, size in zip(starts.tolist(), sizes, strict=False):
        kept = size if long == "cut" else min(size, length) if long == "truncate" else size * (size <= length)
        wanted |= set(range(first + 1, first + kept))
    assert seen == dict.fromkeys(wanted, 1)
    learned = torch.arange(sum(sizes)) % 3 > 0
    total = sum(bool(learned[token]) for token in seen)
    assert int(predicted(pieces, learned).sum()) == total


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    groups=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_packs_by_the_definition(sizes: list[int], groups: int, seed: int) -> None:
    lengths, group = torch.tensor(sizes), torch.arange(len(sizes)) % groups
    order, first = best_fit(lengths, 20, group, seed)
    assert order.sort().values.tolist() == list(range(len(sizes)))
    rows = [row.tolist() for row in order.tensor_split(first[1:-1])]
    rooms = [20 - sum(sizes[i] for i in row) for row in rows]
    assert min(rooms) >= 0
    assert all(row == sorted(row) and len({int(group[i]) for i in row}) == 1 for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(rows) == rows_of_best_fit(sizes, group.tolist())


def rows_of_best_fit(sizes: list[int], groups: list[int]) -> int:
    """How many rows the textbook's loop needs."""
    count = 0
    for group in set(groups):
        rooms: list[int] = []
        for size in sorted((s for s, g in zip(sizes, groups, strict=True) if g == group), reverse=True):
            fits = [room for room in rooms if room >= size]
            if fits:
                rooms.remove(min(fits))
            rooms.append((min(fits) if fits else 20) - size)
        count += len(rooms)
    return count


def test_packs_follow_from_data_seed_and_length() -> None:
    texts = [line[: 5 + i % 17] for i, line in enumerate(LINES * 20)]

    def packs(**options) -> list[list[int]]:
        source = language_source(
            texts, **{"tokenizer": "bytes", "length": 40, "pack": True, "validation": 0, **options}
        )
        return LanguageLoader(source.train, batch_size=1, shuffle=False).example(9).inputs["input_ids"].tolist()

    assert packs() == packs() == packs(bucket=3, multiple=1)
    assert packs() != packs(seed=1)
    assert packs() != packs(length=41)


def test_what_became_of_documents_is_told() -> None:
    pairs = [{"prompt": "p" * n, "completion": "completion"} for n in (2, 4, 8, 16, 21, 40)]

    def note(**options) -> str:
        return language_source(pairs, **{"tokenizer": "bytes", "length": 24, "validation": 0, **options}).note

    assert note().endswith(
        "train: 6 documents in 5 rows, 42 of 98 tokens predicted, 3 longer than 24 truncated, "
        "1 with nothing to predict left out"
    )
    assert note(long="drop").endswith(
        "train: 6 documents in 3 rows, 33 of 50 tokens predicted, 3 longer than 24 dropped"
    )
    assert "cut in blocks" in note(long="cut")
    packed = language_source(["ab"] * 12, tokenizer="bytes", length=8, pack=True, validation=0)
    assert "12 documents in 6 packs of 8, 100% full, 36 of 48 tokens predicted" in packed.note


def test_a_domain_has_packs_of_its_own() -> None:
    rows = [{"text": "abc", "tag": tag} for tag in "xyx" * 8]
    source = language_source(rows, tokenizer="bytes", length=32, pack=True, validation=0)
    loader = LanguageLoader(source.train, batch_size=2, shuffle=False, drop_last=False)
    assert loader.tags == ("x", "y")
    tags = torch.cat([batch.extras["tag"] for batch in loader.batches()])
    documents = torch.cat([batch.extras["document"].amax(dim=1) for batch in loader.batches()])
    assert sum(documents[tags == 0].tolist()) == 16
    assert sum(documents[tags == 1].tolist()) == 8
