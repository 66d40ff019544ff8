"""Instruction tuning on a mixture of sets, in shares that are kept, with a look at every set by itself."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError, did_you_mean
from limbeck.core.files import write_json
from limbeck.core.survey import dry
from limbeck.data.language.domains import DomainLoader
from limbeck.data.language.loader import LanguageLoader
from limbeck.engine.stage import Stage
from limbeck.schemes.language.ddk import summed_loss
from limbeck.schemes.language.telling import Telling
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_FILE = "mixture.json"  # in the run's folder


@register(
    Card(
        key="tulu_sft_mixture",
        name="Tulu",
        title="How Far Can Camels Go? Exploring the State of Instruction Tuning on Open Resources",
        year=2023,
        arxiv="2306.04751",
        code="allenai/open-instruct",
        knowledge="scheme",
        equation=r"L = - \frac{\sum_t m_t \log p_S(y_t \mid y_{<t})}{\sum_t m_t}",
        use="To tune a language model on instructions of people and of teachers that give texts alone. Read sets by "
        "`limbeck.data.language.mixture:mixture_source`, which writes them in one form, caps them and leaves out what "
        "tests hold; with cross_entropy. No teacher is asked: its texts are in the data.",
        defaults={
            "shares": "by size, the paper's; its sets were cut down to 100,000 records before (`cap`)",
            "texts": "500 of a set, our choice",
            "train": "the paper's runs: adamw at 2e-5, falling linearly after 3% of warm-up, no weight decay, 2 "
            "epochs, batches of 128, 2048 tokens",
        },
        evidence="formula",
        evidence_note="the loss is the cross-entropy of the assistant's tokens and their end alone, its gradient zero "
        "elsewhere; who wrote a text changes nothing",
        choices=(
            "shares are kept to the whole text in every epoch, where the paper draws from all sets joined",
            "the mean runs over all answer tokens of a step, as with one large batch",
            "sets are judged by the loss of their own held-out answers, before and after; tasks with a metric of their "
            "own are measured beside it (`limbeck.analysis`)",
            "decontamination is that of Tulu 3 (arXiv 2411.15124), since this paper has none",
        ),
        tasks=("language",),
    )
)
class TuluSFTMixture(Scheme):
    r"""One stage on texts of several sets, told apart by tags, each with its share of every epoch.

    .. math:: L = - \frac{\sum_t m_t \log p_S(y_t \mid y_{<t})}{\sum_t m_t}

    ``mixture.json`` in the run's folder tells of every set its author, rows, answer tokens, how long an answer is, and
    the mean loss of held-out answers before and after; and the same numbers by author. Long answers please judges, so
    their length belongs beside every score.

    Args:
        shares: Of sets, by name, in any sum; a set that is left out is not shown. Empty: as many as there are.
        by: Who wrote a set's answers: ``human``, ``self`` or a teacher's name, where the data do not tell.
        texts: Held-out rows of a set that are looked at, at most; 0: none are.

    Source: How Far Can Camels Go?, arXiv 2306.04751.

    >>> TuluSFTMixture(shares={"dolly": 1, "sharegpt": 3}).shares["sharegpt"]
    3
    """

    def __init__(
        self,
        shares: dict[str, float] = {},  # noqa: B006  never changed
        by: dict[str, str] = {},  # noqa: B006  never changed
        texts: int = 500,
    ) -> None:
        for name, share in shares.items():
            if not 0 <= share < float("inf"):
                raise ConfigError("must be 0 or above", where=f"scheme.shares.{name}", found=share)
        if shares and not any(shares.values()):
            raise ConfigError("no set is shown", where="scheme.shares", found="all 0")
        if texts < 0:
            raise ConfigError("must be 0 or more", where="scheme.texts", found=texts)
        self.shares, self.by, self.texts = dict(shares), dict(by), texts

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = cast.train
        if not isinstance(loader, LanguageLoader) or not loader.tags:
            found = "no tags" if isinstance(loader, LanguageLoader) else type(loader).__name__
            remedy = "name their column: data.options.tag, or read them by mixture_source"
            raise DataError("sets are told by tags", where="scheme tulu_sft_mixture", found=found, remedy=remedy)
        for option, given in (("shares", self.shares), ("by", self.by)):
            for name in given:
                if name not in loader.tags:
                    known, near = ", ".join(loader.tags), did_you_mean(name, loader.tags)
                    raise ConfigError("no such set", where=f"scheme.{option}.{name}", wanted=known, remedy=near)
        wanted = torch.tensor([float(self.shares.get(name, 0.0)) for name in loader.tags]).double()
        train = DomainLoader(loader, max(1, loader.steps_per_epoch), lambda _: wanted) if self.shares else loader
        distiller = Telling(cast, cast.teacher, {"shares": self.shares})
        before = self._judged(cast)
        yield Training([Stage("tulu_sft_mixture", distiller, cast.config)], train=train)
        if cast.folder is not None:
            facts = self._told(loader, before, self._judged(cast))
            if int(os.environ.get("RANK", "0")) == 0:
                write_json(cast.folder / _FILE, facts)

    def _judged(self, cast: Cast) -> dict[str, float]:
        """The mean loss of each set's held-out answers, by name."""
        held = cast.validation
        if not self.texts or not isinstance(held, LanguageLoader):
            return {}
        cast.student.to(held.device)
        return losses_by_tag(cast.student, held, self.texts, cast.logits)

    def _told(self, loader: LanguageLoader, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
        known: dict[str, Any] = loader.split.settings.get("mixture", {})
        rows, tokens = counted(loader)
        share = torch.tensor([float(self.shares.get(name, 0.0)) for name in loader.tags] if self.shares else rows)
        sets, authors = {}, defaultdict[str, dict[str, int]](lambda: {"rows": 0, "tokens": 0})
        for number, name in enumerate(loader.tags):
            own = dict(known.get(name, {}))
            author: str = self.by.get(name) or own.get("by", "unknown")
            own["by"] = author
            own |= {"rows": rows[number], "tokens": tokens[number], "length": tokens[number] / max(1, rows[number])}
            own |= {"share": float(share[number] / share.sum())}
            own |= {f"loss_{when}": all[name] for when, all in (("before", before), ("after", after)) if name in all}
            sets[name] = own
            authors[author]["rows"] += rows[number]
            authors[author]["tokens"] += tokens[number]
        return {"sets": sets, "authors": dict(authors)}


def counted(loader: LanguageLoader) -> tuple[list[int], list[int]]:
    """Rows of each tag, and tokens in them that are predicted."""
    size = len(loader.tags)
    rows, tokens = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    for first in range(0, len(loader.split), loader.split.measured):
        batch = loader.rows.batch(torch.arange(first, min(first + loader.split.measured, len(loader.split))))
        tag = batch.extras["tag"]
        there = tag >= 0
        rows.index_add_(0, tag[there], torch.ones_like(tag[there]))
        tokens.index_add_(0, tag[there], batch.require("mask").sum(dim=1)[there])
    return rows.tolist(), tokens.tolist()


def losses_by_tag(
    model: nn.Module, loader: LanguageLoader, most: int = 500, where: str | None = None
) -> dict[str, float]:
    """The mean cross-entropy of a token in the rows of each tag, by name; a tag without rows is left out.

    Args:
        model: A causal language model; its mode is as before afterwards.
        loader: Of texts with tags; without them nothing is found.
        most: Rows of a tag that are looked at, the first.
        where: The logits in the model's output.
    """
    tags, found = loader.rows.tag, dict[str, float]()
    if tags is None:
        return found
    with dry(model):
        for number, name in enumerate(loader.tags):
            rows = (tags == number).nonzero().flatten()[:most]
            if not len(rows):
                continue
            pieces = [[(part, 0)] for part in rows.split(loader.split.measured)]
            sums = [torch.stack(summed_loss(model, batch, where)) for batch in loader.read(pieces)]
            loss, tokens = torch.stack(sums).sum(dim=0).tolist()
            found[name] = loss / max(1.0, tokens)
    return found
