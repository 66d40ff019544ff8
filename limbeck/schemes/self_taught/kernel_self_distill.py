"""Iterated self-distillation: every step learns a mixture of the truth and of what the step before says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.blending import optimal_weight
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.files import write_json
from limbeck.core.labels import soft_labels
from limbeck.core.reduction import check_inside
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.core.trace import logits_of
from limbeck.data.loader import Loader
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.sides import weigh_sides
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_WEIGHTS = "self_distillation.json"
_APART = 1000  # keeps the starts of models that only help to estimate apart from those of the chain


@register(
    Card(
        key="kernel_self_distill",
        name="Iterated self-distillation with weighted ground-truth targets",
        title="Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by "
        "Self-Distillation",
        year=2021,
        arxiv="2102.13088",
        code="Kennethborup/self_distillation",
        knowledge="scheme",
        equation=r"\theta_\tau = \arg\min_\theta\ \alpha_\tau L(f_\theta, y) + (1 - \alpha_\tau)\, "
        r"L(f_\theta, f_{\theta_{\tau-1}})",
        use="To make a model better than itself over several steps without regularising it to nothing: the truth in "
        "the targets keeps them. The paper's loss is {brier: 1, prob_mse: 1}; what kernels do is known exactly, "
        "limbeck.analysis.self_distillation.",
        defaults={
            "steps": "5, the runs of the authors' script",
            "weight": "estimated; the paper's figures also hold it fixed, from 0 to 1",
        },
        evidence="formula",
        evidence_note="kernel ridge regression by the engine's own losses against the closed form; the estimate "
        "against a grid",
        choices=(
            "the model of the first step learns from the labels alone, and stands for the fit to the truth in all "
            "estimates, as in the paper; a teacher in the recipe takes its place",
            "the weight is estimated on the recipe's validation data, from probabilities, and kept between 0 and 1",
            "terms of the loss that ask no teacher are the truth's; the authors' penalty on norms is the optimizer's "
            "weight decay",
        ),
    )
)
class KernelSelfDistill(Scheme):
    r"""A chain of trainings: the same architecture, a new start, targets of truth and of the last step.

    .. math:: y_\tau = \alpha_\tau y + (1 - \alpha_\tau)\, f_{\tau-1}(x), \qquad
        \hat\alpha_\tau = \frac{\langle y_v - w,\ u - w \rangle}{\lVert u - w \rVert^2}

    The estimate takes the network as if its predictions were linear in its targets, which those of a kernel are: u are
    probabilities on validation data of the model of step 1, w those of a model that learned from the last step alone.
    It costs a second training a step.

    Args:
        steps: Of the chain, the first one included.
        weight: :math:`\alpha` of every step after the first; or ``"estimate"``.

    Source: Borup and Andersen, arXiv 2102.13088, sections 3 and 4.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import Brier, ProbabilityMSE
    >>> loss = Brier() + ProbabilityMSE()
    >>> cast = Cast(nn.Linear(4, 3), loss, None, TrainConfig(), fresh=lambda number: nn.Linear(4, 3))
    >>> [training.name for training in KernelSelfDistill(3, 0.4).trainings(cast)]
    ['step-1', 'step-2', '']
    """

    own_teacher = "may"

    def __init__(self, steps: int = 5, weight: float | Literal["estimate"] = "estimate") -> None:
        if steps < 2:
            raise ConfigError("there must be two at least", where="scheme.steps", found=steps)
        if not isinstance(weight, str):
            check_inside(weight, "scheme.weight", closed=True)
        elif weight != "estimate":
            raise ConfigError("no such weight", where="scheme.weight", found=weight, wanted="0 to 1, or 'estimate'")
        self.steps, self.weight = steps, weight

    def trainings(self, cast: Cast) -> Iterator[Training]:
        held = cast.validation
        if isinstance(self.weight, str) and held is None:
            raise ConfigError(
                "the weight is estimated on held-out data, and there are none",
                where="scheme.weight",
                remedy="give validation data, or a number from 0 to 1",
            )
        teacher, chosen = cast.teacher, list[float]()
        if teacher is None:
            first = cast.another(1)
            yield self._training(cast, first, None, 1.0, "step-1")
            teacher = FrozenTeacher(first, logits=cast.logits)
        by_labels = teacher
        for step in range(2, self.steps + 1):
            if isinstance(self.weight, str):
                assert held is not None
                if not isinstance(by_labels, FrozenTeacher):
                    raise ConfigError(
                        "what the teacher says of held-out data can be asked only where it is a model at hand",
                        where="teacher",
                        found=type(by_labels).__name__,
                        remedy="leave the teacher out, or say scheme.weight",
                    )
                model = cast.another(_APART + step)
                yield self._training(cast, model, teacher, 0.0, f"step-{step}-without-truth")
                weight = estimated_weight(by_labels, FrozenTeacher(model, logits=cast.logits), held)
            else:
                weight = float(self.weight)
            chosen.append(weight)
            if cast.folder is not None:
                write_json(cast.folder / _WEIGHTS, {"weights": chosen})
            last = step == self.steps
            model = cast.student if last else cast.another(step)
            yield self._training(cast, model, teacher, weight, "" if last else f"step-{step}")
            teacher = FrozenTeacher(model, logits=cast.logits)

    def _training(self, cast: Cast, model: nn.Module, teacher: Teacher | None, weight: float, name: str) -> Training:
        loss = weigh_sides(cast.again(), weight, 1 - weight, "self-distillation")
        distiller = Distiller(model, loss, teacher if loss.teacher_taps else None, logits=cast.logits)
        return Training([Stage("distill" if loss.teacher_taps else "labels", distiller, cast.config)], name)


def estimated_weight(by_labels: FrozenTeacher, by_teacher: FrozenTeacher, held: Loader) -> float:
    """The weight of the truth that would be best on held-out data; see ``limbeck.core.blending.optimal_weight``.

    Args:
        by_labels: A model that learned from the truth.
        by_teacher: One that learned from the step before.
        held: Held-out data with labels; what has none does not count.
    """
    truth, answers = list[Tensor](), (list[Tensor](), list[Tensor]())
    models = (by_labels.model, by_teacher.model)
    device = next((p.device for p in by_teacher.model.parameters()), torch.device("cpu"))
    by_labels.to(device)
    with dry(models[0]), dry(models[1]):
        for batch in held.batches():
            batch = batch.to(device)
            labels = batch.require("labels")
            counts = torch.ones(len(labels), dtype=torch.bool, device=device)
            found = [logits_of(call_model(m.model, batch.inputs), m.where) for m in (by_labels, by_teacher)]
            if held.task != "regression":
                found = [f.sigmoid() if held.task == "multilabel" else f.softmax(dim=-1) for f in found]
            if held.task == "classification":
                counts = counts if labels.is_floating_point() else labels >= 0
                labels = soft_labels(labels, found[0].shape[-1])
            truth.append(labels[counts].double().cpu())
            for kept, said in zip(answers, found, strict=True):
                kept.append(said[counts].double().cpu())
    return optimal_weight(torch.cat(truth), torch.cat(answers[0]), torch.cat(answers[1]))
