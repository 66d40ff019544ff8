"""A run of a comparison, which may fail by itself: its loss goes astray, or memory runs out. The others go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.core.errors import TrainingError
from limbeck.core.files import write_json
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe

_FAILED = "failed.json"


class Failed(Exception):
    """A run that came to no end, with the reason."""


def attempt(recipe: Recipe, folder: Path, *, teachers: Path, quiet: bool = False) -> dict[str, Any]:
    """The result of a run, which goes on where it was interrupted.

    One that failed in training says why in ``failed.json`` of its folder and is not tried again while that is there.

    Raises:
        Failed: The run itself cannot be brought to an end.
    """
    file = folder / _FAILED
    if file.is_file():
        raise Failed(json.loads(file.read_text(encoding="utf-8"))["error"])
    try:
        return run(recipe, folder, resume=True, teachers=teachers, quiet=quiet)
    except TrainingError as error:
        write_json(file, {"error": str(error)})
        raise Failed(str(error)) from error


def is_over(folder: Path) -> bool:
    """Whether a run has ended, well or not."""
    return (folder / "result.json").is_file() or (folder / _FAILED).is_file()
