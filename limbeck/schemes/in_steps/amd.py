"""AMD: which assistant stands between teacher and student is found by training all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.files import write_json
from limbeck.core.hashing import below, draw_bits, key, key_tensor
from limbeck.core.reduction import check_inside
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.engine.evaluation import evaluate
from limbeck.engine.metrics import headline
from limbeck.engine.stage import Stage
from limbeck.models.describe import parameters
from limbeck.schemes.in_steps.supernet import INSIDE, Supernet
from limbeck.schemes.parts.looking import indexed, need_labels
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_DRAW = 21  # keeps the draw of levels apart from others
_LOOKS = 8  # batches on which units are ranked
_FOUND = "assistant.json"


def npsd(performances: Sequence[float], scales: Sequence[float], teacher: float) -> list[float]:
    r"""The negative performance-scale derivative of candidates, :math:`-(P_t - P_i) / (1 - S_i)`.

    What is lost for each part of the size that is gone; the best candidate has the highest.

    Args:
        performances: Of the candidates.
        scales: Their sizes, in parts of the teacher's.
        teacher: Its performance.

    >>> [round(value, 3) for value in npsd([0.89, 0.80], [0.6, 0.5], teacher=0.90)]
    [-0.025, -0.2]
    """
    return [-(teacher - p) / max(1 - s, 1e-9) for p, s in zip(performances, scales, strict=True)]


@register(
    Card(
        key="amd",
        name="AMD",
        title="AMD: Automatic Multi-step Distillation of Large-scale Vision Models",
        year=2024,
        arxiv="2407.04208",
        knowledge="scheme",
        equation=r"A = \arg\max_i -\frac{P_t - P_i}{S_t - S_i}, \qquad T \to A \to S",
        use="Where the teacher is more than about ten times the student's size: an assistant is cut out of the "
        "teacher, of the size that loses least. Wants a transformer or a residual network as the teacher.",
        defaults={
            "candidates": "8: from 20% to 90% of the teacher where the student is a tenth of it, as in the paper",
            "finetune": "0.5 of the training; the paper does not say",
        },
        evidence="reading",
        evidence_note="nesting, importance and choice against plain loops; no code or formula is published",
        choices=(
            "read in the abstract and in summaries: pruning, joint training and choice are the paper's; the formulas "
            "of importance (first-order Taylor) and of the choice are ours",
            "a level keeps the same share of every layer's units; whole layers stay",
            "each step trains the largest, the smallest and a drawn candidate on shared weights",
            "cross-entropy, logits and features have the weights of the recipe's loss; projectors are shared by all",
            "candidates are judged on validation data; the student starts as the recipe says, not from cut weights",
        ),
    )
)
class AMD(Scheme):
    r"""Three trainings: all candidates at once, the chosen one alone, and the student.

    .. math:: L = \sum_{i \in \{\text{largest, smallest, drawn}\}} L_{\text{loss}}(M_i, T), \qquad
        A = \arg\max_i -\frac{P_t - P_i}{S_t - S_i}

    Candidates lie evenly between the student's size and the teacher's. They are the teacher with some of its heads and
    channels left out, those of a smaller candidate being among those of a larger, and share its weights.

    Args:
        candidates: How many; 0: no assistant, plain distillation.
        finetune: How long the chosen one is trained further, a part of the recipe's length; 0: not at all.
        rule: ``npsd``, or ``best``: the candidate with the best performance, whatever its size.
        units: Names of the teacher's layers whose inputs can be left out; ``None``: those that are known, see
            :data:`~limbeck.schemes.in_steps.supernet.INSIDE`.

    Source: AMD, arXiv 2407.04208.

    >>> AMD(candidates=4).shares(0.1)
    [0.28, 0.46, 0.64, 0.82]
    """

    def __init__(
        self,
        candidates: int = 8,
        finetune: float = 0.5,
        rule: Literal["npsd", "best"] = "npsd",
        units: list[str] | None = None,
    ) -> None:
        if candidates < 0:
            raise ConfigError("cannot be less than none", where="scheme.candidates", found=candidates)
        check_inside(finetune, "scheme.finetune", closed=True)
        if rule not in ("npsd", "best"):
            raise ConfigError("no such rule", where="scheme.rule", found=repr(rule), wanted="'npsd' or 'best'")
        self.candidates, self.finetune, self.rule, self.units = candidates, finetune, rule, units

    def shares(self, least: float) -> list[float]:
        """The candidates' sizes, evenly between the student's and 1."""
        gap = (1 - least) / (self.candidates + 1)
        return [round(least + gap * number, 6) for number in range(1, self.candidates + 1)]

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("an assistant is cut out of it: give")
        if self.candidates:
            if not isinstance(teacher, FrozenTeacher):
                raise ConfigError("assistants are cut out of a model", where="teacher", found=type(teacher).__name__)
            if cast.validation is None:
                raise ConfigError("assistants are chosen on validation data", where="validation", found="none")
            net = self._cut(cast, teacher)
            joint = Joint(net.model, cast.again(), teacher, logits=teacher.where)
            joint.scheme, joint.net, joint.seed = self, net, cast.seed
            yield Training([Stage("joint", joint, cast.config)], "candidates")
            net.level = self._chosen(cast, net, teacher)
            if self.finetune:
                alone = Distiller(net.model, cast.again(), teacher, logits=teacher.where)
                yield Training([Stage("finetune", alone, self._shorter(cast))], "assistant")
            teacher = FrozenTeacher(net.model, logits=teacher.where)
        last = Distiller(cast.student, cast.loss, teacher, logits=cast.logits)
        yield Training([Stage("distill", last, cast.config)])

    def _cut(self, cast: Cast, teacher: FrozenTeacher) -> Supernet:
        """The candidates, of units that are ranked on the first batches of the training set."""
        loader = indexed(cast.train, "amd")
        need_labels(loader, "amd")
        least = parameters(cast.student) / parameters(teacher.model)
        if least >= 1:
            raise ConfigError("the teacher is no larger than the student", where="student", found=f"{least:.2f} of it")
        net = Supernet(copy.deepcopy(teacher.model), INSIDE if self.units is None else self.units)
        for parameter in net.model.parameters():
            parameter.requires_grad_(True)  # a teacher's are frozen
        batches = (batch for batch, _ in zip(loader.plain(), range(_LOOKS), strict=False))
        device = next((p.device for p in net.model.parameters()), torch.device("cpu"))
        net.rank((batch.to(device) for batch in batches), self.shares(least), teacher.where)
        return net

    def _chosen(self, cast: Cast, net: Supernet, teacher: FrozenTeacher) -> int:
        """The best candidate; what each came to is written into the run's folder."""
        assert cast.validation is not None
        assert cast.train is not None
        metric = headline(cast.validation.task)
        device = next(net.model.parameters()).device
        inputs = cast.train.example(16).to(device).inputs
        scales, performances = [], []
        for level in range(self.candidates):
            net.level = level
            performances.append(float(evaluate(net.model, cast.validation, logits=teacher.where)[metric]))
            scales.append(net.scale(level, inputs, teacher.where))
        best = float(evaluate(teacher.model, cast.validation, logits=teacher.where)[metric])
        scores = npsd(performances, scales, best) if self.rule == "npsd" else performances
        chosen = max(range(self.candidates), key=lambda level: scores[level])
        if cast.folder is not None:
            facts = {"scales": scales, metric: performances, "scores": scores, "teacher": best, "chosen": chosen}
            write_json(cast.folder / _FOUND, facts)
        return chosen

    def _shorter(self, cast: Cast) -> Any:
        name = "steps" if cast.config.steps is not None else "epochs"
        return cast.config.model_copy(update={name: max(1, round(getattr(cast.config, name) * self.finetune))})


class Joint(Distiller):
    """All candidates at once; see :class:`AMD`."""

    scheme: AMD
    net: Supernet
    seed: int

    def levels(self, batch: Batch) -> list[int]:
        """Those of this step: the smallest, the largest, and one that progress and seed draw."""
        last = self.scheme.candidates - 1
        moment = int(torch.as_tensor(batch.progress, dtype=torch.float64) * 2**40)
        bits = draw_bits(key_tensor([key(_DRAW, self.seed, moment)]), torch.zeros(1, dtype=torch.long))
        return sorted({0, last, int(below(bits[..., 0], last + 1))})

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        teacher: Trace = self._teach(prepared)
        found: Losses | None = None
        try:
            for level in self.levels(batch):
                self.net.level = level
                own = self.compare(self.heard(prepared), teacher, prepared, counted=batch)
                if found is None:
                    found = own
                    continue
                found.total, found.logits = found.total + own.total, own.logits
                found.terms |= {name: found.terms[name] + value for name, value in own.terms.items()}
        finally:
            self.net.level = None
        assert found is not None
        return found

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))
