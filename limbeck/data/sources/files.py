"""Files of a folder, by the split that they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from limbeck.data.sources.source import split_name

_FILE = re.compile(r"([a-z]+)(-\d+-of-\d+.*)?", re.IGNORECASE)


def files_by_split(path: Path, kinds: Sequence[str]) -> dict[str, list[Path]]:
    """Files called ``train.KIND`` or ``train-00000-of-00004.KIND`` and so on, in a folder or in its ``data`` folder.

    Args:
        path: The folder.
        kinds: Endings; the first of which there are files counts.
    """
    for kind in kinds:
        files = sorted([*path.glob(f"*.{kind}"), *path.glob(f"data/*.{kind}")])
        if files:
            break
    found: dict[str, list[Path]] = {}
    for file in files:
        match = _FILE.fullmatch(file.stem)
        name = split_name(match[1]) if match else None
        if name:
            found.setdefault(name, []).append(file)
    return found
