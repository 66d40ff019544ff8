"""A divergence of a language model's prediction from a teacher's most probable tokens, without logits of all places."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating
from limbeck.core.top_k import TopK
from limbeck.kernels.arguments import Settings, check_head, check_places, check_settings
from limbeck.kernels.bucket_rows import Buckets
from limbeck.kernels.loop import Gradients, Head, Index
from limbeck.kernels.operator import TAGS, FusedLoss, count, labels_of, register, rows_module, run


def linear_sparse_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    top: TopK,
    *,
    student_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    weight: float = 1.0,
    chunk: int | None = None,
) -> FusedLoss:
    r"""Divergence from a sparse teacher over its k classes and the tail, without the logits of all places.

    .. math::
        L = \frac{w}{n} \sum_i T^2 D(p_i, q_i) + \frac{w_y}{n_y} \sum_i -\log \mathrm{softmax}(z_i)_{y_i}, \qquad
        q = \mathrm{softmax}(z / T),\ z = W h + b

    where :math:`D` compares k + 1 buckets: the teacher's k classes, and all others together. The student's share of the
    last bucket is summed over its logits there, so that it keeps its digits where the k classes take nearly everything.
    A row's gradient is a softmax, scaled, with other values at the k classes: a chunk needs its logits' memory once.

    Logits exist for one chunk of places at a time; loss and gradient are made together, so that backward only scales.
    Places that do not count cost nothing. Where student and teacher have vocabularies padded to different sizes, the
    student's logits from ``top.classes`` on count as minus infinity. Products are computed in the inputs' dtype or
    autocast's, all else at least in float32. There is no second derivative.

    Args:
        student_hidden: ``[*, D]``.
        student_weight: ``[V, D]``, the student's head.
        top: The teacher's prediction, ``[*, k]``, **at the temperature T**: ``TopK.of(logits, k, T)``. A bucket to
            which it gives no probability (``log_tail`` of minus infinity, k below C) makes ``"reverse_kl"`` infinite.
        student_bias: ``[V]``, if any.
        divergence: :math:`D`: ``"forward_kl"`` (``kd_loss``), ``"reverse_kl"``, ``"jsd"``, ``"skew_kl"``,
            ``"skew_reverse_kl"`` or ``"total_variation"``.
        beta: The teacher's share of the mixture in ``"jsd"``; 0.5 as in ``jsd_loss``.
        skew: The share of the first distribution in the skewed ones; 0.1 as in ``skew_kl_loss``.
        temperature: T, by which the student is softened.
        mask: ``[*]`` booleans, True where a place counts; others add nothing, whatever they hold.
        normalizer: :math:`n = n_y`, a number or a tensor of one number: say the tokens of all micro-batches and ranks.
            Default: counted places, and counted places with a label, at least 1.
        labels: ``[*]`` integers, negative where a place has none.
        label_weight: :math:`w_y`, the cross-entropy's. Default 0: it is told, but not trained on.
        weight: :math:`w`, the divergence's.
        chunk: Places at a time. Default: as many as make the logits as large as the hidden states, or 32 MiB (256 MiB
            on a device).

    Raises:
        TensorError: Shapes or dtypes do not fit, a class is none of the student's, a row's classes do not ascend, or a
            label names no class of both.
        ConfigError: An unknown divergence, or a setting outside its bounds.

    Source:
        The losses: see ``limbeck.functional``. Gradients made in forward, chunk by chunk: Liger Kernel, arXiv
        2410.10989. A gathered log-probability from a streamed logarithm of sums: DistillKit.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> linear_sparse_divergence(logits.flip(1), torch.eye(2), TopK.of(logits, 1)).total
        tensor(1.5232)
    """
    share = check_settings(divergence, beta, skew, temperature, weight, label_weight, chunk)
    dtype = check_head(student_hidden, student_weight, student_bias, "student")
    _check_top(top, student_hidden.shape[:-1])
    counted = count(student_hidden, mask, labels, label_weight, normalizer)
    graded = torch.is_grad_enabled()
    sums = _linear_sparse_divergence(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        top.ids.reshape(-1, top.ids.shape[-1]),
        top.log_probs.detach().reshape(-1, top.ids.shape[-1]),
        top.log_tail.detach().reshape(-1),
        top.classes,
        counted.mask,
        counted.labels,
        counted.label_factor,
        divergence,
        share,
        temperature,
        weight,
        chunk or 0,
        dtype,
        graded and student_hidden.requires_grad,
        graded and student_weight.requires_grad,
        graded and student_bias is not None and student_bias.requires_grad,
    )
    return counted.means(*sums[:3])


def _check_top(top: TopK, places: torch.Size) -> None:
    """Refuse a sparse prediction whose parts do not belong together, or to the student's places."""
    check_floating(top.log_probs, "top.log_probs")
    check_floating(top.log_tail, "top.log_tail", least=0)
    if top.ids.is_floating_point() or top.ids.dtype == torch.bool:
        raise TensorError("classes are integers", where="top.ids", found=top.ids.dtype, wanted="torch.int64")
    check_places(places, (top.ids.shape[:-1], "top.ids"), (top.log_tail.shape, "top.log_tail"))
    if top.log_probs.shape != top.ids.shape:
        raise TensorError(
            "one log-probability a class is wanted",
            where="top.log_probs",
            found=list(top.log_probs.shape),
            wanted=f"{list(top.ids.shape)} as top.ids",
        )


def _check_ids(ids: Tensor, classes: int) -> None:
    """Refuse rows that are not distinct classes in ascending order, each one of the student's."""
    if not ids.numel():
        return
    low, high, step = torch.stack(
        [ids.min(), ids.max(), ids.diff(dim=-1).min() if ids.shape[-1] > 1 else ids.new_ones(())]
    ).tolist()
    if low < 0 or high >= classes:
        raise TensorError(
            "a class is none of the student's",
            where="top.ids",
            found=low if low < 0 else high,
            wanted=f"0 to {classes - 1}",
            remedy="were teacher and student given the same tokenizer?",
        )
    if step < 1:
        raise TensorError(
            "a row's classes are not distinct and in ascending order", where="top.ids", remedy="TopK.of sorts them"
        )


@torch.library.custom_op("limbeck::linear_sparse_divergence", mutates_args=(), **TAGS)
def _linear_sparse_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    classes: int,
    mask: Tensor | None,
    labels: Tensor | None,
    label_factor: Tensor | None,
    divergence: str,
    share: float,
    temperature: float,
    weight: float,
    chunk: int,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums and gradients; see ``operator.Sums``."""
    classes = min(classes, student_weight.shape[0])
    teacher = Buckets(ids.long(), log_probs, log_tail)
    _check_ids(teacher.ids if mask is None else teacher.ids[mask], classes)
    student = Head(student_hidden, student_weight, student_bias, classes, dtype)
    gradients = Gradients(student, student_weight, wants_hidden, wants_weight, wants_bias)
    settings = Settings(divergence, share, temperature, weight, gradients.wanted)
    known = labels_of(labels, label_factor, mask, classes)
    rows = rows_module(student_hidden)

    def step(logits: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
        return rows.sparse_rows(logits, teacher.at(index), None if known is None else known.at(index), settings)

    return run(gradients, mask, chunk, step, weight, label_factor)


register(_linear_sparse_divergence)
