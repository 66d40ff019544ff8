from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from limbeck.objectives.response.label_smoothing import label_smoothing_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(smoothing: float, reduction: str) -> None:
    logits, labels = torch.randn(4, 3, 5).double(), torch.randint(0, 5, (4, 3))
    labels[0, 1] = -100
    value = cross_entropy_loss(logits, labels, label_smoothing=smoothing, reduction=reduction)
    wanted = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(value, wanted)


def test_soft_labels_equal_hard_ones_where_they_agree() -> None:
    logits, labels = torch.randn(4, 5), torch.randint(0, 5, (4,))
    soft = F.one_hot(labels, 5).half()
    for smoothing in (0.0, 0.3):
        torch.testing.assert_close(
            cross_entropy_loss(logits, soft, label_smoothing=smoothing),
            cross_entropy_loss(logits, labels, label_smoothing=smoothing),
        )


def test_any_negative_label_means_none() -> None:
    logits = torch.randn(3, 5)
    value = cross_entropy_loss(logits, torch.tensor([2, -1, -7]))
    torch.testing.assert_close(value, cross_entropy_loss(logits[:1], torch.tensor([2])))
    assert cross_entropy_loss(logits, torch.tensor([-1, -1, -1])) == 0


def test_mask_and_missing_labels_add_up() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -1, 2], [0, 3, 4]])
    value = cross_entropy_loss(logits, labels, mask=torch.tensor([[True, True, False], [False, False, True]]))
    wanted = cross_entropy_loss(torch.stack([logits[0, 0], logits[1, 2]]), torch.tensor([1, 4]))
    torch.testing.assert_close(value, wanted)


def test_label_that_names_no_class() -> None:
    with pytest.raises(TensorError, match=r"labels.*found 5.*0 to 4"):
        cross_entropy_loss(torch.randn(2, 5), torch.tensor([1, 5]))
    with pytest.raises(ConfigError, match="label_smoothing"):
        cross_entropy_loss(torch.randn(2, 5), torch.tensor([1, 2]), label_smoothing=1.5)


def test_label_smoothing_is_distillation_from_an_ignorant_teacher() -> None:
    logits, labels = torch.randn(4, 5).double(), torch.randint(0, 5, (4,))
    soft = 0.9 * F.one_hot(labels, 5).double() + 0.1 / 5
    torch.testing.assert_close(label_smoothing_loss(logits, labels), -(soft * logits.log_softmax(-1)).sum(-1).mean())
