"""``limbeck export`` and ``limbeck report``: what leaves a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.methods import Json
from limbeck.cli.screen import print_json, print_table, say


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    to: Annotated[str, typer.Option(help="safetensors, onnx or transformers.")] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="RUN/export-FORM")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's student in a form that others read; it is run again there and must equal the trained one."""
    from limbeck.models.export import export as write

    facts = write(run, to, out or run / f"export-{to}")  # type: ignore[arg-type]  # checked there, with near misses
    if as_json:
        print_json(facts)
        return
    print_table(("file", "bytes"), facts["files"].items())
    say(f"{facts['path']}: logits differ by {facts['max_difference']:.2g} at most, {facts['tolerance']:.2g} is allowed")


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run or of a comparison.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="report.html in the folder")] = None,
    as_json: Json = False,
) -> None:
    """Make one self-contained page of a run or a comparison, to be opened anywhere, also offline."""
    from limbeck.report import build

    page = build(run, out)
    if as_json:
        print_json({"report": str(page)})
    else:
        say(f"the report is {page}")
