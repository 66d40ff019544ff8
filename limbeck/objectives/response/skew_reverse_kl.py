"""Skew reverse KL divergence (DistiLLM): skew KL with the student first."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.catalogue import Card, register
from limbeck.core.reduction import Reduction
from limbeck.objectives.response.skew_kl import SkewKL, skew_kl_loss


def skew_reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Reverse KL whose second distribution is mixed with some of the student's, which bounds it.

    .. math:: L = T^2\, \mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p), \qquad
        p = \mathrm{softmax}(z^T / T),\ q = \mathrm{softmax}(z^S / T)

    It never exceeds :math:`- T^2 \log \lambda`. Reverse KL is the limit :math:`\lambda \to 0`.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        skew: :math:`\lambda`, between 0 and 1; 0.1 in the paper.
        temperature: T; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``skew`` not between 0 and 1, or a temperature that is not above zero.

    Source:
        Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024, arXiv 2402.03898.

    Example:
        >>> import torch
        >>> skew_reverse_kl_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.8639)
    """
    return skew_kl_loss(
        student_logits,
        teacher_logits,
        labels,
        skew=skew,
        reverse=True,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
    )


register(
    Card(
        key="skew_reverse_kl",
        name="Skew reverse KL (DistiLLM)",
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        year=2024,
        arxiv="2402.03898",
        code="jongwooko/distillm",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p)",
        use="For language models in place of reverse KL, whose gradient is rough where the teacher rules tokens out; "
        "the paper's choice for text that the student has written itself.",
        defaults={
            "skew": "0.1, the paper's value",
            "reverse": "always; without it this is the method skew_kl",
            "temperature": "1, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradient of jongwooko/distillm@d47e77f (skewed_reverse_kl; float32)",
        choices=(
            "Formula and class are those of skew_kl, with the student first.",
            "A temperature, with KD's factor T^2, which the paper leaves at 1.",
            "The labels beside it stand for the training on labels that comes before it in the paper.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    skew_reverse_kl_loss,
    reverse=True,
)(SkewKL)
