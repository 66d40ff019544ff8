"""Texts to learn from that hold what a model will be tested on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_inside

_WORD = re.compile(r"\w+")


class Held:
    """Texts that are kept for tests, and which others have too much of one of them.

    A text is told by its words in small letters. It has of a test what stands in runs of ``words`` words that both
    have; a test of fewer words counts as one run.

    Args:
        tests: The texts.
        words: Of a run; 8 is that of Tulu 3.
        share: Of a test's words, above which a text has too much of it; 0.5 is that of Tulu 3.

    Raises:
        ConfigError: Numbers that cannot be.

    Source: Tulu 3, arXiv 2411.15124, section on decontamination.

    >>> held = Held(["What is the capital of France?"], words=3)
    >>> held.told(["Tell me: what is the capital of France", "What is the capital of Peru?", "What is it?"])
    [True, True, False]
    """

    def __init__(self, tests: Iterable[str], words: int = 8, share: float = 0.5) -> None:
        if isinstance(words, bool) or not isinstance(words, int) or words < 1:
            raise ConfigError("must be a whole number, 1 or more", where="words", found=repr(words))
        check_inside(share, "share", closed=True)
        self.share, self.lengths = share, list[int]()
        #: Runs by their length: where they stand in which tests.
        self.runs = defaultdict[int, defaultdict[tuple[str, ...], list[tuple[int, int]]]](lambda: defaultdict(list))
        for test in tests:
            own = _words(test)
            if own:
                length = min(words, len(own))
                for first, run in enumerate(_runs(own, length)):
                    self.runs[length][run].append((len(self.lengths), first))
                self.lengths.append(len(own))

    def told(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text has too much of a test."""
        return [self._has(_words(text)) for text in texts]

    def _has(self, own: list[str]) -> bool:
        found = defaultdict[int, set[int]](set)
        for length, known in self.runs.items():
            for run in set(_runs(own, length)) & known.keys():
                for test, first in known[run]:
                    found[test].update(range(first, first + length))
        return any(len(places) > self.share * self.lengths[test] for test, places in found.items())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[first:] for first in range(length)), strict=False)
