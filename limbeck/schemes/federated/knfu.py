"""KnFu: each client is told what those say whose data are like its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn  # noqa: F401  for the example

from limbeck.core.catalogue import Card
from limbeck.core.objective import Terms  # noqa: F401  for the example
from limbeck.core.reduction import check_inside, check_positive
from limbeck.objectives.response.kd import KD
from limbeck.schemes.federated.clients import Where
from limbeck.schemes.federated.local import check_lengths
from limbeck.schemes.federated.owners import of_labels, split_among
from limbeck.schemes.federated.rounds import Plan, training_of
from limbeck.schemes.federated.scores import ScoreServer, Scoring, models_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register

Distance = Literal["l2", "js"]
_TINY = 1e-12


def effectiveness(
    beliefs: Tensor, beta: float = 10.0, distance: Distance = "l2", among: Tensor | None = None
) -> Tensor:
    r"""How much each client's knowledge weighs for each other client: a softmax of how unlike their data are.

    .. math:: w_{kj} = \frac{e^{-\beta d_{kj}}}{\sum_l e^{-\beta d_{kl}}}, \qquad
        d_{kj} = \frac{D(p_k, p_j)}{\max_l D(p_k, p_l)}

    Args:
        beliefs: Each client's distribution over classes, as its predictions tell ``[K, C]``.
        beta: 0: all weigh the same; large: everybody hears itself alone.
        distance: D: ``"l2"``, or ``"js"``, the Jensen-Shannon divergence.
        among: Who can be heard ``[K]``, booleans; the others weigh nothing.

    Returns:
        ``[K, K]``, rows of clients that hear; each sums to 1.

    >>> effectiveness(torch.eye(2), beta=0.0)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if distance == "l2":
        apart = (beliefs[:, None] - beliefs[None]).norm(dim=-1)
    else:
        p, q = beliefs.clamp(min=_TINY)[:, None], beliefs.clamp(min=_TINY)[None]
        middle = ((p + q) / 2).log()
        apart = ((p * (p.log() - middle) + q * (q.log() - middle)).sum(dim=-1) / 2).clamp(min=0)
    likeness = -beta * apart / apart.max(dim=1, keepdim=True).values.clamp(min=_TINY)
    if among is not None:
        likeness = likeness.masked_fill(~among, -torch.inf)
    return likeness.softmax(dim=1)


@register(
    Card(
        key="knfu",
        name="KnFu",
        title="KnFu: Effective Knowledge Fusion",
        year=2024,
        arxiv="2403.11892",
        knowledge="scheme",
        equation=r"\bar Z_k = \sum_j w_{kj} Z_j, \quad w_{kj} \propto e^{-\beta d(p_k, p_j)}, \quad "
        r"L_k = T^2 KL(\bar Z_k \| q_k)",
        use="Where clients' classes differ so much that a consensus of all would mislead them: everybody learns from "
        "its neighbours. Judge it by clients_mean, the accuracy of the clients' own models.",
        defaults={
            "beta": "10, the paper's in all experiments",
            "temperature": "2; the paper's is not known to us",
            "epochs": "5; the paper's is not known to us",
        },
        evidence="reading",
        choices=(
            "the paper's equations were not at hand: its four steps, beta and the measure are; the rest is read from "
            "its argument",
            "a client's distribution is the mean of its predictions on the transfer set (the estimated probability "
            "distribution that the paper speaks of), so nothing beside predictions crosses the wire",
            "distances are divided by the largest of the client's, so that beta means the same in every federation",
            "the student on the server is nobody's neighbour: it learns from the mean of all, as FedMD's does",
            "a round is one exchange: a client learns from what it was told, trains on its own samples, then speaks",
            "one that was asked and did not answer is told of others by what it said last",
        ),
        tasks=("classification",),
    )
)
class KnFu(Scheme):
    r"""One training in rounds: every client is told a mixture of predictions of its own.

    .. math:: \bar Z_k = \sum_j w_{kj} Z_j, \qquad Z_j = \mathrm{softmax}(f_j(X) / T), \qquad
        L_k = T^2\, KL(\bar Z_k \| \mathrm{softmax}(f_k(X) / T))

    :math:`w` is :func:`effectiveness`. Across the wire go predictions on the public samples, whose labels nobody uses:
    each client's own up, the mixture made for it down.

    Args:
        count: Clients.
        alpha: Of the Dirichlet split; ``None``: equal parts.
        public: Share of the training samples that is everybody's: the transfer set.
        beta: :math:`\beta`. 0 is FedMD's mean; 1e6 leaves everybody alone.
        distance: ``"l2"`` or ``"js"``; see :func:`effectiveness`.
        temperature: T.
        epochs: Of a client on its own samples, in a round.
        digest_epochs: On the public samples, in a round.
        each: Public samples of a round; ``None``: all.
        models: Names of players, whose architectures clients have in turn; none: the student's.
        fraction, clients, least, timeout: As in :class:`~limbeck.schemes.federated.fedavg.FedAvg`.

    Source: KnFu: Effective Knowledge Fusion, arXiv 2403.11892.

    >>> from limbeck.data import as_loader
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> train = as_loader((torch.randn(40, 4), torch.arange(40) % 3), batch_size=8, train=True)
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(CrossEntropy()), None, TrainConfig(), train=train,
    ...             fresh=lambda number: nn.Linear(4, 3))
    >>> (training,) = KnFu(count=2, alpha=None, public=0.25).trainings(cast)
    >>> training.stages[0].distiller.scores.shape
    torch.Size([2, 10, 3])
    """

    def __init__(
        self,
        count: int = 10,
        alpha: float | None = 0.1,
        public: float = 0.2,
        beta: float = 10.0,
        distance: Distance = "l2",
        temperature: float = 2.0,
        epochs: int = 5,
        digest_epochs: int = 1,
        each: int | None = None,
        models: list[str] = [],  # noqa: B006  never changed
        fraction: float = 1.0,
        clients: Where = "simulated",
        least: int = 10,
        timeout: float | None = None,
    ) -> None:
        self.plan = Plan(count, clients, fraction, timeout)
        check_inside(public, "scheme.public")
        check_inside(beta, "scheme.beta", 0.0, 1e9, closed=True)
        check_positive(temperature, "scheme.temperature")
        self.alpha, self.public, self.least, self.models = alpha, public, least, list(models)
        self.facts = {"beta": beta, "distance": distance, "temperature": temperature, "models": self.models}
        self.beta, self.distance, self.temperature = beta, distance, temperature
        lengths = {"epochs": epochs, "digest_epochs": digest_epochs, "start": 0, "start_public": 0}
        check_lengths(0, **lengths)
        check_lengths(1, each=each)
        self.lengths: dict[str, Any] = {**lengths, "each": each}

    def trainings(self, cast: Cast) -> Iterator[Training]:
        yield training_of("knfu", cast, lambda: self.server(cast))

    def server(self, cast: Cast) -> FusingServer:
        """The server, with its clients and what they own."""
        models, loss = models_of(cast, self.plan.count, self.models), of_labels(cast)
        owners = split_among(cast, "knfu", self.plan.count, self.alpha, self.least, self.public)
        work = Predicting(models, loss, KD(self.temperature), owners, self.lengths, cast.logits)
        work.temperature = self.temperature
        facts = {**self.lengths, **self.facts, **owners.facts}
        server = FusingServer(cast, work, self.plan, facts, self.plan.count)
        server.fusing = self
        return server


class Predicting(Scoring):
    """A client of KnFu: speaks in probabilities."""

    temperature: float

    def spoken(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(dim=-1)

    def heard(self, scores: Tensor) -> Tensor:
        return self.temperature * scores.clamp(min=_TINY).log()  # logits whose softmax at T these are


class FusingServer(ScoreServer):
    """The server of KnFu; see :class:`KnFu`."""

    fusing: KnFu
    beliefs: Tensor

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        classes = self.scores.shape[-1]
        self.register_buffer("beliefs", torch.full((self.plan.count, classes), 1 / classes))

    def fuse(self, said: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        present = list(said)
        predictions = torch.stack(list(said.values())).to(self.beliefs.device)
        self.beliefs[present] = predictions.mean(dim=1)
        spoke = torch.zeros(self.plan.count, dtype=torch.bool, device=self.beliefs.device)
        spoke[present] = True
        weights = effectiveness(self.beliefs, self.fusing.beta, self.fusing.distance, among=spoke)
        return torch.einsum("kj,jmc->kmc", weights[:, present], predictions), predictions.mean(dim=0)
