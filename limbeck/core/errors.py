"""The one family of errors a user can cause.

Every message says what is wrong, where (the field or tensor), what was found, what was wanted and what to do.
The command line prints it on one screen and leaves with exit code 2; a traceback means a bug in limbeck.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """A mistake that the reader of the message can mend.

    Args:
        message: What is wrong, in one sentence.
        where: The field, file or tensor it is about, such as ``"train.epochs"`` or ``"student_logits"``.
        found: What was there.
        wanted: What should have been there.
        remedy: What to do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        found: object = None,
        wanted: object = None,
        remedy: str | None = None,
    ) -> None:
        self.message, self.where, self.found, self.wanted, self.remedy = message, where, found, wanted, remedy
        parts = [f"{where}: {message}" if where else message]
        if found is not None:
            parts.append(f"found {found}")
        if wanted is not None:
            parts.append(f"wanted {wanted}")
        if remedy is not None:
            parts.append(remedy)
        super().__init__("; ".join(parts))


class ConfigError(LimbeckError):
    """A recipe, option or argument is wrong."""


class TensorError(LimbeckError):
    """A tensor has the wrong shape, dtype or values."""


class TapError(LimbeckError):
    """A tap names no place in the model, never fired, or gave something else than a tensor."""


class DataError(LimbeckError):
    """A data set cannot be read, or a batch lacks what an objective needs."""


class ModelError(LimbeckError):
    """A model cannot be built, or weights do not fit it."""


class CheckpointError(LimbeckError):
    """A checkpoint is damaged, incomplete or of another run."""


class CacheError(LimbeckError):
    """A teacher's cache is damaged, unfinished, or of another teacher, other data or other views."""


class TrainingError(LimbeckError):
    """Training cannot go on: a loss went bad, or memory ran out."""


class MissingExtra(LimbeckError):
    """An optional dependency is not installed.

    >>> str(MissingExtra("kornia", extra="vision"))
    "the package 'kornia' is not installed; install it with: pip install 'limbeck[vision]'"
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(
            f"the package {package!r} is not installed", remedy=f"install it with: pip install 'limbeck[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str | None:
    """Name the nearest known words, as a sentence, or ``None`` where nothing is near.

    >>> did_you_mean("epoch", ["epochs", "seed"])
    "did you mean 'epochs'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    near += [k for k in known if k not in near and (name in k or k in name) and name][: limit - len(near)]
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else None
