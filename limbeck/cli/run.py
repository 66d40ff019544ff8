"""``limbeck run``: train what a recipe says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.cli.methods import Json
from limbeck.cli.recipes import RecipeName, Set
from limbeck.cli.screen import print_json, print_table, say

if TYPE_CHECKING:
    from limbeck.recipes.schema import Recipe

Out = Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/ and the recipe's name")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def run(
    recipe: RecipeName,
    settings: Set = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train what a recipe says; its folder gets the student, figures and all that is needed to go on or repeat it."""
    path = Path(recipe)
    if out is None and (path / "recipe.yaml").is_file():
        out = path  # going on with a run by its folder
    read = checked(recipe, settings)
    folder = out or Path("runs") / read.name
    from limbeck.recipes.run import run as train

    result = interruptible(train, read, folder, resume, quiet=quiet)
    if not result:  # another process of a distributed run reports
        return
    if as_json:
        print_json(result)
    else:
        _summary(result)
    say(f"{folder}: the student is in {folder / 'student'}; limbeck report {folder} makes a page of it")


def checked(recipe: str, settings: list[str] | None) -> Recipe:
    """A recipe without mistakes, or an error with all of them."""
    from limbeck.recipes.check import check
    from limbeck.recipes.load import load
    from limbeck.recipes.problem import RecipeError

    problems = check(recipe, settings or ())
    if problems:
        raise RecipeError(problems, recipe)
    return load(recipe, settings or ())


def interruptible(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call something long; Ctrl-C and SIGTERM leave with a message and the usual exit code, 128 and the signal."""
    try:
        return function(*arguments, **options)
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted")
        sys.stderr.flush()
        raise typer.Exit(128 + getattr(stop, "number", 2)) from None


def _summary(result: dict[str, Any]) -> None:
    teacher = result.get("teacher") or {}
    rows = []
    for name, key, shown in _FIGURES:
        own, other = result.get(key), teacher.get(key)
        if own is not None:
            rows.append((name, shown(own), "" if other is None else shown(other)))
    where = f"{result['samples']} {result['split']} samples"
    print_table((where, "student", "teacher" if teacher else ""), rows)


_FIGURES = (
    ("perplexity", "perplexity", "{:.3f}".format),
    ("bits per byte", "bits_per_byte", "{:.3f}".format),
    ("accuracy", "accuracy", "{:.2%}".format),
    ("mean average precision", "map_macro", "{:.2%}".format),
    ("F1 over all decisions", "f1_micro", "{:.2%}".format),
    ("right decisions (Hamming)", "hamming", "{:.2%}".format),
    ("mean squared error", "mse", "{:.4g}".format),
    ("agreement with the teacher", "agreement", "{:.2%}".format),
    ("drafts the teacher would accept", "acceptance", "{:.2%}".format),
    ("ROUGE-L", "rouge_l", "{:.3f}".format),
    ("exact answers", "exact_match", "{:.2%}".format),
    ("tokens a second", "tokens_per_second", "{:,.0f}".format),
    ("calibration error", "ece", "{:.2%}".format),
    ("parameters", "parameters", "{:,}".format),
    ("operations", "flops", "{:,}".format),
    ("latency, ms", "latency_ms", "{:.3g}".format),
)


def threads_for_small_models() -> None:
    """One thread: on tiny tensors several spend their time waiting for each other."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
