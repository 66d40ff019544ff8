"""MT-DNN with distillation: one student of several tasks, some of which have an ensemble of teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.divergences import cross_entropy_rows, jensen_shannon_rows, kl_rows, soften
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_positive, check_same_shape, reduce, widen
from limbeck.core.schedules import Constant
from limbeck.core.trace import Trace
from limbeck.data.grouped import GroupedLoader
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.looking import indexed
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.several import SeveralTeachers

Soft = Literal["cross_entropy", "kl", "symmetric", "js", "mse"]


def task_answers_loss(
    student_logits: Tensor,
    teacher_probabilities: Tensor,
    labels: Tensor,
    taught: Tensor,
    *,
    loss: Soft = "cross_entropy",
    temperature: float = 1.0,
) -> Tensor:
    r"""The mean over labelled places of :math:`-\sum_c Q_t(c \mid x) \log p_t(c \mid x)`; 0 in tasks without a teacher.

    Args:
        student_logits: ``[B, T, C]``, of every task.
        teacher_probabilities: :math:`Q`, the same shape.
        labels: ``[B, T]``, negative where a sample is not of a task.
        taught: ``[T]`` booleans.
        loss: In the place of the cross-entropy: ``"kl"``, ``"symmetric"`` (both directions), ``"js"``
            (Jensen-Shannon), ``"mse"`` (of probabilities).
        temperature: T; of the student's side, and a factor of its square.

    >>> z = torch.zeros(1, 2, 2)
    >>> task_answers_loss(z, z + 0.5, torch.tensor([[1, -1]]), torch.tensor([True, False]))
    tensor(0.6931)
    """
    check_same_shape(student_logits, teacher_probabilities, "student_logits", "teacher_probabilities")
    log_p, q = soften(student_logits, temperature), widen(teacher_probabilities).detach()
    if loss == "cross_entropy":
        rows = cross_entropy_rows(q, log_p)
    elif loss == "mse":
        rows = (log_p.exp() - q).square().mean(dim=-1)
    else:
        log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
        if loss == "js":
            rows = jensen_shannon_rows(log_q, log_p)
        else:
            rows = kl_rows(log_q, log_p) + (kl_rows(log_p, log_q) if loss == "symmetric" else 0.0)
    return temperature**2 * reduce(rows * taught.to(rows.dtype), labels >= 0)


@register(
    Card(
        key="mtdnn_kd",
        name="MT-DNN_KD",
        title="Improving Multi-Task Deep Neural Networks via Knowledge Distillation for Natural Language Understanding",
        year=2019,
        arxiv="1904.09482",
        code="namisan/mt-dnn",
        knowledge="scheme",
        equation=r"L_t = L_{hard}(z_t, y) - \sum_c Q_t(c \mid x) \log p_t(c \mid x), \qquad Q_t = \frac 1 M "
        r"\sum_m \mathrm{softmax}(z_m)",
        use="For one student of several tasks, with several teachers for those where they are known to help. Labels "
        "are `[N, T]`, negative where a sample is not of a task; models answer `[B, T, C]`, such as those of "
        "`limbeck.models.task_heads:several_tasks`, and a teacher of one task `[B, C]`.",
        defaults={
            "weight": "1, as in the released code, which adds both losses; the paper averages them",
            "temperature": "1, the paper's",
            "soft": "cross_entropy, as for the paper's tasks with teachers",
        },
        evidence="formula",
        evidence_note="against sums over samples in float64; the hard loss for one-hot answers",
        choices=(
            "Tasks of classification only: those that the paper has teachers for. Similarity and ranking are left to "
            "be two classes.",
            "The recipe trains the teachers, and its seeds and models make an ensemble; the best of many are chosen "
            "beforehand.",
            "Teachers answer while the student learns, which is the same as answers written beside the labels.",
            "The released symmetric and Jensen-Shannon losses hold one side fixed; ours are the divergences.",
            "A batch is of one task, the last of each filled up; `batches: mixed` leaves the order alone.",
        ),
        needs=("labels",),
        tasks=("text classification", "classification", "several teachers"),
        cost="Every teacher answers each batch.",
    )
)
class MTDNNKD(Scheme):
    r"""Batches of one task at a time; where the task has teachers, their mean answer is learned beside the labels.

    .. math:: L_t = L_{hard}(z_t, y) + w \, L_{soft}(z_t, Q_t), \qquad Q_t = \frac 1 M \sum_m \mathrm{softmax}(z_m / T)

    Args:
        taught: Which tasks (their places, from 0) each teacher teaches, by the teacher's name; who is not named
            teaches all.
        soft: :math:`L_{soft}`; see :func:`task_answers_loss`.
        weight: w.
        temperature: T.
        batches: ``"task"``: each of one task, in random order, so that tasks come as often as they are large;
            ``"mixed"``: as the data give them.

    Source: Improving Multi-Task Deep Neural Networks via Knowledge Distillation, arXiv 1904.09482.

    >>> MTDNNKD(taught={"large": [0]}).weight
    1.0
    """

    def __init__(
        self,
        taught: dict[str, list[int]] = {},  # noqa: B006  never changed
        soft: Soft = "cross_entropy",
        weight: float = 1.0,
        temperature: float = 1.0,
        batches: Literal["task", "mixed"] = "task",
    ) -> None:
        for name, value, known in (("soft", soft, get_args(Soft)), ("batches", batches, ("task", "mixed"))):
            if value not in known:
                raise ConfigError("no such way", where=f"scheme.{name}", found=value, wanted=", ".join(known))
        check_positive(weight, "scheme.weight")
        check_positive(temperature, "scheme.temperature")
        self.taught, self.soft, self.weight, self.temperature, self.batches = taught, soft, weight, temperature, batches

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teachers = cast.need_teachers("tasks are taught by", least=1)
        for name, tasks in self.taught.items():
            if name not in teachers or any(task < 0 for task in tasks):
                raise ConfigError(
                    "no such teacher, or no such task",
                    where=f"scheme.taught.{name}",
                    found=tasks,
                    wanted=f"one of {', '.join(teachers)}, and places of tasks from 0",
                )
        if cast.loss.teacher_taps:
            found = ", ".join(cast.loss.names)
            raise ConfigError("the loss is what labels teach", where="loss", found=found, wanted="cross_entropy")
        answers = TaskAnswers([self.taught.get(name) for name in teachers], self.soft, self.temperature)
        loss = cast.loss + Terms([answers], [Constant(self.weight)], ["teachers"])
        student = Distiller(cast.student, loss, SeveralTeachers(teachers.values()), logits=cast.logits)
        train = cast.train
        if train is not None and self.batches == "task":
            train = GroupedLoader(indexed(train, "mtdnn_kd"), tasks_of(train.labels))
        yield Training([Stage("mtdnn_kd", student, cast.config)], train=train)


class TaskAnswers(Objective):
    """See :func:`task_answers_loss`.

    Args:
        tasks: Of each teacher, which it teaches; ``None``: all.
        soft, temperature: Of the loss.
    """

    contract = Contract(normalizer="labels", at_equal=None)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, tasks: list[list[int] | None], soft: Soft = "cross_entropy", temperature: float = 1.0) -> None:
        super().__init__()
        self.tasks, self.soft, self.temperature = tasks, soft, temperature
        self.register_buffer("weights", None, persistent=False)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        count = _by_task(student.logits, batch.require("labels"))[0].shape[1]
        weights = torch.zeros(len(self.tasks), count)
        for row, tasks in zip(weights, self.tasks, strict=True):
            if tasks is not None and max(tasks, default=0) >= count:
                raise ConfigError("there are fewer tasks", where="scheme.taught", found=tasks, wanted=f"below {count}")
            row[slice(None) if tasks is None else tasks] = 1.0
        self.weights = (weights / weights.sum(dim=0).clamp(min=1.0)).to(student.logits.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        logits, labels = _by_task(student.logits, batch.require("labels"))
        weights: Tensor = self.ready("weights")
        answers = torch.zeros_like(widen(logits))
        for own, member, tasks in zip(weights, teacher.members, self.tasks, strict=True):
            said = self._answer(member.logits, logits.shape[1] if tasks is None else len(tasks), logits)
            answers += own.unsqueeze(-1).to(answers.dtype) * said
        return task_answers_loss(
            logits, answers, labels, weights.sum(dim=0) > 0, loss=self.soft, temperature=self.temperature
        )

    def _answer(self, said: Tensor, teaches: int, like: Tensor) -> Tensor:
        """A teacher's probabilities ``[B, T or 1, C]``."""
        said = said.unsqueeze(1) if said.ndim == 2 else said
        classes, places = like.shape[-1], said.shape[1:2]
        fits = said.ndim == 3 and said.shape[-1] <= classes and places in (like.shape[1:2], (1,))
        if not fits or (places == (1,) and teaches > 1):
            raise TensorError(
                "a teacher of one task, or one that answers all as the student does",
                where="teacher_logits",
                found=list(said.shape),
                wanted=f"{list(like.shape)}, or [B, C] of who teaches one task",
                remedy="say which in scheme.taught: {NAME: [place]}",
            )
        probabilities = soften(said, self.temperature).exp()
        return torch.nn.functional.pad(probabilities, (0, classes - said.shape[-1]))


def _by_task(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, C]`` and labels ``[B, T]``; of one task they may lack its place."""
    if logits.ndim == 2 and labels.ndim == 1:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise TensorError(
            "a student of several tasks answers each, and labels tell of which a sample is",
            where="student_logits",
            found=f"{list(logits.shape)} with labels {list(labels.shape)} {labels.dtype}",
            wanted="[B, T, C] with integers [B, T], negative where a sample is not of a task",
        )
    return logits, labels


def tasks_of(labels: Tensor | None) -> Tensor:
    """The task of each sample ``[N]``, the first that it has a label of; -1 where none.

    Raises:
        DataError: Labels are not known as a whole, or of another form.

    >>> tasks_of(torch.tensor([[-1, 2], [0, -1], [-1, -1]])).tolist()
    [1, 0, -1]
    """
    if labels is None or labels.is_floating_point() or labels.ndim > 2:
        found = "none" if labels is None else f"{list(labels.shape)} {labels.dtype}"
        wanted = "integers [N, T], negative where a sample is not of a task"
        raise DataError("which sample is of which task is not known", where="data.labels", found=found, wanted=wanted)
    known = (labels if labels.ndim == 2 else labels.unsqueeze(1)) >= 0
    return torch.where(known.any(dim=1), known.int().argmax(dim=1), -1)
