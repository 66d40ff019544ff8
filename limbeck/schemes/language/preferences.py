"""A model that learns to prefer texts to others, from itself as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.rewritten import Ids, rewritten
from limbeck.data.language.rows import Layout
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.language.written import of_the_second, together
from limbeck.objectives.parts.preference import LABELS, PLACES


class Preferences(Distiller):
    """Puts beside each text of a batch the one that it is preferred to; a sample is a pair.

    The student is the model that learns, the teacher what it was before.
    """

    rejected: LanguageSplit

    def pairs(
        self,
        split: LanguageSplit,
        tokens: Tokens,
        prompts: Sequence[Ids],
        sides: Sequence[Sequence[Ids]],
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> LanguageLoader:
        """Take pairs, and give a loader of them.

        Args:
            split: Whose layout rows have, but that they are not cut.
            tokens: Of the model that learns.
            prompts: Of each pair.
            sides: What is said in each pair, chosen and rejected.
            batch_size: Pairs of a step; all of them where there are fewer.
            device, seed: Of the loader.
        """
        layout = Layout(None, False, split.rows.layout.padding, split.rows.layout.multiple)
        plain = replace(split, tokens=tokens, teacher_tokens=None, tags=())
        plain.rows = replace(split.rows, layout=layout, teacher=None, tag=None)
        chosen, self.rejected = (rewritten(plain, [0] * len(prompts), prompts, side) for side in sides)
        return LanguageLoader(chosen, batch_size=min(batch_size, len(prompts)), device=device, seed=seed)

    def settled(self) -> dict[str, Any]:
        return {"rejected": self.rejected.settings["written"]}

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        """Of a batch that was not made either, such as an example's."""
        return super().forward(batch if LABELS in batch.extras else self.made(batch), turn)

    def made(self, batch: Batch) -> Batch:
        index = batch.require("index")
        other = self.rejected.rows.batch(index.cpu()).to(index.device)
        made = together(batch, other, self.rejected.tokens.pad)
        labels, places = (of_the_second(other.require(name), made) for name in ("labels", "mask"))
        own = len(index)
        labels[:own], places[:own] = made.require("labels")[:own], made.require("mask")[:own]
        made.extras |= {LABELS: labels, PLACES: places}
        return made
