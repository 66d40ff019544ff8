"""``limbeck compare`` and ``limbeck demo``: methods side by side, with controls."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli.methods import Json
from limbeck.cli.recipes import RecipeName, Set
from limbeck.cli.run import Quiet, checked, interruptible, threads_for_small_models
from limbeck.cli.screen import print_json, print_table, print_text, say, width

_DEMO = ("kd", "dkd", "fitnets")
_DEMO_CONTROLS = ("no_teacher", "label_smoothing", "random_teacher")


def compare(
    recipe: RecipeName,
    methods: Annotated[
        list[str], typer.Option("--methods", "-m", help="Methods, with options where wanted: kd,dkd:beta=4,crd.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the recipe's.")] = 3,
    controls: Annotated[
        str, typer.Option(help="Which controls to run: all, none, or some by name: no_teacher,same_budget.")
    ] = "all",
    settings: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison.", show_default="runs/NAME-compare")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="How many runs to do at a time.")] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run methods and controls over seeds and say which differences they bear out. Goes on where it was stopped."""
    from limbeck.recipes.entries import split_methods

    read = checked(recipe, settings)
    folder = out or Path("runs") / f"{read.name}-compare"
    chosen = [method for text in methods for method in split_methods(text)]
    named = {"all": True, "none": False}.get(controls)
    wanted = named if named is not None else [name.strip() for name in controls.split(",") if name.strip()]
    _compare(read, chosen, seeds, wanted, folder, quiet, as_json, jobs)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    as_json: Json = False,
) -> None:
    """The whole job on real data in about a minute: teacher, controls, KD, DKD and FitNets over seeds, and a report."""
    from limbeck.recipes.load import load

    began = time.monotonic()
    say("Handwritten digits: a teacher is trained, then students learn from it and, as controls, without it.")
    threads_for_small_models()
    _compare(load("digits"), list(_DEMO), seeds, list(_DEMO_CONTROLS), out, True, as_json)
    say(f"{time.monotonic() - began:.0f} s in all")


def _compare(
    recipe: Any, methods: list[str], seeds: int, controls: Any, folder: Path, quiet: bool, as_json: bool, jobs: int = 1
) -> None:
    from limbeck.recipes import compare as comparison
    from limbeck.report import build, caption

    gc.freeze()  # what is imported stays: the engine's collections after each run need not walk over it
    facts = interruptible(
        comparison.compare, recipe, methods, seeds, controls, out=folder, jobs=jobs, quiet=quiet, say=say
    )
    if not facts:  # another process of a distributed run reports
        return
    page = build(folder)
    if as_json:
        print_json(facts)
    else:
        _table(facts)
        print_text(f"\n{caption(facts)}")
    say(f"the report is {page}")


def _table(facts: dict[str, Any]) -> None:
    """The comparison; on a narrow terminal without intervals of differences, steps and seconds."""
    from limbeck.report import columns, rows

    if width() >= _WIDE:
        print_table(columns(facts), rows(facts))
        return
    short = [(name, accuracy, gain.split(" ")[0], *rest[:4]) for name, accuracy, gain, *rest in rows(facts)]
    print_table(("", columns(facts)[1], "gain", "", "agree %", "params", "ms"), short)


_WIDE = 118
