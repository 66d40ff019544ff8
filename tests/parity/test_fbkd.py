"""FBKD's learned modules against mmrazor's connectors, with their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from limbeck.objectives.parts.non_local import RelationHeads

NAMES = {
    "adapt": "student.adaptation_layers",
    "channels": "student.channel_wise_adaptation",
    "places": "student.spatial_wise_adaptation",
    "relate": "student.non_local_adaptation",
    **{f"student.{n}": f"student.student_non_local.{n}.conv" for n in ("theta", "phi", "g")},
    **{f"teacher.{n}": f"teacher.teacher_non_local.{n}.conv" for n in ("theta", "phi", "g")},
    **{
        f"{s}.out.{i}": f"{s}.{s}_non_local.conv_out.{n}"
        for s in ("student", "teacher")
        for i, n in ((0, "conv"), (1, "norm"))
    },
}


def test_modules() -> None:
    with np.load(Path(__file__).parent / "fbkd_mmrazor.npz", allow_pickle=False) as file:
        numbers = {k.removeprefix("modules/"): torch.from_numpy(v) for k, v in file.items() if k.startswith("modules/")}
    heads = RelationHeads(5, 5).double()
    state = {own: numbers[f"{NAMES[own.rpartition('.')[0]]}.{own.rpartition('.')[2]}"] for own in heads.state_dict()}
    heads.load_state_dict(state)
    found = heads(numbers["out.student_feature"], numbers["out.teacher_feature"])
    for name, value in zip(
        ("adapted", "channels", "places", "student_relation", "teacher_relation"), found, strict=True
    ):
        torch.testing.assert_close(value, numbers[f"out.{name}"], msg=name)
