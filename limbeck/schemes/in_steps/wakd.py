"""WAKD: distillation whose student is an average of weights along the way, for domains that nobody has seen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.ranks import rank_here, world_size
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import call_model
from limbeck.core.taps import Listener
from limbeck.core.teacher import Teacher
from limbeck.data.loader import Loader
from limbeck.engine.evaluation import evaluate_loss
from limbeck.engine.stage import Stage
from limbeck.schemes.in_steps.weight_average import Mean, ValleyMean
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="wakd",
        name="WAKD",
        title="Weight Averaging Improves Knowledge Distillation under Domain Shift",
        year=2023,
        arxiv="2309.11446",
        code="vorobeevich/distillation-in-dg",
        knowledge="scheme",
        equation=r"\bar\theta = \frac{1}{T - s + 1} \sum_{t=s}^{T} \theta_t, \qquad "
        r"\theta_t \text{ learns by } T^2 KL(p_t \| p_s)",
        use="Where the student will see other domains than it learned from: the paper's loss is kd alone at "
        "temperature 5. Needs no more than one training.",
        defaults={
            "average": "wakd, the paper's own, which looks at no validation data",
            "start": "0.1: step 5000 of the 50,000 of the authors' configurations",
            "every": "100, as in the authors' configurations",
            "converge": "3, tolerance: 6 and ratio: 1.3, those of SWAD and of the authors' configurations",
            "statistics": "frozen, as in the authors' trainings from pre-trained weights",
        },
        evidence="formula",
        evidence_note="averages against plain means of the weights of every step; valleys against scripted losses",
        choices=(
            "a valley begins and ends as SWAD's algorithm says; the authors' code begins a block before it and "
            "keeps two that are past its end",
            "sma is the running mean with train.select: best and train.validate_steps: every; it may choose weights "
            "from before the start",
            "where no valley is found, the student is the mean of the last block, as in SWAD's code",
            "the loss is the recipe's, on any data; a mixture of domains is a data set like others",
            "statistics: recompute lets the averaged student see each batch once more to find its own statistics",
        ),
    )
)
class WAKD(Scheme):
    r"""One training of a copy of the student; the student is the average of its weights.

    .. math:: \bar\theta = \frac{1}{T - s + 1} \sum_{t=s}^{T} \theta_t

    Args:
        average: ``wakd``: the mean over every step from the start on; ``sma``: the same, of which that is kept
            which does best on validation data; ``swad``: the mean of blocks of steps within a valley of the loss on
            validation data.
        start: Of ``wakd`` and ``sma``: s, a share of the training; 1: the last weights alone.
        every: Steps of a block of ``swad``, and between validations of ``sma``.
        converge: Of ``swad``: :math:`N_s`.
        tolerance: Of ``swad``: :math:`N_e`.
        ratio: Of ``swad``: r, see :func:`~limbeck.schemes.in_steps.weight_average.valley`.
        statistics: Of batch normalisation: ``frozen``: they stay as the student brings them, for pre-trained
            students; ``recompute``: the averaged student finds its own while it follows.

    Source: WAKD, arXiv 2309.11446; SWAD, arXiv 2102.08604.

    >>> from limbeck.data.resident import ResidentLoader
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.core.teacher import as_teacher
    >>> from limbeck.objectives import KD
    >>> data = ResidentLoader(torch.zeros(8, 4), batch_size=4)
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(KD(5.0)), as_teacher(nn.Linear(4, 3)), TrainConfig(steps=20), data)
    >>> (training,) = WAKD(start=0.5).trainings(cast)
    >>> training.stages[0].distiller.turns, training.stages[0].distiller.keeper.first
    (('student', 'average'), 10)
    """

    def __init__(
        self,
        average: Literal["wakd", "sma", "swad"] = "wakd",
        start: float = 0.1,
        every: int = 100,
        converge: int = 3,
        tolerance: int = 6,
        ratio: float = 1.3,
        statistics: Literal["frozen", "recompute"] = "frozen",
    ) -> None:
        check_inside(start, "scheme.start", closed=True)
        for name, value in {"every": every, "converge": converge, "tolerance": tolerance}.items():
            check_positive(value, f"scheme.{name}")
        check_inside(ratio, "scheme.ratio", 1.0, float("inf"), closed=True)
        self.average, self.start, self.every = average, start, every
        self.converge, self.tolerance, self.ratio, self.statistics = converge, tolerance, ratio, statistics

    def trainings(self, cast: Cast) -> Iterator[Training]:
        config, epoch = cast.config, None if cast.train is None else cast.train.steps_per_epoch
        total = config.total_steps(epoch)
        if config.ema is not None:
            raise ConfigError("the scheme averages weights itself", where="train.ema", found=config.ema, wanted="none")
        if self.average != "wakd" and cast.validation is None:
            raise ConfigError(
                f"{self.average} is told by validation data", where="validation", remedy="say average: wakd"
            )
        if self.average == "sma":
            config = config.model_copy(update={"select": "best", "validate_steps": self.every})
        distiller = Averaged(cast.student, cast.loss, cast.teacher, self, cast.logits)
        if self.average == "swad":
            if total < self.every:
                raise ConfigError(
                    "there is not one whole block", where="scheme.every", found=f"{self.every} of {total}"
                )
            distiller.keeper = distiller.in_valleys(total // self.every, cast.validation)
        else:
            distiller.keeper = Mean(max(1, round(self.start * total)))
        yield Training([Stage("average", distiller, config)])


class Averaged(Distiller):
    """A student that is the average of a walker's weights, and the walker that learns; see :class:`WAKD`.

    A step has two turns: in the first the walker takes its step, in the second the average follows it.

    Args:
        student: Who averages; the walker starts as its copy.
        loss: The walker's.
        teacher: Its teacher.
        scheme: With its settings.
        logits: Where logits stand in the output.
    """

    turns = ("student", "average")
    keeper: Mean | ValleyMean
    steps: Tensor

    def __init__(
        self, student: nn.Module, loss: Terms, teacher: Teacher | None, scheme: WAKD, logits: str | None = None
    ) -> None:
        super().__init__(student, loss, teacher, logits=logits)
        self.walking = Distiller(copy.deepcopy(student), self.loss, teacher, logits=logits)
        self.scheme = scheme
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # that the average has followed
        self._step: int | None = None  # the same, once it was looked at
        self._due = False
        self._judges: tuple[Loader, ...] = ()

    def in_valleys(self, blocks: int, judges: Loader | None) -> ValleyMean:
        """The keeper of a valley's mean, judged by these data."""
        assert judges is not None
        self._judges, scheme = (judges,), self.scheme
        return ValleyMean(self._pairs()[0], blocks, scheme.every, scheme.converge, scheme.tolerance, scheme.ratio)

    def objectives(self) -> Iterator[Objective]:
        return self.walking.objectives()

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Averaged:
        """The walker's; the student listens to itself for when it is judged by its loss."""
        self.close()
        self.walking.setup(batch, data)
        self._vocabulary = self.walking._vocabulary
        self._listener = Listener(self.student, self._taps, self.prepare(batch).inputs, logits=self._logits)
        return self

    def close(self) -> None:
        super().close()
        if "walking" in self._modules:
            self.walking.close()

    def train(self, mode: bool = True) -> Averaged:
        """Also leave frozen statistics as they are."""
        super().train(mode)
        if self.scheme.statistics == "frozen":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def made(self, batch: Batch) -> Batch:
        self._due = True
        return batch

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if turn == "average":
            self._follow(batch)
            # The average has moved already: its own step adds nothing.
            still = torch.stack([0.0 * p.sum() for p in self.student.parameters() if p.requires_grad]).sum()
            return Losses(still, {}, {})
        return self.walking(batch) if self.training else super().forward(batch)

    @torch.compiler.disable
    def _follow(self, batch: Batch) -> None:
        """Take in the walker's step, once a step whatever the number of its parts."""
        if self._due:
            self._due = False
            step = int(self.steps) + 1 if self._step is None else self._step + 1
            self._step = step
            self.steps.fill_(step)
            own, live = self._pairs()
            if isinstance(self.keeper, Mean):
                self.keeper.follow(own, live, step)
            elif self.keeper.gather(live, step):
                progress = torch.as_tensor(batch.progress, device=live[0].device)
                own_rank, ranks = rank_here(), world_size()  # each looks at its part, and all come to the same
                found = evaluate_loss(self.walking, self._judges[0], progress, rank=own_rank, world=ranks)
                self.keeper.judge(own, found["total"])
        if self.scheme.statistics == "recompute":
            with torch.no_grad():
                call_model(self.student, batch.inputs)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of average and walker, each once."""
        own, live = ([p.detach() for p in m.parameters()] for m in (self.student, self.walking.student))
        return own, live

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        return self.student.parameters() if turn == "average" else self.walking.parameters()

    def settings_of(self, turn: str) -> dict[str, Any]:
        if turn == "student":
            return {}
        still = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.0}, "weight_decay": 0.0, "warmup": 0.0}
        return {**still, "schedule": "constant", "schedule_options": {}}

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))
