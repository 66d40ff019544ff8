"""A split of rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.data.language.rows import Rows
from limbeck.data.language.tokens import Tokens
from limbeck.data.sources.split import MEASURED, Split

LOGITS = 1 << 26  # of a batch where models are only looked at


@dataclass(eq=False)
class LanguageSplit(Split):
    """Rows of tokens for causal language models, with the tokenizers that made them.

    Args:
        rows: A sample is a row: a text, a block of one, or a pack of several.
        tokens: The student's tokenizer.
        teacher_tokens: The teacher's, where that is another one.
        tags: Names of domains, by the numbers in ``rows.tag``.
        settings: How documents became rows, as plain values.
    """

    rows: Rows
    tokens: Tokens = field(kw_only=True)
    teacher_tokens: Tokens | None = field(default=None, kw_only=True)
    tags: tuple[str, ...] = field(default=(), kw_only=True)
    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self.task = "language"
        if not len(self):
            raise DataError("there are no rows of text", where="data")
        super().__post_init__()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def vocabulary(self) -> int:
        """How many token ids the student's tokenizer has."""
        return self.tokens.size

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def measured(self) -> int:
        return max(1, min(MEASURED, LOGITS // (int(self.rows.lengths.max()) * self.vocabulary)))

    def subset(self, rows: Tensor) -> LanguageSplit:
        return replace(self, rows=self.rows.of(rows))
