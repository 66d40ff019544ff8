"""Every scheme's example here, or in all processes of a launcher: ``python ranks_run.py FOLDER [KEY ...]``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from limbeck.recipes.load import load
from limbeck.recipes.run import run
from tests.schemes.test_every_scheme import EXAMPLES, settings_of


def main(folder: Path, keys: list[str]) -> None:
    """What each run left lies in its folder; what each process thinks of it in ``said-RANK.json`` there."""
    rank = int(os.environ.get("RANK", "0"))
    for key in keys:
        said = {"error": "", "ranks": 0}
        try:
            run(load("digits", settings_of(key)), folder / key, teachers=folder / key / "teachers", quiet=True)
            said["ranks"] = json.loads((folder / key / "run.json").read_text())["ranks"]
        except Exception:
            said["error"] = traceback.format_exc()
        (folder / key).mkdir(parents=True, exist_ok=True)
        (folder / key / f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    main(Path(sys.argv[1]), sys.argv[2:] or sorted(EXAMPLES))
    if dist.is_initialized():
        dist.destroy_process_group()
