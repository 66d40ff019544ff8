"""FedMD: clients with models of their own agree on the scores of public samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn  # noqa: F401  for the example

from limbeck.core.catalogue import Card
from limbeck.core.objective import Terms  # noqa: F401  for the example
from limbeck.core.reduction import check_inside
from limbeck.schemes.federated.clients import Where
from limbeck.schemes.federated.local import check_lengths
from limbeck.schemes.federated.owners import of_labels, split_among
from limbeck.schemes.federated.rounds import Plan, training_of
from limbeck.schemes.federated.scores import ScoreServer, Scoring, digest_by, models_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="fedmd",
        name="FedMD",
        title="FedMD: Heterogenous Federated Learning via Model Distillation",
        year=2019,
        arxiv="1910.03581",
        code="diogenes0319/FedMD_clean",
        knowledge="scheme",
        equation=r"\tilde f(x) = \frac 1 K \sum_k f_k(x), \quad f_k \to \tilde f \text{ on public } x, "
        r"\text{ then } D_k",
        use="Where every client has an architecture of its own, and there are public samples: only scores of these "
        "cross the wire, so bytes do not grow with the models.",
        defaults={
            "digest": "mae of logits, one epoch, which is what the released code does",
            "epochs": "2 on one's own samples in a round, the code's for FEMNIST",
            "start": "20 epochs of transfer learning, the code's; it stops early, by a validation set",
            "each": "5000 public samples a round, the code's; all where there are fewer",
        },
        evidence="formula",
        evidence_note="the consensus against its definition; what is digested against a loop of one's own",
        choices=(
            "FedMD has no model on the server. Here the student is one: a participant without data of its own, which "
            "digests each consensus and costs no byte. So what ships has seen nobody's samples, has an architecture "
            "that no client has to share, and is judged as FedAvg's is; clients' own models are judged beside it",
            "a round is one exchange: a client digests and revisits what it was told, then says its scores; so the "
            "last consensus is digested by the student alone",
            "optimizers begin anew for each digest and revisit; the released code keeps Adam's moments",
            "clients that did not answer are not in the consensus",
        ),
    )
)
class FedMD(Scheme):
    r"""One training in rounds, over public samples that everybody has.

    .. math:: \tilde f(x_i) = \frac 1 {|S|} \sum_{k \in S} f_k(x_i), \qquad
        L_k = \frac 1 {MC} \sum_i \| f_k(x_i) - \tilde f(x_i) \|_1

    Before its first round a client learns from the public samples' labels, then from its own. In a round it learns from
    the consensus, then again from its own samples, and says its scores. Only these cross the wire, both ways.

    Args:
        count: Clients.
        alpha: Of the Dirichlet split; ``None``: equal parts.
        public: Share of the training samples that is everybody's.
        epochs: Of a client on its own samples, in a round.
        digest_epochs: On the public samples, in a round.
        start: Epochs on its own samples, before a client's first round.
        start_public: On the public samples and their labels, before that; 0: nobody uses these labels.
        each: Public samples of a round; ``None``: all.
        digest: How scores are learned from: ``"mae"``, or a method that asks for logits, such as ``"kd"``.
        options: Of that method.
        models: Names of players, whose architectures clients have in turn; none: the student's.
        fraction, clients, least, timeout: As in :class:`~limbeck.schemes.federated.fedavg.FedAvg`.

    Source: FedMD: Heterogenous Federated Learning via Model Distillation, arXiv 1910.03581.

    >>> from limbeck.data import as_loader
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> train = as_loader((torch.randn(40, 4), torch.arange(40) % 3), batch_size=8, train=True)
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(CrossEntropy()), None, TrainConfig(), train=train,
    ...             fresh=lambda number: nn.Linear(4, 3))
    >>> (training,) = FedMD(count=2, alpha=None, public=0.25).trainings(cast)
    >>> training.stages[0].distiller.scores.shape
    torch.Size([1, 10, 3])
    """

    def __init__(
        self,
        count: int = 10,
        alpha: float | None = 0.1,
        public: float = 0.2,
        epochs: int = 2,
        digest_epochs: int = 1,
        start: int = 20,
        start_public: int = 20,
        each: int | None = 5000,
        digest: str = "mae",
        options: dict[str, Any] = {},  # noqa: B006  never changed
        models: list[str] = [],  # noqa: B006  never changed
        fraction: float = 1.0,
        clients: Where = "simulated",
        least: int = 10,
        timeout: float | None = None,
    ) -> None:
        self.plan = Plan(count, clients, fraction, timeout)
        check_inside(public, "scheme.public")
        self.alpha, self.public, self.least, self.models = alpha, public, least, list(models)
        self.digest = digest_by(digest, options)
        self.told = {"digest": digest, "options": dict(options), "models": self.models}
        lengths = {"epochs": epochs, "digest_epochs": digest_epochs, "start": start, "start_public": start_public}
        check_lengths(0, **lengths)
        check_lengths(1, each=each)
        self.lengths: dict[str, Any] = {**lengths, "each": each}

    def trainings(self, cast: Cast) -> Iterator[Training]:
        yield training_of("fedmd", cast, lambda: self.server(cast))

    def server(self, cast: Cast) -> ConsensusServer:
        """The server, with its clients and what they own."""
        models, loss = models_of(cast, self.plan.count, self.models), of_labels(cast)
        owners = split_among(cast, "fedmd", self.plan.count, self.alpha, self.least, self.public)
        work = Scoring(models, loss, self.digest, owners, self.lengths, cast.logits)
        return ConsensusServer(cast, work, self.plan, {**self.lengths, **self.told, **owners.facts}, 1)


class ConsensusServer(ScoreServer):
    """The server of FedMD; see :class:`FedMD`."""

    def fuse(self, said: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        consensus = torch.stack(list(said.values())).mean(dim=0)
        return consensus[None], consensus
