"""FedAvg: clients train a common model, the server averages their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from limbeck.core.catalogue import Card
from limbeck.core.objective import Terms
from limbeck.schemes.federated.clients import Where, Work
from limbeck.schemes.federated.local import Round, check_lengths, learn, seeded
from limbeck.schemes.federated.owners import Owners, of_labels, split_among
from limbeck.schemes.federated.rounds import Federation, Plan, training_of
from limbeck.schemes.federated.wire import Tensors, below, under
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def averaged(states: Mapping[int, Tensors], weights: Mapping[int, float]) -> Tensors:
    r"""Weights of several models as their mean, :math:`\sum_k w_k \theta_k / \sum_k w_k`; of counters the largest.

    Args:
        states: State dicts, by client.
        weights: Of each, relative.

    Source: McMahan et al., arXiv 1602.05629, algorithm 1.

    >>> averaged({0: {"w": torch.zeros(2)}, 1: {"w": torch.ones(2)}}, {0: 1, 1: 3})
    {'w': tensor([0.7500, 0.7500])}
    """
    whole = float(sum(weights[number] for number in states))
    found = {}
    for name, first in next(iter(states.values())).items():
        every = [(state[name], weights[number] / whole) for number, state in states.items()]
        if first.is_floating_point():
            found[name] = torch.stack([tensor.double() * share for tensor, share in every]).sum(dim=0).to(first.dtype)
        else:
            found[name] = torch.stack([tensor for tensor, _ in every]).max(dim=0).values
    return found


@register(
    Card(
        key="fedavg",
        name="FedAvg",
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        year=2017,
        arxiv="1602.05629",
        knowledge="scheme",
        equation=r"\theta \leftarrow \sum_k \frac{n_k}{n} \theta_k, \quad "
        r"\theta_k = \text{local training from } \theta \text{ on client } k",
        use="The baseline of federated methods, where all clients can run one architecture: train.epochs are rounds, "
        "train.lr is the clients'.",
        defaults={
            "epochs": "5 local ones, which the paper recommends beside 1 and 20",
            "fraction": "1; the paper's is often 0.1 of a hundred clients",
            "count": "10 clients, with alpha 0.1: strongly unlike",
        },
        evidence="formula",
        evidence_note="the mean against its definition; one client equals plain training; one step of full batches "
        "equals a step on all data",
        choices=(
            "the local rate follows the run's schedule from round to round and stays the same within one",
            "local optimizers begin anew each round, as in the paper",
            "normalisation statistics are averaged as weights are, counters are the largest",
            "a round goes on with those clients that answer, weighted among themselves",
        ),
    )
)
class FedAvg(Scheme):
    r"""One training in rounds: clients start from the server's weights, train on their own samples, and are averaged.

    .. math:: \theta \leftarrow \sum_{k \in S} \frac{n_k}{\sum_{j \in S} n_j} \theta_k

    Across the wire go weights, both ways, and how many samples a client has. ``rounds.jsonl`` of the run says for each
    round who was asked, who was lost, and the bytes. ``train.epochs`` (or ``steps``) counts rounds.

    Args:
        count: Clients.
        alpha: Of the Dirichlet split; ``None``: equal parts.
        epochs: Of a client in a round.
        fraction: Of the clients, asked in a round.
        clients: ``"simulated"`` in this process, or ``"processes"``: each in one of its own. Several ranks share them:
            client i lives on rank i modulo their number, and every rank does the server's part.
        public: Share of the samples that no client has, for a fair comparison with methods that need such.
        least: Samples of every client; the split is drawn until each has them.
        timeout: Seconds that a round waits for processes; ``None``: until they answer or die.

    Source: Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv 1602.05629.

    >>> from limbeck.data import as_loader
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> train = as_loader((torch.randn(40, 4), torch.arange(40) % 3), batch_size=8, train=True)
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(CrossEntropy()), None, TrainConfig(), train=train)
    >>> (training,) = FedAvg(count=2, alpha=None).trainings(cast)
    >>> training.stages[0].distiller.owners.sizes
    [20, 20]
    """

    def __init__(
        self,
        count: int = 10,
        alpha: float | None = 0.1,
        epochs: int = 5,
        fraction: float = 1.0,
        clients: Where = "simulated",
        public: float = 0.0,
        least: int = 10,
        timeout: float | None = None,
    ) -> None:
        self.plan = Plan(count, clients, fraction, timeout)
        check_lengths(1, epochs=epochs)
        self.alpha, self.epochs, self.public, self.least = alpha, epochs, public, least

    def trainings(self, cast: Cast) -> Iterator[Training]:
        yield training_of("fedavg", cast, lambda: self.server(cast))

    def server(self, cast: Cast) -> AveragingServer:
        """The server, with its clients and what they own."""
        loss = of_labels(cast)
        owners = split_among(cast, "fedavg", self.plan.count, self.alpha, self.least, self.public)
        work = Averaging(cast.student, loss, owners, self.epochs, cast.logits)
        server = AveragingServer(cast, work, self.plan, {"epochs": self.epochs, **owners.facts})
        server.owners = owners
        return server


class Averaging(Work):
    """A client of FedAvg: trains from the server's weights, keeps nothing."""

    hears = ("weights",)
    says = ("weights", "samples")

    def __init__(self, student: nn.Module, loss: Terms, owners: Owners, epochs: int, logits: str | None) -> None:
        self.model = copy.deepcopy(student)
        self.loss, self.owners, self.epochs, self.logits = loss, owners, epochs, logits

    def answer(self, number: int, kept: Tensors, told: Tensors, place: Round) -> tuple[Tensors, Tensors]:
        loader = self.owners.loaders[number]
        self.model.load_state_dict(below("weights", told))
        with seeded(place.seed, place.number, number):
            learn(self.model, self.loss, loader, place, epochs=self.epochs, logits=self.logits)
        return {}, {**under("weights", self.model.state_dict()), "samples": torch.tensor(loader.shown)}


class AveragingServer(Federation):
    """The server of FedAvg; see :class:`FedAvg`."""

    owners: Owners

    def tell(self, number: int, place: Round) -> Tensors:
        return under("weights", self.student.state_dict())

    def hear(self, said: dict[int, Tensors], place: Round) -> Tensors:
        sizes: dict[int, float] = {number: float(tensors["samples"]) for number, tensors in said.items()}
        return averaged({number: below("weights", tensors) for number, tensors in said.items()}, sizes)
