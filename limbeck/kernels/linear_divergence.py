"""A divergence of two language models' predictions from their last hidden states, without their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.kernels.arguments import Settings, check_head, check_places, check_settings
from limbeck.kernels.loop import Gradients, Head, Index
from limbeck.kernels.operator import TAGS, FusedLoss, count, labels_of, register, rows_module, run


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    r"""Divergence between the predictions of two linear heads, without ever holding the logits of all places.

    .. math::
        L = \frac{w}{n} \sum_i T^2 D(p_i, q_i) + \frac{w_y}{n_y} \sum_i -\log \mathrm{softmax}(z^S_i)_{y_i}, \qquad
        p = \mathrm{softmax}(z^T / T),\ q = \mathrm{softmax}(z^S / T),\ z = W h + b

    Logits exist for one chunk of places at a time; loss and gradient are made together, so that backward only scales.
    The same numbers as ``limbeck.functional``'s losses on the full logits give. Places that do not count cost nothing.
    Vocabularies padded to different sizes: what lies beyond the smaller one has a logit of minus infinity in both
    models. Products are computed in the inputs' dtype or autocast's, all else at least in float32. There is no second
    derivative.

    Args:
        student_hidden: ``[*, Ds]``.
        student_weight: ``[Vs, Ds]``, the student's head.
        teacher_hidden: ``[*, Dt]``; carries no gradient, as all of the teacher.
        teacher_weight: ``[Vt, Dt]``.
        student_bias, teacher_bias: ``[Vs]`` and ``[Vt]``, if any.
        divergence: :math:`D`: ``"forward_kl"`` (``kd_loss``), ``"reverse_kl"``, ``"jsd"``, ``"skew_kl"``,
            ``"skew_reverse_kl"`` or ``"total_variation"``.
        beta: The teacher's share of the mixture in ``"jsd"``; 0.5 as in ``jsd_loss``.
        skew: The share of the first distribution in the skewed ones; 0.1 as in ``skew_kl_loss``.
        temperature: T.
        mask: ``[*]`` booleans, True where a place counts; others add nothing, whatever they hold.
        normalizer: :math:`n = n_y`, a number or a tensor of one number: say the tokens of all micro-batches and ranks.
            Default: counted places, and counted places with a label, at least 1.
        labels: ``[*]`` integers, negative where a place has none.
        label_weight: :math:`w_y`, the cross-entropy's. Default 0: it is told, but not trained on.
        weight: :math:`w`, the divergence's.
        chunk: Places at a time. Default: as many as make the logits as large as the hidden states, or 32 MiB (256 MiB
            on a device).

    Raises:
        TensorError: Shapes or dtypes do not fit, or a label names no class of both.
        ConfigError: An unknown divergence, or a setting outside its bounds.

    Source:
        The losses: see ``limbeck.functional``. Gradients made in forward, chunk by chunk: Liger Kernel, arXiv
        2410.10989.

    Example:
        >>> hidden, head = torch.tensor([[2.0, 0.0]]), torch.eye(2)
        >>> linear_divergence(hidden, head, hidden.flip(1), head).total
        tensor(1.5232)
    """
    share = check_settings(divergence, beta, skew, temperature, weight, label_weight, chunk)
    student_dtype = check_head(student_hidden, student_weight, student_bias, "student")
    teacher_dtype = check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher")
    check_places(student_hidden.shape[:-1], (teacher_hidden.shape[:-1], "teacher_hidden"))
    counted = count(student_hidden, mask, labels, label_weight, normalizer)
    graded = torch.is_grad_enabled()
    sums = _linear_divergence(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        counted.mask,
        counted.labels,
        counted.label_factor,
        divergence,
        share,
        temperature,
        weight,
        chunk or 0,
        student_dtype,
        teacher_dtype,
        graded and student_hidden.requires_grad,
        graded and student_weight.requires_grad,
        graded and student_bias is not None and student_bias.requires_grad,
    )
    return counted.means(*sums[:3])


@torch.library.custom_op("limbeck::linear_divergence", mutates_args=(), **TAGS)
def _linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    label_factor: Tensor | None,
    divergence: str,
    share: float,
    temperature: float,
    weight: float,
    chunk: int,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums and gradients; see ``operator.Sums``."""
    classes = min(student_weight.shape[0], teacher_weight.shape[0])
    student = Head(student_hidden, student_weight, student_bias, classes, student_dtype)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, classes, teacher_dtype)
    gradients = Gradients(student, student_weight, wants_hidden, wants_weight, wants_bias)
    settings = Settings(divergence, share, temperature, weight, gradients.wanted)
    known = labels_of(labels, label_factor, mask, classes)
    rows = rows_module(student_hidden)

    def step(logits: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
        part = None if known is None else known.at(index)
        return rows.dense_rows(logits, teacher.logits(teacher.states(index)), part, settings)

    return run(gradients, mask, chunk, step, weight, label_factor)


register(_linear_divergence)
