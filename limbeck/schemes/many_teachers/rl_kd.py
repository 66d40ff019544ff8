"""RL-KD: a policy learns which of several teachers each sample is taught by, from how the student fares afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import soften
from limbeck.core.ensembling import stacked
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import as_on_first, mean_of_rows, mean_over_ranks, rows_of_ranks
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import dry
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.data.loader import Loader
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.many_teachers.choosing import Policy, selected_rows
from limbeck.schemes.many_teachers.holding import held_out
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.several import SeveralTeachers

Reward = Literal["labels", "loss", "held_out"]
Credit = Literal["batch", "sample"]
_HELD, _DICE = 11, "rl_kd_dice"


@register(
    Card(
        key="rl_kd",
        name="RL-KD",
        title="Reinforced Multi-Teacher Selection for Knowledge Distillation",
        year=2020,
        arxiv="2012.06048",
        knowledge="scheme",
        equation=r"\frac{T^2}{K_i} \sum_{k: a_{ik} = 1} CE(p_k, p_S), \quad a_{ik} \sim \sigma(A s_{ik} + b_k), \quad "
        r"\theta \leftarrow \theta + \beta \sum_{ik} (R - \bar R) \nabla \log \pi(a_{ik} | s_{ik})",
        use="For several teachers of which some are wrong where others are right. The recipe's loss is what the "
        "student learns beside them: `loss: {cross_entropy: 0.5}`.",
        defaults={
            "reward": "held_out, which the paper finds best on average",
            "weight": "0.5, our choice: one half each",
            "gamma": "0.5, our choice",
            "warm": "a fifth of the training, our choice",
            "start": "0.9, our choice for a policy that has learned to choose all",
            "episode": "5 batches, our choice",
        },
        evidence="reading",
        choices=(
            "The paper's equations are from memory of it. A is shared by all teachers, the bias is each one's.",
            "R(x) is what enters the first teacher's classifier, brought to mean 0 and variance 1, where the paper has "
            "a frozen encoder.",
            "A moving average of rewards is taken off them; without, the policy's steps are far noisier.",
            "The reward is of the whole batch, as in the paper; `credit: sample` gives each sample its own.",
            "The policy is started at choosing nearly all, not trained to it; the student goes on afterwards, it is "
            "not begun anew.",
            "In the reward, a sample for which no teacher is chosen is compared with all of them: were it free, "
            "the policy would soon choose nobody.",
            "Samples that judge accuracy are held out of the training set.",
        ),
        needs=("labels",),
        tasks=("classification", "several teachers"),
        cost="Every teacher answers each batch twice, and the student once more.",
    )
)
class RLKD(Scheme):
    r"""Two stages: a warm start from all teachers, then teachers chosen sample by sample.

    A state :math:`s_{ik}` holds the sample's feature, the teacher's probabilities and its cross-entropy. After each of
    the student's steps the batch is judged anew:

    .. math:: R_1 = -L_{CE}, \qquad R_2 = -L_{CE} - L_{DL}, \qquad R_3 = \gamma R_2 + (1 - \gamma)\, \mathrm{Acc}

    and after ``episode`` batches the policy moves. Samples for which no teacher is chosen learn from labels alone.

    Args:
        reward: ``"labels"`` (:math:`R_1`), ``"loss"`` (:math:`R_2`) or ``"held_out"`` (:math:`R_3`).
        credit: ``"batch"``: one reward for all of a batch; ``"sample"``: each sample's own.
        weight: Of the teachers' part.
        temperature: T.
        gamma: :math:`\gamma`.
        warm: Share of the training in which all teachers teach.
        start: Chance of each teacher in the beginning.
        episode: Batches of one step of the policy.
        lr: The policy's learning rate.
        momentum: Of the moving average of rewards.
        share: Of the training samples, held out; of ``"held_out"``.
        judges: How many of them judge one step; they take turns.
        tap: :math:`R(x)`, of the first teacher.

    Source: Reinforced Multi-Teacher Selection for Knowledge Distillation, arXiv 2012.06048.

    >>> RLKD("loss", episode=2).gamma
    0.5
    """

    def __init__(
        self,
        reward: Reward = "held_out",
        credit: Credit = "batch",
        weight: float = 0.5,
        temperature: float = 1.0,
        gamma: float = 0.5,
        warm: float = 0.2,
        start: float = 0.9,
        episode: int = 5,
        lr: float = 0.1,
        momentum: float = 0.9,
        share: float = 0.1,
        judges: int = 128,
        tap: str = "penultimate",
    ) -> None:
        for way, named, known in (("reward", reward, get_args(Reward)), ("credit", credit, get_args(Credit))):
            if named not in known:
                raise ConfigError("no such way", where=f"scheme.{way}", found=named, wanted=", ".join(known))
        positive = {"temperature": temperature, "episode": episode, "lr": lr, "judges": judges, "weight": weight}
        for name, value in positive.items():
            check_positive(value, f"scheme.{name}")
        for name, value in {"start": start, "share": share}.items():
            check_inside(value, f"scheme.{name}")
        for name, value in {"gamma": gamma, "warm": warm, "momentum": momentum}.items():
            check_inside(value, f"scheme.{name}", closed=True)
        self.reward, self.credit, self.weight, self.temperature, self.gamma = reward, credit, weight, temperature, gamma
        self.warm, self.start, self.episode, self.lr, self.momentum = warm, start, episode, lr, momentum
        self.share, self.judges, self.tap = share, judges, tap

    def trainings(self, cast: Cast) -> Iterator[Training]:
        whole_batches(cast.config.accumulate, "rl_kd", "rewards a batch as a whole")
        judge = SeveralTeachers(cast.need_teachers("there must be a choice of").values())
        rest, held = None, None
        if self.reward == "held_out":
            rest, held = held_out(cast.train, self.share, _HELD, self.judges, "rl_kd")
        settings = _split(cast.config, self.warm)
        stages = [
            Stage(name, SelectDistiller(cast, judge, self, held if name == "select" else None, name == "select"), own)
            for name, own in settings.items()
        ]
        yield Training(stages, train=rest)


class SelectDistiller(Distiller):
    """A student of chosen teachers, and who chooses them; see :class:`RLKD`."""

    baseline: Tensor
    steps: Tensor
    gathered: Tensor

    def __init__(self, cast: Cast, judge: Teacher, scheme: RLKD, held: Loader | None, selects: bool) -> None:
        super().__init__(cast.student, cast.loss, judge, logits=cast.logits, also=("logits",))
        self.scheme, self.selects, self._held = scheme, selects, held
        self.turns = ("student", "policy") if selects else ("student",)
        self.policy: Policy | None = None
        self._judges: list[Batch] = []
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("gathered", None)

    def setup(self, batch: Batch, data: DataInfo | None = None) -> SelectDistiller:
        """Also make the policy, and fetch who judges."""
        super().setup(batch, data)
        teacher = self.teacher
        assert teacher is not None
        taps = ("logits", *((self.scheme.tap,) if self.selects else ()))
        teacher.attach(tuple(dict.fromkeys([*self.loss.teacher_taps, *taps])), self.prepare(batch))
        if not self.selects:
            return self
        states, _ = self._states(self._ask(self.prepare(batch)), self.prepare(batch))
        if self.policy is None:
            self.policy = Policy(states.shape[-1], len(states), self.scheme.start)
            self.gathered = torch.zeros(sum(p.numel() for p in self.policy.parameters()))
        self.policy.to(states.device)
        self.gathered = self.gathered.to(states.device)
        self._judges = [] if self._held is None else [one.to(states.device) for one in self._held.batches()]
        return self

    def _ask(self, batch: Batch) -> Trace:
        """What all teachers say, whether or not a term of the loss wants to know."""
        assert self.teacher is not None
        return self.teacher(batch)

    def made(self, batch: Batch) -> Batch:
        """With the dice of this step's choice, which both turns throw alike; the first rank throws for all."""
        count, device = len(self.teacher.members), batch.require("labels").device  # type: ignore[union-attr]
        rows = rows_of_ranks(batch.size, device)
        dice = torch.rand(count, rows.whole, device=device)
        as_on_first([dice])
        return batch.replace(extras={**batch.extras, _DICE: dice[:, rows.own]}) if self.selects else batch

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        own = set() if self.policy is None else {id(p) for p in self.policy.parameters()}
        return (p for p in self.parameters() if (id(p) in own) == (turn == "policy"))

    def settings_of(self, turn: str) -> dict[str, Any]:
        if turn != "policy":
            return {}
        plain = {"optimizer_options": {"momentum": 0.0}, "schedule": "constant", "schedule_options": {}, "warmup": 0.0}
        return {"optimizer": "sgd", "lr": self.scheme.lr, "weight_decay": 0.0, **plain}

    def settled(self) -> dict[str, Any]:
        return {**vars(self.scheme), "selects": self.selects}

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        teacher = self._ask(prepared)
        logits = stacked([member.logits for member in teacher.members])
        chosen, log_chance = self._choose(teacher, prepared, logits)
        if turn == "policy":
            return self._judge(prepared, logits, chosen, log_chance)
        said = self.heard(prepared)
        losses = self.compare(said, teacher, prepared, counted=batch)
        values = selected_rows(said.logits, logits, chosen, self.scheme.temperature)
        value = mean_of_rows(values) if self.training else values.mean()
        losses.total = losses.total + self.scheme.weight * value
        losses.terms["teachers"], losses.weights["teachers"] = value.detach(), value.new_tensor(self.scheme.weight)
        return losses

    def _states(self, teacher: Trace, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the policy sees, ``[K, B, D + C + 1]``, and the samples' targets."""
        logits = stacked([member.logits for member in teacher.members])
        if logits.ndim != 3:
            found = list(logits.shape[1:])
            raise TensorError("teachers are chosen for samples of one label each", where="teacher_logits", found=found)
        target, labelled = class_labels(batch.labels, logits.shape[-1], "rl_kd")
        log_p = soften(logits)
        wrong = -log_p.gather(-1, target.expand(len(logits), -1).unsqueeze(-1)) * labelled.unsqueeze(-1)
        feature = teacher.members[0][self.scheme.tap].flatten(1)
        feature = F.layer_norm(feature.to(log_p.dtype), feature.shape[1:]).expand(len(logits), -1, -1)
        return torch.cat([feature, log_p.exp(), wrong], dim=-1), target

    def _choose(self, teacher: Trace, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Who teaches whom, ``[K, B]``, and the logarithm of how likely that choice was."""
        if not self.selects:
            return logits.new_ones(logits.shape[:2]), logits.new_zeros(logits.shape[:2])
        assert self.policy is not None
        states, _ = self._states(teacher, batch)
        scores = self.policy(states.to(self.policy.weight.dtype))
        dice = batch.extras.get(_DICE, torch.full_like(scores, 0.5))  # where nobody learns: who is more likely than not
        chosen = (dice < scores.sigmoid()).to(scores.dtype).detach()
        return chosen, -F.binary_cross_entropy_with_logits(scores, chosen, reduction="none")

    @torch.compiler.disable
    def _judge(self, batch: Batch, logits: Tensor, chosen: Tensor, log_chance: Tensor) -> Losses:
        """Add this batch's part to the policy's gradient; after an episode, hand it over."""
        assert self.policy is not None
        scheme, parameters = self.scheme, list(self.policy.parameters())
        with dry(self.student):
            said = self.heard(batch).logits
            rewards = self._rewards(said, logits, chosen, batch)
        reward = mean_of_rows(rewards)
        gain = rewards - (self.baseline if self.steps > 0 else reward)
        found = torch.autograd.grad(-mean_of_rows((gain * log_chance).sum(dim=0)), parameters)
        self.gathered += mean_over_ranks(torch.cat([g.flatten() for g in found]))
        kept = scheme.momentum if self.steps > 0 else 0.0
        self.baseline.mul_(kept).add_(reward, alpha=1 - kept)
        self.steps += 1
        due = self.steps % scheme.episode == 0
        flat = torch.cat([p.flatten() for p in parameters])
        total = (flat * self.gathered.clone() * (due / scheme.episode)).sum()
        self.gathered *= ~due
        value = -reward  # what is logged; the gradient is the episode's
        terms = {"reward": reward, "chosen": chosen.mean()}
        return Losses(total - total.detach() + value, terms, {name: torch.ones_like(value) for name in terms})

    def _rewards(self, said: Tensor, logits: Tensor, chosen: Tensor, batch: Batch) -> Tensor:
        """How well the student fares now, ``[B]``; the same for all where the batch is judged as one."""
        scheme = self.scheme
        target, labelled = class_labels(batch.labels, said.shape[-1], "rl_kd")
        rewards = -F.cross_entropy(said.float(), target, reduction="none") * labelled
        if scheme.reward != "labels":
            heard = torch.where(chosen.sum(dim=0) > 0, chosen, 1.0)
            rewards = rewards - selected_rows(said, logits, heard, scheme.temperature)
        if scheme.credit == "batch":
            rewards = mean_of_rows(rewards).expand(len(said))
        if scheme.reward == "held_out":
            judges = self._judges[int(self.steps) % len(self._judges)]
            right = self.heard(judges).logits.argmax(dim=-1) == judges.require("labels")
            rewards = scheme.gamma * rewards + (1 - scheme.gamma) * right.float().mean()
        return rewards


def _split(config: TrainConfig, warm: float) -> dict[str, TrainConfig]:
    """The settings of both stages by name; lengths add up to the whole, and a share of 0 leaves the first out."""
    name = "steps" if config.steps is not None else "epochs"
    whole = getattr(config, name)
    first = round(whole * warm)
    lengths = {"warm": first, "select": whole - first}
    return {key: config.model_copy(update={name: length}) for key, length in lengths.items() if length}
