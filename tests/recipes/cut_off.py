"""A run that is cut off and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck.engine.run import Run
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe


def cut_off_and_resumed(recipe: Recipe, folder: Path, teachers: Path) -> None:
    """Do a run that fails after its fifth step, and let it go on."""
    real, calls = Run.after_step, []

    def fail_at_five(self: Run) -> None:
        real(self)
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the power went out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_step", fail_at_five)
        with pytest.raises(RuntimeError, match="power"):
            run(recipe, folder, quiet=True, teachers=teachers)
    assert not (folder / "result.json").exists()
    run(recipe, folder, resume=True, quiet=True, teachers=teachers)


def same_students(*folders: Path) -> bool:
    """Whether two runs came to the same bits."""
    first, second = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
