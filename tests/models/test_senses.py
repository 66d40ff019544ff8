"""Dictionaries of senses, and how states become them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import DataError, TensorError
from limbeck.models.sense_clusters import Gatherer, k_means, markov_clusters
from limbeck.models.senses import SenseDictionary, SenseStudent, likeness
from limbeck.models.text import TextEncoder


def blobs(groups: int, each: int, dim: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(groups)
    centers = 20 * torch.randn(groups, dim).double()
    return centers, (centers.unsqueeze(1) + 0.3 * torch.randn(groups, each, dim).double()).flatten(0, 1)


def test_every_state_of_a_token_is_kept_with_equal_chance() -> None:
    """However often other tokens come, and in however many batches."""
    seen: Counter[int] = Counter()
    for seed in range(300):
        gatherer = Gatherer(3, seed, torch.float32)
        for start in range(0, 12, 4):
            ids = torch.cat([torch.full((4,), 7), torch.full((5,), 2)])
            gatherer.add(ids, torch.cat([torch.arange(start, start + 4.0), torch.full((5,), -1.0)]).unsqueeze(1))
        known = dict(gatherer.groups())
        assert known[7].shape == (3, 1)
        assert len(known[7].unique()) == 3
        seen.update(known[7].flatten().int().tolist())
    assert len(seen) == 12
    assert all(abs(count - 75) < 5 * 7.5 for count in seen.values())  # 300 / 4, five standard deviations


def test_thinning_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [(torch.randint(5, (50,)), torch.randn(50, 2)) for _ in range(6)]

    def found(every: bool) -> dict[int, Tensor]:
        gatherer = Gatherer(4, 1)
        for ids, states in batches:
            gatherer.add(ids, states)
            if every:
                gatherer._thin()
        return dict(gatherer.groups())

    first, second = found(True), found(False)
    assert first.keys() == second.keys()
    for token in first:
        assert torch.equal(first[token].sort(0).values, second[token].sort(0).values)


def test_k_means_finds_groups_that_lie_apart() -> None:
    centers, states = blobs(4, 9)
    found = k_means(states, 4)
    wanted = states.view(4, 9, -1).mean(1)
    assert all(float(torch.cdist(found, w.view(1, -1)).min()) < 1e-9 for w in wanted)
    assert float(torch.cdist(found, centers).min(0).values.max()) < 1
    with pytest.raises(TensorError, match="not so many states"):
        k_means(states[:3], 4)
    same = k_means(torch.ones(6, 2), 3)
    assert torch.equal(same, torch.ones(3, 2))


def test_markov_clusters_are_groups_that_lie_apart() -> None:
    _, states = blobs(3, 12)
    found = markov_clusters(states)
    wanted = states.view(3, 12, -1).mean(1)
    assert found.shape == wanted.shape
    assert float(torch.cdist(found, wanted).min(0).values.max()) < 1e-9


def test_a_dictionary_by_plain_loops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    groups: dict[int, Tensor] = {2: torch.randn(3, 4), 3: torch.randn(1, 4), 7: torch.randn(5, 4)}
    senses = SenseDictionary.of(groups.items())
    ids, states = torch.randint(0, 11, (6, 9)), torch.randn(6, 9, 4)
    where = torch.rand(6, 9) > 0.3
    wanted = states.clone()
    for place in where.nonzero().tolist():
        token, state = int(ids[tuple(place)]), states[tuple(place)]
        if token in groups:
            wanted[tuple(place)] = groups[token][int((groups[token] @ state).argmax())]
    assert torch.equal(senses.replaced(ids, states, where), wanted)
    assert senses.known(torch.tensor([-1, 2, 4, 100])).tolist() == [False, True, False, False]
    senses.save(tmp_path / "a.safetensors", more=torch.ones(2))
    again, more = SenseDictionary.load(tmp_path / "a.safetensors")
    assert torch.equal(again.replaced(ids, states, where), wanted)
    assert more["more"].tolist() == [1, 1]
    assert not senses.state_dict()  # checkpoints do not hold it
    with pytest.raises(DataError, match="no dictionary"):
        SenseDictionary.load(tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="no token"):
        SenseDictionary.of([])


def test_likeness() -> None:
    state, senses = torch.tensor([[3.0, 4.0]]), torch.tensor([[[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]]])
    assert likeness(state, senses).tolist() == [[25.0, 50.0, 3.0]]
    torch.testing.assert_close(likeness(state, senses, "cos"), torch.tensor([[1.0, 1.0, 0.6]]))
    assert likeness(state, senses, "l2").tolist() == [[0.0, -25.0, -20.0]]


def test_a_student_that_is_its_teacher_says_what_the_teacher_says() -> None:
    """Where a token's senses are its only states, the teacher's head sees them again."""
    torch.manual_seed(0)
    teacher = TextEncoder(8, 2, vocabulary=12).eval()
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    mask = (ids > 0).long()
    with torch.no_grad():
        states: Any = teacher.embedding(ids)
        trace = _states(teacher, ids, mask)
        senses = SenseDictionary.of(sorted((int(i), s.unsqueeze(0)) for i, s in zip(ids[ids > 0], trace[ids > 0])))  # noqa: B905

        def head(meant: Tensor, mask: Tensor) -> Tensor:
            counts = mask.unsqueeze(-1).to(meant.dtype)
            return teacher.linear((teacher.norm(meant) * counts).sum(1) / counts.sum(1))

        model = SenseStudent(teacher, "blocks:-1", nn.Identity(), senses, head)
        torch.testing.assert_close(model(ids, mask), teacher(ids, mask))
        assert states.shape == trace.shape
        skipping = SenseStudent(teacher, "blocks:-1", nn.Identity(), senses, lambda meant, mask: meant, skip=[3])
        assert torch.equal(skipping(ids, mask), trace)


def _states(model: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda m, a, output: found.append(output))
    model(ids, mask)
    handle.remove()
    return found[0]
