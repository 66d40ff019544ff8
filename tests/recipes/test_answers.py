"""What a teacher says of held-out data is worked out once, and never mistaken for another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.analysis.assess import assess
from limbeck.data import ResidentLoader
from limbeck.recipes.answers import answers


def make() -> tuple[nn.Module, nn.Module, ResidentLoader]:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Linear(width, 3)) for width in (4, 8))
    images = torch.rand(50, 1, 4, 4)
    loader = ResidentLoader(images, torch.arange(50) % 3, batch_size=16, shuffle=False, drop_last=False)
    return student, teacher, loader


def test_assessing_with_known_answers_says_the_same(tmp_path: Path) -> None:
    student, teacher, loader = make()
    said = answers(teacher, loader, tmp_path, data={"name": "noise"})
    assert said is not None
    with torch.no_grad():
        torch.testing.assert_close(said, teacher(loader.inputs))
    runs = {"count": 0}
    teacher.register_forward_hook(lambda *_: runs.update(count=runs["count"] + 1))
    plain = assess(student, teacher, loader, latency=False, cka_samples=0)
    asked = runs["count"]
    known = assess(student, teacher, loader, latency=False, cka_samples=0, said=said)
    assert asked >= 4
    assert runs["count"] == asked
    for name in ("accuracy", "agreement", "kl", "js"):
        assert known[name] == pytest.approx(plain[name], rel=1e-5)
    assert plain["teacher"]["accuracy"] == known["teacher"]["accuracy"]


def test_they_are_read_again_and_only_for_the_same_teacher_and_data(tmp_path: Path) -> None:
    _, teacher, loader = make()
    first = answers(teacher, loader, tmp_path, data={"name": "noise"})
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first, answers(teacher, loader, tmp_path, data={"name": "noise"}))
    assert len(list(tmp_path.iterdir())) == 1
    answers(teacher, loader, tmp_path, data={"name": "other"})
    with torch.no_grad():
        teacher[1].bias += 1
    moved = answers(teacher, loader, tmp_path, data={"name": "noise"})
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(first, moved)
