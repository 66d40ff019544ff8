"""Writes in a process of its own: ``python writer_run.py FOLDER`` prints the answers and how many were asked for."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from limbeck.models.generating import Decoding
from limbeck.teachers.writer import ModelWriter
from tests.schemes.tiny import llama

PROMPTS = [tuple(2 + (5 * i + j) % 50 for j in range(1 + i % 4)) for i in range(24)]


def made(folder: Path | None, **options: object) -> ModelWriter:
    settings = {"ends": [1], "pad": 0, "identity": "tiny", "batch_size": 2, **options}
    model = llama(52, seed=3, sharp=8.0)
    return ModelWriter(model, Decoding(6, 0.0, beams=3, keep=2), folder=folder, **settings)


if __name__ == "__main__":
    writer = made(Path(sys.argv[1]))
    if len(sys.argv) > 2:  # slowly, so that it can be killed
        answer = writer._answer

        def slowly(chunk):
            time.sleep(0.05)
            return answer(chunk)

        writer._answer = slowly
    found = writer.write(PROMPTS)
    print(json.dumps([[[w.ids, w.finished, w.score] for w in row] for row in found]), writer.asked)
