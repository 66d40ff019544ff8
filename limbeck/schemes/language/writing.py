"""What schemes have in common whose texts are written while they train."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import key
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.written import along, continued, prompts_of
from limbeck.data.loader import Loader
from limbeck.models.drawing import row_keys
from limbeck.models.generating import Decoding, check_writes, endings, write

_STEPS, _CHOICE, _ROWS = 21, 1, 2  # keep these draws apart from others, and from one another
_VIEWS = 40  # bits of a sample's id, above which stands its view


class _Options(Protocol):
    """What a scheme says of its texts."""

    decoding: Decoding
    prompt: int


def texts_of(train: Loader | None, scheme: str) -> LanguageLoader:
    """The training data, or an error where nobody could go on with them.

    Raises:
        DataError: They are no texts, are packed, or the teacher reads them in other tokens.
    """
    where = f"scheme {scheme}"
    if not isinstance(train, LanguageLoader):
        raise DataError(
            "texts are written here, and these data are none",
            where=where,
            found=type(train).__name__,
            wanted="data with a tokenizer",
            remedy="give data.options.tokenizer",
        )
    if train.rows.layout.pack:
        raise DataError(
            "a pack holds several texts, of which none can be gone on with",
            where="data.options.pack",
            found="true",
            wanted="false",
            remedy=f"set pack: false, or use another scheme than {scheme}",
        )
    return train


def same_tokens(loader: LanguageLoader, scheme: str) -> None:
    """Refuse a teacher that reads other tokens than the student writes.

    Raises:
        DataError: It does.
    """
    if loader.split.teacher_tokens is not None:
        raise DataError(
            "what the student writes has to be read by the teacher as it stands, and their tokenizers differ",
            where=f"scheme {scheme}",
            found=f"{loader.split.tokens.name} and {loader.split.teacher_tokens.name}",
            remedy="use seq_kd, where the teacher writes and its texts are cut into the student's tokens",
        )


def author_of(teacher: Teacher, where: str) -> nn.Module:
    """A teacher's model, where it can write.

    Raises:
        ConfigError: It is no model at hand.
        ModelError: The model does not write.
    """
    if not isinstance(teacher, FrozenTeacher):
        raise ConfigError(
            "this scheme asks a teacher about texts that nobody has seen before",
            where=where,
            found=type(teacher).__name__,
            wanted="a model at hand, not a cache of what it said",
            remedy="give the teacher's model, or use the scheme offline",
        )
    check_writes(teacher.model, where)
    return teacher.model


class WritingDistiller(Distiller):
    """A distiller whose batches may be written by one of its models.

    What is drawn is a hash of the seed, of how far training is, and of a sample's id. So micro-batches, ranks and
    resumed runs see the same texts, up to how arithmetic rounds. Batches without ids, or outside of an engine, draw
    from torch's random state.
    """

    def plan(self, options: _Options, loader: LanguageLoader, seed: int) -> None:
        """Take the scheme's settings and the tokenizer's marks."""
        self.decoding, self.least, self.seed = options.decoding, options.prompt, seed
        self.ends, self.pad = endings(loader.split.tokens, self.student), loader.split.tokens.pad

    def settled(self) -> dict[str, Any]:
        return {"decoding": dataclasses.asdict(self.decoding), "prompt": self.least, "ends": self.ends}

    def step_key(self, batch: Batch) -> int:
        """A key that all micro-batches and ranks of a step have in common."""
        if batch.index is None or not isinstance(batch.progress, Tensor):
            return int(torch.randint(2**62, ()))
        return key(_STEPS, self.seed, *struct.pack("<d", float(batch.progress)))

    def chance(self, step: int) -> float:
        """A number from 0 to 1, the same for the whole step.

        >>> 0 <= WritingDistiller.chance(None, 3) < 1
        True
        """
        return (key(_CHOICE, step) >> 11) * 2.0**-53

    def written(
        self, batch: Batch, model: nn.Module, step: int, *, mixed: nn.Module | None = None, share: float = 0.0
    ) -> tuple[Batch, Tensor]:
        """A batch whose rows go on from the prompts of another as a model writes; see ``limbeck.models.generating``.

        Returns:
            The batch, and for each of its places ``[B, L]`` the log-probability with which the token that it predicts
            was drawn.
        """
        prompts, mask = prompts_of(batch, self.least, self.pad)
        index = torch.arange(len(prompts), device=prompts.device) if batch.index is None else batch.index
        if isinstance(batch.view, Tensor):  # several views of a sample in a batch are several texts
            index = index + (batch.view.to(index) << _VIEWS)
        keys = row_keys(index, key(_ROWS, step))
        found = write(
            model,
            prompts,
            mask,
            self.decoding,
            ends=self.ends,
            pad=self.pad,
            keys=keys,
            mixed=mixed,
            share=share,
            where="student" if model is self.student else "teacher",
        )
        made = continued(batch, prompts, mask, found.ids, found.mask, self.pad)
        assert made.mask is not None
        chances = torch.zeros_like(made.mask, dtype=torch.float)
        if found.log_probs is not None:
            chances = along(found.log_probs.float(), made.mask)
        return made, chances
