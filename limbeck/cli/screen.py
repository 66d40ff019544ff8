"""What goes to the screen: results on stdout, messages on stderr, and with --json one document on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNBOUND = 10_000


def messages() -> Console:
    """Where messages and progress go."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A message. Square brackets in it are text, not markup."""
    messages().print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def print_text(text: str = "") -> None:
    """A result that people read."""
    console = Console(highlight=False)
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def width() -> int:
    """Characters in a line of stdout; many where it is no terminal."""
    console = Console()
    return console.width if console.is_terminal else _UNBOUND


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout: as wide as the terminal, or as it needs where stdout is none."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    rows = list(rows)
    numbers = [all(_is_number(cell) for cell in column) for column in zip(*rows, strict=True)]
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if rows and numbers[i] else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
    Console(highlight=False, width=width()).print(table)


def _is_number(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.replace(",", "").replace(".", "").replace("±", "").replace(" ", "").isdigit()
    return cell is None or isinstance(cell, (int, float))
