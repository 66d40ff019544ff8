"""A decoder teaches an encoder-decoder, place by place, on what the student writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Losses
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import key
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.reduction import check_inside
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.pairs import PairRows, beside, side_by_side
from limbeck.engine.stage import Stage
from limbeck.models.answering import answer, check_answers
from limbeck.models.drawing import row_keys
from limbeck.models.generating import Decoding
from limbeck.schemes.language.writing import WritingDistiller, author_of, same_tokens, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_OWN, _ROWS = "own", 3  # in a batch's extras: what the student wrote; and what keeps its draws apart from others


@register(
    Card(
        key="mu_encdec_kd",
        name="Mu",
        title="Return of the Encoder: Maximizing Parameter Efficiency for SLMs",
        year=2025,
        arxiv="2501.16273",
        code="microsoft/encoder-decoder-slm",
        knowledge="scheme",
        equation=r"\alpha\, \mathrm{KL}\left( p_T(\cdot \mid x, \tilde y_{<t}) \,\|\, p_S(\cdot \mid x, \tilde y_{<t}) "
        r"\right) + (1 - \alpha)\, \mathrm{CE}(p_S, y), \qquad \tilde y \sim p_S(\cdot \mid x)",
        use="For small students that read a long prompt once, with an encoder, and write short answers: an "
        "encoder-decoder with the tokenizer of its teacher, a causal language model. With cross_entropy and kd at "
        "temperature 1; any loss over logits takes kd's place.",
        defaults={
            "alpha": "0.9, the released code's",
            "temperature": "0.9, the released code's, of drawing",
            "top_k": "128, the released code's",
            "max_new_tokens": "256, the released code's",
            "mask_padding": "on; the released code learns from padding, too",
        },
        evidence="parity",
        evidence_note="loss and gradient of KDModel.forward_kd of microsoft/encoder-decoder-slm at b306bae on student "
        "and teacher logits of several widths, with padding and without",
        choices=(
            "the loss over padding, which the released code has, is left out unless mask_padding is off; texts are "
            "then as wide as max_new_tokens, as there",
            "ids that stand for no token are never drawn; the released code draws them and puts the unknown token in "
            "their place",
            "sources and targets are padded to a batch's longest, where the released code pads to fixed lengths; "
            "positions of the teacher do not count padding",
            "the order of student and decoder sizes, and tuning the teacher by LoRA, are the user's",
        ),
        tasks=("language",),
        cost="Writing a text takes a forward of the student's decoder for each of its tokens.",
    )
)
class MuEncDecKD(Scheme):
    r"""One stage with two passes a step: what the student wrote, by the teacher; the data's answers, by labels.

    .. math:: L = \alpha\, L_{kd}(\tilde y) + (1 - \alpha)\, L_{ce}(y)

    Terms of the loss that ask the teacher learn from :math:`\tilde y`, all others from y. The data are those of
    :func:`~limbeck.data.language.pairs.seq2seq_source`; where the teacher's places stand is told there.

    Args:
        alpha: What the terms weigh that ask the teacher; the others weigh the rest.
        on_policy: Learn from the teacher on the student's own texts; off: on the data's, which writes nothing.
        max_new_tokens: Of a text at most.
        temperature: Of drawing; 0 takes the likeliest token every time.
        top_k: Draw among so many likeliest tokens; 0: among all.
        mask_padding: Padding does not count.

    Source: Return of the Encoder, arXiv 2501.16273.

    >>> MuEncDecKD().decoding.top_k
    128
    """

    def __init__(
        self,
        alpha: float = 0.9,
        on_policy: bool = True,
        max_new_tokens: int = 256,
        temperature: float = 0.9,
        top_k: int = 128,
        mask_padding: bool = True,
    ) -> None:
        check_inside(alpha, "scheme.alpha", closed=True)
        self.alpha, self.on_policy, self.mask_padding, self.prompt = alpha, on_policy, mask_padding, 1
        self.decoding = Decoding(max_new_tokens, temperature, top_k)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = texts_of(cast.train, "mu_encdec_kd")
        check_answers(cast.student, "student")
        judge = cast.need_teacher("an encoder-decoder learns from")
        author_of(judge, "teacher")
        assert isinstance(judge, FrozenTeacher)
        same_tokens(loader, "mu_encdec_kd")
        beside(loader.example(1))
        other = [tap for tap in cast.loss.teacher_taps if tap != "logits"]
        if other:
            wanted = "terms that ask the teacher for its logits"
            raise ConfigError(
                "only logits stand at the same places", where="loss", found=", ".join(other), wanted=wanted
            )
        aligned = AlignedTeacher(judge.model, logits=judge.where)
        distiller = MuDistiller(cast.student, cast.loss, aligned, logits=cast.logits)
        distiller.take(self, cast, loader)
        yield Training([Stage("mu_encdec_kd", distiller, cast.config)])


def aligned_logits(teacher_logits: Tensor, count: int) -> Tensor:
    """Those of the teacher that predict the last so many tokens it reads, ``[B, S + T, V]`` to ``[B, T, V]``.

    >>> aligned_logits(torch.arange(5.0).view(1, 5, 1), 2).flatten().tolist()
    [2.0, 3.0]
    """
    return teacher_logits[:, teacher_logits.shape[1] - count - 1 : -1]


class AlignedTeacher(FrozenTeacher):
    """A decoder that answers at the places of an encoder-decoder's decoder."""

    def __call__(self, batch: Batch) -> Trace:
        said = super().__call__(batch)
        taps = {**said.taps, "logits": aligned_logits(said.logits, beside(batch)["decoder_input_ids"].shape[1])}
        return Trace(said.output, taps)


class MuDistiller(WritingDistiller):
    """Learns from the teacher on its own texts, and from labels on the data's; see :class:`MuEncDecKD`."""

    def take(self, scheme: MuEncDecKD, cast: Cast, loader: LanguageLoader) -> None:
        """Take the scheme's settings, and the marks of the texts."""
        self.plan(scheme, loader, cast.seed)
        self.on_policy, self.mask_padding = scheme.on_policy, scheme.mask_padding
        self.apart(scheme.alpha)
        assert isinstance(loader.rows, PairRows)
        self.start, self.size = loader.rows.start, loader.split.tokens.size
        config: Any = cast.student.config
        said = getattr(config, "decoder_start_token_id", None)
        if said is not None and said != self.start:
            raise DataError(
                "the student's decoder begins with another token than these texts",
                where="data.options.start",
                found=self.start,
                wanted=f"{said}, the student's decoder_start_token_id",
                remedy=f"start: {said}",
            )
        config.decoder_start_token_id = self.start  # so that whoever has the student knows how it begins
        cast.student.generation_config.decoder_start_token_id = self.start  # type: ignore[union-attr]

    def apart(self, alpha: float) -> None:
        """Tell the terms that ask the teacher from the others."""
        self.alpha = alpha
        self._parts = _part(self.loss, True), _part(self.loss, False)  # in a tuple: they are not children once more

    def settled(self) -> dict[str, Any]:
        own = {"alpha": self.alpha, "on_policy": self.on_policy, "mask_padding": self.mask_padding}
        return {**super().settled(), **own, "start": self.start}

    def objectives(self) -> Iterator[Objective]:
        yield from super().objectives()
        for unit in {o.contract.normalizer for o in self.loss if o.teacher_taps}:
            yield type("Own", (Objective,), {"contract": Contract(normalizer=f"{_OWN}/{unit}")})()

    def made(self, batch: Batch) -> Batch:
        own = self.answered(batch) if self.on_policy and self.alpha else batch
        units = {o.contract.normalizer for o in self.loss if o.teacher_taps}
        return batch.replace(extras={**batch.extras, _OWN: own, **{f"{_OWN}/{u}": _places(own, u) for u in units}})

    def answered(self, batch: Batch) -> Batch:
        """A batch's sources with what the student writes about them."""
        ids, there = beside(batch)["input_ids"], batch.inputs["attention_mask"] > 0
        index = torch.arange(len(ids), device=ids.device) if batch.index is None else batch.index
        keys = row_keys(index, key(_ROWS, self.step_key(batch)))
        marks: dict[str, Any] = {"start": self.start, "pad": self.pad}
        said = answer(
            self.student, ids, there, self.decoding, ends=self.ends, size=self.size, keys=keys, where="student", **marks
        )
        target, kept, mask = said.ids, said.mask, None
        if not self.mask_padding:
            rest = (0, self.decoding.max_new_tokens - target.shape[1])
            target = torch.nn.functional.pad(target, rest, value=self.pad)
            kept, mask = torch.nn.functional.pad(kept, rest), torch.ones_like(target, dtype=torch.bool)
        made = side_by_side(ids, there, target, kept, **marks, mask=mask)
        labels = torch.full_like(target, -1)  # nobody says that what it wrote is right
        return made.replace(labels=labels, index=batch.index, progress=batch.progress)

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        own: Batch = batch.extras.get(_OWN, batch)
        if _OWN in batch.extras:
            units = {o.contract.normalizer for o in self._parts[0]}
            totals = {unit: batch.totals[f"{_OWN}/{unit}"] for unit in units if batch.totals}
            own = own.replace(totals=totals, progress=batch.progress)
        found = Losses(torch.zeros((), device=batch.require("labels").device), {}, {})
        for loss, given, weight in zip(self._parts, (own, batch), (self.alpha, 1 - self.alpha), strict=True):
            if not len(loss.names) or not weight:
                continue
            prepared = given
            for objective in loss:
                prepared = objective.prepare(prepared)
            teacher = self._teach(prepared) if loss.teacher_taps else Trace(None)
            part = self.compare(self.heard(prepared), teacher, prepared, counted=given, loss=loss)
            found.total = found.total + weight * part.total
            found.terms |= part.terms
            found.weights |= {name: weight * value for name, value in part.weights.items()}
            found.apart |= {side: found.apart.get(side, 0.0) + weight * value for side, value in part.apart.items()}
            if loss is self._parts[1] or found.logits is None:
                found.logits = part.logits
        return found

    def _common(self, objective: Objective, student: Trace, teacher: Trace) -> tuple[Trace, Trace]:
        """Of logits those that both have."""
        if not objective.teacher_taps or "logits" not in student.taps:
            return student, teacher
        size = min(student.logits.shape[-1], teacher.logits.shape[-1])
        return student.narrowed(size), teacher.narrowed(size)


def _part(loss: Terms, asks: bool) -> Terms:
    """The terms that ask a teacher, or the others; they are the same objects."""
    kept = [(name, o, weight) for name, o, weight in loss.items() if bool(o.teacher_taps) == asks]
    return Terms([o for _, o, _ in kept], [weight for *_, weight in kept], [name for name, *_ in kept])


def _places(batch: Batch, unit: str) -> Tensor:
    """As many places that are True as the unit counts."""
    mask = batch.require("mask")
    known = {"positions": mask, "labels": mask & (batch.require("labels") >= 0), "samples": mask.any(dim=1)}
    return known[unit] if unit in known else batch.extras[unit]
