"""Sequence-level distillation: the teacher writes first, and the student learns what it wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.reduction import check_inside, check_positive
from limbeck.data.language.bleu import sentence_bleu
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.rewritten import Ids, after, marked, parted, places, rewritten, text_of, unended
from limbeck.data.language.split import LanguageSplit
from limbeck.data.loader import Loader
from limbeck.engine.identity import digest
from limbeck.engine.stage import Stage
from limbeck.models.generating import Decoding, endings
from limbeck.schemes.language.authors import WRITTEN, author_of_texts, check_author, told
from limbeck.schemes.language.sequences import Sequences
from limbeck.schemes.language.writing import author_of, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.writer import ModelWriter, Wrote


@register(
    Card(
        key="seq_kd",
        name="Sequence-level KD",
        title="Sequence-Level Knowledge Distillation",
        year=2016,
        arxiv="1606.07947",
        code="harvardnlp/seq2seq-attn",
        knowledge="scheme",
        equation=r"L = (1 - \alpha) L(y \mid x) + \alpha L(\hat y \mid x), \qquad "
        r"\hat y = \arg\max_{y \in \mathrm{beam}_K(x)} p_T(y \mid x) \ \text{ or } \ \arg\max_y \mathrm{BLEU}(y, t)",
        use="The way to learn from a teacher whose text is all there is (a server, another tokenizer), and the usual "
        "start before on-policy training. With loss cross_entropy it is Seq-KD; with cross_entropy and kd, Seq-KD and "
        "Word-KD together; with interpolation, Seq-Inter.",
        defaults={
            "beams": "5, the paper's; it takes 35 for interpolation",
            "alpha": "1, the paper's Seq-KD: the data's own completions are not learned",
            "interpolation": "off; the paper trains with it last, from a Seq-KD student and at a lower rate",
            "times": "none, since prompts are no sources; translations want 1.5 and plus 10",
            "unfinished": "drop, the paper's; texts without an end, as of plain corpora, want keep",
            "max_new_tokens": "128, our choice",
        },
        evidence="formula",
        evidence_note="loss and gradient equal the ordinary loss on what a plain beam search finds; interpolation with "
        "one beam equals Seq-KD, and with the data's completion among the beams gives it back",
        choices=(
            "beams are told apart by log-probability alone, which makes the first the teacher's mode as the paper "
            "defines it",
            "BLEU is smoothed by adding one, and counts the student's tokens, so that no language needs words",
            "a served teacher does not search: it gives one answer, its likeliest where temperature is 0, or for "
            "interpolation as many as there are beams",
            "equal pairs of prompt and completion are learned once",
        ),
        tasks=("language",),
        cost="Training costs what its loss costs; before it the teacher writes once.",
    )
)
class SeqKD(Scheme):
    r"""The teacher writes a completion for every prompt of the training set, then the student learns them by any loss.

    .. math:: L = - \sum_t \log p_S(\hat y_t \mid x, \hat y_{<t}), \qquad \hat y \approx \arg\max_y p_T(y \mid x)

    What was written lies in ``written/`` of the run's folder, and is not written again in a resumed run. Prompts that
    are equal are answered once.

    Args:
        beams: K of beam search; for interpolation, how many texts there are to choose from.
        alpha: What the teacher's texts weigh; the data's own completions weigh the rest.
        interpolation: Take of the K best the one that is most like the data's completion.
        max_new_tokens: Of a completion at most.
        times, plus: A completion of more than ``times`` its prompt's tokens and ``plus`` more is left out; ``None``:
            none is.
        unfinished: What becomes of completions that came to no end: ``drop`` or ``keep``.
        temperature: Draw with it instead of searching; a served teacher draws several answers at 1 unless this says
            otherwise.
        batch_size: Prompts that a teacher at hand answers at a time.
        prompt: Tokens of a prompt at least; of whole texts, where everything is learned, the first so many.
        writer: Who writes in the teacher's place: anything that answers as ``ServedTeacher`` does, or what makes one:
            ``{base_url: ..., model: ...}``. Several, each for prompts of its tag: a ``RoutedTeacher``, or
            ``{teachers: {TAG: {base_url: ..., model: ...}}, default: TAG}``.

    Source: Sequence-Level Knowledge Distillation, arXiv 1606.07947.

    >>> SeqKD(interpolation=True, beams=35).decoding.keep
    35
    """

    def __init__(
        self,
        beams: int = 5,
        alpha: float = 1.0,
        interpolation: bool = False,
        max_new_tokens: int = 128,
        times: float | None = None,
        plus: int = 10,
        unfinished: str = "drop",
        temperature: float | None = None,
        batch_size: int = 16,
        prompt: int = 1,
        writer: Any = None,
    ) -> None:
        check_inside(alpha, "scheme.alpha", closed=True)
        if unfinished not in ("drop", "keep"):
            wanted = "drop or keep"
            raise ConfigError("no such choice", where="scheme.unfinished", found=repr(unfinished), wanted=wanted)
        if times is not None:
            check_positive(times, "scheme.times")
        for name, value in (("prompt", prompt), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError("must be 1 or more", where=f"scheme.{name}", found=value)
        if writer is None and temperature is not None and interpolation:
            remedy = "leave temperature out"
            raise ConfigError("beams are searched, not drawn", where="scheme.temperature", remedy=remedy)
        if writer is not None:
            check_author(writer)
        self.beams, self.alpha, self.interpolation, self.temperature = beams, alpha, interpolation, temperature
        self.times, self.plus, self.unfinished, self.prompt = times, plus, unfinished, prompt
        self.writer, self.batch_size = writer, batch_size
        self.decoding = (
            Decoding(max_new_tokens, 0.0, beams=beams, keep=beams if interpolation else 1)
            if temperature is None
            else Decoding(max_new_tokens, temperature)
        )

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = texts_of(cast.train, "seq_kd")
        if self.writer is None and self.alpha:
            author_of(cast.need_teacher("the texts are written by"), "teacher")
        pairs = loader.split.teacher_tokens is not None and bool(cast.loss.teacher_taps)
        if pairs and self.unfinished == "keep":
            raise ConfigError(
                "texts without an end are not cut into two tokenizers' tokens",
                where="scheme.unfinished",
                found="keep",
                wanted="drop, or a loss that asks no teacher",
            )
        distiller = Sequences(cast.student, cast.loss, cast.teacher, logits=cast.logits)
        distiller.alpha = self.alpha
        stage = Stage("seq_kd", distiller, cast.config)
        yield Training([stage], train=lambda: self._written(cast, loader, distiller, pairs))

    def _written(self, cast: Cast, loader: LanguageLoader, distiller: Sequences, pairs: bool) -> Loader:
        """What is trained on, once the teacher has written it."""
        if not self.alpha:
            return loader
        sides = list(parted(loader.split, self.prompt))
        prompts = [prompt for prompt, _ in sides]
        facts = {"prompts": len(prompts), "different": len(set(prompts))}
        wrote = self._ask(cast, loader.split, prompts)
        rows, said = self._chosen(loader.split, sides, wrote, facts)
        split = rewritten(loader.split, rows, [prompts[row] for row in rows], said, teacher=pairs)
        if cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            write_json(cast.folder / WRITTEN / "summary.json", {**facts, "rows": len(split)})
        if self.alpha < 1:
            distiller.take(split, places(split, rows, len(prompts)))
            return loader
        return LanguageLoader(
            split,
            batch_size=loader.batch_size,
            shuffle=loader.shuffle,
            drop_last=loader.drop_last,
            device=loader.device,
            seed=loader.seed,
        )

    def _ask(self, cast: Cast, split: LanguageSplit, prompts: list[Ids]) -> list[list[Wrote]]:
        """What was written after each prompt, the best first, cut into the student's tokens."""
        own, other = split.tokens, split.teacher_tokens
        if self.writer is not None:
            tag = [-1] * len(prompts) if split.rows.tag is None else split.rows.tag.tolist()
            tags = [split.tags[number] if number >= 0 else None for number in tag]
            found = self._served(cast.folder, [text_of(own, prompt) for prompt in prompts], tags)
        else:
            model, tokens = author_of(cast.need_teacher("the texts are written by"), "teacher"), other or own
            assert cast.train is not None
            device = getattr(cast.train, "device", None)
            asked = prompts if other is None else [marked(other, text_of(own, prompt)) for prompt in prompts]
            found = ModelWriter(
                model if device is None else model.to(device),
                self.decoding,
                ends=endings(tokens, model),
                pad=tokens.pad,
                folder=None if cast.folder is None else cast.folder / WRITTEN,
                identity=digest(model),
                batch_size=self.batch_size,
                seed=cast.seed,
                decode=tokens.decode,
            ).write(asked)
            if other is None:
                return found
        flat = [wrote for row in found for wrote in row]
        cut = iter(after(own, [w.text or "" for w in flat], [w.finished for w in flat]))
        return [[Wrote(w.finished, next(cut), w.text, w.score) for w in row] for row in found]

    def _served(self, folder: Path | None, prompts: list[str], tags: list[str | None]) -> list[list[Wrote]]:
        """Answers of a teacher that gives texts; of several, each prompt's tag tells which."""
        number = self.beams if self.interpolation else 1
        warm = self.temperature if self.temperature is not None else float(number > 1)
        settings: dict[str, Any] = {"max_tokens": self.decoding.max_new_tokens, "temperature": warm, "n": number}
        with author_of_texts(self.writer, folder) as teacher:
            answers = told(teacher, prompts, tags, **settings)
        return [[Wrote(answer.finish_reason != "length", text=answer.text) for answer in row] for row in answers]

    def _chosen(
        self, split: LanguageSplit, sides: list[tuple[Ids, Ids]], wrote: list[list[Wrote]], facts: dict[str, Any]
    ) -> tuple[list[int], list[Ids]]:
        """Rows whose completion is learned, and the completions; what is left out is counted."""
        rows, said, seen = list[int](), list[Ids](), set[tuple[Ids, Ids]]()
        facts |= {"unfinished": 0, "too_long": 0, "equal": 0}
        masses = []
        for row, ((prompt, gold), several) in enumerate(zip(sides, wrote, strict=True)):
            best = several[:1] if not self.interpolation else several
            ended = [w for w in best if w.finished or self.unfinished == "keep"]
            most = math.inf if self.times is None else self.times * len(prompt) + self.plus
            short = [w.ids or () for w in ended if len(w.ids or ()) - w.finished <= most]
            if not short:
                facts["too_long" if ended else "unfinished"] += 1
                continue
            chosen = short[0]
            if self.interpolation:
                end = split.tokens.back
                likeness = [sentence_bleu(unended(ids, end), unended(gold, end)) for ids in short]
                chosen = short[likeness.index(max(likeness))]
            if (prompt, chosen) in seen:
                facts["equal"] += 1
                continue
            seen.add((prompt, chosen))
            rows.append(row)
            said.append(chosen)
            if several[0].score is not None:
                masses.append(math.exp(several[0].score))
        if not rows:
            raise DataError(
                "nothing of what the teacher wrote can be learned",
                where="scheme seq_kd",
                found=", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items()),
                remedy="raise max_new_tokens, or set unfinished: keep where texts have no end",
            )
        if masses:  # how peaked the teacher is: of all it might say, how much is said here
            facts["mass_on_the_first"] = sum(masses) / len(masses)
        return rows, said
