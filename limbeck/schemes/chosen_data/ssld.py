"""SSLD: labelled and chosen unlabelled images alike teach by the teacher's answers alone, then the labelled ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.teacher import FrozenTeacher  # noqa: F401  for the example
from limbeck.data.loader import IndexedLoader
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.looking import Unlabelled, indexed, need_labels, only_teacher, said_of_all
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_CHOSEN = "chosen_samples.json"


def topk_per_class(scores: Tensor, most: int) -> Tensor:
    """The samples that a class scores highest, for every class.

    Args:
        scores: ``[N, C]``, such as a teacher's probabilities.
        most: Of one class.

    Returns:
        Rows, ascending; one that several classes claim stands once.

    >>> topk_per_class(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]), 1)
    tensor([0, 2])
    """
    return scores.topk(min(most, len(scores)), dim=0).indices.flatten().unique()


def lookalikes(features: Tensor, others: Tensor, similar: float) -> Tensor:
    """Which samples are nearly the same as one of the others: True where a cosine reaches ``similar``, ``[N]``.

    Args:
        features: ``[N, D]``.
        others: ``[M, D]``.
        similar: From which cosine on.

    >>> lookalikes(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0]]), 0.99)
    tensor([ True, False])
    """
    known = F.normalize(others, dim=1).T
    parts = [(F.normalize(part, dim=1) @ known).amax(dim=1) >= similar for part in features.split(4096)]
    return torch.cat(parts)


@register(
    Card(
        key="ssld",
        name="SSLD",
        title="Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve Backbones",
        year=2021,
        arxiv="2103.05959",
        code="PaddlePaddle/PaddleClas",
        knowledge="scheme",
        equation=r"L = \tfrac{1}{2} KL(p_T \| p_S) + \tfrac{1}{2} KL(p_S \| p_T)",
        use="Where there is a strong teacher and many images without labels beside those that have one: a sample "
        "without a label has the label -1. Loss {kd: {weight: 0.5, temperature: 1}, reverse_kl: {weight: 0.5}} as "
        "released, or jsd, as the paper says it.",
        defaults={
            "per_class": "4000: four million images for a thousand classes",
            "finetune": "30 of 360 epochs, as in the documentation",
            "finetune_lr": "a hundredth, as in the documentation",
            "similar": "0.999, ours",
        },
        evidence="formula",
        evidence_note="the released loss computed independently, over batch size times classes; the choice of samples",
        choices=(
            "Images of the pool that are nearly one of the validation data, by the teacher's features, are left out; "
            "the authors match SIFT features.",
            "The teacher itself chooses from the pool; the authors have a stronger model do so.",
            "An image that two classes choose stands once.",
            "The loss is the recipe's mean over samples; the code adds up the batch and multiplies by the classes.",
            "Their last stage at higher resolution and their rates of layers in transfer are recipes of their own.",
        ),
    )
)
class SSLD(Scheme):
    r"""Choose from the unlabelled samples, train on these and the labelled ones, then on the labelled ones alone.

    .. math:: L = \tfrac{1}{2} KL(p_T \| p_S) + \tfrac{1}{2} KL(p_S \| p_T)

    The loss is the recipe's, of terms that ask the teacher. No label is used but to tell which samples have one.

    Args:
        per_class: Unlabelled samples that each class chooses: those to which the teacher gives it most.
        finetune: Length of the second training, a part of the first's; 0: there is none.
        finetune_lr: Its learning rate, a part of the first's.
        similar: Cosine of the teacher's features from which on an unlabelled sample counts as one of the validation
            data; ``None``: do not look.

    Source: arXiv 2103.05959, and the documentation of PaddlePaddle/PaddleClas.

    >>> from limbeck.core.objective import Terms
    >>> from limbeck.data.resident import ResidentLoader
    >>> from limbeck.objectives import JSD
    >>> from torch import nn
    >>> labels = torch.arange(40) % 3
    >>> train = ResidentLoader(torch.rand(40, 4), labels.index_fill(0, torch.arange(10, 40), -1), batch_size=4)
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(JSD()), FrozenTeacher(nn.Linear(4, 3)), TrainConfig(epochs=12), train)
    >>> first, second = SSLD(per_class=2).trainings(cast)
    >>> first.train.shown <= 16, second.train.shown, second.stages[0].config.epochs
    (True, 10, 1)
    """

    def __init__(
        self,
        per_class: int = 4000,
        finetune: float = 30 / 360,
        finetune_lr: float = 0.01,
        similar: float | None = 0.999,
    ) -> None:
        if per_class < 1:
            raise ConfigError("there must be one at least", where="scheme.per_class", found=per_class)
        check_inside(finetune, "scheme.finetune", closed=True)
        check_positive(finetune_lr, "scheme.finetune_lr")
        if similar is not None:
            check_inside(similar, "scheme.similar", -1.0, 1.0, closed=True)
        self.per_class, self.finetune, self.finetune_lr, self.similar = per_class, finetune, finetune_lr, similar

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loss, loader = only_teacher(cast.loss, "SSLD"), indexed(cast.train, "SSLD")
        teacher = cast.need_teacher("SSLD asks")
        labelled = (need_labels(loader, "SSLD") >= 0).nonzero().flatten()
        rows, facts = self.chosen(cast, loader)
        if cast.folder is not None:
            write_json(cast.folder / _CHOSEN, {**facts, "samples": rows.tolist()})
        both = torch.cat([labelled, rows]).sort().values
        if not self.finetune or not len(labelled):
            distiller = Unlabelled(cast.student, loss, teacher, logits=cast.logits)
            yield Training([Stage("distill", distiller, cast.config)], train=loader.chosen(both))
            return
        first = Unlabelled(cast.student, cast.again(), teacher, logits=cast.logits)
        yield Training([Stage("distill", first, cast.config)], "all", train=loader.chosen(both))
        second = Unlabelled(cast.student, loss, teacher, logits=cast.logits)
        yield Training([Stage("finetune", second, self._shorter(cast.config))], train=loader.chosen(labelled))

    def chosen(self, cast: Cast, loader: IndexedLoader) -> tuple[Tensor, dict[str, int]]:
        """The unlabelled samples that are taken, by id, and how many there were.

        Raises:
            DataError: There are none.
        """
        pool = (need_labels(loader, "SSLD") < 0).nonzero().flatten()
        if not len(pool):
            raise DataError(
                "every sample has a label, so there is none to choose",
                where="data",
                remedy="give the further samples with label -1, or train with scheme: offline",
            )
        teacher, device = cast.need_teacher("SSLD asks"), _device(cast)
        held = cast.validation if self.similar is not None and isinstance(cast.validation, IndexedLoader) else None
        taps = ("logits",) if held is None else ("logits", "penultimate")
        said = said_of_all(teacher, loader.chosen(pool), taps, device)
        free = torch.ones(len(pool), dtype=torch.bool)
        if held is not None:
            assert self.similar is not None
            known = said_of_all(teacher, held, ("penultimate",), device)["penultimate"].flatten(1)
            free = ~lookalikes(said["penultimate"].flatten(1), known, self.similar)
        ids, scores = said["index"][free], said["logits"][free].softmax(dim=-1)
        rows = ids[topk_per_class(scores, self.per_class)] if len(ids) else ids
        return rows, {"unlabelled": len(pool), "like_validation": int((~free).sum()), "chosen": len(rows)}

    def _shorter(self, config: TrainConfig) -> TrainConfig:
        length = {n: max(1, round(v * self.finetune)) for n in ("epochs", "steps") if (v := getattr(config, n))}
        return config.model_copy(update={**length, "lr": config.lr * self.finetune_lr})


def _device(cast: Cast) -> torch.device:
    return next((p.device for p in cast.student.parameters()), torch.device("cpu"))
