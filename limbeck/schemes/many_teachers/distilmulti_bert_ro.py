"""DistilMulti-BERT: a masked language model of half the layers learns from several teachers at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.ensembling import mixed_logits, stacked
from limbeck.core.errors import ConfigError, DataError, ModelError
from limbeck.core.hashing import below, uniform
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import check_positive, widen
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.masked import MaskedRows
from limbeck.data.language.translate import translate
from limbeck.engine.stage import Stage
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes.many_teachers.half_layers import start_from
from limbeck.schemes.many_teachers.token_spans import apart, piece_means, pieces, same_spans, shared_kl
from limbeck.schemes.parts.step_draws import step_bits
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_GAPS = 68  # keeps these draws apart from others


@register(
    Card(
        key="distilmulti_bert_ro",
        name="DistilMulti-BERT-base-ro",
        title="Distilling the Knowledge of Romanian BERTs Using Multiple Teachers",
        year=2021,
        arxiv="2112.12650",
        code="racai-ai/Romanian-DistilBERT",
        knowledge="scheme",
        equation=r"L = a_{ce} T^2 \mathrm{KL}(\tfrac 1 K \sum_k p_k \| p_S) + a_{mlm} L_{MLM} + "
        r"a_{cos} \tfrac 1 K \sum_k (1 - \cos(h_S, h_k))",
        use="For masked language models, on plain texts: data of `limbeck.data.language.masked:masked_source`, and "
        "`loss: {cross_entropy: 2}`, which is the part of masked tokens. How loyal the student is tells "
        "`limbeck.analysis.probability_loyalty` and its like.",
        defaults={
            "kl, cosine, temperature": "5, 1, 2: DistilBERT's, whose recipe the paper follows; 2 for masked tokens",
        },
        evidence="reading",
        choices=(
            "The paper's abstract, the repository's README and the model cards could be read; the losses are "
            "DistilBERT's from memory, and how the two teachers are brought together is our choice.",
            "Teachers of the student's tokens are averaged in probabilities; the cosine is averaged over all.",
            "A teacher of other tokens (`other`, with data.options.teacher_tokenizer) sees gaps under the same "
            "characters. It teaches predictions of tokens that cover the same characters, over the tokens that both "
            "vocabularies have, and mean states of the least stretches of text that both tokenizers cut off alike.",
            "Divergence and cosine run over all tokens that are no padding, as in DistilBERT.",
        ),
        tasks=("language", "several teachers"),
        cost="Every teacher answers each batch.",
    )
)
class DistilMultiBertRo(Scheme):
    r"""One stage on texts whose gaps are drawn anew in each step.

    Args:
        kl: :math:`a_{ce}`.
        cosine: :math:`a_{cos}`.
        temperature: T.
        start: The student begins as every second layer of the first teacher of its tokens (every n-th, by how many
            fewer layers it has), with its embeddings and its head.
        other: The teachers that have tokens of their own, by name.
        tap: The hidden states that are compared.

    Source: Distilling the Knowledge of Romanian BERTs Using Multiple Teachers, arXiv 2112.12650.

    >>> DistilMultiBertRo(other=["robert"]).temperature
    2.0
    """

    def __init__(
        self,
        kl: float = 5.0,
        cosine: float = 1.0,
        temperature: float = 2.0,
        start: bool = True,
        other: list[str] = [],  # noqa: B006  never changed
        tap: str = "blocks:-1",
    ) -> None:
        for name, value in (("kl", kl), ("cosine", cosine)):
            if value < 0:
                raise ConfigError("must not be negative", where=f"scheme.{name}", found=value)
        check_positive(temperature, "scheme.temperature")
        self.kl, self.cosine, self.temperature = kl, cosine, temperature
        self.start, self.other, self.tap = start, other, tap

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teachers = cast.need_teachers("a masked language model learns from", least=1)
        unknown = [name for name in self.other if name not in teachers]
        if unknown:
            raise ConfigError("no such teacher", where="scheme.other", found=unknown, wanted=", ".join(teachers))
        if cast.loss.teacher_taps:
            found = ", ".join(cast.loss.names)
            raise ConfigError("the loss is what hidden tokens teach", where="loss", found=found, wanted="cross_entropy")
        train = cast.train
        if not isinstance(train, LanguageLoader) or not isinstance(train.rows, MaskedRows):
            raise DataError(
                "a masked language model learns from texts with gaps",
                where="data.source",
                found=type(train).__name__,
                wanted="limbeck.data.language.masked:masked_source",
            )
        if self.other and train.split.teacher_tokens is None:
            raise DataError(
                "the tokens of these teachers are not known",
                where="data.options.teacher_tokenizer",
                found="none, or the student's own",
                remedy="name their tokenizer, or leave them out of scheme.other",
            )
        own = [name for name in teachers if name not in self.other]
        if self.start:
            if not own:
                raise ConfigError("no teacher has the student's tokens", where="scheme.start", remedy="start: false")
            start_from(cast.student, teachers[own[0]])
        yield Training([Stage("masked", GapDistiller(cast, self, teachers, train), cast.config)])


class Over(Objective):
    """Stands for a mean over places that a batch's extras tell, so that these are counted over a step.

    Args:
        places: Their name.
    """

    def __init__(self, places: str) -> None:
        super().__init__()
        self.contract = Contract(normalizer=places, at_equal=None)  # type: ignore[misc]


class GapDistiller(Distiller):
    """See :class:`DistilMultiBertRo`."""

    def __init__(
        self, cast: Cast, scheme: DistilMultiBertRo, teachers: dict[str, Teacher], train: LanguageLoader
    ) -> None:
        super().__init__(cast.student, cast.loss, None, logits=cast.logits, also=("logits", scheme.tap))
        assert isinstance(train.rows, MaskedRows)
        self.scheme, self.rows, self.seed = scheme, train.rows, cast.seed
        self._judges = (dict(teachers),)
        # All tokens that are no padding; those, and the pieces, that a teacher of other tokens has in common with them.
        units = ["attended", *(["common_tokens", "common_pieces"] if scheme.other else [])]
        self.units = nn.ModuleList(Over(unit) for unit in units)
        shared = train.split.teacher_tokens if scheme.other else None
        found = None if shared is None else translate(train.split.tokens, shared)
        empty = torch.zeros(0, dtype=torch.long)
        self.register_buffer("own_ids", empty if found is None else found.student, persistent=False)
        self.register_buffer("other_ids", empty if found is None else found.teacher, persistent=False)

    own_ids: Tensor
    other_ids: Tensor

    def objectives(self) -> Iterator[Objective]:
        yield from self.loss
        yield from self.units  # type: ignore[misc]

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))

    def made(self, batch: Batch) -> Batch:
        """With gaps of this step."""
        bits = step_bits(batch, batch.extras["whole"].shape[1], 3, _GAPS, self.seed)
        made = self.rows.hidden(batch, uniform(bits[..., :2]), below(bits[..., 2], self.rows.masking.size))
        if self.scheme.other:
            pairs, (own, _) = self.in_common(made)
            known = own.new_zeros(len(own), own.shape[1] + 1, dtype=torch.bool).scatter_(1, own + 1, True)[:, 1:]
            made = made.replace(extras={**made.extras, "common_tokens": pairs >= 0, "common_pieces": known})
        return made

    def setup(self, batch: Batch, data: DataInfo | None = None) -> GapDistiller:
        super().setup(batch, data)
        device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        for name, teacher in self._judges[0].items():
            teacher.to(device)
            teacher.attach(("logits", self.scheme.tap), self._seen(name, batch))
        return self

    def _seen(self, name: str, batch: Batch) -> Batch:
        """A batch as a teacher reads it."""
        return batch if name in self.scheme.other else batch.replace(teacher_inputs=None)

    @torch.compiler.disable
    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        said = self.heard(prepared)
        losses = self.compare(said, Trace(None), prepared, counted=batch)
        if not self.training:
            return losses
        heard = {name: teacher(self._seen(name, prepared)) for name, teacher in self._judges[0].items()}
        for name, value, weight in self.parts(said, heard, prepared):
            if weight:
                losses.total = losses.total + weight * value
                losses.terms[name], losses.weights[name] = value.detach(), value.new_tensor(weight)
        return losses

    def parts(self, said: Trace, heard: dict[str, Trace], batch: Batch) -> list[tuple[str, Tensor, float]]:
        """Divergence and cosine, as this batch's shares of those of the step."""
        scheme, there = self.scheme, batch.extras["attended"]
        own = [trace for name, trace in heard.items() if name not in scheme.other]
        states, count = widen(said[scheme.tap]), there.sum().clamp(min=1)
        divergence, cosine = states.new_zeros(()), states.new_zeros(())
        if own:
            mean, share = self._mean(said.logits, own), batch.share("attended")
            divergence = share * len(own) * kd_loss(said.logits, mean, temperature=scheme.temperature, mask=there)
            cosine = share * sum((self._apart(states, t)[there].sum() / count for t in own), cosine)
        for name in scheme.other:
            first, second = self._of_other(said, heard[name], states, batch)
            divergence = divergence + batch.share("common_tokens") * first
            cosine = cosine + batch.share("common_pieces") * second
        return [("kl", divergence / len(heard), scheme.kl), ("cosine", cosine / len(heard), scheme.cosine)]

    def _mean(self, logits: Tensor, own: list[Trace]) -> Tensor:
        """Logits of the teachers' mean softened probabilities, of the tokens that there are."""
        size = min(logits.shape[-1], self.rows.masking.size)
        every = stacked([trace.logits[..., :size] for trace in own])
        mean = mixed_logits(every, every.new_full((len(own),), 1 / len(own)), temperature=self.scheme.temperature)
        return torch.nn.functional.pad(mean, (0, logits.shape[-1] - size), value=-1e4)

    def _apart(self, states: Tensor, trace: Trace) -> Tensor:
        other = trace[self.scheme.tap]
        if other.shape[-1] != states.shape[-1]:
            raise ModelError(
                "states of other widths have no angle",
                where="scheme.tap",
                found=f"{states.shape[-1]} of the student, {other.shape[-1]} of a teacher",
                remedy="take a student as wide as its teachers, or cosine: 0",
            )
        return apart(states, other)

    def in_common(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Which of the other tokens covers the same characters as each, and the number of everybody's piece."""
        extras = batch.extras
        common = extras["offsets"], extras["teacher_offsets"], extras["attended"]
        theirs = batch.teacher_inputs["attention_mask"] > 0
        return same_spans(*common, theirs), pieces(*common, theirs)

    def _of_other(self, said: Trace, heard: Trace, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of a teacher that has tokens of its own: means over common tokens, and over common pieces."""
        pairs, number = self.in_common(batch)
        sample, place = (pairs >= 0).nonzero(as_tuple=True)
        rows = shared_kl(
            said.logits[sample, place],
            heard.logits[sample, pairs[sample, place]],
            self.own_ids,
            self.other_ids,
            self.scheme.temperature,
        )
        divergence = rows.sum() / max(1, len(rows))
        if not self.scheme.cosine:
            return divergence, divergence.new_zeros(())
        first, known = piece_means(states, number[0], states.shape[1])
        second, _ = piece_means(widen(heard[self.scheme.tap]).to(states.dtype), number[1], states.shape[1])
        gaps = self._apart(first, Trace(None, {self.scheme.tap: second}))[known]
        return divergence, gaps.sum() / max(1, len(gaps))
