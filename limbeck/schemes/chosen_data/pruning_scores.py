"""How much each sample is worth to training: the scores by which data sets are pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import DataError
from limbeck.core.ranks import rows_of_ranks
from limbeck.core.survey import dry
from limbeck.core.trace import logits_of
from limbeck.data.loader import IndexedLoader

_AT_ONCE = 64  # samples whose gradients are held at a time
_STRATA = 50  # of Zheng et al.


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Length of the error vector, :math:`\lVert p - y \rVert_2`, for each sample.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` classes.

    Source: Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075.

    >>> el2n(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.7071])
    """
    return torch.linalg.vector_norm(logits.softmax(dim=-1) - F.one_hot(labels, logits.shape[-1]), dim=-1)


def gradient_norms(model: nn.Module, loader: IndexedLoader, where: str | None = None) -> Tensor:
    r"""GraNd: the norm of each sample's gradient, :math:`\lVert \nabla_\theta CE(f_\theta(x), y) \rVert_2`.

    Args:
        model: Asked in evaluation mode, in which samples do not touch one another.
        loader: Of images or vectors with classes.
        where: Where logits stand in its output.

    Returns:
        ``[N]`` by id, on the CPU.

    Source: Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(functional_call(model, own, (x[None],)), where), y[None])

    each, found = vmap(grad(loss), in_dims=(None, 0, 0)), torch.zeros(loader.samples)
    with dry(model), torch.enable_grad():
        for batch in loader.plain():
            if not isinstance(batch.inputs, Tensor) or not batch.inputs.is_floating_point():
                raise DataError("gradients are taken of images and vectors", where="scheme.score", found="grand")
            for rows in torch.arange(batch.size).split(_AT_ONCE):
                own = each(weights, batch.inputs[rows].to(device), batch.require("labels")[rows].to(device))
                square = sum(g.flatten(1).square().sum(dim=1) for g in own.values())
                assert isinstance(square, Tensor)
                found[batch.require("index")[rows].cpu()] = square.sqrt().float().cpu()
    return found


class Forgetting(nn.Module):
    """How often each sample was known, and then not any more, from one epoch to the next.

    Args:
        samples: In the set.

    Source: Toneva et al., "An Empirical Study of Example Forgetting", 2018, arXiv 1812.05159.

    >>> seen = Forgetting(2)
    >>> for right in ([True, False], [False, False], [True, False]): seen.update(torch.arange(2), torch.tensor(right))
    >>> seen.scores()
    tensor([1., inf])
    """

    known: Tensor
    ever: Tensor
    forgotten: Tensor

    def __init__(self, samples: int) -> None:
        super().__init__()
        for name, kind in (("known", torch.bool), ("ever", torch.bool), ("forgotten", torch.long)):
            self.register_buffer(name, torch.zeros(samples, dtype=kind))

    def update(self, index: Tensor, right: Tensor) -> None:
        """Take what came of these samples ``[B]``; each of them once."""
        self.forgotten[index] += (self.known[index] & ~right).long()
        self.known[index] = right
        self.ever[index] |= right

    def scores(self) -> Tensor:
        """``[N]`` counts; of a sample that was never known, infinity."""
        return self.forgotten.float().masked_fill(~self.ever, torch.inf).cpu()


class Forgetful(Distiller):
    """A model that learns, and beside it what it forgets."""

    forgetting: Forgetting

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        losses = super().forward(batch, turn)
        if self.training and losses.logits is not None:
            self._watch(batch.require("index"), losses.logits.argmax(dim=-1) == batch.require("labels"))
        return losses

    @torch.compiler.disable
    def _watch(self, index: Tensor, right: Tensor) -> None:
        """Take what came of all ranks' samples."""
        rows = rows_of_ranks(len(index), index.device)
        self.forgetting.update(rows.gather(index), rows.gather(right))


def herding(features: Tensor, count: int) -> Tensor:
    """The samples whose mean follows the mean of all most closely, one after the other.

    Args:
        features: ``[N, D]``; scaled to length 1 here.
        count: How many.

    Returns:
        ``[count]`` rows.

    Source: Welling, "Herding Dynamical Weights to Learn", 2009; as iCaRL uses it, arXiv 1611.07725.

    >>> herding(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), 1)
    tensor([1])
    """
    unit = F.normalize(features.double(), dim=1)
    mean, total, free = unit.mean(dim=0), torch.zeros_like(unit[0]), torch.ones(len(unit), dtype=torch.bool)
    chosen = []
    for number in range(1, count + 1):
        away = torch.linalg.vector_norm(mean - (total + unit) / number, dim=1).masked_fill(~free, torch.inf)
        row = int(away.argmin())
        chosen.append(row)
        free[row], total = False, total + unit[row]
    return torch.tensor(chosen, dtype=torch.long)


def coverage(scores: Tensor, count: int, order: Tensor, cutoff: float = 0.0) -> Tensor:
    """Samples of all difficulties: the hardest left out, the range cut into strata, as many as there are from each.

    Args:
        scores: ``[N]``, larger is harder.
        count: How many are wanted.
        order: ``[N]`` rows in random order; within a stratum its first are taken.
        cutoff: The part of the hardest that is left out, as far as enough are left.

    Source: Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", 2022, arXiv 2210.15809.

    >>> coverage(torch.tensor([0.0, 0.1, 0.2, 5.0]), 2, torch.tensor([3, 0, 1, 2]))
    tensor([0, 3])
    """
    kept = scores.argsort(stable=True)[: max(count, round((1 - cutoff) * len(scores)))]
    low, high = scores[kept].min(), scores[kept].max()
    stratum = torch.full((len(scores),), -1)
    stratum[kept] = ((scores[kept] - low) / (high - low).clamp(min=1e-12) * _STRATA).long().clamp(max=_STRATA - 1)
    drawn = stratum[order]
    order, drawn = order[drawn >= 0], drawn[drawn >= 0]
    # small ones first: what they lack, the larger ones give; equals in random order
    first = list(dict.fromkeys(drawn.tolist()))
    strata = sorted((order[drawn == s] for s in first), key=len)
    chosen, left = [], count
    for place, rows in enumerate(strata):
        taken = rows[: min(len(rows), -(-left // (len(strata) - place)))]
        chosen.append(taken)
        left -= len(taken)
    return torch.cat(chosen)[:count].sort().values


def quotas(labels: Tensor, count: int) -> Tensor:
    """How many of each class, so that together they are ``count`` and as even as the classes' sizes let them be.

    >>> quotas(torch.tensor([0, 0, 0, 0, 1, 2, 2]), 5)
    tensor([2, 1, 2])
    """
    sizes = labels.bincount()
    found = torch.zeros_like(sizes)
    for _ in range(int(sizes.max())):
        room = found < sizes
        if int((found + room).sum()) > count:
            found[room.nonzero().flatten()[: count - int(found.sum())]] += 1
            break
        found += room
    return found
