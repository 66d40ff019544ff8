"""What losses on features share: one row a sample, unit vectors, and how rows lie to one another."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating, check_positive, fit_mask, widen

Rows = tuple[Tensor, Tensor, Tensor | None]


def channel_dim(feature: Tensor) -> int:
    """Where the channels are: last in vectors ``[B, D]`` and tokens ``[B, T, D]``, second in maps ``[B, C, H, W]``."""
    return 1 if feature.ndim >= 4 else feature.ndim - 1


def rows(feature: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One row a sample, ``[B, D]``, and which samples count.

    What the mask leaves out is 0 in the row, so that padding changes no relation; a sample counts where any of its
    places does.

    Args:
        feature: ``[B, *]``.
        mask: ``[B]``, or ``[B, *]`` over the first dimensions of the feature.
    """
    if mask is not None:
        feature = feature.masked_fill(~fit_mask(mask, feature), 0.0)
        mask = mask.reshape(mask.shape[0], -1).any(dim=1)
    return feature.reshape(feature.shape[0], -1), mask


def paired_rows(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None) -> Rows:
    """Both features as ``rows``, the teacher's without gradient and in the student's precision, and who counts.

    Args:
        student_feature: ``[B, *]``; half precision is widened.
        teacher_feature: ``[B, *]``, of any other shape.
        mask: ``[B]``, or over the first dimensions of both features.

    Raises:
        TensorError: No floating tensors, other numbers of samples, or a mask that does not fit.
    """
    check_floating(student_feature, "student_feature", least=2)
    check_floating(teacher_feature, "teacher_feature", least=2)
    check_same_batch(student_feature, teacher_feature, "student_feature", "teacher_feature")
    student, counts = rows(widen(student_feature), mask)
    teacher, _ = rows(teacher_feature.detach().to(student.dtype), mask)
    return student, teacher, counts


def pooled(feature: Tensor, mask: Tensor | None = None, name: str = "feature") -> tuple[Tensor, Tensor | None]:
    """The mean of each sample's places that count, ``[B, D]``, and which samples count.

    Args:
        feature: ``[B, D]``, tokens ``[B, T, D]`` or maps ``[B, C, *]``.
        mask: ``[B]``, or over the places: ``[B, T]``, ``[B, *]``.
        name: What it is called in errors.
    """
    check_floating(feature, name, least=2)
    places = feature.movedim(channel_dim(feature), -1).flatten(1, -2) if feature.ndim > 2 else feature.unsqueeze(1)
    if mask is None:
        return places.mean(dim=1), None
    counts = fit_mask(mask, feature.select(channel_dim(feature), 0)).reshape(places.shape[:2])
    total = places.masked_fill(~counts.unsqueeze(-1), 0.0).sum(dim=1)
    return total / counts.sum(dim=1, keepdim=True).clamp(min=1), counts.any(dim=1)


def first_counted(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each sample's first row that counts, ``[B, D]``: the class token of BERT and ViT. Without any, its first row.

    Args:
        feature: Rows ``[B, T, D]``.
        mask: ``[B]`` or ``[B, T]``.

    >>> rows_ = torch.arange(6.0).view(1, 3, 2)
    >>> first_counted(rows_, torch.tensor([[False, True, True]]))
    tensor([[2., 3.]])
    """
    check_floating(feature, "feature", least=3)
    if mask is None or mask.ndim == 1:
        return feature[:, 0]
    first = fit_mask(mask, feature[..., 0]).int().argmax(dim=1)
    return feature.take_along_dim(first.reshape(-1, 1, 1), dim=1).squeeze(1)


def summed(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The sum over each sample's places that count, ``[B]``, and which samples count.

    Args:
        values: ``[B, *]``.
        mask: ``[B]``, or over the first dimensions of the values.
    """
    if mask is None:
        return values.flatten(1).sum(dim=1), None
    values = values.masked_fill(~fit_mask(mask, values), 0.0)
    return values.flatten(1).sum(dim=1), mask.reshape(len(mask), -1).any(dim=1)


def project(layer: nn.Module, feature: Tensor, name: str) -> Tensor:
    """Run a feature through a learned map, in the map's own precision."""
    check_floating(feature, name, least=2)
    dtype = next((p.dtype for p in layer.parameters()), feature.dtype)
    return layer(feature.to(dtype))


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length 1; a zero vector stays zero, and passes no gradient.

    No epsilon is added, so that the direction of a very short vector is exact in any precision.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / length.masked_fill(length == 0, math.inf)


def gram(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Inner products of rows, ``[*, N, M]``: of ``first`` ``[*, N, D]`` with ``second`` ``[*, M, D]``, or with itself.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]])
    """
    return first @ (first if second is None else second).mT


def head_scores(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    r"""Attention scores before their softmax, ``[B, A, T, T]``: :math:`X_a Y_a^\top / \sqrt d` for each of A heads.

    Args:
        queries: ``[B, T, D]``, the vectors of all heads side by side; half precision is widened.
        keys: The same.
        heads: A, parts of width d into which both are cut.

    Raises:
        TensorError: Not rows of one shape, or a width that the heads do not divide.

    >>> head_scores(torch.eye(2).unsqueeze(0), torch.ones(1, 2, 2), 2).shape
    torch.Size([1, 2, 2, 2])
    """
    check_floating(queries, "student or teacher", least=3)
    check_positive(heads, "heads")
    if queries.ndim != 3 or queries.shape[-1] % heads or keys.shape != queries.shape:
        wanted = f"[B, T, D] with a width that {heads} heads divide, the same for both sides of a relation"
        raise TensorError("cannot be cut into heads", where="heads", found=list(queries.shape), wanted=wanted)
    x, y = (widen(v).unflatten(-1, (heads, -1)).transpose(1, 2) for v in (queries, keys))
    return gram(x, y) / math.sqrt(x.shape[-1])


def cosines(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Cosines between rows, ``[*, N, M]``; a zero row has cosine 0 with everything, itself included.

    >>> cosines(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    return gram(unit(first), None if second is None else unit(second))


def distances(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Euclidean distances between rows, ``[*, N, M]``; equal rows pass no gradient.

    From differences, not from a Gram matrix, which would lose the digits of near neighbours far from zero; without
    keeping the differences, ``[N, M, D]``, in memory.

    >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[0., 5.],
            [5., 0.]])
    """
    return torch.cdist(first, first if second is None else second, compute_mode="donot_use_mm_for_euclid_dist")


def squared_distances(vectors: Tensor) -> Tensor:
    """Squared Euclidean distances between rows, ``[N, N]``, by one matrix product: for many rows at once.

    The rows are centred first, so that digits are lost only between rows much nearer to each other than to the rest.

    >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[ 0., 25.],
            [25.,  0.]])
    """
    products = gram(vectors - vectors.mean(dim=0).detach())
    # Not `diagonal`, of which a step compiled by torch 2.13 has another gradient (pytorch issue 182012).
    squares = products.gather(1, torch.arange(len(products), device=products.device).unsqueeze(1))
    return (squares + squares.mT - 2 * products).clamp(min=0)


def gram_distances(vectors: Tensor, weight: Tensor) -> Tensor:
    """``distances`` of many sets of rows at once, ten times as fast, and a little less exact between near neighbours.

    From the Gram matrix of rows about their mean: in float32 a distance below a thousandth of the set's extent loses
    digits, and what cannot be told from 0 is 0 and passes no gradient.

    Args:
        vectors: ``[*, N, D]``.
        weight: ``[*, N]``, 1 where a row counts for the mean and 0 where not.

    >>> gram_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.ones(2))
    tensor([[0., 5.],
            [5., 0.]])
    """
    number = weight.sum(dim=-1, keepdim=True).clamp(min=1).unsqueeze(-1)
    centred = vectors - (vectors * weight.unsqueeze(-1)).sum(dim=-2, keepdim=True) / number
    squares = centred.square().sum(dim=-1)
    both = squares.unsqueeze(-2) + squares.unsqueeze(-1)
    gaps = both - 2 * gram(centred)
    same = gaps <= 8 * torch.finfo(gaps.dtype).eps * both
    return gaps.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)


def scaled_distances(vectors: Tensor, weight: Tensor, *, exact: bool = True) -> Tensor:
    """Distances between the rows that count, over the mean of those above zero: no scale, shift or rotation matters.

    Args:
        vectors: ``[*, N, D]``: one set of rows, or several.
        weight: ``[*, N]``, 1 where a row counts and 0 where not.
        exact: Take ``distances``; else ``gram_distances``, for many sets.

    Returns:
        ``[*, N, N]``, also where a row does not count; 0 throughout a set whose rows are equal.

    >>> scaled_distances(torch.tensor([[0.0], [1.0], [3.0]]), torch.ones(3))
    tensor([[0.0000, 0.5000, 1.5000],
            [0.5000, 0.0000, 1.0000],
            [1.5000, 1.0000, 0.0000]])
    """
    lengths = distances(vectors) if exact else gram_distances(vectors, weight)
    pairs = weight.unsqueeze(-2) * weight.unsqueeze(-1) * (lengths > 0)
    mean = (lengths * pairs).sum(dim=(-2, -1), keepdim=True) / pairs.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    return lengths / mean.masked_fill(mean == 0, 1.0)


def double_centre(relations: Tensor, counts: Tensor | None = None) -> Tensor:
    """A matrix of relations less the means of its rows and columns, ``[N, N]``: both are 0 afterwards.

    Args:
        relations: ``[N, N]``.
        counts: ``[N]`` booleans, True where a sample counts; means run over these, and all else is 0 afterwards.
    """
    if counts is None:
        return relations - relations.mean(0, keepdim=True) - relations.mean(1, keepdim=True) + relations.mean()
    number = counts.sum().clamp(min=1)
    relations = relations.masked_fill(~(counts.unsqueeze(0) & counts.unsqueeze(1)), 0.0)
    columns, rows_ = relations.sum(0, keepdim=True) / number, relations.sum(1, keepdim=True) / number
    centred = relations - columns - rows_ + columns.sum() / number
    return centred.masked_fill(~(counts.unsqueeze(0) & counts.unsqueeze(1)), 0.0)


def dcor(first: Tensor, second: Tensor, counts: Tensor | None = None, *, least: float = 0.0) -> Tensor:
    r"""Distance correlation of two sets of features of the same samples: 0 where independent, 1 where similar figures.

    .. math::
        \mathrm{dCor} = \sqrt{\frac{\langle A, B \rangle}{\sqrt{\langle A, A \rangle \langle B, B \rangle}}},
        \qquad A = \text{double centring of } \|x_i - x_j\|

    Widths may differ. Translations, rotations and a common scale change nothing. Where one side does not vary it is 0
    and passes no gradient.

    Args:
        first: ``[B, *]``; flattened to one row a sample.
        second: ``[B, *]``.
        counts: ``[B]`` booleans, True where a sample counts.
        least: Squared distances are at least this; MV-MR's code has 1e-4, between a sample and itself too.

    Returns:
        A number from 0 to 1.

    Source:
        Szekely, Rizzo and Bakirov, "Measuring and testing dependence by correlation of distances", 2007.

    >>> points = torch.tensor([[0.0], [1.0], [5.0]])
    >>> dcor(points, 2 * points + 1)
    tensor(1.)
    """
    a, b = (double_centre(_at_least(distances(widen(x).flatten(1)), least), counts) for x in (first, second))
    covariance, spread = (a * b).sum(), torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    still = (spread == 0) | (covariance <= 0)
    return (covariance / spread.masked_fill(still, 1.0)).masked_fill(still, 1.0).sqrt().masked_fill(still, 0.0)


def _at_least(distances_: Tensor, least: float) -> Tensor:
    return distances_.clamp(min=math.sqrt(least)) if least else distances_


def check_same_batch(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str) -> None:
    """Refuse two tensors that do not hold the same samples."""
    if student.shape[0] != teacher.shape[0]:
        raise TensorError(
            f"{student_name} and {teacher_name} hold different numbers of samples",
            where=teacher_name,
            found=list(teacher.shape),
            wanted=f"{student.shape[0]} samples as in {student_name} {list(student.shape)}",
        )


def pearson(x: Tensor, y: Tensor, eps: float = 0.0, weight: Tensor | None = None) -> Tensor:
    r"""Pearson's correlation along the last dimension.

    Where both do not vary it is 1, where one does not it is 0; neither passes a gradient.

    Args:
        x, y: ``[*, N]``.
        eps: Added to the product of norms: what hardly varies correlates less.
        weight: ``[N]``, 1 for entries that count and 0 for others.

    >>> pearson(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 4.0]))
    tensor(0.9286)
    """
    x_centred, x_constant = _centre(x, weight)
    y_centred, y_constant = _centre(y, weight)
    norms = torch.linalg.vector_norm(x_centred, dim=-1) * torch.linalg.vector_norm(y_centred, dim=-1)
    undefined = x_constant | y_constant
    rho = (x_centred * y_centred).sum(dim=-1) / (norms + eps).masked_fill(undefined, 1.0)
    return torch.where(undefined, (x_constant & y_constant).to(rho.dtype), rho)


def _centre(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Entries minus their mean, and whether they are the same up to rounding."""
    if weight is None:
        centred, counted = x - x.mean(dim=-1, keepdim=True), x
    else:
        counted = x * weight
        centred = (x - counted.sum(dim=-1, keepdim=True) / weight.sum().clamp(min=1)) * weight
    with torch.no_grad():
        size = torch.linalg.vector_norm(counted, dim=-1)
        constant = torch.linalg.vector_norm(centred, dim=-1) <= 4 * torch.finfo(x.dtype).eps * size
    return centred, constant
