"""Domains in which the student lags behind its teacher are shown more often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import logits_of
from limbeck.data.language.domains import DomainLoader
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.loader import Loader
from limbeck.engine.stage import Stage
from limbeck.schemes.language.writing import same_tokens
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="ddk",
        name="DDK",
        title="DDK: Distilling Domain Knowledge for Efficient Large Language Models",
        year=2024,
        arxiv="2407.16154",
        knowledge="scheme",
        equation=r"r^{t+1}_i = \alpha \frac{r^t_i e^{l^S_i / l^T_i}}{\sum_j r^t_j e^{l^S_j / l^T_j}} + "
        r"\frac{1 - \alpha} N",
        use="For texts of several domains (`data.options.tag`), in some of which the student lags further behind its "
        "teacher than in others. With any loss; the paper's is cross_entropy and 0.2 times kd at temperature 1.",
        defaults={
            "interval": "1000 steps, the paper's",
            "alpha": "0.5, the paper's",
            "texts": "500 of each domain, the paper's",
        },
        evidence="formula",
        evidence_note="the paper's equations, written independently; shares that do not change are those of a loader",
        choices=(
            "the first interval shows domains by their size, as in the paper's algorithm",
            "shares are kept to the whole text, where the paper draws at random; a domain that is used up comes again, "
            "in another order",
            "perplexities are those of the validation data, over the predictions that count",
        ),
        tasks=("language",),
    )
)
class DDK(Scheme):
    r"""One stage in intervals; each begins with the perplexities of student and teacher on every domain.

    .. math:: r^0 = \mathrm{softmax}\left( l^S / l^T \right), \qquad
        r^{t+1} = \alpha\, \mathrm{softmax}\left( \log r^t + l^S / l^T \right) + \frac{1 - \alpha} N

    The share :math:`r_i` of domain i in what is shown grows with the ratio of the student's perplexity to the
    teacher's, and never falls below :math:`(1 - \alpha) / N`.

    Args:
        interval: Steps between two looks.
        alpha: :math:`\alpha`; 0 shows all domains alike.
        texts: Held-out rows of each domain that are looked at, at most.

    Source: DDK, arXiv 2407.16154.

    >>> DDK(interval=100).alpha
    0.5
    """

    def __init__(self, interval: int = 1000, alpha: float = 0.5, texts: int = 500) -> None:
        check_positive(interval, "scheme.interval")
        check_positive(texts, "scheme.texts")
        check_inside(alpha, "scheme.alpha", closed=True)
        self.interval, self.alpha, self.texts = interval, alpha, texts

    def trainings(self, cast: Cast) -> Iterator[Training]:
        judge = cast.need_teacher("domains are weighed against")
        if not isinstance(judge, FrozenTeacher):
            raise ConfigError(
                "what the teacher says of held-out texts can be asked only where it is a model at hand",
                where="teacher",
                found=type(judge).__name__,
                remedy="give the model itself, not a cache of what it said",
            )
        if not isinstance(cast.train, LanguageLoader):
            found, wanted = type(cast.train).__name__, "data with a tokenizer and a column of tags"
            raise DataError("domains are those of texts", where="scheme ddk", found=found, wanted=wanted)
        same_tokens(cast.train, "ddk")
        distiller = DomainDistiller(cast.student, cast.loss, judge, logits=cast.logits)
        distiller.plan(self, cast.train.tags, cast.validation)
        train = DomainLoader(cast.train, self.interval, distiller.shares)
        steps = cast.config.total_steps(cast.train.steps_per_epoch)  # an interval is no epoch
        config = cast.config.model_copy(update={"steps": steps, "epochs": None})
        yield Training([Stage("ddk", distiller, config)], train=train)


class DomainDistiller(Distiller):
    """Weighs domains; see :class:`DDK`."""

    weights: Tensor
    taught: Tensor
    interval: Tensor

    def plan(self, scheme: DDK, tags: tuple[str, ...], validation: Loader | None) -> None:
        """Take the scheme's settings, and the texts to look at."""
        self.alpha, self.every, self.most, self.tags, self.held = (
            scheme.alpha,
            scheme.interval,
            scheme.texts,
            tags,
            validation,
        )
        self.register_buffer("weights", torch.full((len(tags),), 1 / max(1, len(tags))).double())
        self.register_buffer("taught", torch.zeros(len(tags)).double())
        self.register_buffer("interval", torch.tensor(-1))

    def settled(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "interval": self.every, "domains": list(self.tags)}

    def shares(self, epoch: int) -> Tensor | None:
        """What each domain has of an interval; models are looked at where it has not begun before."""
        if int(self.interval) < epoch:
            assert isinstance(self.teacher, FrozenTeacher)
            if not bool(self.taught.any()):
                self.taught.copy_(self.perplexities(self.teacher.model, self.teacher.where))
            ratios = self.perplexities(self.student, self._logits) / self.taught.cpu()
            known = None if epoch == 0 else self.weights.cpu()
            self.weights.copy_(weighed(ratios, known, self.alpha))
            self.interval.fill_(epoch)
        return None if epoch == 0 else self.weights.cpu()

    def perplexities(self, model: torch.nn.Module, where: str | None) -> Tensor:
        """Of each domain's held-out texts, ``[N]``."""
        device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        loader, rows = self._looked_at()
        found = []
        with dry(model):
            for own in rows:
                pieces = [[(part, 0)] for part in own.split(loader.batch_size)]
                sums = [torch.stack(summed_loss(model, batch.to(device), where)) for batch in loader.read(pieces)]
                loss, number = torch.stack(sums).sum(dim=0)
                found.append((loss / number.clamp(min=1)).exp())
        return torch.stack(found).cpu()

    def _looked_at(self) -> tuple[LanguageLoader, list[Tensor]]:
        """The held-out texts, and which of them are of each domain."""
        held, rows, missing = self.held, [], "no validation data"
        if isinstance(held, LanguageLoader):
            known = {name: number for number, name in enumerate(held.tags)}
            tag = torch.full((held.samples,), -1) if held.rows.tag is None else held.rows.tag
            rows = [(tag == known.get(name, -2)).nonzero().flatten()[: self.most] for name in self.tags]
            missing = ", ".join(name for name, own in zip(self.tags, rows, strict=True) if not len(own))
        if missing or not isinstance(held, LanguageLoader):
            raise DataError(
                "a domain has no held-out text to look at",
                where="scheme ddk",
                found=missing,
                remedy="hold some out: data.options.validation",
            )
        return held, rows


def weighed(ratios: Tensor, weights: Tensor | None = None, alpha: float = 0.5) -> Tensor:
    r"""Shares of domains by how far the student lags in each: the paper's equations 1 (no shares before) and 2.

    Args:
        ratios: ``[N]``, the student's perplexity over the teacher's.
        weights: ``[N]``, the shares before.
        alpha: How much of the new shares is not spread evenly.

    >>> first = weighed(torch.tensor([2.0, 1.0]))
    >>> first, weighed(torch.tensor([2.0, 1.0]), first)
    (tensor([0.7311, 0.2689]), tensor([0.6904, 0.3096]))
    """
    if weights is None:
        return ratios.softmax(dim=0)
    return alpha * (weights.log() + ratios).softmax(dim=0) + (1 - alpha) / len(ratios)


def summed_loss(model: torch.nn.Module, batch: Batch, where: str | None) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the predictions that count, and how many they are."""
    scores, labels = logits_of(call_model(model, batch.inputs), where), batch.require("labels")
    counts = labels >= 0 if batch.mask is None else batch.mask & (labels >= 0)
    values = F.cross_entropy(scores[counts].double(), labels[counts], reduction="sum")
    return values, counts.sum().double()
