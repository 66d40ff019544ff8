"""Contrasts between two embeddings of the same samples: within a batch, and against memory banks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape, reduce, widen
from limbeck.core.relations import rows, unit


@without_autocast
def crd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The contrast within a batch: each sample's two embeddings against those of the batch's other samples.

    .. math::
        L_i = -\log \frac{e^{s_i \cdot t_i / \tau}}{\sum_{j \in N(i)} e^{s_i \cdot t_j / \tau}}
              -\log \frac{e^{s_i \cdot t_i / \tau}}{\sum_{j \in N(i)} e^{s_j \cdot t_i / \tau}},
        \qquad s, t \text{ of length } 1

    :math:`N(i)` is the sample and every other that counts; with labels, only samples of other classes. This needs no
    memory bank, and no more than one batch; the paper's own loss is ``crd_bank_loss``.

    The loss ties the samples of a batch together: the loss of a batch is not the mean of the losses of its parts. A
    sample without negatives costs 0.

    Args:
        student_embedding: ``[B, D]`` (``[B, *]`` is flattened); scaled to length 1 here.
        teacher_embedding: The same shape. *Not* detached, since the teacher's projector learns too: detach the
            teacher's feature before projecting it.
        labels: ``[B]`` integers; a negative label is a class of its own.
        temperature: :math:`\tau`; 0.07 in the paper.
        mask: ``[B]`` booleans, True where a sample counts; or over the first dimensions of the embeddings.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Embeddings of different shapes, or labels that are not one integer a sample.
        ConfigError: A temperature that is not above zero.

    Source:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, arXiv 1910.10699; the form within a
        batch is InfoNCE (arXiv 1807.03748) taken both ways.

    Example:
        >>> import torch
        >>> crd_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.6265)
    """
    student, teacher, counts = _embeddings(student_embedding, teacher_embedding, mask)
    check_positive(temperature, "temperature")
    size = len(student)
    positive = torch.eye(size, dtype=torch.bool, device=student.device)
    negative = ~positive
    if counts is not None:
        negative = negative & counts
    if labels is not None:
        if labels.shape != (size,) or labels.is_floating_point():
            found = f"{list(labels.shape)} {labels.dtype}"
            raise TensorError("not one class a sample", where="labels", found=found, wanted=f"[{size}] integers")
        negative = negative & ((labels.unsqueeze(0) != labels.unsqueeze(1)) | (labels < 0))
    scores = student @ teacher.T / temperature
    allowed = positive | negative
    to_teachers = scores.masked_fill(~allowed, -math.inf).logsumexp(dim=1)
    to_students = scores.T.masked_fill(~allowed, -math.inf).logsumexp(dim=1)
    return reduce(to_teachers + to_students - 2 * scores.diagonal(), counts, reduction)


@without_autocast
def crd_bank_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    *,
    log_z: Tensor,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The paper's loss: noise-contrastive estimation against negatives from memory banks.

    .. math::
        L_i &= \ell_i(s_i, M^T, Z_S) + \ell_i(t_i, M^S, Z_T), \qquad s, t \text{ of length } 1 \\
        \ell_i(a, M, Z) &= -\log \frac{h(a, M_i)}{h(a, M_i) + K / n}
            - \sum_{j \in N(i)} \log \frac{K / n}{h(a, M_j) + K / n}, \qquad h(a, m) = \frac{e^{a \cdot m / \tau}}{Z}

    Each side is compared with the other side's bank of ``n`` rows; ``K`` negatives are drawn for each sample. The
    authors' code adds 1e-7 to both denominators, which moves the loss by less than :math:`10^{-7} n`; here logarithms
    make that unnecessary.

    Args:
        student_embedding: ``[B, D]`` (``[B, *]`` is flattened); scaled to length 1 here.
        teacher_embedding: The same shape. *Not* detached, since the teacher's projector learns too: detach the
            teacher's feature before projecting it.
        student_bank, teacher_bank: ``[n, D]``: the embeddings of all samples, as last seen; no gradient flows there.
        index: ``[B]``: which rows are those of these samples.
        negatives: ``[B, K]``: rows of the negatives.
        log_z: ``[2]``: logarithms of :math:`Z_S` and :math:`Z_T`; the paper sets them once, see ``crd_log_z``.
        temperature: :math:`\tau`; 0.07 in the paper.
        mask: ``[B]`` booleans, True where a sample counts; or over the first dimensions of the embeddings.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes that do not belong together.
        ConfigError: A temperature that is not above zero.

    Source:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, arXiv 1910.10699, equations 17 to 19.

    Example:
        >>> import torch
        >>> bank, index, negatives = torch.eye(3), torch.tensor([0]), torch.tensor([[1, 2]])
        >>> embedding = torch.tensor([[1.0, 0.0, 0.0]])
        >>> log_z = crd_log_z(embedding, embedding, bank, bank, index, negatives)
        >>> crd_bank_loss(embedding, embedding, bank, bank, index, negatives, log_z=log_z)
        tensor(1.0217)
    """
    student, teacher, counts = _embeddings(student_embedding, teacher_embedding, mask)
    wanted = _bank_rows(student, student_bank, teacher_bank, index, negatives)
    check_positive(temperature, "temperature")
    log_noise = math.log(negatives.shape[1] / len(student_bank))  # log of K / n
    values = student.new_zeros(len(student))
    for anchor, bank, log_z_side in ((student, teacher_bank, log_z[0]), (teacher, student_bank, log_z[1])):
        odds = _scores(anchor, bank, wanted, temperature) - log_z_side - log_noise  # log of h / (K / n)
        values = values - F.logsigmoid(odds[:, 0]) - F.logsigmoid(-odds[:, 1:]).sum(dim=1)
    return reduce(values, counts, reduction)


@torch.no_grad()
@without_autocast
def crd_log_z(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.07,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Logarithms of the constants that make ``h`` a probability on average: ``[2]``, for student and teacher.

    .. math:: Z = n \cdot \mathrm{mean}_{i,\, j \in \{i\} \cup N(i)}\; e^{a_i \cdot m_j / \tau}

    The paper estimates them on the first batch and keeps them. Arguments are those of ``crd_bank_loss``.
    """
    student, teacher, counts = _embeddings(student_embedding, teacher_embedding, mask)
    wanted = _bank_rows(student, student_bank, teacher_bank, index, negatives)
    sides = []
    for anchor, bank in ((student, teacher_bank), (teacher, student_bank)):
        scores = _scores(anchor, bank, wanted, temperature)
        number = scores.new_tensor(scores.numel()) if counts is None else counts.sum() * scores.shape[1]
        if counts is not None:
            scores = scores.masked_fill(~counts.unsqueeze(1), -math.inf)
        sides.append(scores.flatten().logsumexp(dim=0) - number.log() + math.log(len(bank)))
    return torch.stack(sides)


def _embeddings(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unit rows of both, and which samples count."""
    check_floating(student, "student_embedding", least=2)
    check_floating(teacher, "teacher_embedding", least=2)
    check_same_shape(student, teacher, "student_embedding", "teacher_embedding")
    student, counts = rows(widen(student), mask)
    teacher, _ = rows(teacher.to(student.dtype), mask)
    return unit(student), unit(teacher), counts


def _bank_rows(
    embedding: Tensor, student_bank: Tensor, teacher_bank: Tensor, index: Tensor, negatives: Tensor
) -> Tensor:
    """``[B, 1 + K]``: the row of each sample, then those of its negatives."""
    check_same_shape(student_bank, teacher_bank, "student_bank", "teacher_bank")
    size, width = embedding.shape
    for tensor, name, fits, wanted in (
        (student_bank, "student_bank", student_bank.shape[1:] == (width,), f"[n, {width}]"),
        (index, "index", index.shape == (size,) and not index.is_floating_point(), f"[{size}] integers"),
        (negatives, "negatives", negatives.ndim == 2 and negatives.shape[0] == size, f"[{size}, K] integers"),
    ):
        if not fits:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise TensorError("does not belong to these embeddings", where=name, found=found, wanted=wanted)
    return torch.cat([index.unsqueeze(1), negatives], dim=1)


def _scores(anchor: Tensor, bank: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """``[B, 1 + K]`` similarities over temperature.

    One product with the whole bank and a look-up read far less memory than copying ``B (1 + K)`` rows out of it.
    """
    return (anchor @ bank.detach().to(anchor.dtype).T).gather(1, wanted) / temperature
