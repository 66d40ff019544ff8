"""Schemes that write, for one process or two: ``accelerate launch --num_processes 2 writing_ranks_run.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from limbeck.objectives import JSD, CrossEntropy
from limbeck.schemes import GKD, MiniLLM, SeqKD, perform
from tests.schemes.tiny import cast

CASES = {
    "gkd": (lambda: GKD(lmbda=0.6, teacher_share=0.5, max_new_tokens=6), JSD),
    "minillm": (lambda: MiniLLM(max_new_tokens=6), CrossEntropy),
    "seq_kd": (lambda: SeqKD(beams=2, alpha=0.6, max_new_tokens=6, unfinished="keep"), CrossEntropy),
}


def main(folder: Path) -> None:
    for name, (scheme, loss) in CASES.items():
        perform(scheme(), cast(loss(), steps=4), out=folder / name, quiet=True)
    if os.environ.get("RANK", "0") == "0":
        (folder / "ranks").write_text(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
