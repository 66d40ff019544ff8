"""A small encoder learns to tag what belongs to a name, from passages that a language model has annotated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.data.language.anchored import AnchoredSplit, Passage
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.spans import Pair, read_pairs, verbatim
from limbeck.data.loader import Loader
from limbeck.engine.stage import Stage
from limbeck.schemes.language.annotating import Asks
from limbeck.schemes.language.authors import WRITTEN
from limbeck.schemes.language.telling import Telling
from limbeck.schemes.scheme import Cast, Scheme, Training, register

TEMPLATE = (
    "List every drug in the passage together with each adverse event that it is said to have caused, one pair a line, "
    "as: drug | adverse event. Copy both from the passage word for word. Say 'none' if there is no such pair.\n\n"
    "{examples}Passage: {passage}\nPairs:\n"
)
SHOTS: list[dict[str, Any]] = [
    {
        "text": "Two patients developed severe hepatitis during treatment with isoniazid.",
        "pairs": [["isoniazid", "severe hepatitis"]],
    },
    {"text": "Metformin was well tolerated by all subjects.", "pairs": []},
    {
        "text": "Rash and fever followed the first dose of phenytoin.",
        "pairs": [["phenytoin", "Rash"], ["phenytoin", "fever"]],
    },
    {
        "text": "Vancomycin caused deafness; gentamicin, which was given later, did not.",
        "pairs": [["Vancomycin", "deafness"]],
    },
    {
        "text": "A patient on lithium and on haloperidol, which induced dystonia, had tremor from lithium.",
        "pairs": [["lithium", "tremor"], ["haloperidol", "dystonia"]],
    },
]


@register(
    Card(
        key="ade_llm_distill",
        name="LLM to tagger",
        title="Distilling Large Language Models for Biomedical Knowledge Extraction: A Case Study on Adverse Drug "
        "Events",
        year=2023,
        arxiv="2307.06439",
        knowledge="scheme",
        equation=r"L = - \frac{1}{|W|} \sum_{w \in W} \log p_S(b_w \mid x, d), \qquad "
        r"b = \mathrm{BIO}\left( \{ e : (d, e) \in \mathrm{verbatim}(T(x)) \} \right)",
        use="To get a small encoder that extracts pairs (a drug and its adverse events, a gene and its diseases) out "
        "of passages nobody has labelled, from a language model that can. Data: "
        "`limbeck.data.language.anchored:anchored_source`, with the names that are looked for. With cross_entropy and "
        "a student that gives three logits a token (`auto: AutoModelForTokenClassification`).",
        defaults={
            "template, shots": "ours; five examples, as the paper's teacher has in its better setting",
            "samples": "1 at temperature 0; more are a vote, our extension",
            "train": "adamw at 1e-5 to 5e-5, batches of 16, up to 100 epochs, stopped early: the recipe's",
        },
        evidence="reading",
        evidence_note="where the teacher says what the data hold, weights are those of supervised training bit for bit",
        choices=(
            "of the paper the abstract could be read; drug-centric tagging as the method's account has it",
            "the marked name keeps its words, between two marks; a placeholder would hide which drug it is",
            "an unreadable answer takes its passage out; a readable one without pairs leaves it as a negative",
            "pairs whose sides do not both stand in the passage are not believed",
            "the data's names are anchors in every passage, those of the teacher in the passage where it named them",
            "held-out passages are judged where their pairs are known (`limbeck.analysis.extraction.assess_pairs`)",
        ),
        tasks=("language",),
        cost="Training costs what its loss costs; before it a language model answers once for each passage.",
    )
)
class ADELLMDistill(Scheme):
    r"""A language model says which pairs each passage of the training set tells of; the student learns tags.

    .. math:: L = - \frac{1}{|W|} \sum_{w \in W} \log p_S(b_w \mid x, d)

    For every place where a name d stands there is one row, in which it is marked, and each word has a tag: it begins,
    goes on with, or is no event of d. Words are tagged at their first token. Passages whose pairs the data know are
    not asked about. Answers lie in ``written/`` of the run's folder, with ``summary.json``.

    Args:
        template: What is asked, with ``{passage}`` and, for the examples, ``{examples}``.
        shots: Examples: ``{text: ..., pairs: [[drug, event], ...]}``.
        between: What stands between the two sides of a pair in an answer.
        samples: Answers to each passage; a pair counts that enough of them have.
        agree: How many: a share of the samples.
        temperature: Of several samples; one is the likeliest.
        tokens: Of an answer at most.
        chat: A teacher at hand is asked in its chat template.
        batch_size: Passages that a teacher at hand answers at a time.
        writer: Who answers in the teacher's place; see :class:`SeqKD`.

    Source: Distilling Large Language Models for Biomedical Knowledge Extraction, arXiv 2307.06439.

    >>> print(ADELLMDistill(template="{examples}{passage}:", shots=[{"text": "a b", "pairs": [["a", "b"]]}]).asks("c"))
    Passage: a b
    Pairs:
    a | b
    <BLANKLINE>
    c:
    """

    def __init__(
        self,
        template: str = TEMPLATE,
        shots: list[dict[str, Any]] = SHOTS,
        between: str = "|",
        samples: int = 1,
        agree: float = 0.5,
        temperature: float = 1.0,
        tokens: int = 256,
        chat: bool = False,
        batch_size: int = 16,
        writer: Any = None,
    ) -> None:
        if "{passage}" not in template:
            raise ConfigError("the template leaves something out", where="scheme.template", wanted="{passage}")
        for number, shot in enumerate(shots):
            if set(shot) != {"text", "pairs"} or not all(len(pair) == 2 for pair in shot["pairs"]):
                raise ConfigError(
                    "no such example", where=f"scheme.shots.{number}", wanted="{text: ..., pairs: [[a, b]]}"
                )
        if not between.strip():
            raise ConfigError("something must stand between", where="scheme.between", found=repr(between))
        self.teacher = Asks(writer, samples, agree, temperature, tokens, chat, batch_size)
        self.template, self.shots, self.between = template, list(shots), between

    def asks(self, passage: str) -> str:
        """What the teacher is asked about a passage."""
        shown = []
        for shot in self.shots:
            pairs = "\n".join(f"{a} {self.between} {b}" for a, b in shot["pairs"]) or "none"
            shown.append(f"Passage: {shot['text']}\nPairs:\n{pairs}\n\n")
        head, _, tail = self.template.partition("{passage}")
        return head.replace("{examples}", "".join(shown)) + passage + tail

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = cast.train
        if not isinstance(loader, LanguageLoader) or not isinstance(loader.split, AnchoredSplit):
            wanted = "limbeck.data.language.anchored:anchored_source"
            raise DataError(
                "these are no passages", where="scheme ade_llm_distill", found=type(loader).__name__, wanted=wanted
            )
        if any(passage.pairs is None for passage in loader.split.passages):
            self.teacher.check(cast)
        facts = {"template": self.template, "shots": self.shots, "between": self.between}
        distiller = Telling(cast, None, facts)
        stage = Stage("ade_llm_distill", distiller, cast.config)
        held: Any = None if cast.validation is None else cast.validation.split
        known = isinstance(held, AnchoredSplit) and any(passage.pairs is not None for passage in held.passages)
        yield Training([stage], train=lambda: self._annotated(cast, loader), judged=known)

    def _annotated(self, cast: Cast, loader: LanguageLoader) -> Loader:
        """The passages, once the teacher has said which pairs they tell of."""
        split = loader.split
        assert isinstance(split, AnchoredSplit)
        passages, facts = self.annotate(cast, loader, split.passages)
        if not passages:
            raise DataError(
                "nothing of what the teacher wrote could be read",
                where="scheme ade_llm_distill",
                found=f"{facts['asked']} answers",
                wanted=f"lines such as: drug {self.between} event, or none",
            )
        made = split.told(passages)
        facts |= {
            "passages": len(passages),
            "rows": len(made),
            "events": sum(1 in (o.tags or ()) for o, _ in made.made),
        }
        if cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            write_json(cast.folder / WRITTEN / "summary.json", facts)
        options = {name: getattr(loader, name) for name in ("batch_size", "shuffle", "drop_last", "device", "seed")}
        return LanguageLoader(made, **options)

    def annotate(
        self, cast: Cast, loader: LanguageLoader, passages: tuple[Passage, ...]
    ) -> tuple[list[Passage], dict[str, int]]:
        """Passages with their pairs, those that could not be read left out; and what became of the answers."""
        unknown = [n for n, passage in enumerate(passages) if passage.pairs is None]
        told: list[list[Pair] | None] = []
        if unknown:
            prompts = [self.asks(passages[n].text) for n in unknown]
            with self.teacher.author(cast, loader) as author:
                told = self.teacher.items(author, prompts, lambda text: read_pairs(text, self.between), cast.seed)
        said = dict(zip(unknown, told, strict=True))
        facts = {"asked": len(unknown), "unreadable": sum(pairs is None for pairs in told), "pairs": 0, "not_there": 0}
        found = []
        for n, passage in enumerate(passages):
            pairs = passage.pairs
            if n in said:
                own = said[n]
                if own is None:
                    continue
                pairs = tuple(verbatim(own, passage.text))
                facts["pairs"] += len(own)
                facts["not_there"] += len(own) - len(pairs)
            found.append(Passage(passage.text, pairs))
        return found, facts
