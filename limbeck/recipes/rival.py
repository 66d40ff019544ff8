"""A student of a random teacher, held against the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.analysis.assess import assess
from limbeck.core.files import write_json
from limbeck.models.student import load_student
from limbeck.recipes.answers import answers
from limbeck.recipes.build import Sizes, check_loader, source_of
from limbeck.recipes.run import device_of, held_out
from limbeck.recipes.schema import Recipe
from limbeck.recipes.teacher import teacher_of

_OF_TEACHER = ("agreement", "kl", "js", "acceptance", "teacher", "cka")


def against(recipe: Recipe, folder: Path, teachers: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What a run's student has in common with the recipe's own teacher, not with the one it was trained by.

    Written into the run's folder as ``rival.json``, and read from there the next time.
    """
    file = folder / "rival.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    source, device = source_of(recipe.data), device_of(recipe.train)
    name, split = held_out(source)
    loader = check_loader(recipe.data, split, device)
    sizes = Sizes.of(loader)
    teacher = teacher_of(recipe, source, sizes, teachers, device=device)
    assert teacher is not None
    assert recipe.teacher is not None
    # The same that the teacher was asked by the runs it taught.
    asked = {"split": name, "source": source.describe()}
    where = recipe.teacher.logits
    said = answers(teacher.to(device), loader, teachers.with_name("answers"), data=asked, where=where)
    facts = assess(
        load_student(folder / "student").to(device),
        teacher,
        loader,
        logits=recipe.student.logits,
        teacher_logits=where,
        said=said,
        latency=False,
    )
    facts = {name: facts[name] for name in _OF_TEACHER if name in facts}
    write_json(file, facts)
    return facts
