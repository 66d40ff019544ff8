"""The package's face: every name is there, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import limbeck


@pytest.mark.parametrize("name", limbeck.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(limbeck, name) is not None
    assert name in dir(limbeck)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="distil"):
        limbeck.distil  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, limbeck; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
