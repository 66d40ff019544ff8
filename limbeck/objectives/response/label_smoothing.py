"""Label smoothing: the control that needs no teacher."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.reduction import Reduction
from limbeck.objectives.response.cross_entropy import cross_entropy_loss


def label_smoothing_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with labels of which a part is spread evenly over all classes.

    .. math:: L = -\sum_c q_c \log p_c, \qquad q = (1 - \epsilon)\,\mathrm{label} + \epsilon / C

    It is distillation from a teacher that knows nothing but the label, so a method that does not beat it has
    transferred nothing.

    Args:
        student_logits: ``[B, *, C]``.
        labels: Integers ``[B, *]``, negative where a place has no label; or soft labels, floating ``[B, *, C]``.
        smoothing: :math:`\epsilon`; 0.1 as in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Labels that do not fit the logits, or name no class.
        ConfigError: ``smoothing`` outside 0 to 1.

    Source:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv 1512.00567, section 7.

    Example:
        >>> import torch
        >>> label_smoothing_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.2269)
    """
    return cross_entropy_loss(student_logits, labels, label_smoothing=smoothing, mask=mask, reduction=reduction)
