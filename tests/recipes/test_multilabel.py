"""A comparison of multi-label data: another metric, other controls, other losses beside a method; and its pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.models.student import read_student
from limbeck.recipes import load
from limbeck.recipes.compare import compare
from limbeck.recipes.distill import distill, method_loss
from limbeck.recipes.entries import MULTILABEL_CONTROLS, control, controls_of, entries_of, method
from limbeck.report import build, markdown_table

RECIPE = """\
name: small
data:
  source: table.parquet
  options: {features: x, labels: y, test: 0.3, validation: 0.2}
  batch_size: 16
teacher: {model: mlp_32, train: {epochs: 30}}
student: {model: mlp_4}
loss: mld
train: {epochs: 4, lr: 0.05, select: best}
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("compared")
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + 2 * torch.randn(160, 6, generator=generator)
    labels = ((inputs - 3) @ torch.randn(6, 3, generator=generator) > 1).int()
    table = pa.table({"x": inputs.tolist(), "y": labels.tolist()})
    pq.write_table(table, folder / "table.parquet")
    (folder / "recipe.yaml").write_text(RECIPE.replace("table.parquet", str(folder / "table.parquet")))
    recipe = load(str(folder / "recipe.yaml"))
    methods = ["mld", "rkd", "l2d"]
    facts = compare(recipe, methods, 2, ["no_teacher", "random_teacher"], out=folder / "out", quiet=True, command="x")
    return folder / "out", facts


def test_the_headline_is_mean_average_precision(compared):
    folder, facts = compared
    rows = {row["entry"]: row for row in facts["methods"]}
    assert facts["metric"] == "map_macro"
    assert list(rows) == ["no_teacher", "random_teacher", "mld", "rkd", "l2d"]
    for entry, row in rows.items():
        values = [r["map_macro"] for r in row["runs"]]
        result = json.loads((folder / "runs" / f"{entry}-seed0" / "result.json").read_text())
        assert values[0] == result["map_macro"]
        assert row["map_macro"]["mean"] == pytest.approx(sum(values) / 2)
        assert "accuracy" not in row
    best = max(("no_teacher", "random_teacher"), key=lambda c: rows[c]["map_macro"]["mean"])
    assert facts["best_control"] == best
    gain = rows["mld"]["map_macro"]["mean"] - rows[best]["map_macro"]["mean"]
    assert rows["mld"]["gain"]["mean"] == pytest.approx(gain)
    assert facts["teacher"]["map_macro"] > 0.8


def test_losses_on_labels_are_binary(compared):
    _, facts = compared
    rows = {row["entry"]: row["loss"] for row in facts["methods"]}
    assert list(rows["no_teacher"]) == ["binary_cross_entropy"]
    assert list(rows["random_teacher"]) == ["binary_cross_entropy", "mld"]
    assert list(rows["rkd"]) == ["binary_cross_entropy", "rkd"]


def test_a_student_knows_how_its_features_were_standardised(compared):
    folder, _ = compared
    about = read_student(folder / "runs" / "mld-seed0")
    assert about["options"] == {"num_classes": 3, "in_features": 6}
    assert len(about["normalize"]["mean"]) == 6
    assert all(2 < m < 4 for m in about["normalize"]["mean"])


def test_pages_speak_of_it(compared):
    folder, facts = compared
    table = markdown_table(facts)
    assert "| mAP % |" in table
    assert "mAP on 48 test samples" in table
    page = build(folder).read_text()
    assert "Average precision by class" in page
    assert "Validation mAP %" in page
    run = build(folder / "runs" / "mld-seed0").read_text()
    assert "mAP is" in run


def test_controls():
    assert controls_of(True, teacher=True, task="multilabel") == list(MULTILABEL_CONTROLS)
    assert [e.entry for e in control("tuned_kd", "multilabel").variants] == [
        f"mld:weight={w}" for w in (0.25, 1, 4, 16)
    ]
    smooth = control("label_smoothing", "multilabel").loss["binary_cross_entropy"]
    assert smooth.options == {"label_smoothing": 0.1}
    twice = entries_of(["binary_cross_entropy", "mld"], ["no_teacher"], "multilabel")
    assert [e.entry for e in twice] == ["no_teacher", "mld"]
    assert list(method("kd", "multilabel").loss) == ["binary_cross_entropy", "kd"]
    with pytest.raises(ConfigError, match=r"no controls for this task yet; found regression"):
        controls_of(True, teacher=True, task="regression")


def test_distill_is_told_what_labels_mean():
    inputs = torch.randn(96, 5)
    labels = (inputs[:, :3] > 0).float()
    teacher, student = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    data = (inputs, labels)
    done = distill(
        teacher, student, data, "mld", validation=data, batch_size=32, task="multilabel", epochs=3, lr=0.5, quiet=True
    )
    assert done.result["map_macro"] > 0.9
    assert method_loss("mld", "multilabel").names == ["binary_cross_entropy", "mld"]
