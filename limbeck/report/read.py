"""What a folder knows about its run or comparison, read without trusting it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from limbeck.core.errors import DataError


@dataclass
class RunFacts:
    """A run's folder, as far as it is written.

    Args:
        name: Of the folder.
        result: ``result.json``; empty where the run is not finished.
        status: ``run.json``.
        history: The lines of ``metrics.jsonl``.
        recipe: ``recipe.yaml`` as it stands.
    """

    name: str
    result: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's values; none where it cannot be read."""
        try:
            values = yaml.safe_load(self.recipe)
        except yaml.YAMLError:
            values = None
        return values if isinstance(values, dict) else {}


def read_run(folder: Path) -> RunFacts:
    """Everything a run's folder holds.

    Raises:
        DataError: It holds no run, or a file in it is damaged.
    """
    names = ("result.json", "run.json", "metrics.jsonl", "recipe.yaml")
    if not any((folder / name).is_file() for name in names):
        raise DataError(
            "no run and no comparison is here",
            where=str(folder),
            wanted="a run's folder, or a comparison's folder or its compare.json",
            remedy="check the path",
        )
    facts = RunFacts(folder.resolve().name)
    for name, file in (("result", "result.json"), ("status", "run.json")):
        if (folder / file).is_file():
            setattr(facts, name, read_json(folder / file))
    if (folder / "metrics.jsonl").is_file():
        facts.history = _lines(folder / "metrics.jsonl")
    if (folder / "recipe.yaml").is_file():
        facts.recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return facts


def read_comparison(path: Path) -> dict[str, Any] | None:
    """``compare.json`` in a folder, or the file itself; ``None`` where the path is no comparison."""
    file = path / "compare.json" if path.is_dir() else path
    if not file.is_file():
        if not path.exists():
            raise DataError("there is no such file or folder", where=str(path), remedy="check the path")
        return None
    facts = read_json(file)
    if facts.get("kind") != "comparison" or not isinstance(facts.get("methods"), list):
        raise DataError("this file is no comparison", where=str(file), wanted="what `limbeck compare` wrote")
    return facts


def runs_of(comparison: dict[str, Any], folder: Path) -> dict[str, list[RunFacts]]:
    """The runs of each line of a comparison whose folders are at hand."""
    found: dict[str, list[RunFacts]] = {}
    for row in comparison["methods"]:
        for run in row["runs"]:
            place = folder / run["folder"]
            if _inside(place, folder) and (place / "result.json").is_file():
                found.setdefault(row["entry"], []).append(read_run(place))
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: The file is damaged or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"this file is damaged: {error}", where=str(file)) from error
    if not isinstance(value, dict):
        raise DataError("this file is damaged", where=str(file), found=type(value).__name__, wanted="a mapping")
    return value


def _lines(file: Path) -> list[dict[str, Any]]:
    """A log's lines; the last may have been cut by a crash."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def _inside(place: Path, folder: Path) -> bool:
    return os.path.realpath(place).startswith(os.path.realpath(folder) + os.sep)
