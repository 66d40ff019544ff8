"""One self-contained HTML file from a run's folder or a comparison."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jinja2

from limbeck.core.errors import DataError
from limbeck.core.files import write_text
from limbeck.report.comparison_page import comparison_page
from limbeck.report.read import read_comparison, read_run
from limbeck.report.run_page import run_page


def build(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run or of a comparison.

    The file needs nothing beside it: no network, no script. It opens from a disk or an e-mail, on a phone, in light and
    dark.

    Args:
        path: A run's folder, a comparison's folder, or a ``compare.json`` alone. A comparison whose runs' folders lie
            beside it gets curves, reliability diagrams, layers and classes too.
        out: The file. Default: ``report.html`` in the folder, or the JSON file's name with ``.html``.

    Returns:
        Where it was written, at once or not at all.

    Raises:
        DataError: Neither is there, or a file in it is damaged.
    """
    path = Path(path)
    comparison = read_comparison(path)
    folder = path if path.is_dir() else path.parent
    try:
        page = run_page(read_run(path)) if comparison is None else comparison_page(comparison, folder)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DataError(
            f"what lies here is not as limbeck writes it ({type(error).__name__}: {error})",
            where=str(path),
            remedy="make it again with limbeck run or limbeck compare",
        ) from error
    if out is None:
        alone = path.is_file() and path.name != "compare.json"
        out = path.with_suffix(".html") if alone else folder / "report.html"
    out = Path(out)
    write_text(out, _render(page))
    return out


def _render(page: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("limbeck.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    empty = dict.fromkeys(("warning", "said", "tiles", "table", "command", "recipe"))
    version = importlib.metadata.version("limbeck")
    page["parts"] = [{"legend": None, "texts": None, **part} for part in page["parts"]]
    for part in page["parts"]:
        part["figures"] = [
            {"title": None, "note": None, "legend": None, "square": False, **figure} for figure in part["figures"]
        ]
        part["width"] = {3: "three", 4: "four"}.get(len(part["figures"]), "")
    return environment.get_template("page.html.j2").render({**empty, "version": version, **page})
