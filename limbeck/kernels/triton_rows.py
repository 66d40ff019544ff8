"""What a chunk's logits go through on a GPU: a program reads a row in blocks and writes the gradient in its place.

The same as ``torch_rows``, with no memory beside the logits, which may stay in half precision: they are widened to
float32 in registers. For float64 there is ``torch_rows``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from limbeck.kernels.arguments import Settings
from limbeck.kernels.bucket_rows import Buckets, Labels, bucket_rows

try:
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

    AVAILABLE, _jit = True, triton.jit
except ImportError:
    AVAILABLE = False

    def _jit(function: Any) -> Any:
        return function


#: Classes a program reads at a time, and its threads in groups of 32.
BLOCK, WARPS = 4096, 8


def dense_rows(
    student: Tensor, teacher: Tensor, labels: Labels | None, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Divergence and cross-entropy of each row of logits ``[c, V]``; the gradient goes where the student's were."""
    rows, classes = student.shape
    divergence = student.new_empty(rows, dtype=torch.float32)
    cross_entropy = None if labels is None else torch.empty_like(divergence)
    with _on(student.device):
        _dense[(rows,)](
            student,
            teacher,
            divergence,
            divergence if cross_entropy is None else cross_entropy,
            divergence if labels is None else torch.where(labels.known, labels.target, -1),
            divergence if labels is None else labels.factor,
            classes,
            student.stride(0),
            teacher.stride(0),
            1 / settings.temperature,
            settings.temperature**2,
            settings.weight * settings.temperature,
            settings.share,
            DIVERGENCE=settings.divergence,
            GRADIENT=settings.gradient,
            LABELS=labels is not None,
            RAW=settings.temperature != 1,
            BLOCK=_block(classes),
            num_warps=WARPS,
        )
    return divergence, cross_entropy


def sparse_rows(
    student: Tensor, teacher: Buckets, labels: Labels | None, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """As ``dense_rows``, of a sparse teacher."""
    rows, classes = student.shape
    label_logits = None if labels is None else student.gather(1, labels.target.unsqueeze(-1)).squeeze(-1).float()
    logits = student.gather(1, teacher.ids).float()
    student.scatter_(1, teacher.ids, float("-inf"))
    raw = labels is not None and settings.temperature != 1
    tails = student.new_empty(2, rows, dtype=torch.float32)
    common = (classes, student.stride(0), 1 / settings.temperature)
    with _on(student.device):
        _tails[(rows,)](student, tails[0], tails[1], *common, RAW=raw, BLOCK=_block(classes), num_warps=WARPS)
        found = bucket_rows(logits, tails[0], tails[1] if raw else None, teacher, labels, label_logits, settings)
        if found.kept is None or found.share is None:
            return found.divergence, found.cross_entropy
        share = found.share.contiguous()
        raw_share = share if found.raw_share is None else found.raw_share.contiguous()
        _powers[(rows,)](
            student, tails[0], tails[1], share, raw_share, *common, RAW=raw, BLOCK=_block(classes), num_warps=WARPS
        )
    student.scatter_(1, teacher.ids, found.kept.to(student.dtype))
    if labels is not None:
        student.scatter_add_(1, labels.target.unsqueeze(-1), -labels.factor.unsqueeze(-1).to(student.dtype))
    return found.divergence, found.cross_entropy


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which may be another one than the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _block(classes: int) -> int:
    """A power of two, and no larger than it has to be."""
    return min(BLOCK, 1 << max(classes - 1, 1).bit_length())


# From here on Triton's language: names in capitals are constants of a compiled kernel.


@_jit
def _log_sum(row, classes, inverse_temperature, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logarithm of the sum of exponentials of a row, relative to the highest of what was read so far."""
    top = -3.0e38
    total = 0.0
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row + columns, mask=columns < classes, other=float("-inf")).to(tl.float32) * inverse_temperature
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    return top + tl.log(total)


@_jit
def _terms(log_p, log_q, share, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The divergence's terms, g and q, as in ``divergence_rows``."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if DIVERGENCE == "forward_kl":
        value = tl.where(p == 0, 0.0, p * (log_p - log_q))
        g = -p
    elif DIVERGENCE == "reverse_kl":
        value = tl.where(q == 0, 0.0, q * (log_q - log_p))
        g = value
    elif DIVERGENCE == "jsd":
        log_m = tl.log(tl.maximum(share * p + (1 - share) * q, 1.1754944e-38))
        g = (1 - share) * tl.where(q == 0, 0.0, q * (log_q - log_m))
        value = share * tl.where(p == 0, 0.0, p * (log_p - log_m)) + g
    elif DIVERGENCE == "skew_kl":
        m = tl.maximum(share * p + (1 - share) * q, 1.1754944e-38)
        value = tl.where(p == 0, 0.0, p * (log_p - tl.log(m)))
        g = (share - 1) * q * (p / m)
    elif DIVERGENCE == "skew_reverse_kl":
        m = tl.maximum(share * q + (1 - share) * p, 1.1754944e-38)
        value = tl.where(q == 0, 0.0, q * (log_q - tl.log(m)))
        g = value - share * q * (q / m)
    else:
        tl.static_assert(DIVERGENCE == "total_variation")
        value = 0.5 * tl.abs(q - p)
        g = 0.5 * q * tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    return value, g, q


@_jit
def _dense(  # type: ignore[no-untyped-def]
    student,
    teacher,
    divergence,
    cross_entropy,
    labels,
    factors,
    classes,
    student_stride,
    teacher_stride,
    inverse_temperature,
    squared_temperature,
    scale,
    share,
    DIVERGENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    student += number * student_stride
    teacher += number * teacher_stride
    log_sum = _log_sum(student, classes, inverse_temperature, BLOCK)
    teacher_log_sum = _log_sum(teacher, classes, inverse_temperature, BLOCK)
    if LABELS:
        raw_log_sum = log_sum
        if RAW:
            raw_log_sum = _log_sum(student, classes, 1.0, BLOCK)
        label = tl.load(labels + number)
        factor = tl.load(factors + number)
        label_logit = tl.load(student + tl.maximum(label, 0)).to(tl.float32)
        tl.store(cross_entropy + number, tl.where(label < 0, 0.0, raw_log_sum - label_logit))
    value = 0.0
    total = 0.0
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        z = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32)
        term, g, _ = _terms(
            t * inverse_temperature - teacher_log_sum, z * inverse_temperature - log_sum, share, DIVERGENCE
        )
        value += tl.sum(term, 0)
        total += tl.sum(g, 0)
    tl.store(divergence + number, value * squared_temperature)
    if GRADIENT:
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < classes
            z = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32)
            t = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32)
            _, g, q = _terms(
                t * inverse_temperature - teacher_log_sum, z * inverse_temperature - log_sum, share, DIVERGENCE
            )
            gradient = (g - q * total) * scale
            if LABELS:
                gradient += factor * (tl.exp(z - raw_log_sum) - tl.where(columns == label, 1.0, 0.0))
            tl.store(student + columns, gradient.to(student.dtype.element_ty), mask=inside)


@_jit
def _tails(  # type: ignore[no-untyped-def]
    logits, tails, raw_tails, classes, stride, inverse_temperature, RAW: tl.constexpr, BLOCK: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    logits += number * stride
    tl.store(tails + number, _log_sum(logits, classes, inverse_temperature, BLOCK))
    if RAW:
        tl.store(raw_tails + number, _log_sum(logits, classes, 1.0, BLOCK))


@_jit
def _powers(  # type: ignore[no-untyped-def]
    logits,
    tails,
    raw_tails,
    shares,
    raw_shares,
    classes,
    stride,
    inverse_temperature,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The student's share of each class among those outside the buckets, scaled; 0 where a logit is minus infinity."""
    number = tl.program_id(0).to(tl.int64)
    logits += number * stride
    tail = tl.load(tails + number)
    share = tl.load(shares + number)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        z = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        power = share * tl.exp(z * inverse_temperature - tail)
        if RAW:
            power += tl.load(raw_shares + number) * tl.exp(z - tl.load(raw_tails + number))
        power = tl.where(z == float("-inf"), 0.0, power)
        tl.store(logits + columns, power.to(logits.dtype.element_ty), mask=inside)
