"""A pruned model is tuned on answers that the whole model has put into its own words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError
from limbeck.core.files import write_json
from limbeck.core.reduction import check_positive
from limbeck.core.survey import dry
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language.answers import answer_of
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.rewritten import Ids, after, marked, parted, rewritten, text_of, unended
from limbeck.data.language.split import LanguageSplit
from limbeck.data.loader import Loader
from limbeck.engine.stage import Stage
from limbeck.models.low_rank import LEARNS, adapt, merge
from limbeck.schemes.language.authors import WRITTEN
from limbeck.schemes.language.ddk import summed_loss
from limbeck.schemes.language.seq_kd import SeqKD
from limbeck.schemes.language.telling import Telling
from limbeck.schemes.language.writing import author_of, same_tokens, texts_of
from limbeck.schemes.scheme import Cast, Training, register

TEMPLATE = (
    "Below are an instruction that describes a task along with a reference answer. Using the reference answer as a "
    "guide, write your own response.\n\n### Instruction:\n{prompt}\n\n### Reference Answer:\n{completion}\n\n"
    "### Response:\n"
)


@register(
    Card(
        key="self_data_distill",
        name="Self-data distillation",
        title="Self-Data Distillation for Recovering Quality in Pruned Large Language Models",
        year=2024,
        arxiv="2410.09982",
        knowledge="scheme",
        equation=r"L = - \sum_t \log p_S(\hat y_t \mid x, \hat y_{<t}), \qquad "
        r"\hat y = \tilde y \text{ if } \mathrm{ok}(\tilde y, y) \text{ else } y, \qquad "
        r"\tilde y \sim p_T(\cdot \mid x, y)",
        use="To mend a language model after layers were cut from it (`limbeck.compression.student_from`, `choose: "
        "angular`), on prompts with answers of somebody else: the whole model says them in its own words first, so "
        "that the student is not drawn away from what it knew. With cross_entropy. Two students of different texts can "
        "be merged: `limbeck.compression.slerp_merge`.",
        defaults={
            "template": "that of Self-Distillation Bridges Distribution Gap (arXiv 2402.13669)",
            "answer": "number, our choice: answers that end in one have to keep it",
            "temperature": "0, our choice",
            "rank": "8, our choice; 0 trains all weights",
            "lora_alpha": "16, our choice",
            "shortest, longest": "0.2 and 5 times the answer's length, our choice",
            "max_new_tokens": "256, our choice",
        },
        evidence="reading",
        evidence_note="where every text is refused, weights are those of plain fine-tuning bit for bit; angular "
        "distances are tested with the layers' choice, arcs with slerp_merge",
        choices=(
            "a text is taken where it came to an end, is not empty, is of a like length, and has the answer's final "
            "answer where one can be told; else the data's own answer stays",
            "adapters of low rank stand on all linear layers but that of the logits, and are merged afterwards",
            "white space before an answer stays as the data have it",
        ),
        tasks=("language",),
        cost="Training costs what its loss costs; before it the whole model writes once.",
    )
)
class SelfDataDistill(SeqKD):
    r"""The teacher, the model before it was pruned, restates every answer; the student learns what passes the checks.

    .. math:: L = - \sum_t \log p_S(\hat y_t \mid x, \hat y_{<t})

    What was written lies in ``written/`` of the run's folder with ``summary.json``: how many answers were taken and why
    others were not, and the mean log-probability that the teacher gives to a token of the data's answers and of those
    learned. Rows are prompts with one answer.

    Args:
        template: What the teacher is asked, with ``{prompt}`` and ``{completion}``.
        answer: How a final answer is told: ``number`` (behind ``####``, else the last), ``none``, or a regular
            expression whose first group it is.
        shortest, longest: Of a text, as a multiple of the answer's characters.
        rank: Of adapters; 0: all weights are trained.
        lora_alpha: Their change counts lora_alpha / rank.
        max_new_tokens: Of a text at most.
        temperature: Of drawing; 0 takes the likeliest token every time.
        batch_size: Prompts that the teacher answers at a time.
        writer: Who writes in the teacher's place; see :class:`~limbeck.schemes.language.seq_kd.SeqKD`.

    Source: Self-Data Distillation, arXiv 2410.09982.

    >>> SelfDataDistill(rank=0).refusal(" four", "five", finished=True)
    >>> SelfDataDistill().refusal("It is #### 4", "It is 5", finished=True)
    'answer'
    """

    def __init__(
        self,
        template: str = TEMPLATE,
        answer: str = "number",
        shortest: float = 0.2,
        longest: float = 5.0,
        rank: int = 8,
        lora_alpha: float = 16.0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 16,
        writer: Any = None,
    ) -> None:
        super().__init__(
            1, max_new_tokens=max_new_tokens, temperature=temperature or None, batch_size=batch_size, writer=writer
        )
        missing = [part for part in ("{prompt}", "{completion}") if part not in template]
        if missing:
            raise ConfigError(
                "the template leaves something out", where="scheme.template", wanted=" and ".join(missing)
            )
        if not 0 <= shortest <= longest:
            found = f"{shortest:g} and {longest:g}"
            raise ConfigError("no such bounds", where="scheme.shortest", found=found, wanted="0 <= shortest <= longest")
        if isinstance(rank, bool) or rank < 0:
            raise ConfigError("must be 0 or more", where="scheme.rank", found=rank)
        check_positive(lora_alpha, "scheme.lora_alpha")
        self.template, self.answer, self.rank, self.lora_alpha = template, answer, rank, lora_alpha
        self.shortest, self.longest, self.pattern = shortest, longest, _pattern(answer)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = texts_of(cast.train, "self_data_distill")
        judge = cast.need_teacher("answers are restated by")
        if self.writer is None:
            author_of(judge, "teacher")
        same_tokens(loader, "self_data_distill")
        if self.rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(cast.seed)
                adapt(cast.student, self.rank, self.lora_alpha)
        distiller = Telling(cast, judge, {"template": self.template, "answer": self.answer, "rank": self.rank})
        learn = (LEARNS,) if self.rank else ("*",)
        stage = Stage("self_data_distill", distiller, cast.config, learn)
        yield Training([stage], train=lambda: self._restated(cast, loader))
        merge(cast.student)

    def _restated(self, cast: Cast, loader: LanguageLoader) -> Loader:
        """What is trained on, once the teacher has written it."""
        split, tokens = loader.split, loader.split.tokens
        sides = list(parted(split))
        texts = [(text_of(tokens, prompt), tokens.decode(unended(said, tokens.back))) for prompt, said in sides]
        asked = [self.asks(prompt, said) for prompt, said in texts]
        wrote = self._ask(cast, split, [marked(tokens, text) for text in asked])
        chosen, why = list[Ids](), dict[str, int]()
        for (_, gold), (_, own), (first, *_) in zip(sides, texts, wrote, strict=True):
            told = first.text if first.text is not None else tokens.decode(unended(first.ids or (), tokens.back))
            refused = self.refusal(own, told, finished=first.finished)
            why[refused or "taken"] = why.get(refused or "taken", 0) + 1
            chosen.append(gold if refused else after(tokens, [_before(own) + told.strip()], [True])[0])
        made = rewritten(split, range(len(sides)), [prompt for prompt, _ in sides], chosen)
        if cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            facts = {"prompts": len(sides), "taken": why.pop("taken", 0), "refused": why}
            write_json(cast.folder / WRITTEN / "summary.json", {**facts, **_likelihoods(cast, loader, made)})
        options = {n: getattr(loader, n) for n in ("batch_size", "shuffle", "drop_last", "device", "seed")}
        return LanguageLoader(made, **options)

    def asks(self, prompt: str, completion: str) -> str:
        """What the teacher is asked about a prompt and its answer."""
        parts = {"{prompt}": prompt, "{completion}": completion}
        return re.sub(r"\{prompt\}|\{completion\}", lambda found: parts[found[0]], self.template)

    def refusal(self, reference: str, text: str, *, finished: bool) -> str | None:
        """Why a text is not taken: ``unfinished``, ``empty``, ``length`` or ``answer``; ``None`` where it is.

        Args:
            reference: The answer.
            text: What the teacher wrote.
            finished: It came to an end.
        """
        reference, text = reference.strip(), text.strip()
        if not finished or not text:
            return "empty" if finished else "unfinished"
        if not self.shortest * len(reference) <= len(text) <= self.longest * len(reference):
            return "length"
        wanted = self._final(reference)
        return "answer" if wanted is not None and self._final(text) != wanted else None

    def _final(self, text: str) -> str | None:
        if self.answer == "number":
            return answer_of(text)
        found = None if self.pattern is None else self.pattern.search(text)
        return None if found is None else found[1]


def _pattern(answer: str) -> re.Pattern[str] | None:
    if answer in ("number", "none"):
        return None
    try:
        found = re.compile(answer)
    except re.error as error:
        raise ConfigError(f"cannot be read: {error}", where="scheme.answer", found=repr(answer)) from error
    if not found.groups:
        wanted = "number, none, or a regular expression with a group"
        raise ConfigError("nothing is picked out", where="scheme.answer", found=repr(answer), wanted=wanted)
    return found


def _before(text: str) -> str:
    """The white space with which a text begins."""
    return text[: len(text) - len(text.lstrip())]


def _likelihoods(cast: Cast, loader: LanguageLoader, made: LanguageSplit) -> dict[str, float]:
    """The mean log-probability of a token of the data's answers, and of those learned, in the teacher's eyes."""
    if not isinstance(cast.teacher, FrozenTeacher):
        return {}
    model, device = cast.teacher.model.to(loader.device), loader.device
    found = {}
    with dry(model):
        for name, split in (("of_the_data", loader.split), ("learned", made)):
            batches = LanguageLoader(split, batch_size=loader.batch_size, device=device).batches()
            sums = torch.stack([torch.stack(summed_loss(model, batch, cast.teacher.where)) for batch in batches]).sum(
                dim=0
            )
            found[f"log_probability_{name}"] = float(-sums[0] / sums[1].clamp(min=1))
    return found
