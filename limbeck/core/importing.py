"""Code of the user's own, named as ``package.module:attribute``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def current_folder_on_path() -> Iterator[None]:
    """Let modules in the current folder be found: an installed command does not look in the folder it was called in."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
