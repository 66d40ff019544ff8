"""The command ``limbeck``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from limbeck.cli import cache, compare, export, methods, recipes, run, taps
from limbeck.cli.screen import say
from limbeck.core.errors import LimbeckError

app = typer.Typer(
    name="limbeck",
    help="Knowledge distillation for PyTorch: any teacher, any student, every method checked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback means a bug, and is to be seen as it is
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"limbeck {version('limbeck')}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


for _command in (
    compare.demo,
    run.run,
    recipes.check,
    compare.compare,
    export.report,
    export.export,
    recipes.recipes,
    methods.methods,
    methods.show,
    taps.taps,
):
    app.command()(_command)
app.add_typer(cache.app)


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done; 2 a mistake of the user's, told in one message; 130 interrupted."""
    try:
        app(arguments)
    except LimbeckError as error:
        say(f"Error: {error}")
        sys.exit(2)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
