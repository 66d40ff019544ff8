"""KD3's parts against its authors' code: mixed colours, contrast, weighted alignment, and which samples are chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.objectives.feature.simkd import simkd_loss
from limbeck.schemes.data_free.contrast import paired_contrast
from limbeck.schemes.data_free.kd3 import aligned_by_classifier, mix_distribution, teachers_share
from limbeck.schemes.data_free.selection import class_thresholds, confident

with np.load(Path(__file__).parent / "kd3_kd3.npz", allow_pickle=False) as file:
    NUMBERS = dict(file)


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in NUMBERS.items() if k.startswith(prefix)}


def test_mixed_colours() -> None:
    given = part("mix/")
    images = given["images"].requires_grad_()
    found = mix_distribution(images, given["others"], given["share"])
    torch.testing.assert_close(found, given["value"])
    (found * given["weights"]).sum().backward()
    # Ours lets no gradient pass the image's own statistics either.
    torch.testing.assert_close(images.grad, given["grad"])


def test_contrast() -> None:
    given = part("contrast/")
    first, second = given["first"].requires_grad_(), given["second"].requires_grad_()
    value = paired_contrast(first, second, 0.3)
    torch.testing.assert_close(value, given["value"])
    value.backward()
    torch.testing.assert_close(first.grad, given["grad_first"])
    torch.testing.assert_close(second.grad, given["grad_second"])


def test_weighted_alignment() -> None:
    given = part("aligned/")
    student = given["student"].requires_grad_()
    rows = simkd_loss(student, given["teacher"], reduction="none")
    value = aligned_by_classifier(rows, given["student_logits"], given["teacher_logits"])
    torch.testing.assert_close(value, given["value"], rtol=1e-6, atol=0)  # theirs adds 1e-6 to differences of logits
    value.backward()
    torch.testing.assert_close(student.grad, given["grad"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_choice(share: float) -> None:
    given = part("select/")
    said = share * given["teacher"] + (1 - share) * given["student"]
    assert torch.equal(confident(said, 0.95), given[f"{share}/rows"])
    counts = said.argmax(dim=1).bincount(minlength=5)
    torch.testing.assert_close(class_thresholds(counts, 0.95), given[f"{share}/thresholds"])


def test_the_teachers_share() -> None:
    """Their epoch e, from 1 to 240, begins at progress (e - 1) / 240; they are two epochs ahead."""
    for epoch in range(1, 239):
        theirs = float(NUMBERS["alpha"][epoch - 1])
        assert teachers_share((epoch + 1) / 240, ends=121 / 240) == pytest.approx(theirs, abs=1e-9)
