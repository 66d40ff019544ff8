"""What the fused losses refuse, and what they say then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.top_k import TopK
from limbeck.kernels import linear_divergence, linear_sparse_divergence

PARTS = {
    "student_hidden": torch.randn(4, 3),
    "student_weight": torch.randn(7, 3),
    "teacher_hidden": torch.randn(4, 5),
    "teacher_weight": torch.randn(7, 5),
}
TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"student_hidden": torch.zeros(4, 3, dtype=torch.int64)}, "student_hidden: .*floating"),
    ({"student_hidden": torch.zeros(3)}, "student_hidden: .*2 or more"),
    ({"student_weight": torch.zeros(7, 4)}, r"student_weight: .*found \[7, 4\]; wanted \[vocabulary, 3\]"),
    ({"student_weight": torch.zeros(7, 3).half()}, "student_weight: .*float16; wanted torch.float32; .*autocast"),
    ({"teacher_weight": torch.zeros(7, 4)}, r"teacher_weight: .*wanted \[vocabulary, 5\]"),
    ({"teacher_hidden": torch.zeros(3, 5)}, r"teacher_hidden: .*found \[3\]; wanted \[4\]"),
    ({"teacher_hidden": torch.zeros(4, 5).double()}, "teacher_weight: .*float32; wanted torch.float64"),
    ({"student_bias": torch.zeros(3)}, r"student_bias: .*found \[3\]; wanted \[7\]"),
    ({"teacher_bias": torch.zeros(7).double()}, "teacher_bias: .*float64"),
    ({"mask": torch.ones(4)}, "mask: .*boolean"),
    ({"mask": torch.ones(3).bool()}, r"mask: .*found \[3\]"),
    ({"labels": torch.zeros(4)}, "labels: .*integers; found torch.float32"),
    ({"labels": torch.zeros(3).long()}, r"labels: .*found \[3\]; wanted \[4\]"),
    ({"labels": torch.tensor([0, 1, 2, 7])}, "labels: .*found 7; wanted 0 to 6"),
    ({"normalizer": torch.ones(2)}, r"normalizer: .*found \[2\]"),
]
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"divergence": "reverse-kl"}, "divergence: .*did you mean 'reverse_kl'"),
    ({"temperature": -1.0}, "temperature: .*found -1.0"),
    ({"temperature": 0.0}, "temperature: "),
    ({"weight": -1.0}, "weight: .*zero or more"),
    ({"weight": float("nan")}, "weight: "),
    ({"label_weight": float("inf"), "labels": torch.zeros(4).long()}, "label_weight: "),
    ({"label_weight": 1.0}, "label_weight: a cross-entropy needs labels"),
    ({"divergence": "jsd", "beta": 1.0}, "beta: .*between 0 and 1; .*'reverse_kl'"),
    ({"divergence": "skew_kl", "skew": 0.0}, "skew: .*'forward_kl'"),
    ({"divergence": "skew_reverse_kl", "skew": 1.5}, "skew: .*'reverse_kl'"),
    ({"normalizer": 0}, "normalizer: .*above zero"),
    ({"chunk": 0}, "chunk: .*at least one"),
]


@pytest.mark.parametrize(("given", "message"), TENSORS)
def test_tensors_that_do_not_fit_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TensorError, match=message):
        linear_divergence(**{**PARTS, **given})


@pytest.mark.parametrize(("given", "message"), SETTINGS)
def test_settings_that_mean_nothing_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linear_divergence(**PARTS, **given)
    top = TopK.of(torch.randn(4, 7), 2)
    with pytest.raises(ConfigError, match=message):
        linear_sparse_divergence(PARTS["student_hidden"], PARTS["student_weight"], top, **given)
