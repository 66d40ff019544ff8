"""Senses of tokens: what a model says of each token in many texts, and the few states that stand for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from limbeck.core.errors import TensorError

_LOOSE = 0.01  # added to distances before they are turned round, as in the authors' code
_PRUNED = 1e-3  # flows below this are none
_FLOWS = 100  # rounds of Markov clustering at most


class Gatherer:
    """Keeps a random few of the states that each token has: every state of a token is kept with equal chance.

    Each state draws a number, and a token's smallest numbers are kept. So nothing has to be counted beforehand, and
    tokens do not take chances from one another.

    Args:
        most: States of a token that are kept.
        seed: Of what is drawn.
        dtype: In which states are kept.

    >>> found = Gatherer(2)
    >>> found.add(torch.tensor([5, 5, 5, 7]), torch.eye(4))
    >>> [(token, states.shape) for token, states in found.groups()]
    [(5, torch.Size([2, 4])), (7, torch.Size([1, 4]))]
    """

    def __init__(self, most: int = 1000, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
        self.most, self.dtype = most, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._ids: list[Tensor] = []
        self._chances: list[Tensor] = []
        self._states: list[Tensor] = []
        self._kept = self._new = 0

    def add(self, ids: Tensor, states: Tensor) -> None:
        """Take states ``[N, D]`` of tokens ``[N]``."""
        self._ids.append(ids.cpu())
        self._states.append(states.detach().to("cpu", self.dtype))
        self._chances.append(torch.rand(len(ids), generator=self.generator, dtype=torch.float64))
        self._new += len(ids)
        if self._new > max(self._kept, 1 << 16):  # so that what is sorted again has doubled since
            self._thin()

    def _thin(self) -> None:
        ids, chances, states = torch.cat(self._ids), torch.cat(self._chances), torch.cat(self._states)
        order = chances.argsort()
        order = order[ids[order].argsort(stable=True)]
        _, counts = ids[order].unique_consecutive(return_counts=True)
        place = torch.arange(len(ids)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        order = order[place < self.most]
        self._ids, self._chances, self._states = [ids[order]], [chances[order]], [states[order]]
        self._kept, self._new = len(order), 0

    def groups(self) -> Iterable[tuple[int, Tensor]]:
        """Each token with its states, by ascending id."""
        if not self._ids:
            return
        self._thin()
        tokens, counts = self._ids[0].unique_consecutive(return_counts=True)
        yield from zip(tokens.tolist(), self._states[0].split(counts.tolist()), strict=True)


def k_means(states: Tensor, number: int, *, seed: int = 0, rounds: int = 300, starts: int = 1) -> Tensor:
    """Centers ``[number, D]`` of the states ``[N, D]``, from centers far from one another (k-means++).

    A center that nobody is nearest to stays where it is.

    Args:
        states: At least ``number`` of them.
        number: Of centers.
        seed: Of the start.
        rounds: At most.
        starts: The best of so many runs.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007.

    >>> k_means(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2).sort(0).values.flatten()
    tensor([ 0.5000, 10.5000])
    """
    if not 1 <= number <= len(states):
        raise TensorError("there are not so many states", where="states", found=len(states), wanted=f"{number} or more")
    generator = torch.Generator(states.device).manual_seed(seed)
    best, least = states[:number], float("inf")
    for _ in range(starts):
        centers = _spread(states, number, generator)
        for _ in range(rounds):
            nearest = torch.cdist(states, centers).argmin(dim=1)
            sums = torch.zeros_like(centers).index_add_(0, nearest, states)
            counts = nearest.bincount(minlength=number).unsqueeze(1)
            moved = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
            if torch.equal(moved, centers):
                break
            centers = moved
        cost = float(torch.cdist(states, centers).min(dim=1).values.square().sum())
        if cost < least:
            best, least = centers, cost
    return best


def _spread(states: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """States drawn one after the other, each with a chance that grows with its squared distance from those before."""
    first = int(torch.randint(len(states), (), generator=generator, device=states.device))
    chosen, apart = [first], (states - states[first]).square().sum(dim=1)
    for _ in range(number - 1):
        far = float(apart.sum()) > 0
        chances = apart if far else torch.ones_like(apart)
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        apart = torch.minimum(apart, (states - states[chosen[-1]]).square().sum(dim=1))
    return states[chosen]


def markov_clusters(
    states: Tensor, *, inflation: float = 1.75, share: float = 0.2, least: int = 10, step: float = 0.05
) -> Tensor:
    r"""Means ``[K, D]`` of the clusters in which random walks between near states stay.

    A walk goes from state to state by :math:`1 / (d + 0.01)`. Two steps are taken, chances are raised to the power of
    the inflation, and so on until nothing moves. As long as there are ``least`` clusters or more, and more than
    ``share`` of the number of states, the inflation is lowered, which joins clusters.

    Args:
        states: ``[N, D]``.
        inflation: The first, and that of what no inflation makes small enough.
        share, least: See above; 0.2 and 10 in the authors' code.
        step: By which the inflation is lowered, down to 1.

    Source: van Dongen, "Graph Clustering by Flow Simulation", 2000; limits of SenseDict, arXiv 2504.06036.

    >>> states = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
    >>> markov_clusters(states).sort(0).values.flatten()
    tensor([0.1000, 9.1000])
    """
    chances = 1 / (torch.cdist(states, states) + _LOOSE)
    chances.fill_diagonal_(1.0)
    tried, found = inflation, None
    while tried > 1 and found is None:
        attractors = _flow(chances, tried)
        if len(attractors) < least or len(attractors) / len(states) <= share:
            found = attractors
        tried -= step
    found = _flow(chances, inflation) if found is None else found
    return (found.to(states) @ states) / found.sum(dim=1, keepdim=True).to(states)


def _flow(chances: Tensor, inflation: float) -> Tensor:
    """Which states ``[K, N]`` each cluster has."""
    flow = chances / chances.sum(dim=0, keepdim=True)
    for _ in range(_FLOWS):
        before = flow
        flow = (flow @ flow).pow(inflation)
        flow = flow / flow.sum(dim=0, keepdim=True)
        top = flow.argmax(dim=0)  # the largest of a column is never pruned
        small = flow < _PRUNED
        small[top, torch.arange(len(flow), device=flow.device)] = False
        flow = flow.masked_fill(small, 0.0)
        if torch.allclose(flow, before):
            break
    return torch.unique(flow[flow.diagonal() > 0] > 0, dim=0)
