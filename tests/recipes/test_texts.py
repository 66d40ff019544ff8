"""Texts from a recipe to a student that reads them, vocabulary and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest
import torch

from limbeck.data import Tokenizer
from limbeck.models.export import export
from limbeck.models.student import load_student, read_student
from limbeck.recipes.check import check
from limbeck.recipes.compare import compare
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe

GOOD, BAD = ("good", "fine", "lovely"), ("bad", "poor", "dull")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that one word decides."""
    folder = tmp_path_factory.mktemp("films")
    rows = [(f"a {word} film , number {i}", int(word in GOOD)) for i in range(16) for word in GOOD + BAD]
    for name, part in (("train", rows), ("validation", rows[:12]), ("test", rows[-24:])):
        pyarrow.csv.write_csv(
            pa.table({"text": [t for t, _ in part], "label": [y for _, y in part]}), folder / f"{name}.csv"
        )
    return folder


def settings(data: Path, *more: str) -> list[str]:
    return [
        f"data={{source: {data}, options: {{text: text}}, batch_size: 16}}",
        "teacher={model: text_32_2, train: {epochs: 8}}",
        "student={model: text_16_1}",
        "train={epochs: 15, optimizer: adamw, lr: 0.01, device: cpu}",
        *more,
    ]


def recipe(data: Path, *more: str) -> Recipe:
    return load("digits", settings(data, *more))


@pytest.mark.parametrize("loss", ["lelp", "dho", "kd", "{simkd: {feature: pooled}}"])
def test_a_student_of_texts_ships_with_its_vocabulary(loss: str, data: Path, tmp_path: Path) -> None:
    assert check("digits", settings(data, f"loss={loss}")) == []
    result = run(recipe(data, f"loss={loss}"), tmp_path / "run", quiet=True)
    assert result["accuracy"] > 0.9
    about: dict[str, Any] = read_student(tmp_path / "run")
    tokenizer, student = Tokenizer.read(about["text"]), load_student(tmp_path / "run").eval()
    assert about["options"]["vocabulary"] == tokenizer.size
    held = pyarrow.csv.read_csv(data / "test.csv").to_pydict()
    with torch.no_grad():  # from nothing but the folder and texts as people write them
        said = student(**tokenizer([text.upper() for text in held["text"]])).argmax(dim=1)
    assert (said == torch.tensor(held["label"])).float().mean().item() == pytest.approx(result["accuracy"])


@pytest.mark.slow
def test_an_export_keeps_the_vocabulary(data: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    run(recipe(data, "loss=lelp", "train.epochs=1"), tmp_path / "run", quiet=True)
    for form in ("onnx", "safetensors"):
        facts = export(tmp_path / "run", form, tmp_path / form)
        assert facts["max_difference"] <= facts["tolerance"]
        written = json.loads((tmp_path / form / "student.json").read_text())
        assert written["text"] == read_student(tmp_path / "run")["text"]
        assert list(written["head"]) == ["subclass"]


def test_texts_are_compared(data: Path, tmp_path: Path) -> None:
    facts = compare(recipe(data, "train.epochs=2"), ["kd", "lelp"], 1, ["no_teacher"], out=tmp_path, quiet=True)
    assert [row["entry"] for row in facts["methods"]] == ["no_teacher", "kd", "lelp"]
    assert "told by the training split" in facts["data"]["source"]["note"]


def test_a_model_of_images_says_that_it_takes_no_texts(data: Path) -> None:
    problems = [str(p) for p in check("digits", settings(data, "student.model=resnet8"))]
    assert len(problems) == 1
    assert "student.model: resnet8: this model takes no texts" in problems[0]
    problems = [str(p) for p in check("digits", settings(data, "data.options={text: txt}"))]
    assert any("no such column" in p and "did you mean 'text'" in p for p in problems)


def test_the_recipe_of_sst2(shared_data: Path, tmp_path: Path) -> None:
    small = [f"data.source={shared_data / 'sst2'}", "data.samples=200", "train.epochs=1"]
    small += ["teacher={model: text_16_1, samples: 200, train: {epochs: 1}}", "train.validate_epochs=1"]
    assert check(ROOT / "results" / "sst2.yaml", small) == []
    result = run(load(ROOT / "results" / "sst2.yaml", small), tmp_path / "run", quiet=True)
    assert result["samples"] == 1821
    assert 0.4 < result["accuracy"] < 1
