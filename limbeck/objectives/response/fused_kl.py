"""KD and cross-entropy of language models in one pass over hidden states, without logits of all tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import check_inside, check_positive, fit_mask
from limbeck.core.trace import Trace
from limbeck.kernels import linear_divergence, linear_sparse_divergence
from limbeck.objectives.parts.divergences import Divergence, rows_of

_HEAD = ("logits@in", "logits@weight", "logits@bias")


@register(
    Card(
        key="fused_kl",
        name="Fused KL",
        title="Liger Kernel: Efficient Triton Kernels for LLM Training",
        year=2024,
        arxiv="2410.10989",
        code="linkedin/Liger-Kernel",
        knowledge="response",
        equation=r"(1 - a)\, T^2 D(p, q) + a\, \mathrm{CE}(y, q_1), \quad q_T = \mathrm{softmax}((W h + b) / T)",
        use="For language models, where logits of all tokens would take more memory than anything else: it gives what "
        "kd, reverse_kl, jsd, skew_kl or total_variation give beside the labels, and neither model ever makes its "
        "logits. With teacher 'top_k' it learns from a cache of sparse predictions.",
        defaults={
            "divergence": "KL, as in KD",
            "label_share": "one half, as other tools for language models have it",
            "beta": "0.5, the symmetric divergence",
            "skew": "0.1, DistiLLM's value",
            "temperature": "1, as the papers on language models have it",
        },
        evidence="formula",
        evidence_note="value and gradient of limbeck's own losses on the full logits, in float64",
        choices=(
            "The labels' loss stands in it, since the pass that makes the logits of a few tokens makes both. Where it "
            "has a share, the tokens that count are those with a label, for both parts.",
            "A model that changes what its last layer gives before that is its logits (Gemma 2, Granite) is refused.",
        ),
        needs=("labels",),
        tasks=("classification", "language"),
    )
)
class FusedKL(Objective):
    r"""A divergence and the labels' cross-entropy from hidden states and heads, a chunk of tokens at a time.

    .. math:: L = \frac 1 n \sum_i (1 - a)\, T^2 D(p_i, q_i) - a \log \mathrm{softmax}(z^S_i)_{y_i}, \qquad z = W h + b

    with :math:`p = \mathrm{softmax}(z^T / T)` and :math:`q = \mathrm{softmax}(z^S / T)`. It taps what enters both
    models' last layers, where both stop: their logits are never made, but for one chunk at a time. Loss and gradient
    are those of the losses on full logits; see ``limbeck.kernels.linear_divergence``, which does it for a loop of
    one's own. (Set-up still runs both models once, on an example, as they are.) Vocabularies padded to different sizes
    are compared over the smaller one.

    Args:
        divergence: D: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"skew_kl"``, ``"skew_reverse_kl"`` or
            ``"total_variation"``.
        label_share: a, the cross-entropy's; at 0 no labels are needed.
        beta: The teacher's share of the mixture in ``"jsd"``.
        skew: The share of the first distribution in the skewed ones.
        temperature: T, the divergence's.
        teacher: ``"head"``: hidden states and last layer of the teacher; ``"top_k"``: the sparse prediction that a
            cache holds, compared over its classes and the tail, as in ``top_k_kl``.
        chunk: Tokens at a time. Default: as many as make the logits as large as the hidden states, or 32 MiB (256 MiB
            on a device).

    Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv 2410.10989.

    >>> loss = FusedKL("reverse_kl", label_share=0.3)
    >>> loss.student_taps
    ('logits@in', 'logits@weight', 'logits@bias')
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    student_taps = _HEAD

    def __init__(
        self,
        divergence: Divergence = "forward_kl",
        label_share: float = 0.5,
        beta: float = 0.5,
        skew: float = 0.1,
        temperature: float = 1.0,
        teacher: str = "head",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        rows_of(divergence, beta, skew)
        check_inside(label_share, "label_share", closed=True)
        check_positive(temperature, "temperature")
        if chunk is not None:
            check_positive(chunk, "chunk")
        if teacher not in ("head", "top_k"):
            raise ConfigError("no such teacher", where="teacher", found=repr(teacher), wanted="'head' or 'top_k'")
        self.teacher_taps = _HEAD if teacher == "head" else ("top_k",)
        self.divergence, self.label_share, self.beta, self.skew = divergence, label_share, beta, skew
        self.temperature, self.chunk = temperature, chunk
        if not label_share:
            self.contract = replace(self.contract, normalizer="positions", at_equal=0.0)  # type: ignore[misc]

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor | dict[str, Tensor]:
        hidden, weight, bias = _head(student)
        options: dict[str, Any] = {n: getattr(self, n) for n in ("divergence", "beta", "skew", "temperature", "chunk")}
        options |= {"student_bias": bias, "weight": 1 - self.label_share, "mask": batch.mask}
        if self.label_share:
            labels = batch.require("labels")
            counts = labels >= 0 if batch.mask is None else (labels >= 0) & fit_mask(batch.mask, labels)
            options |= {"labels": labels, "label_weight": self.label_share, "mask": counts}
        if self.teacher_taps == _HEAD:
            states, other_weight, other_bias = _head(teacher)
            loss = linear_divergence(hidden, weight, states, other_weight, teacher_bias=other_bias, **options)
        else:
            loss = linear_sparse_divergence(hidden, weight, teacher["top_k"].softened(self.temperature), **options)
        if not self.label_share:
            return loss.total
        labelled = self.label_share * loss.cross_entropy  # both parts have one gradient, which the other one carries
        return {"divergence": loss.total - labelled, "cross_entropy": labelled}


def _head(trace: Trace) -> list[Tensor]:
    """Hidden states, weight and bias. What is float16 is widened: a head's sums may be too large for it."""
    return [t.float() if t.dtype == torch.float16 else t for t in (trace[tap] for tap in _HEAD)]
