"""Clients with models of their own, who say what they think of public samples and learn from what they are told."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.reduction import check_logits, reduce, widen
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import Trace, logits_of
from limbeck.data.loader import IndexedLoader
from limbeck.engine.device import make_accelerator
from limbeck.engine.evaluation import evaluate
from limbeck.schemes.federated.clients import Work
from limbeck.schemes.federated.local import Round, learn, seeded
from limbeck.schemes.federated.owners import Owners
from limbeck.schemes.federated.rounds import Federation, Plan
from limbeck.schemes.federated.wire import Tensors, below, under
from limbeck.schemes.scheme import Cast

_CHOSEN = 65  # keeps these draws apart from others
_SERVER = 1 << 20  # of the server's own training, beside the clients' numbers


class LogitDistance(Objective):
    r"""Mean absolute distance of logits, :math:`\frac 1 C \sum_c |z^S_c - z^T_c|`: how FedMD's code digests.

    >>> said = Trace(None, {"logits": torch.tensor([[1.0, 2.0]])})
    >>> LogitDistance()(said, Trace(None, {"logits": torch.tensor([[3.0, 2.0]])}), Batch(None))
    tensor(1.)
    """

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        check_logits(student.logits, teacher.logits)
        gap = widen(student.logits) - widen(teacher.logits.detach())
        return reduce(gap.abs().mean(dim=-1), batch.mask)


def digest_by(method: str, options: dict[str, Any]) -> Objective:
    """How scores are learned from: ``"mae"``, or any method of the catalogue that asks for logits alone.

    Raises:
        ConfigError: It asks for more than crosses the wire.
    """
    if method == "mae":
        return LogitDistance()
    found = catalogue.get(method, "scheme.digest").build("scheme.options", **options)
    if set(found.teacher_taps) != {"logits"}:
        raise ConfigError(
            "only scores cross the wire, and this method asks a teacher for other things",
            where="scheme.digest",
            found=", ".join(found.teacher_taps) or "nothing",
            wanted="logits",
        )
    return found


class Told:
    """A teacher that knows the scores of some samples, by their ids, and nothing else.

    Args:
        rows: Ids ``[M]``.
        scores: Logits ``[M, C]``.
        samples: Of the whole set.
    """

    def __init__(self, rows: Tensor, scores: Tensor, samples: int) -> None:
        self.place = torch.zeros(samples, dtype=torch.long)
        self.place[rows] = torch.arange(len(rows))
        self.scores = scores.detach()

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        """Nothing to do: it has logits and no other taps."""

    def __call__(self, batch: Batch) -> Trace:
        return Trace(None, {"logits": self.scores[self.place[batch.require("index")]]})

    def to(self, device: torch.device | str) -> Told:
        self.place, self.scores = self.place.to(device), self.scores.to(device)
        return self


class Scoring(Work):
    """A client that keeps a model of its own.

    Its round: learn from what was told of the last one, learn from its own samples, say what it thinks of some public
    ones. In its first round it trains on the public samples, if there are labels to use, and on its own.

    Args:
        models: Of each client.
        loss: By which labels are learned from.
        digest: By which scores are.
        owners: Whose samples are whose; some are public.
        options: ``epochs`` on one's own samples in a round, ``digest_epochs`` on what was told, ``start`` on one's own
            and ``start_public`` on the public ones before the first, and ``each``, public samples of a round.
        logits: Where logits stand in the models' outputs.
    """

    hears = ("scores", "round")
    says = ("scores",)

    def __init__(
        self,
        models: Sequence[nn.Module],
        loss: Terms,
        digest: Objective,
        owners: Owners,
        options: dict[str, Any],
        logits: str | None,
    ) -> None:
        if owners.public is None or owners.public.only is None:
            raise DataError("clients speak of public samples, and there are none", where="scheme.public", found=0)
        self.models, self.loss, self.digest, self.owners = list(models), loss, Terms.of(digest), owners
        self.options, self.logits, self.public = options, logits, owners.public
        self.rows = owners.public.only

    def begin(self, number: int) -> Tensors:
        return {"begun": torch.zeros((), dtype=torch.long), **under("weights", self.models[number].state_dict())}

    def answer(self, number: int, kept: Tensors, told: Tensors, place: Round) -> tuple[Tensors, Tensors]:
        model = self.models[number]
        model.load_state_dict(below("weights", kept))
        with seeded(place.seed, place.number, number):
            self.study(number, model, bool(kept["begun"]), told, place)
            scores = self.spoken(self.scores(model, place))
        return {"begun": torch.ones((), dtype=torch.long), **under("weights", model.state_dict())}, {"scores": scores}

    def study(self, number: int, model: nn.Module, begun: bool, told: Tensors, place: Round) -> None:
        """A client's round before it speaks."""
        own, options = self.owners.loaders[number], self.options
        shared: dict[str, Any] = {"logits": self.logits}
        if not begun:
            for loader, epochs in ((self.public, options["start_public"]), (own, options["start"])):
                if epochs:
                    learn(model, self.loss, loader, place, epochs=epochs, first=0, **shared)
        if "scores" in told:
            self.digested(model, told["scores"], int(told["round"]), place)
        if options["epochs"]:
            first = options["start"] + place.number * options["epochs"]
            learn(model, self.loss, own, place, epochs=options["epochs"], first=first, **shared)

    def digested(self, model: nn.Module, scores: Tensor, number: int, place: Round) -> None:
        """Learn from scores of the public samples of a round."""
        rows, epochs = self.about(number), self.options["digest_epochs"]
        loader = still(self.public).chosen(rows)
        loader.batch_size = min(loader.batch_size, len(rows))
        teacher = Told(rows, self.heard(scores), loader.samples)
        learn(model, self.digest, loader, place, epochs=epochs, teacher=teacher, logits=self.logits)

    def about(self, number: int) -> Tensor:
        """The public samples that a round is about, which everybody draws alike."""
        size = self.options["each"]
        if size is None or size >= len(self.rows):
            return self.rows
        bits = draw_bits(key_tensor([key(_CHOSEN, number)]), self.rows).squeeze(1)
        return self.rows[bits.argsort(stable=True)[:size]].sort().values

    def spoken(self, logits: Tensor) -> Tensor:
        """Logits as they cross the wire; here, as they are."""
        return logits

    def heard(self, scores: Tensor) -> Tensor:
        """What crossed the wire as the logits of a teacher."""
        return scores

    @torch.no_grad()
    def scores(self, model: nn.Module, place: Round) -> Tensor:
        """What a model thinks of a round's public samples ``[M, C]``."""
        device = make_accelerator(place.config).device
        model.eval().to(device)
        batches = self.public.bare().chosen(self.about(place.number)).batches()
        return torch.cat(
            [logits_of(call_model(model, b.to(device).inputs), self.logits).float().cpu() for b in batches]
        )


class ScoreServer(Federation):
    """A server that hears scores. Its student learns from them on the public samples, as one more client would.

    Args:
        cast: Student, loss and settings.
        work: What clients do.
        plan: How rounds go.
        facts: What the run is beside that.
        heard: How many sets of scores it keeps: one for all, or one for each client.
    """

    scores: Tensor
    spoken: Tensor

    def __init__(self, cast: Cast, work: Scoring, plan: Plan, facts: dict[str, Any], heard: int) -> None:
        super().__init__(cast, work, plan, facts)
        self.scoring, self.pupil = work, (copy.deepcopy(cast.student),)  # in a tuple: no child, nothing that is saved
        example = work.public.example(1)
        with dry(cast.student):
            classes = logits_of(call_model(cast.student, example.inputs), cast.logits).shape[-1]
        self.register_buffer("scores", torch.zeros(heard, len(work.about(0)), classes))
        self.register_buffer("spoken", torch.tensor(-1))  # the round that the scores are of

    @abstractmethod
    def fuse(self, said: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """What clients are told of what they said.

        Args:
            said: Scores ``[M, C]``, by client.

        Returns:
            Scores ``[heard, M, C]`` that are told, and those ``[M, C]`` that the student learns from.
        """

    def tell(self, number: int, place: Round) -> Tensors:
        if int(self.spoken) < 0:
            return {}
        return {"scores": self.scores[number if len(self.scores) > 1 else 0], "round": self.spoken}

    def hear(self, said: dict[int, Tensors], place: Round) -> Tensors:
        told, learned = self.fuse({number: tensors["scores"] for number, tensors in said.items()})
        self.scores.copy_(told)
        self.spoken.fill_(place.number)
        (pupil,) = self.pupil
        pupil.load_state_dict(self.student.state_dict())
        with seeded(place.seed, place.number, _SERVER):
            self.scoring.digested(pupil, learned, place.number, place)
        return dict(pupil.state_dict())

    def judge(self, place: Round) -> dict[str, float]:
        """How well the clients' own models do: the mean (ALMA), and the worst."""
        assert self.validation is not None
        found = []
        for number in range(self.plan.count):
            model = self.scoring.models[number]
            model.load_state_dict(below("weights", self._kept(number).tensors))
            scores = evaluate(model, self.validation, logits=self.scoring.logits)
            found.append(scores[self.config.monitored(self.validation.task)])
        return {"clients_mean": sum(found) / len(found), "clients_worst": min(found)}


def still(loader: IndexedLoader) -> IndexedLoader:
    """The same samples in random order, without augmentation: scores are of samples as they are."""
    found = loader.bare()
    found.shuffle = True
    return found


def models_of(cast: Cast, count: int, players: list[str]) -> list[nn.Module]:
    """A model for each client: fresh students, or players by name, in turn.

    Args:
        cast: Who has them.
        count: Clients.
        players: Names; none: all have a student's architecture.
    """
    if not players:
        return [cast.another(number + 1) for number in range(count)]
    return [copy.deepcopy(cast.player(players[number % len(players)])) for number in range(count)]
